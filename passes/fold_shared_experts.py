"""moe_experts(x, ...) + gated_mlp(x, w_gate, w_up, w_down) -> moe_experts(x, ..., w_gate, w_up, w_down)

The shared experts of a layer are one more expert that every token passes with weight 1.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from dsopt.effects import between
from dsopt.op import Op
from dsopt.ops.experts import moe_experts
from dsopt.ops.linear import gated_mlp
from dsopt.quantized import block_of
from dsopt.rewrite import Emitter, Log, aten, is_op, replace, same_shape, shape, val

FAMILY = "moe"
SHARED = slice(13, 16)  # where the shared MLP's weights are among the arguments of moe_experts
# weights and the arguments that hold their scales
ROUTED = {"w13": "scale13", "w2": "scale2", "w3": "scale3"}
MLP = {"w_gate": "scale_gate", "w_up": "scale_up", "w_down": "scale_down"}
# views that keep the order of the rows
_VIEWS = (aten.reshape.default, aten.view.default, aten.contiguous.default)


def run(gm: GraphModule, log: Log) -> None:
    for node in gm.graph.find_nodes(op="call_function", target=moe_experts.overload):
        views, total = _total(node)
        mlp = None if total is None else _shared(node, total)
        if mlp is None:
            continue
        args = moe_experts.bind(node.args, node.kwargs)
        operands = [n for n in (*args, *mlp.args) if isinstance(n, Node)]
        if reason := log.moved(between(total, operands), total):
            log.miss(total, reason)
            continue
        log.hit()
        emit = Emitter(gm, total)
        routed = args[: SHARED.start]
        folded = emit(moe_experts.overload, *routed, *mlp.args[1:4], *args[SHARED.stop :], like=val(node))
        for view in views:
            folded = emit(view.target, folded, *view.args[1:], like=val(view))
        replace(total, folded)


def _total(node: Node) -> tuple[list[Node], Node | None]:
    """(the views of the experts' result, the sum that is all that reads the last of them)."""
    views = []
    while len(node.users) == 1:
        (node,) = node.users
        if is_op(node, aten.add.Tensor) and not node.kwargs:
            return views, node
        if not is_op(node, *_VIEWS):
            break
        views.append(node)
    return views, None


def _shared(node: Node, total: Node) -> Node | None:
    """The gated MLP that is added, if it reads the same x row by row and nothing else reads it."""
    if moe_experts.bind(node.args, node.kwargs)[SHARED.start] is not None:
        return None
    for term in total.args:
        mlp = _unviewed(term)
        if not is_op(mlp, gated_mlp.overload) or not _is_plain(mlp):
            continue
        if _blocks(moe_experts, node, ROUTED) != _blocks(gated_mlp, mlp, MLP):
            continue  # kernels take weights of one kind
        same = _unviewed(mlp.args[0]) is _unviewed(node.args[0]) and val(total).dtype == val(node).dtype
        alone = _unviewed(next(t for t in total.args if t is not term)) is node and len(mlp.users) == 1
        if same and alone and same_shape(shape(total), shape(term)):
            return mlp
    return None


def _blocks(op: Op, node: Node, pairs: dict[str, str]) -> set[tuple[int, int] | None]:
    """The blocks of an op's weights that are in FP8 or were dequantized, None for one that is wide."""
    names = [a.name for a in op.overload._schema.arguments]
    args = dict(zip(names, op.bind(node.args, node.kwargs), strict=True))
    weights = [(args[w], args[s]) for w, s in pairs.items() if args[w] is not None]
    return {block_of(w) if scale is None else tuple(args["block"]) for w, scale in weights}


def _is_plain(mlp: Node) -> bool:
    """True for an MLP without biases, with silu and no limit before it."""
    return gated_mlp.bind(mlp.args, mlp.kwargs)[4:] == gated_mlp.bind(mlp.args[:4])[4:]


def _unviewed(node: Node) -> Node:
    while is_op(node, *_VIEWS):
        node = node.args[0]
    return node

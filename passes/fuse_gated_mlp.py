"""linear(act(linear(x, w_gate)) * linear(x, w_up), w_down) -> gated_mlp(x, w_gate, w_up, w_down)

act is silu or gelu. Gate and up may be one merged linear whose output is sliced in two; biases are carried along,
and so is a limit: act(min(gate, limit)) * clamp(up, -limit, limit). The product may be made in a wider dtype.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from dsopt.ops.linear import gated_mlp
from dsopt.rewrite import (
    Bindings,
    Call,
    Cast,
    Emitter,
    Log,
    Var,
    argument,
    aten,
    best_match,
    is_inner_dim,
    is_op,
    is_tensor,
    keeps,
    mul,
    other_reader,
    replace,
    same_shape,
    shape,
    val,
)

FAMILY = "mlp"

GATE, UP = Var("gate", is_tensor), Var("up", is_tensor)
_ACTIVATED = Call((aten.silu.default, aten.gelu.default), (Cast(GATE),), name="activated")
_HIDDEN = Cast(mul(Cast(_ACTIVATED), Cast(UP)))
GATED = Call((aten.linear.default,), (_HIDDEN, Var("w_down", is_tensor)))
_FREE = (None, None)


def run(gm: GraphModule, log: Log) -> None:
    for node in list(gm.graph.nodes):
        found = best_match(GATED, node)
        if found is not None:
            _fuse(gm, node, found, log)


def _fuse(gm: GraphModule, node: Node, found: Bindings, log: Log) -> None:
    emit = Emitter(gm, node)
    (gate, gate_bounds), (up, up_bounds) = _unclamped(found["gate"]), _unclamped(found["up"])
    limit = gate_bounds[1]
    halves = _merged(gate, up)
    inner = [*found["inner"], found["gate"], found["up"], gate, up, *([] if halves is None else [halves])]
    if halves is None and not (is_op(gate, aten.linear.default) and is_op(up, aten.linear.default)):
        log.miss(node, "gate and up are not both linear in the input")
        return
    if halves is None and gate.args[0] is not up.args[0]:
        log.miss(node, "gate and up read different inputs")
        return
    if (gate_bounds, up_bounds) not in ((_FREE, _FREE), ((None, limit), (_negated(limit), limit))):
        log.miss(node, "gate and up are clamped otherwise than to (-inf, limit] and [-limit, limit]")
        return
    if (reader := other_reader(node, inner)) is not None:
        log.miss(node, f"{reader.name} is read by another node")
        return
    source = halves if halves is not None else gate
    x, w_down, b_down = source.args[0], found["w_down"], argument(node, "bias")
    linears = (gate, up) if halves is None else (halves,)
    if not all(val(w).ndim == 2 for w in (*(argument(n, "weight") for n in linears), w_down)):
        log.miss(node, "a weight is not a matrix")
        return
    if not keeps(found, val(x).dtype):
        log.miss(node, f"a cast rounds to less than the input's {val(x).dtype} in between")
        return
    if not same_shape(shape(gate), shape(up)):
        log.miss(node, "gate and up differ in width")
        return
    if reason := log.moved([*inner, node], node):
        log.miss(node, reason)
        return
    log.hit("mlp", node)
    if halves is None:
        (w_gate, b_gate), (w_up, b_up) = ((argument(n, "weight"), argument(n, "bias")) for n in (gate, up))
    else:
        w, b = argument(halves, "weight"), argument(halves, "bias")
        (w_gate, b_gate), (w_up, b_up) = (
            tuple(None if t is None else emit(aten.slice.Tensor, t, 0, *_bounds(part)) for t in (w, b))
            for part in (gate, up)
        )
    weights = (w_gate, w_up, w_down, b_gate, b_up, b_down)
    how = (_name(found["activated"]), None if limit is None else float(limit))
    replace(node, emit(gated_mlp.overload, x, *weights, *how, like=val(node)))


def _name(activated: Node) -> str:
    """The op's word for an activation."""
    if is_op(activated, aten.silu.default):
        return "silu"
    return "gelu_tanh" if argument(activated, "approximate") == "tanh" else "gelu"


def _unclamped(node: Node) -> tuple[Node, tuple[float | None, float | None]]:
    """(x, its bounds) for a clamp of x to two numbers."""
    if not is_op(node, aten.clamp.default, aten.clamp_max.default):
        return node, _FREE
    low = argument(node, "min") if is_op(node, aten.clamp.default) else None
    return node.args[0], (low, argument(node, "max"))


def _negated(limit: float | None) -> float | None:
    return -limit if isinstance(limit, (int, float)) else None


def _bounds(part: Node) -> tuple[int, int]:
    start = argument(part, "start") or 0
    return start, start + shape(part)[-1]


def _merged(gate: Node, up: Node) -> Node | None:
    """The linear whose output gate and up are slices of."""
    for part in (gate, up):
        if not is_op(part, aten.slice.Tensor) or argument(part, "step") != 1:
            return None
        if not is_inner_dim(argument(part, "dim"), val(part).ndim) or (argument(part, "start") or 0) < 0:
            return None
    source = gate.args[0]
    return source if source is up.args[0] and is_op(source, aten.linear.default) else None

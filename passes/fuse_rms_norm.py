"""x * rsqrt(mean(x^2) + eps) * weight -> rms_norm(x, weight, eps)

and, where x = a + b is a residual sum,

    rms_norm(a + b, weight, eps), a + b -> add_rms_norm(a, b, weight, eps)

Casts may stand anywhere between; the op computes in float32 and rounds once, which eager does twice.
"""

from __future__ import annotations

import operator

from torch.fx import GraphModule, Node

import dsopt.ops.norm as ops
from dsopt.census import is_norm
from dsopt.rewrite import (
    Bindings,
    Call,
    Cast,
    Const,
    Emitter,
    Log,
    Pattern,
    Var,
    add,
    argument,
    aten,
    best_match,
    is_inner_dim,
    is_op,
    is_tensor,
    keeps,
    last_cast,
    mul,
    other_reader,
    precedes,
    replace,
    same_shape,
    shape,
    val,
)

FAMILY = "norm"


def _scaled(x: Pattern) -> Pattern:
    """x * rsqrt(mean(x^2, -1, keepdim) + eps)."""
    square = Call((aten.pow.Tensor_Scalar,), (Cast(x), Const(2)))
    mean = Call((aten.mean.dim,), (square, Var("dims"), Const(True)))
    eps = Var("eps", lambda v: isinstance(v, float))
    return mul(Cast(x), Cast(Call((aten.rsqrt.default,), (add(Cast(mean), eps),))))


NORMALIZED = _scaled(Var("x", is_tensor))
WEIGHTED = mul(Cast(NORMALIZED), Cast(Var("weight", lambda v: is_tensor(v) and val(v).ndim == 1)))


def run(gm: GraphModule, log: Log) -> None:
    for node in gm.graph.find_nodes(op="call_function", target=aten.rms_norm.default):
        _native(gm, node, log)
    taken: set[Node] = set()
    refused: dict[Node, tuple[Node, str]] = {}
    # what has no weight of its own, or shares the normalized value, is a norm all the same
    for pattern in (WEIGHTED, NORMALIZED):
        for node in list(gm.graph.nodes):
            found = _find(pattern, node) if node not in taken and node.users else None
            if found is None:
                continue
            (root,) = (n for n in found["inner"] if is_op(n, aten.rsqrt.default))
            if (reason := _fuse(gm, node, found, log)) is None:
                taken.update(found["inner"])
                refused.pop(root, None)
            else:
                refused.setdefault(root, (node, reason))
    for node, reason in refused.values():
        log.miss(node, reason)
    for node in gm.graph.nodes:
        if (
            is_op(node, aten.rsqrt.default, aten.sqrt.default)
            and node not in {*taken, *refused}
            and is_norm(node)
        ):
            log.miss(node, "not x * rsqrt(mean(x^2, -1) + eps): eps, mean or product stand elsewhere")


def _find(pattern: Pattern, node: Node) -> Bindings | None:
    if not is_op(node, aten.mul.Tensor):
        return None

    def good(way: Bindings) -> bool:
        dtype = val(way["x"]).dtype
        weight = way.get("weight")
        same = weight is None or val(weight).dtype == dtype
        return same and keeps(way, dtype) and val(last_cast(node, dtype)).dtype == dtype

    return best_match(pattern, node, good)


def _native(gm: GraphModule, node: Node, log: Log) -> None:
    x, sizes, weight, eps = (argument(node, a) for a in ("input", "normalized_shape", "weight", "eps"))
    if len(sizes) != 1 or eps is None:
        log.miss(node, "rms_norm over more than the last dim" if len(sizes) != 1 else "eps is left to torch")
    elif weight is not None and val(weight).dtype != val(x).dtype:
        log.miss(node, "weight and input differ in dtype")
    else:
        _rewrite(gm, node, x, weight, eps, log, [node])


def _fuse(gm: GraphModule, node: Node, found: Bindings, log: Log) -> str | None:
    """Rewrites one match; why not if it may not be."""
    x, weight = found["x"], found.get("weight")
    root = last_cast(node, val(x).dtype)
    dims = found["dims"]
    casts_of_x = [n for n in found["inner"] if is_op(n, aten.to.dtype) and n.args[0] is x]
    if reader := other_reader(root, [*found["inner"], node], casts_of_x):
        outside = next(_outside(reader, found, root))
        return f"an intermediate value is read by another node, {outside}"
    if len(dims) != 1 or not is_inner_dim(dims[0], val(x).ndim):
        return f"the mean runs over dims {list(dims)}, not over the last"
    if val(root).dtype != val(x).dtype:
        return f"the result is {val(root).dtype} but the input is {val(x).dtype}"
    if not keeps(found, val(x).dtype):
        return f"a cast rounds to less than the input's {val(x).dtype} in between"
    if weight is not None and val(weight).dtype != val(x).dtype:
        return f"weight is {val(weight).dtype} but the input is {val(x).dtype}"
    if weight is not None and not same_shape(shape(weight), shape(x)[-1:]):
        return "the weight's size is not the input's last size"
    if reason := log.moved(matched := [root, node, *found["inner"]], root):
        return reason
    _rewrite(gm, root, x, weight, found["eps"], log, matched)
    return None


def _outside(reader: Node, found: Bindings, root: Node):
    inside = {root, *found["inner"]}
    return (u.name for u in reader.users if u not in inside)


def _rewrite(
    gm: GraphModule, root: Node, x: Node, weight: Node | None, eps: float, log: Log, matched: list[Node]
) -> None:
    log.hit("norm", root)
    parts = _residual_sum(x, weight)
    if parts is None or log.moved(matched, x):
        new = Emitter(gm, root)(ops.rms_norm.overload, x, weight, eps, like=val(root))
        replace(root, new)
        return
    emit = Emitter(gm, x.next)
    both = emit(ops.add_rms_norm.overload, *parts, weight, eps)
    normed, total = (emit(operator.getitem, both, i) for i in (0, 1))
    replace(x, total)
    replace(root, normed)


def _residual_sum(x: Node, weight: Node | None) -> tuple[Node, Node] | None:
    """(a, b) when x is a + b of one shape and dtype and the weight is known where x is computed."""
    if not is_op(x, aten.add.Tensor) or x.kwargs or not all(is_tensor(a) for a in x.args):
        return None
    a, b = x.args
    alike = all(same_shape(shape(p), shape(x)) and val(p).dtype == val(x).dtype for p in (a, b))
    return (a, b) if alike and (weight is None or precedes(weight, x)) else None

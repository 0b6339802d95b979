"""softmax(q @ k^T * scale + mask) @ v -> scaled_dot_product_attention(q, k, v, mask, scale=scale)

The products may be matmul or einsum over any order of axes; the scale may be a factor or a divisor, the mask
added, or filled in by masked_fill. Someone else reading the scores or the weights keeps them as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from dsopt.capture import known
from dsopt.effects import between
from dsopt.rewrite import (
    Emitter,
    Log,
    argument,
    aten,
    is_float_cast,
    is_inner_dim,
    is_op,
    is_tensor,
    replace,
    same_shape,
    shape,
    val,
)

FAMILY = "mla"

_SOFTMAX = (aten.softmax.int, aten._softmax.default)
_POINTWISE = (aten.to.dtype, aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor)
_POINTWISE += (aten.tanh.default, aten.clamp.default, aten.masked_fill.Scalar, aten.where.self)
# masks below this make a weight vanish whatever the score, so filling and adding are the same
_HIDDEN = -1e9


def run(gm: GraphModule, log: Log) -> None:
    for node in list(gm.graph.nodes):
        if is_op(node, *_SOFTMAX):
            found = _read(node)
            if isinstance(found, Attention):
                leaves = (found.q[0], found.k[0], found.v[0], found.mask, found.fill)
                found = log.moved(between(found.out, leaves), found.out) or found
            if isinstance(found, str):
                log.miss(node, found)
            elif found is not None:
                log.hit()
                _rewrite(gm, found)


@dataclass
class Attention:
    """What was read off the graph; q, k, v with the axes that bring them to (batch, heads, tokens, dim)."""

    out: Node
    q: tuple[Node, list[int]]
    k: tuple[Node, list[int]]
    v: tuple[Node, list[int]]
    result: list[int]
    scale: float
    mask: Node | None
    fill: Node | None
    mask_order: list[int]


def _only_reader(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _read(softmax: Node) -> Attention | str | None:
    """The attention around a softmax; a reason if it is one that does not fit; None if it is none."""
    chain, product = _scores(softmax)
    if product is None:
        return None
    if not is_inner_dim(argument(softmax, "dim"), val(softmax).ndim):
        return None
    if isinstance(chain, str):
        return chain
    scale, mask, fill, between = chain
    weights = softmax
    while True:
        reader = _only_reader(weights)
        if reader is None:
            return f"the attention weights have {len(weights.users)} readers"
        if not is_op(reader, aten.to.dtype):
            break
        between.append(weights)
        weights = reader
    for node in (*between, product):
        if len(node.users) != 1:
            return f"the scores {node.name} have {len(node.users)} readers"
    left, right = _axes(product), _axes(reader)
    if left is None or right is None or weights not in _operands(reader)[:1]:
        return "the weights are not multiplied with values as softmax(scores) @ v"
    (q, q_axes), (k, k_axes), scores = left
    (_, p_axes), (v, v_axes), result = right
    if len(scores) != 4 or len(result) != 4:
        return None
    # name the axes after their roles: batch, heads, queries, keys
    t = scores[-1]
    shared = [a for a in scores if a in q_axes and a in k_axes]
    queries = [a for a in scores if a in q_axes and a not in k_axes]
    if len(shared) != 2 or len(queries) != 1 or t not in k_axes:
        return "the scores are not <q, k> by head"
    b, h, s = *shared, *queries
    depth = (set(q_axes) & set(k_axes)) - {b, h}
    if len(depth) != 1 or set(q_axes) != {b, h, s, *depth} or set(k_axes) != {b, h, t, *depth}:
        return "the scores are not <q, k> by head"
    to_heads_first = _order(scores, (b, h, s, t))
    rename = dict(zip(p_axes, scores, strict=True))
    v_axes = "".join(rename.get(a, a.upper()) for a in v_axes)
    result = "".join(rename.get(a, a.upper()) for a in result)
    d = set(v_axes) - {b, h, t}
    if len(d) != 1 or set(v_axes) != {b, h, t, *d} or set(result) != {b, h, s, *d}:
        return "the weights are not multiplied with values as softmax(scores) @ v"
    if not same_shape(shape(softmax), shape(product)):
        return "the mask broadcasts the scores to another shape"
    dtype = val(v).dtype
    if not all(_is_as_wide(n, dtype) for n in (*between, weights, softmax)):
        return f"scores or weights are rounded to less than the values' {dtype}"
    order = [
        _uncast(q, _order(q_axes, (b, h, s, *depth)), dtype),
        _uncast(k, _order(k_axes, (b, h, t, *depth)), dtype),
        (v, _order(v_axes, (b, h, t, *d))),
    ]
    if any(val(x).dtype != dtype for x, _ in order):
        return "queries, keys and values are not of one dtype"
    result = _order("".join((b, h, s, *d)), result)
    return Attention(reader, *order, result, scale, mask, fill, to_heads_first)


def _is_as_wide(node: Node, dtype: torch.dtype) -> bool:
    """False for a cast, or a softmax with a dtype, that rounds to less than `dtype` or to no float."""
    if not is_op(node, aten.to.dtype, *_SOFTMAX):
        return True
    if is_op(node, aten.to.dtype) and not is_float_cast(node):
        return False
    old, new = val(node.args[0]).dtype, val(node).dtype
    return new in (torch.promote_types(old, new), torch.promote_types(new, dtype))


def _widens(cast: Node) -> bool:
    return torch.promote_types(val(cast.args[0]).dtype, val(cast).dtype) == val(cast).dtype


def _uncast(node: Node, order: list[int], dtype: torch.dtype) -> tuple[Node, list[int]]:
    """The tensor of `dtype` that was widened to `node`, if any, and the axes that bring it to `order`."""
    source, axes = node, order
    while val(source).dtype != dtype:
        if is_op(source, aten.permute.default):
            source, axes = source.args[0], [source.args[1][i] for i in axes]
        elif is_float_cast(source) and _widens(source):
            source = source.args[0]
        else:
            return node, order
    return source, axes


def _order(axes: str, wanted) -> list[int]:
    return [axes.index(a) for a in wanted]


def _scores(softmax: Node):
    """((scale, added mask, filled mask, nodes between), product) above a softmax; (reason, product) else."""
    scale, mask, fill, between = 1.0, None, None, []
    node = softmax.args[0]
    while True:
        if is_op(node, aten.to.dtype):
            if not val(node).dtype.is_floating_point:
                return None, None
            step = node.args[0]
        elif is_op(node, aten.mul.Tensor, aten.div.Tensor) and not is_tensor(node.args[1]):
            factor = node.args[1]
            if not isinstance(factor, (int, float)) or (factor == 0 and is_op(node, aten.div.Tensor)):
                return "the scale of the scores is not a number", _product_above(node)
            scale = scale * factor if is_op(node, aten.mul.Tensor) else scale / factor
            step = node.args[0]
        elif (
            is_op(node, aten.add.Tensor)
            and mask is None
            and fill is None
            and scale == 1.0
            and not node.kwargs
        ):
            a, b = node.args
            product_first = _product_above(a) is not None
            step, mask = (a, b) if product_first else (b, a)
            if not is_tensor(mask) or _product_above(step) is None:
                return None, None
        elif is_op(node, aten.masked_fill.Scalar) and mask is None and fill is None and scale == 1.0:
            step, hidden, value = node.args
            if not isinstance(value, (int, float)) or value > _HIDDEN:
                return None, None
            fill = hidden
        elif _axes(node) is not None:
            return (scale, mask, fill, between), node
        else:
            product = _product_above(node)
            return _unknown(node), product
        between.append(node)
        node = step


def _unknown(node: Node) -> str:
    if is_op(node, aten.cat.default):
        return "the softmax runs over columns that are no keys (an attention sink)"
    if is_op(node, aten.mul.Tensor, aten.div.Tensor):
        return "the scale of the scores is a tensor"
    return f"{node.target} stands between the scores and the softmax"


def _product_above(node: Node, depth: int = 6) -> Node | None:
    """The product of two activations that a chain of pointwise calls starts from."""
    if not isinstance(node, Node) or depth == 0:
        return None
    if _axes(node) is not None:
        return node
    if not is_op(node, aten.cat.default, *_POINTWISE):
        return None
    above = node.args[0] if is_op(node, aten.cat.default) else node.args
    return next(filter(None, (_product_above(a, depth - 1) for a in above)), None)


def _operands(node: Node) -> list[Node]:
    return list(node.args[1]) if is_op(node, aten.einsum.default) else list(node.args)


def _axes(node: Node):
    """((a, its axes), (b, its axes), axes of the result) for a product of two 4-d tensors; None otherwise."""
    if is_op(node, aten.matmul.default) and all(is_tensor(a) and val(a).ndim == 4 for a in node.args):
        a, b = node.args
        if all(known(x == y) for x, y in zip(shape(a)[:2], shape(b)[:2], strict=True)):
            return (a, "bhik"), (b, "bhkj"), "bhij"
    if is_op(node, aten.einsum.default) and len(node.args[1]) == 2:
        terms, _, out = node.args[0].replace(" ", "").partition("->")
        left, _, right = terms.partition(",")
        a, b = node.args[1]
        if "." not in terms and len(left) == len(right) == len(out) == 4:
            return (a, left), (b, right), out
    return None


def _rewrite(gm: GraphModule, found: Attention) -> None:
    emit = Emitter(gm, found.out)

    def ordered(node: Node, order: list[int]) -> Node:
        if is_op(node, aten.permute.default):
            node, order = node.args[0], [node.args[1][i] for i in order]
        return node if order == [0, 1, 2, 3] else emit(aten.permute.default, node, order)

    def heads_first(mask: Node) -> Node:
        if found.mask_order == [0, 1, 2, 3] and val(mask).ndim >= 2:
            return mask
        for _ in range(4 - val(mask).ndim):
            mask = emit(aten.unsqueeze.default, mask, 0)
        return ordered(mask, found.mask_order)

    q, k, v = (ordered(*x) for x in (found.q, found.k, found.v))
    mask = found.mask if found.mask is None else heads_first(found.mask)
    if found.fill is not None:
        hidden = heads_first(found.fill)
        dtype = torch.promote_types(val(q).dtype, torch.float32)
        zeros = emit(aten.zeros_like.default, hidden, dtype=dtype)
        # a score vanishes beside the lowest value, so that a row with nothing else is uniform as in eager
        mask = emit(aten.masked_fill.Scalar, zeros, hidden, torch.finfo(dtype).min)
    if mask is not None and val(mask).dtype not in (val(q).dtype, torch.float32):
        mask = emit(aten.to.dtype, mask, val(q).dtype)
    out = emit(aten.scaled_dot_product_attention.default, q, k, v, mask, scale=float(found.scale))
    replace(found.out, out if found.result == [0, 1, 2, 3] else emit(aten.permute.default, out, found.result))

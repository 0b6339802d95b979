"""softmax(q @ k^T * scale + mask) @ v -> scaled_dot_product_attention(q, k, v, mask, scale=scale)
softmax(cat(q @ k^T * scale + mask, sinks))[..., :-1] @ v -> attention(q, k, v, mask, scale, sinks=sinks)

The products may be matmul or einsum over any order of axes; the scale may be a factor or a divisor, the mask
added, or filled in by masked_fill. Someone else reading the scores or the weights keeps them as they are.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import torch
from torch.fx import GraphModule, Node

from dsopt.capture import known
from dsopt.census import attention_family
from dsopt.effects import between
from dsopt.ops.attention import attention
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
from dsopt.scores import SOFTMAX, Scores, is_as_wide, read_scores

FAMILY = "attention"


def run(gm: GraphModule, log: Log) -> None:
    for node in list(gm.graph.nodes):
        if is_op(node, *SOFTMAX):
            found = _read(node)
            if isinstance(found, Attention):
                leaves = (found.q[0], found.k[0], found.v[0], found.sinks, *found.scores.masks)
                found = log.moved(between(found.out, leaves), found.out) or found
            if isinstance(found, str):
                log.miss(node, found, attention_family(node))
            elif found is not None:
                family = attention_family(node) if found.sinks is not None else None
                log.hit("attention" if family == "attention" else None, node)
                if family == "mla":
                    log.miss(node, "latent attention has no attention sinks", family)
                _rewrite(gm, found)


@dataclass
class Attention:
    """What was read off the graph; q, k, v with the axes that bring them to (batch, heads, tokens, dim)."""

    out: Node
    q: tuple[Node, list[int]]
    k: tuple[Node, list[int]]
    v: tuple[Node, list[int]]
    result: list[int]
    scores: Scores
    mask_order: list[int]
    sinks: Node | None = None


@dataclass
class Beside:
    """What a softmax takes: scores, and a column beside them of one value for each head.

    between: the nodes from its input down to the scores, which are left out.
    """

    scores: Node
    sinks: Node | None = None
    between: list[Node] = field(default_factory=list)


def _beside(softmax: Node) -> Beside:
    """The scores and sinks of cat((scores, sinks), -1), or of that less its largest values; else scores alone."""
    x, between = softmax.args[0], []
    alone = Beside(x)
    if is_op(x, aten.sub.Tensor) and not x.kwargs:
        largest = x.args[1].args[0] if getattr(x.args[1], "target", None) is operator.getitem else x.args[1]
        over = argument(largest, "dim") if is_op(largest, aten.max.dim, aten.amax.default) else None
        if (
            over not in (-1, 3, [-1], [3])
            or not argument(largest, "keepdim")
            or largest.args[0] is not x.args[0]
        ):
            return alone
        between = [x]
        x = x.args[0]
        if x.users.keys() - {largest, between[0]} or any(len(n.users) > 1 for n in (largest, between[0])):
            return alone
    elif len(x.users) > 1:
        return alone
    if not is_op(x, aten.cat.default) or len(x.args[0]) != 2 or val(x).ndim != 4:
        return alone
    scores, sinks = x.args[0]
    if not is_inner_dim(argument(x, "dim"), 4) or not known(shape(sinks)[-1] == 1):
        return alone
    while is_op(sinks, aten.expand.default):
        sinks = sinks.args[0]
    heads = shape(scores)[1]
    by_head = val(sinks).ndim in (3, 4) and known(shape(sinks)[-3] == heads)
    if not by_head or not known(val(sinks).numel() == heads):
        return alone
    if is_op(sinks, aten.reshape.default) and val(sinks.args[0]).ndim == 1:
        sinks = sinks.args[0]
    return Beside(scores, sinks, [*between, x])


def _only_reader(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _read(softmax: Node) -> Attention | str | None:
    """The attention around a softmax; a reason if it is one that does not fit; None if it is none."""
    beside = _beside(softmax)
    chain, product = read_scores(softmax, lambda node: _axes(node) is not None, beside.scores)
    if product is None:
        return None
    if not is_inner_dim(argument(softmax, "dim"), val(softmax).ndim):
        return None
    if isinstance(chain, str):
        return chain
    between = list(chain.between)
    weights, whole = softmax, beside.sinks is not None
    while True:
        reader = _only_reader(weights)
        if reader is None:
            return f"the attention weights have {len(weights.users)} readers"
        if not is_op(reader, aten.to.dtype) and not (whole and _drops_last(reader)):
            break
        whole = whole and not _drops_last(reader)
        between.append(weights)
        weights = reader
    if whole:
        return "the weight of an attention sink is multiplied with values"
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
    if not same_shape(shape(beside.scores), shape(product)):
        return "the mask broadcasts the scores to another shape"
    dtype = val(v).dtype
    if not all(is_as_wide(n, dtype) for n in (*between, *beside.between, weights, softmax)):
        return f"scores or weights are rounded to less than the values' {dtype}"
    order = [
        _uncast(q, _order(q_axes, (b, h, s, *depth)), dtype),
        _uncast(k, _order(k_axes, (b, h, t, *depth)), dtype),
        (v, _order(v_axes, (b, h, t, *d))),
    ]
    if any(val(x).dtype != dtype for x, _ in order):
        return "queries, keys and values are not of one dtype"
    result = _order("".join((b, h, s, *d)), result)
    if beside.sinks is not None and to_heads_first != [0, 1, 2, 3]:
        return "attention sinks beside scores that are not (batch, heads, queries, keys)"
    return Attention(reader, *order, result, chain, to_heads_first, beside.sinks)


def _drops_last(node: Node) -> bool:
    """True for x[..., :-1]."""
    if not is_op(node, aten.slice.Tensor) or not is_inner_dim(argument(node, "dim"), val(node).ndim):
        return False
    start, step, width = argument(node, "start"), argument(node, "step"), shape(node.args[0])[-1]
    return start in (0, None) and step == 1 and known(shape(node)[-1] == width - 1)


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

    q, k, v = (ordered(*x) for x in (found.q, found.k, found.v))
    mask = found.scores.emit_mask(emit, found.mask_order, val(q).dtype)
    scale = float(found.scores.scale)
    if found.sinks is None:
        out = emit(aten.scaled_dot_product_attention.default, q, k, v, mask, scale=scale)
    else:
        sinks = found.sinks
        sinks = sinks if val(sinks).ndim == 1 else emit(aten.reshape.default, sinks, [val(sinks).numel()])
        out = emit(attention.overload, q, k, v, mask, scale, False, sinks)
        out = emit(aten.permute.default, out, [0, 2, 1, 3])
    replace(found.out, out if found.result == [0, 1, 2, 3] else emit(aten.permute.default, out, found.result))

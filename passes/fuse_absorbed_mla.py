"""softmax(scale * ((q @ w_uk) @ c^T + q_rope @ k_rope^T) + mask) @ c @ w_uv^T -> mla_attention(q, q_rope, c, ...)

Latent attention whose expansion was moved by hand into queries and outputs, as in DeepSeek's inference code:
every head reads one latent c. The op is given the queries as they were before, and absorbs or expands as is
cheaper. The sum of the two products may also be one product of joined operands, cat(q @ w_uk, q_rope) and
cat(c, k_rope), or of a cache that holds the two side by side, and the attention may be a fused call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from dsopt.axes import Labelled, factors, fresh, is_product, onward, peel
from dsopt.capture import known
from dsopt.effects import between
from dsopt.ops.attention import mla_attention
from dsopt.rewrite import (
    Emitter,
    Log,
    argument,
    aten,
    is_float_cast,
    is_inner_dim,
    is_op,
    last_cast,
    other_reader,
    replace,
    same_shape,
    shape,
    val,
)
from dsopt.scores import SOFTMAX, Scores, is_as_wide, read_scores

FAMILY = "mla"


def run(gm: GraphModule, log: Log) -> None:
    for node in list(gm.graph.nodes):
        if is_op(node, *SOFTMAX):
            attention = _from_softmax(node)
        elif is_op(node, aten.scaled_dot_product_attention.default):
            attention = _from_fused(node)
        else:
            continue
        found = _read(attention) if isinstance(attention, Attention) else attention
        if isinstance(found, Found):
            found = log.moved(found.inner, found.out.node) or found
        if isinstance(found, str):
            log.miss(node, found)
        elif found is not None:
            log.hit("mla", node)
            _rewrite(gm, found)


@dataclass(frozen=True)
class Key:
    """What queries are multiplied with: `x`, or its part `span` along the axis `depth`, which is summed over."""

    x: Labelled
    depth: int
    span: tuple[int, int] | None = None

    def is_same(self, other: Labelled, depth: int) -> bool:
        """True for the same part of the same tensor, whose axis `depth` stands for this one's."""
        if self.span is not None:
            node, axes = other.node, other.axes
            if not is_op(node, aten.slice.Tensor) or axes[argument(node, "dim") % len(axes)] != depth:
                return False
            start, end, step = (argument(node, a) for a in ("start", "end", "step"))
            width = shape(node.args[0])[argument(node, "dim")]
            if (start or 0, width if end is None else min(end, width), step) != (*self.span, 1):
                return False
            other = peel(Labelled(node.args[0], axes))
        node, axes = other.node, other.axes
        if node is not self.x.node:
            return False
        sizes = shape(node)
        mine, theirs = (
            [a for a, size in zip(labels, sizes, strict=True) if not known(size == 1)]
            for labels in (self.x.axes, axes)
        )
        return mine == [self.depth if a == depth else a for a in theirs]

    @property
    def node(self) -> Node:
        return self.x.node

    def has(self, order: tuple[int, ...]) -> bool:
        return self.x.has(order)

    def emit(self, emit: Emitter, order: tuple[int, ...]) -> Node:
        node = self.x.emit(emit, order)
        return (
            node if self.span is None else emit(aten.slice.Tensor, node, order.index(self.depth), *self.span)
        )


Pair = tuple[Labelled, Key]


@dataclass(frozen=True)
class Attention:
    """softmax(scores) @ values -> out, the product of the scores being a sum of two <query, key>.

    axes: labels of the scores, those of the keys last.
    """

    pairs: tuple[Pair, Pair]
    axes: tuple[int, ...]
    scores: Scores
    values: Labelled
    out: Labelled
    is_causal: bool = False


@dataclass(frozen=True)
class Found:
    """The op's tensors in its order, each with the axes it wants, and `out`, which the op stands for.

    axes: labels of batch, heads, queries, keys and values. inner: the nodes the op takes the place of.
    """

    attention: Attention
    operands: list[tuple[Labelled | Key, tuple[int, ...]]]
    out: Labelled
    axes: tuple[int, ...]
    inner: list[Node]


def _from_softmax(softmax: Node) -> Attention | str | None:
    scores, product = read_scores(softmax, lambda x: _pairs(Labelled(x, fresh(val(x).ndim))) is not None)
    if product is None or val(softmax).ndim != 4 or not is_inner_dim(argument(softmax, "dim"), 4):
        return None
    if isinstance(scores, str):
        return scores
    if not same_shape(shape(softmax), shape(product)):
        return "the mask broadcasts the scores to another shape"
    axes = fresh(4)
    read = onward(Labelled(softmax, axes))
    if read is None:
        return "the weights are not multiplied with values as softmax(scores) @ v"
    out, values, _ = read
    return Attention(_pairs(Labelled(product, axes)), axes, scores, peel(values), out)


def _from_fused(sdpa: Node) -> Attention | str | None:
    q, k, v, mask, dropout = (argument(sdpa, a) for a in ("query", "key", "value", "attn_mask", "dropout_p"))
    if any(val(x).ndim != 4 for x in (q, k, v)):
        return None
    b, h, s, t, d, c = fresh(6)
    keys, values = (
        Labelled(x, (b, None if known(shape(x)[1] == 1) else h, t, depth)) for x, depth in ((k, d), (v, c))
    )
    pairs = _joined(Labelled(q, (b, h, s, d)), keys, d)
    if pairs is None:
        return None
    if dropout != 0.0:
        return f"dropout with p={dropout}"
    scale = argument(sdpa, "scale")
    scale = 1 / math.sqrt(shape(q)[-1]) if scale is None else scale
    if not isinstance(scale, (int, float)):
        return "the scale is not a number"
    out = Labelled(sdpa, (b, h, s, c))
    flags = mask is not None and val(mask).dtype == torch.bool
    scores = Scores(sdpa, scale, seen=mask) if flags else Scores(sdpa, scale, mask)
    return Attention(pairs, (b, h, s, t), scores, peel(values), out, argument(sdpa, "is_causal"))


def _pairs(scores: Labelled) -> tuple[Pair, Pair] | None:
    """The two (query, key) whose products make the scores, or None."""
    node, axes = scores.node, scores.axes
    if is_op(node, aten.add.Tensor) and not node.kwargs:
        terms = [_uncast(a) for a in node.args]
        if not all(is_product(x) and same_shape(shape(x), shape(node)) for x in terms):
            return None
        first, second = (_query_first(*factors(Labelled(x, axes)), axes[-1]) for x in terms)
        return None if first is None or second is None else (first, second)
    pair = _query_first(*factors(scores), axes[-1]) if is_product(node) else None
    return None if pair is None else _joined(pair[0], pair[1].x, pair[1].depth)


def _uncast(node: object) -> object:
    """What was cast to a wider dtype."""
    while is_float_cast(node) and val(node).dtype.itemsize > val(node.args[0]).dtype.itemsize:
        node = node.args[0]
    return node


def _query_first(x: Labelled, y: Labelled, depth: int, tokens: int | None) -> Pair | None:
    query, key = (y, x) if tokens in x.axes else (x, y)
    return None if tokens in query.axes else (peel(query), Key(peel(key), depth))


def _joined(query: Labelled, key: Labelled, depth: int) -> tuple[Pair, Pair] | None:
    """The parts of a query that two tensors were joined to, each with its part of the key."""
    parts = _parts(query, depth)
    if parts is None:
        return None
    keys, start, pairs = _parts(key, depth), 0, []
    if keys is not None and _width(keys[0], depth) != _width(parts[0], depth):
        return None
    whole = peel(key)
    for i, part in enumerate(parts):
        (new,) = fresh(1)
        width = _width(part, depth)
        mine = whole if keys is None else keys[i]
        span = (start, start + width) if keys is None else None
        query_part, key_part = (
            Labelled(x.node, tuple(new if a == depth else a for a in x.axes)) for x in (part, mine)
        )
        pairs.append((peel(query_part), Key(peel(key_part), new, span)))
        start += width
    return tuple(pairs)


def _width(x: Labelled, label: int) -> int:
    return shape(x.node)[x.axes.index(label)]


def _parts(x: Labelled, depth: int) -> list[Labelled] | None:
    """The two tensors that were joined along the axis `depth` to make x, or None."""
    x = peel(x)
    if not is_op(x.node, aten.cat.default) or len(x.node.args[0]) != 2:
        return None
    # a cache that begins as an empty (0,) tensor is joined to keys of any shape
    if any(val(part).ndim != len(x.axes) for part in x.node.args[0]):
        return None
    dim = argument(x.node, "dim") % len(x.axes)
    parts = [Labelled(part, x.axes) for part in x.node.args[0]]
    one_dtype = len({val(part.node).dtype for part in (x, *parts)}) == 1
    static = isinstance(shape(parts[0].node)[dim], int)
    return parts if x.axes[dim] == depth and one_dtype and static else None


def _read(attention: Attention) -> Found | str | None:
    """The latent attention; a reason if its queries are absorbed but the rest does not fit; None otherwise."""
    first, second = attention.pairs
    for (absorbed, latent), (q_rope, k_rope) in ((first, second), (second, first)):
        split = _absorbed(absorbed, latent.depth, attention.axes)
        if split is None:
            continue
        q_nope, w_uk, h, d = split
        others = [a for a in attention.axes[:-1] if a != h]
        batch = [a for a in others if a in latent.x.axes and a in k_rope.x.axes]
        if len(batch) != 1:
            return "latent and rotary part are not (batch, tokens, dim) for all heads"
        (b,), (s,), t = batch, [a for a in others if a not in batch], attention.axes[-1]
        expanded = _expanded(attention, latent, (b, h, s))
        if isinstance(expanded, str):
            return expanded
        out, w_uv, e, v = expanded
        operands = [
            (q_nope, (b, h, s, d)),
            (q_rope, (b, h, s, k_rope.depth)),
            (latent, (b, t, latent.depth)),
            (k_rope, (b, t, k_rope.depth)),
            (w_uk, (h, d, latent.depth)),
            (w_uv, (h, v, e)),
        ]
        if not all(x.has(order) for x, order in operands):
            return "the operands have other axes than batch, heads, tokens and their depth"
        out = Labelled(last_cast(out.node, val(q_nope.node).dtype), out.axes)
        leaves = [x.node for x, _ in operands] + attention.scores.masks
        inner = between(out.node, leaves)
        return _refusal(attention, operands, inner) or Found(attention, operands, out, (b, h, s, t, v), inner)
    return None


def _absorbed(query: Labelled, c: int, axes: tuple[int, ...]) -> tuple[Labelled, Labelled, int, int] | None:
    """(q_nope, w_uk, label of heads, depth of q_nope) of queries that are q_nope @ w_uk, by head, of depth c."""
    if not is_product(query.node):
        return None
    x, w, d = factors(query)
    for q_nope, w_uk in ((peel(x), peel(w)), (peel(w), peel(x))):
        heads = [a for a in w_uk.axes if a in axes[:-1]]
        if len(w_uk.axes) == 3 and len(heads) == 1 and c in w_uk.axes and c not in q_nope.axes:
            return q_nope, w_uk, heads[0], d
    return None


def _expanded(attention: Attention, latent: Key, queries: tuple[int, int, int]):
    """(result, w_uv, depth of the latent there, label of the values' depth) after the attention, or a reason."""
    e = _other(attention.out, queries)
    if e is None or not latent.is_same(attention.values, e):
        return "the values are not the latent that the queries are multiplied with"
    read = onward(attention.out)
    if read is None:
        return "the attended latent is not expanded by one product"
    out, w_uv, _ = read
    v = _other(out, queries)
    if v is None or not out.has((*queries, v)) or len(out.axes) != 4 or e in out.axes:
        return "the attended latent is not expanded by one product for each head"
    return out, peel(w_uv), e, v


def _other(x: Labelled, known_axes: tuple[int, ...]) -> int | None:
    """The one label that is not among some; None if there are none or several."""
    others = [a for a in x.axes if a not in known_axes]
    return others[0] if len(others) == 1 else None


_SHARED = (aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default, aten.to.dtype)
_SHARED += (aten.slice.Tensor, aten.cat.default, aten.contiguous.default, aten.clone.default)


def _refusal(
    attention: Attention, operands: list[tuple[Labelled | Key, tuple[int, ...]]], inner: list[Node]
) -> str | None:
    """Why the op may not stand for the nodes `inner`, of which the first is the result; None if it may."""
    dtype = val(operands[0][0].node).dtype
    if any(val(x.node).dtype != dtype for x, _ in operands) or val(inner[0]).dtype != dtype:
        return "queries, latent, rotary part and weights are not of one dtype"
    if not all(is_as_wide(n, dtype) for n in inner):
        return f"scores or weights are rounded to less than the values' {dtype}"
    if other := other_reader(inner[0], inner, [n for n in inner if is_op(n, *_SHARED)]):
        return f"{other.name} inside the attention is read by another node"
    axis = attention.axes.index(operands[0][1][1]) - 4
    if any(val(m).ndim >= -axis and not known(shape(m)[axis] == 1) for m in attention.scores.masks):
        return "the mask differs by head"
    return None


def _rewrite(gm: GraphModule, found: Found) -> None:
    attention, (b, h, s, t, v) = found.attention, found.axes
    emit = Emitter(gm, found.out.node)
    tensors = [x.emit(emit, order) for x, order in found.operands]
    order = [attention.axes.index(a) for a in (b, h, s, t)]
    mask = attention.scores.emit_mask(emit, order, val(tensors[0]).dtype)
    batch, heads, tokens, _ = shape(tensors[0])
    out = emit(
        mla_attention.overload,
        *tensors,
        mask,
        float(attention.scores.scale),
        attention.is_causal,
        like=val(tensors[0]).new_empty((batch, tokens, heads, shape(tensors[-1])[1])),
    )
    dims = [(b, s, h, v).index(a) for a in found.out.axes]
    replace(found.out.node, out if dims == [0, 1, 2, 3] else emit(aten.permute.default, out, dims))

"""softmax(q @ k^T * scale + mask) @ v -> scaled_dot_product_attention(q, k, v, mask, scale=scale)

The products may be matmul or einsum over any order of axes; the scale may be a factor or a divisor, the mask
added, or filled in by masked_fill. Someone else reading the scores or the weights keeps them as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from dsopt.capture import known
from dsopt.census import attention_family
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
from dsopt.scores import SOFTMAX, Scores, is_as_wide, read_scores

FAMILY = "attention"


def run(gm: GraphModule, log: Log) -> None:
    for node in list(gm.graph.nodes):
        if is_op(node, *SOFTMAX):
            found = _read(node)
            if isinstance(found, Attention):
                leaves = (found.q[0], found.k[0], found.v[0], found.scores.mask, found.scores.fill)
                found = log.moved(between(found.out, leaves), found.out) or found
            if isinstance(found, str):
                log.miss(node, found, attention_family(node))
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
    scores: Scores
    mask_order: list[int]


def _only_reader(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _read(softmax: Node) -> Attention | str | None:
    """The attention around a softmax; a reason if it is one that does not fit; None if it is none."""
    chain, product = read_scores(softmax, lambda node: _axes(node) is not None)
    if product is None:
        return None
    if not is_inner_dim(argument(softmax, "dim"), val(softmax).ndim):
        return None
    if isinstance(chain, str):
        return chain
    between = list(chain.between)
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
    if not all(is_as_wide(n, dtype) for n in (*between, weights, softmax)):
        return f"scores or weights are rounded to less than the values' {dtype}"
    order = [
        _uncast(q, _order(q_axes, (b, h, s, *depth)), dtype),
        _uncast(k, _order(k_axes, (b, h, t, *depth)), dtype),
        (v, _order(v_axes, (b, h, t, *d))),
    ]
    if any(val(x).dtype != dtype for x, _ in order):
        return "queries, keys and values are not of one dtype"
    result = _order("".join((b, h, s, *d)), result)
    return Attention(reader, *order, result, chain, to_heads_first)


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
    out = emit(aten.scaled_dot_product_attention.default, q, k, v, mask, scale=float(found.scores.scale))
    replace(found.out, out if found.result == [0, 1, 2, 3] else emit(aten.permute.default, out, found.result))

"""sdpa(q, repeat(k), repeat(v), mask) -> permute(attention(q, k, v, mask))

Attention that no latent stands behind, or whose latent was not found. Keys and values that were repeated for the heads
they serve, by expand and reshape or by repeat_interleave, are read as they were before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from dsopt.capture import known
from dsopt.census import attention_family
from dsopt.effects import between
from dsopt.ops.attention import attention
from dsopt.rewrite import Emitter, Log, argument, aten, is_op, replace, same_shape, shape, val
from dsopt.scores import unrepeated_mask

FAMILY = "attention"


def run(gm: GraphModule, log: Log) -> None:
    for node in list(gm.graph.nodes):
        if is_op(node, aten.scaled_dot_product_attention.default):
            found = _read(node)
        elif is_op(node, attention.overload):
            found = _read_op(node)
        else:
            continue
        if isinstance(found, Found):
            leaves = (found.q, found.k.source, found.v.source, found.mask)
            found = log.moved(between(node, leaves), node) or found
        if isinstance(found, str):
            log.miss(node, found)
        elif isinstance(found, Found):
            # an op is a site already; a latent's attention, which absorb_mla left alone, stays counted as missed
            is_site = (
                is_op(node, aten.scaled_dot_product_attention.default)
                and attention_family(node) == "attention"
            )
            log.hit("attention" if is_site else None, node)
            _rewrite(gm, node, found)


@dataclass(frozen=True)
class Heads:
    """Keys or values before they were repeated: `source`, its axes brought to `order`, one of them dropped first."""

    source: Node
    order: tuple[int, ...] = (0, 1, 2, 3)
    dropped: int | None = None

    @property
    def shape(self) -> list:
        sizes = [s for d, s in enumerate(shape(self.source)) if d != self.dropped]
        return [sizes[d] for d in self.order]

    def emit(self, emit: Emitter) -> Node:
        node = self.source if self.dropped is None else emit(aten.squeeze.dim, self.source, self.dropped)
        return node if self.order == (0, 1, 2, 3) else emit(aten.permute.default, node, list(self.order))


@dataclass(frozen=True)
class Found:
    """The op's operands."""

    q: Node
    k: Heads
    v: Heads
    mask: Node | None
    scale: float
    is_causal: bool
    sinks: Node | None = None


def _read_op(node: Node) -> Found | None:
    """The operands of an op whose keys and values were repeated; None for any other."""
    q, k, v, mask, scale, is_causal, sinks = attention.bind(node.args, node.kwargs)
    keys, values = _unrepeated(k), _unrepeated(v)
    if keys.source is k or _mismatch(shape(q), keys.shape, values.shape) is not None:
        return None
    return Found(q, keys, values, unrepeated_mask(mask), scale, is_causal, sinks)


def _read(node: Node) -> Found | str:
    """The operands of the attention, or why the op does not stand for it."""
    q, k, v, mask, dropout = (argument(node, a) for a in ("query", "key", "value", "attn_mask", "dropout_p"))
    if dropout != 0.0:
        return f"dropout with p={dropout}"
    if any(val(x).ndim != 4 for x in (q, k, v)):
        return "queries, keys and values are not (batch, heads, tokens, dim)"
    if any(val(x).dtype != val(q).dtype for x in (k, v)):
        return "queries, keys and values are not of one dtype"
    scale = argument(node, "scale")
    scale = 1 / math.sqrt(shape(q)[-1]) if scale is None else scale
    if not isinstance(scale, (int, float)):
        return "the scale is not a number"
    mask, is_causal = unrepeated_mask(mask), argument(node, "is_causal")
    keys, values = _unrepeated(k), _unrepeated(v)
    if not known(keys.shape[1] == values.shape[1]):
        keys, values = Heads(k), Heads(v)
    return _mismatch(shape(q), keys.shape, values.shape) or Found(
        q, keys, values, mask, float(scale), is_causal
    )


def _mismatch(queries: Sequence, keys: Sequence, values: Sequence) -> str | None:
    """What keys and values of these shapes do not share with the queries or with each other, or None.

    Lengths of a cache's keys and values may be two symbols; ATen's attention raises if they differ.
    """
    (batch, heads, _, _), (_, kv_heads, length, _) = queries, keys
    if known(keys[0] != batch) or known(values[0] != batch):
        return "queries, keys and values are of different batch sizes"
    if not known(values[1] == kv_heads) or known(values[2] != length):
        return "keys and values are of different lengths or numbers of heads"
    if not isinstance(heads, int) or not isinstance(kv_heads, int) or heads % max(kv_heads, 1):
        return f"{heads} heads of queries do not share {kv_heads} heads of keys evenly"
    return None


_COPIES = (aten.contiguous.default, aten.clone.default)


def _unrepeated(x: Node) -> Heads:
    """What keys or values of (batch, heads, tokens, dim) were before each head was repeated; x itself if it was not."""
    whole, order = x, (0, 1, 2, 3)
    while is_op(x, aten.permute.default, *_COPIES):
        if is_op(x, aten.permute.default):
            order = tuple(x.args[1][d] for d in order)
        x = x.args[0]
    found = _repeated(x, order[1])
    return Heads(whole) if found is None else Heads(found[0], order, found[1])


def _repeated(x: Node, dim: int) -> tuple[Node, int | None] | None:
    """(what x repeats each head of, its axis of size 1 to drop or None); heads are axis `dim` of x. None for others."""
    if is_op(x, aten.repeat_interleave.self_int) and argument(x, "dim") in (dim, dim - 4):
        return x.args[0], None
    repeated = x.args[0] if is_op(x, aten.reshape.default, aten.flatten.using_ints) else None
    while is_op(repeated, *_COPIES):
        repeated = repeated.args[0]
    if not is_op(repeated, aten.expand.default) or val(repeated).ndim != 5:
        return None
    source, sizes = repeated.args[0], list(shape(repeated))
    joined = [*sizes[:dim], sizes[dim] * sizes[dim + 1], *sizes[dim + 2 :]]
    before = [*sizes[: dim + 1], 1, *sizes[dim + 2 :]]
    if not same_shape(shape(x), joined) or not same_shape(shape(source), before):
        return None
    if is_op(source, aten.unsqueeze.default) and argument(source, "dim") in (dim + 1, dim - 4):
        return source.args[0], None
    return source, dim + 1


def _rewrite(gm: GraphModule, node: Node, found: Found) -> None:
    emit = Emitter(gm, node)
    keys, values = found.k.emit(emit), found.v.emit(emit)
    args = (found.q, keys, values, found.mask, found.scale, found.is_causal, found.sinks)
    out = emit(attention.overload, *args)
    is_op_already = is_op(node, attention.overload)
    replace(node, out if is_op_already else emit(aten.permute.default, out, [0, 2, 1, 3]))

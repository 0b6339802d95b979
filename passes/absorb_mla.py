"""sdpa(cat(q_nope, q_rope), cat(kv_b(c).k, k_rope), kv_b(c).v) -> mla_attention(q_nope, q_rope, c, k_rope, w_uk, w_uv)

Keys and values that are linear maps of one latent c are not expanded before the attention: the op takes the
latent and views of the expansion's weight, and absorbs them into queries and outputs where that is cheaper.
"""

from __future__ import annotations

import math

from torch.fx import GraphModule, Node

from dsopt.capture import known
from dsopt.census import is_expanded_latent
from dsopt.effects import between
from dsopt.headmap import HeadMap, trace
from dsopt.ops.attention import mla_attention
from dsopt.rewrite import Emitter, Log, argument, aten, is_inner_dim, is_op, replace, shape, val

FAMILY = "mla"


def run(gm: GraphModule, log: Log) -> None:
    for node in list(gm.graph.nodes):
        if not is_op(node, aten.scaled_dot_product_attention.default):
            continue
        found = _read(node)
        if isinstance(found, dict):
            leaves = (found["q"], found["keys"].latent, found["k_rope"], found["mask"])
            found = log.moved(between(node, leaves), node) or found
        if isinstance(found, dict):
            log.hit("mla", node)
            _rewrite(gm, node, **found)
        elif is_expanded_latent(argument(node, "key")):
            log.miss(node, found)


def _read(node: Node) -> dict | str:
    """The operands of the latent attention, or why it is none."""
    q, k, v, mask, dropout = (argument(node, a) for a in ("query", "key", "value", "attn_mask", "dropout_p"))
    if dropout != 0.0:
        return f"dropout with p={dropout}"
    if argument(node, "is_causal") and known(shape(k)[2] == shape(q)[2]):
        # a causal query never sees the tokens that were cut off a longer cache: the whole of it serves
        k, v = _uncut(k), _uncut(v)
    values = trace(v)
    if isinstance(values, str):
        return f"values: {values}"
    keys = _split_keys(k)
    if isinstance(keys, str):
        return f"keys: {keys}"
    key_map, k_rope, rope_first = keys
    if (reason := _mismatch(q, k, k_rope, key_map, values)) is not None:
        return reason
    if key_map.latent is not values.latent:
        return "values are not expanded from the latent that the keys come from"
    if (key_map.num_heads, values.num_heads) != (shape(q)[1], shape(q)[1]):
        return f"{shape(q)[1]} query heads share {key_map.num_heads} key and {values.num_heads} value heads"
    mask = _head_mask(mask)
    if mask is not None and val(mask).ndim > 2 and not known(shape(mask)[-3] == 1):
        return "the mask differs by head"
    scale = argument(node, "scale")
    if scale is None:
        scale = 1 / math.sqrt(shape(q)[-1])
    if not isinstance(scale, (int, float)):
        return "the scale is not a number"
    return {
        "q": q,
        "keys": key_map,
        "values": values,
        "k_rope": k_rope,
        "rope_first": rope_first,
        "mask": mask,
        "scale": float(scale),
        "is_causal": argument(node, "is_causal"),
    }


def _uncut(x: Node) -> Node:
    """The tensor before its last tokens were sliced off."""
    while is_op(x, aten.slice.Tensor) and argument(x, "dim") % val(x).ndim == 2:
        if argument(x, "start") not in (0, None) or argument(x, "step") != 1:
            break
        x = x.args[0]
    return x


def _mismatch(q: Node, k: Node, k_rope: Node, keys: HeadMap, values: HeadMap) -> str | None:
    """What the op's operands disagree in, or None."""
    latent = keys.latent
    if val(q).ndim != 4:
        return "the queries are not (batch, heads, tokens, dim)"
    if not all(known(shape(x)[0] == shape(q)[0]) for x in (k, latent, k_rope)):
        return "queries, latent and rotary part are of different batch sizes"
    if not all(known(tokens == shape(k)[2]) for tokens in (shape(latent)[-2], shape(k_rope)[2])):
        return "latent and rotary part are of different lengths"
    if any(val(x).dtype != val(q).dtype for x in (k, latent, k_rope, keys.w, values.w)):
        return "queries, latent, rotary part and weights are not of one dtype"
    return None


def _split_keys(k: Node) -> tuple[HeadMap, Node, bool] | str:
    """(map of the part without position, rotary part shared by all heads, whether that one comes first)."""
    if not is_op(k, aten.cat.default) or not is_inner_dim(argument(k, "dim"), 4) or len(k.args[0]) != 2:
        whole = trace(k)
        return whole if isinstance(whole, str) else "no rotary part is joined to the expanded keys"
    maps = [trace(part) for part in k.args[0]]
    which = next((i for i, m in enumerate(maps) if isinstance(m, HeadMap)), None)
    if which is None:
        return maps[0]
    k_rope = k.args[0][1 - which]
    while is_op(k_rope, aten.expand.default) and _repeats_heads(k_rope):
        k_rope = k_rope.args[0]
    if val(k_rope).ndim != 4 or not known(shape(k_rope)[1] == 1):
        return "the rotary part differs by head"
    return maps[which], k_rope, which == 1


def _repeats_heads(node: Node) -> bool:
    """True for an expand of a 4-d tensor that changes dim 1 alone."""
    old, new = shape(node.args[0]), shape(node)
    return len(old) == 4 and all(known(old[d] == new[d]) for d in (0, 2, 3))


def _head_mask(mask: Node | None) -> Node | None:
    """The mask before it was repeated for every head."""
    while (
        mask is not None
        and is_op(mask, aten.expand.default)
        and val(mask).ndim == val(mask.args[0]).ndim == 4
    ):
        source = mask.args[0]
        if known(shape(mask)[1] == 1) or not known(shape(source)[1] == 1):
            break
        mask = source
    return mask


def _rewrite(
    gm: GraphModule,
    node: Node,
    q: Node,
    keys: HeadMap,
    values: HeadMap,
    k_rope: Node,
    rope_first: bool,
    mask: Node | None,
    scale: float,
    is_causal: bool,
) -> None:
    emit = Emitter(gm, node)
    q_nope, q_rope = _split_queries(emit, q, keys.head_dim, rope_first)
    latent = emit(aten.squeeze.dim, keys.latent, 1) if val(keys.latent).ndim == 4 else keys.latent
    out = emit(
        mla_attention.overload,
        q_nope,
        q_rope,
        latent,
        emit(aten.squeeze.dim, k_rope, 1),
        keys.weight(emit),
        values.weight(emit),
        mask,
        scale,
        is_causal,
        like=_tokens_first(gm, node),
    )
    replace(node, emit(aten.permute.default, out, [0, 2, 1, 3]))


def _tokens_first(gm: GraphModule, node: Node):
    """The fake (batch, tokens, heads, dim) result, contiguous."""
    out = val(node)
    batch, heads, tokens, dim = out.shape
    return out.new_empty((batch, tokens, heads, dim))


def _split_queries(emit: Emitter, q: Node, nope: int, rope_first: bool) -> tuple[Node, Node]:
    width = shape(q)[-1]
    split = width - nope if rope_first else nope
    if is_op(q, aten.cat.default) and is_inner_dim(argument(q, "dim"), 4) and len(q.args[0]) == 2:
        first, second = q.args[0]
        one_dtype = val(first).dtype == val(second).dtype == val(q).dtype
        if one_dtype and known(shape(first)[-1] == split):
            return (second, first) if rope_first else (first, second)
    first = emit(aten.slice.Tensor, q, -1, 0, split)
    second = emit(aten.slice.Tensor, q, -1, split, width)
    return (second, first) if rope_first else (first, second)

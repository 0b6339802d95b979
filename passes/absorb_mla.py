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
from dsopt.scores import unrepeated_mask

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
    keys = _split_keys(k, values.latent)
    if isinstance(keys, str):
        return f"keys: {keys}"
    key_map, k_rope, head, rope_first = keys
    if (reason := _mismatch(q, k, k_rope, head, key_map, values)) is not None:
        return reason
    if key_map.latent is not values.latent:
        return "values are not expanded from the latent that the keys come from"
    if (key_map.num_heads, values.num_heads) != (shape(q)[1], shape(q)[1]):
        return f"{shape(q)[1]} query heads share {key_map.num_heads} key and {values.num_heads} value heads"
    mask = unrepeated_mask(mask)
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
        "head": head,
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


def _mismatch(q: Node, k: Node, k_rope: Node | None, head: int, keys: HeadMap, values: HeadMap) -> str | None:
    """What the op's operands disagree in, or None."""
    latent = keys.latent
    rotary = [] if k_rope is None else [k_rope]
    if val(q).ndim != 4:
        return "the queries are not (batch, heads, tokens, dim)"
    if not all(known(shape(x)[0] == shape(q)[0]) for x in (k, latent, *rotary)):
        return "queries, latent and rotary part are of different batch sizes"
    if not all(known(n == shape(k)[2]) for n in (shape(latent)[-2], *(shape(x)[3 - head] for x in rotary))):
        return "latent and rotary part are of different lengths"
    if any(val(x).dtype != val(q).dtype for x in (k, latent, *rotary, keys.w, values.w)):
        return "queries, latent, rotary part and weights are not of one dtype"
    return None


def _split_keys(k: Node, latent: Node) -> tuple[HeadMap, Node | None, int, bool] | str:
    """(map of the part without position, rotary part, its axis of one head for all, whether it comes first).

    The rotary part is None where all of the keys comes from the latent.
    """
    joined, order = (k.args[0], k.args[1]) if is_op(k, aten.permute.default) else (k, [0, 1, 2, 3])
    if not is_op(joined, aten.cat.default) or len(joined.args[0]) != 2 or not _is_inner_cat(joined, order):
        whole = trace(k)
        if isinstance(whole, str):
            return whole
        if not known(shape(whole.latent)[-1] < whole.num_heads * whole.head_dim):
            return "the keys have no rotary part and are no wider than what they are made of"
        return whole, None, 1, False
    parts = joined.args[0]
    maps = [trace(part, order) for part in parts]
    # of one head the rotary part is a linear map too, of what the latent was projected from
    found = [i for i, m in enumerate(maps) if isinstance(m, HeadMap)]
    which = next((i for i in found if maps[i].latent is latent), next(iter(found), None))
    if which is None:
        return maps[0]
    k_rope, head = parts[1 - which], order[1]
    while is_op(k_rope, aten.expand.default) and _repeats(k_rope, head):
        k_rope = k_rope.args[0]
    if val(k_rope).ndim != 4 or not known(shape(k_rope)[head] == 1):
        return "the rotary part differs by head"
    if order[0] != 0:
        return "the keys are not (batch, heads, tokens, dim)"
    return maps[which], k_rope, head, which == 1


def _is_inner_cat(cat: Node, order: list[int]) -> bool:
    """True for a cat along the last of four axes, which stays the last in `order`."""
    return val(cat).ndim == 4 and is_inner_dim(argument(cat, "dim"), 4) and order[3] == 3


def _repeats(node: Node, dim: int) -> bool:
    """True for an expand of a 4-d tensor that changes `dim` alone."""
    old, new = shape(node.args[0]), shape(node)
    return len(old) == 4 and all(known(old[d] == new[d]) for d in range(4) if d != dim)


def _rewrite(
    gm: GraphModule,
    node: Node,
    q: Node,
    keys: HeadMap,
    values: HeadMap,
    k_rope: Node | None,
    head: int,
    rope_first: bool,
    mask: Node | None,
    scale: float,
    is_causal: bool,
) -> None:
    emit = Emitter(gm, node)
    q_nope, q_rope = _split_queries(emit, q, keys.head_dim, rope_first)
    latent = emit(aten.squeeze.dim, keys.latent, 1) if val(keys.latent).ndim == 4 else keys.latent
    nothing = emit(aten.slice.Tensor, latent, -1, 0, 0) if k_rope is None else None
    out = emit(
        mla_attention.overload,
        q_nope,
        q_rope,
        latent,
        nothing or _without_axis(emit, k_rope, head),
        keys.weight(emit),
        values.weight(emit),
        mask,
        scale,
        is_causal,
        like=_tokens_first(gm, node),
    )
    replace(node, emit(aten.permute.default, out, [0, 2, 1, 3]))


def _without_axis(emit: Emitter, x: Node, dim: int) -> Node:
    """x without an axis of size 1."""
    if is_op(x, aten.unsqueeze.default) and argument(x, "dim") % val(x).ndim == dim:
        return x.args[0]
    return emit(aten.squeeze.dim, x, dim)


def _tokens_first(gm: GraphModule, node: Node):
    """The fake (batch, tokens, heads, dim) result, contiguous."""
    out = val(node)
    batch, heads, tokens, dim = out.shape
    return out.new_empty((batch, tokens, heads, dim))


def _split_queries(emit: Emitter, q: Node, nope: int, rope_first: bool) -> tuple[Node, Node]:
    width = shape(q)[-1]
    split = width - nope if rope_first else nope
    joined, order = (q.args[0], q.args[1]) if is_op(q, aten.permute.default) else (q, [0, 1, 2, 3])
    if is_op(joined, aten.cat.default) and len(joined.args[0]) == 2 and _is_inner_cat(joined, order):
        first, second = joined.args[0]
        one_dtype = val(first).dtype == val(second).dtype == val(q).dtype
        if one_dtype and known(shape(first)[-1] == split):
            if joined is not q:
                first, second = (emit(aten.permute.default, part, order) for part in (first, second))
            return (second, first) if rope_first else (first, second)
    first = emit(aten.slice.Tensor, q, -1, 0, split)
    second = emit(aten.slice.Tensor, q, -1, split, width)
    return (second, first) if rope_first else (first, second)

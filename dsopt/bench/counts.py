"""Bytes that a call must move and FLOPs that it must do, counted from its arguments.

Each tensor counts once, and only what the call needs of it: the experts that were chosen, the keys that a query
sees. Attention is counted in its cheaper form, absorbed or expanded. A kernel that moves or computes more than this
shows as a smaller share of the ceiling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from dsopt.bench.data import tensors
from dsopt.op import Op


def nbytes(*tensors: torch.Tensor | None) -> int:
    """Bytes of the elements of some tensors; what is expanded along a dimension counts once."""
    return sum(_elements(x) * x.element_size() for x in tensors if x is not None)


def _elements(x: torch.Tensor) -> int:
    count = 1
    for size, stride in zip(x.shape, x.stride()):
        count *= size if stride or not size else 1
    return count


def count(op: Op, args: tuple, results: Sequence[torch.Tensor]) -> tuple[int, int]:
    """(bytes, FLOPs) of one call of an op. FLOPs are 0 where the op has no count of its own: bytes bound it then."""
    if op.name in COUNTS:
        return COUNTS[op.name](args, results)
    return nbytes(*tensors(args), *results), 0


def _per_element(flops: int) -> Callable:
    """Everything is read or written once, and each element of the first argument costs so many FLOPs."""

    def counted(args: tuple, results: Sequence[torch.Tensor]) -> tuple[int, int]:
        return nbytes(*tensors(args), *results), flops * args[0].numel()

    return counted


def _multi_linear(args: tuple, results: Sequence[torch.Tensor]) -> tuple[int, int]:
    x, weights = args[:2]
    rows = x.numel() // x.shape[-1]
    return nbytes(*tensors(args), *results), 2 * rows * sum(w.numel() for w in weights)


def _gated_mlp(args: tuple, results: Sequence[torch.Tensor]) -> tuple[int, int]:
    x, *weights = args[:4]
    rows = x.numel() // x.shape[-1]
    return nbytes(*tensors(args), *results), 2 * rows * sum(w.numel() for w in weights)


def seen_pairs(mask: torch.Tensor | None, is_causal: bool, batch: int, new: int, keys: int) -> int:
    """How many (query, key) pairs of one head see each other, over the batch; a float mask shows all."""
    if is_causal:
        return batch * sum(min(s + 1, keys) for s in range(new))
    if mask is not None and mask.dtype == torch.bool:
        return int(mask.expand(batch, 1, new, keys).sum())
    return batch * new * keys


def _mla_attention(args: tuple, results: Sequence[torch.Tensor]) -> tuple[int, int]:
    q_nope, q_rope, latent = args[:3]
    w_uv, mask, _, is_causal = args[5:9]
    batch, heads, new, nope = q_nope.shape
    keys, rank = latent.shape[1:]
    rope, value = q_rope.shape[-1], w_uv.shape[1]
    pairs = seen_pairs(mask, is_causal, batch, new, keys)
    absorbed = 2 * batch * new * rank * (nope + value) + 2 * pairs * (2 * rank + rope)
    expanded = 2 * batch * keys * rank * (nope + value) + 2 * pairs * (nope + rope + value)
    return nbytes(*tensors(args), *results), heads * min(absorbed, expanded)


def _attention(args: tuple, results: Sequence[torch.Tensor]) -> tuple[int, int]:
    q, k, v, mask, _, is_causal = args[:6]
    batch, heads, new, width = q.shape
    pairs = seen_pairs(mask, is_causal, batch, new, k.shape[2])
    return nbytes(*tensors(args), *results), 2 * heads * pairs * (width + v.shape[3])


def _moe_experts(args: tuple, results: Sequence[torch.Tensor]) -> tuple[int, int]:
    x, ids, weights, w13, w2, w3, b13, b2, b3 = args[:9]
    shared, scales, shared_scales = args[13:16], args[16:19], args[19:22]
    chosen = ids[(ids >= 0) & (ids < w13.shape[0])]
    hit = chosen.unique().numel()
    stacks = [w for w in (w13, w2, w3, b13, b2, b3, *scales) if w is not None]
    products = [w[0].numel() for w in (w13, w2, w3) if w is not None]
    moved = nbytes(x, ids, weights, *shared, *shared_scales, *results) + hit * nbytes(*(w[0] for w in stacks))
    shared_flops = sum(2 * x.shape[0] * w.numel() for w in shared if w is not None)
    return moved, 2 * chosen.numel() * sum(products) + shared_flops


COUNTS: dict[str, Callable[[tuple, Sequence[torch.Tensor]], tuple[int, int]]] = {
    "rms_norm": _per_element(4),
    "add_rms_norm": _per_element(5),
    "rope": _per_element(3),
    "multi_linear": _multi_linear,
    "dequantize": _per_element(1),
    "gated_mlp": _gated_mlp,
    "mla_attention": _mla_attention,
    "attention": _attention,
    "moe_route": _per_element(0),
    "moe_experts": _moe_experts,
}

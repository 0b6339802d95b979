"""x @ w.T through ATen, in float32 where this processor multiplies bfloat16 slowly.

Without instructions for bfloat16 products oneDNN reaches an eighth of its float32 rate on x86, so for many tokens it
is cheaper to widen each weight, a block of rows at a time, than to multiply in bfloat16. For few tokens reading
the weight dominates and ATen's own GEMV stays.
"""

from __future__ import annotations

import functools

import torch
from torch.nn.functional import linear as aten_linear

# tokens from which widening the weight pays; measured equal near 25 on an AVX-512 chip without such products
MANY_TOKENS = 32
# float32 copy of one block of weight rows; small enough to stay out of the memory peak
BLOCK_BYTES = 16 << 20


@functools.cache
def bfloat16_is_slow() -> bool:
    """Whether this processor is an x86 without instructions for bfloat16 products."""
    has = torch.cpu.get_capabilities()
    return has.get("architecture") == "x86_64" and not (has.get("avx512_bf16") or has.get("amx_bf16"))


def linear(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ w.T + bias, x (..., in_features) and w (out_features, in_features) of one dtype, on any device."""
    tokens = x.shape[:-1].numel()
    if x.dtype != torch.bfloat16 or not x.is_cpu or tokens < MANY_TOKENS or not bfloat16_is_slow():
        return aten_linear(x, w, bias)
    wide = x.float()
    out = torch.empty(*x.shape[:-1], w.shape[0], dtype=x.dtype, device=x.device)
    rows = max(1, BLOCK_BYTES // (4 * max(1, w.shape[1])))
    for start in range(0, w.shape[0], rows):
        block = slice(start, start + rows)
        out[..., block] = aten_linear(wide, w[block].float(), None if bias is None else bias[block].float())
    return out

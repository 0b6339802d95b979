"""Sibling projections: ATen's GEMMs, in float32 where this chip multiplies bfloat16 slowly.

Without instructions for bfloat16 products oneDNN reaches a fraction of its float32 rate, so for many tokens it is
cheaper to widen each weight, a block of rows at a time, than to multiply in bfloat16. For few tokens reading
the weight dominates and ATen's own GEMV stays.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import linear as aten_linear

from dsopt.kernels.cpu.native import _cpu
from dsopt.op import Kernel

# tokens from which widening the weight pays; measured equal near 25 on an AVX-512 chip without such products
MANY_TOKENS = 32
# float32 copy of one block of weight rows; small enough to stay out of the memory peak
BLOCK_BYTES = 16 << 20

HAS_BFLOAT16_PRODUCTS = "avx512_bf16" in _cpu.isas()


def linear(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ w.T + bias, x (..., in_features) and w (out_features, in_features) of one dtype; see the module."""
    tokens = x.shape[:-1].numel()
    if x.dtype != torch.bfloat16 or tokens < MANY_TOKENS or HAS_BFLOAT16_PRODUCTS:
        return aten_linear(x, w, bias)
    wide = x.float()
    out = torch.empty(*x.shape[:-1], w.shape[0], dtype=x.dtype)
    rows = max(1, BLOCK_BYTES // (4 * max(1, w.shape[1])))
    for start in range(0, w.shape[0], rows):
        block = slice(start, start + rows)
        out[..., block] = aten_linear(wide, w[block].float(), None if bias is None else bias[block].float())
    return out


def multi_linear(
    x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]
) -> list[torch.Tensor]:
    return [linear(x, w, b) for w, b in zip(weights, biases, strict=True)]


KERNELS = (
    Kernel(
        op="multi_linear",
        backend="cpu",
        plan=lambda *_: multi_linear,
        device="cpu",
        dtypes=frozenset({torch.bfloat16}),
        priority=20,
    ),
)

"""x @ w.T through ATen, in float32 where this processor multiplies 16-bit floats slowly.

Without instructions for their products ATen reaches an eighth of its float32 rate in bfloat16 on x86, and a fortieth
in float16, so for many tokens it is cheaper to widen each weight, a block of rows at a time. For few tokens reading
the weight dominates and ATen's own GEMV stays.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch.nn.functional import linear as aten_linear

from dsopt.kernels.torch.dequantize import dequantize

# tokens from which widening the weight pays; measured equal near 25 on an AVX-512 chip without such products
MANY_TOKENS = 32
# float32 copy of one block of weight rows; small enough to stay out of the memory peak
BLOCK_BYTES = 16 << 20


PRODUCTS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16"),
}


@functools.cache
def is_slow(dtype: torch.dtype) -> bool:
    """Whether dtype is bfloat16 or float16 and this processor an x86 without instructions for products of it."""
    has = torch.cpu.get_capabilities()
    x86 = has.get("architecture") == "x86_64"
    return x86 and dtype in PRODUCTS and not any(has.get(name) for name in PRODUCTS[dtype])


def linear(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    block: Sequence[int] = (128, 128),
) -> torch.Tensor:
    """x @ w.T + bias, x (..., in_features) and w (out_features, in_features) of one dtype, on any device.

    scale: where w is in FP8, its scales as for `dsopt::dequantize`; then it is widened a block of rows at a time.
    """
    tokens = x.shape[:-1].numel()
    widens = x.is_cpu and tokens >= MANY_TOKENS and is_slow(x.dtype)
    if scale is None and not widens:
        return aten_linear(x, w, bias)
    wide = x.float() if widens else x
    out = torch.empty(*x.shape[:-1], w.shape[0], dtype=x.dtype, device=x.device)
    height = 1 if scale is None else block[0]
    step = height * max(1, BLOCK_BYTES // (4 * height * max(1, w.shape[1])))
    for start in range(0, w.shape[0], step):
        rows = slice(start, start + step)
        if scale is None:
            part = w[rows].float()
        else:
            scales = scale[start // height : -(-(start + step) // height)]
            part = dequantize(w[rows], scales, wide.dtype, block)
        out[..., rows] = aten_linear(wide, part, None if bias is None else bias[rows].to(wide.dtype))
    return out

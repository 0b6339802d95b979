"""Native sibling projections: one sweep over the rows of all weights, in their stored layout.

Sums are in float32 and in an order that does not depend on the number of threads, nor on that of up to 64 tokens. For
many tokens, where a product is no longer bound by reading the weights, ATen's GEMM takes over where this processor has
instructions for products of the dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dsopt.capture import known
from dsopt.kernels.cpu.fp8 import refuse_mixed
from dsopt.kernels.cpu.fp8 import scales as scales_of
from dsopt.kernels.cpu.native import CPU, DTYPES, NATIVE, _cpu, dense_rows, plan, rows
from dsopt.kernels.torch.gemm import is_slow
from dsopt.kernels.torch.multi_linear import multi_linear as aten
from dsopt.op import Kernel

# Tokens from which ATen's GEMM is the faster, as measured by benchmarks/bench_linear.py on an AVX-512 chip. More than
# 64, so that the answers to a few new tokens do not depend on the batch they come in.
MANY_TOKENS = 72


def many_tokens(x: torch.Tensor) -> bool:
    """Whether x (..., hidden) has so many tokens that ATen's GEMM is the faster one; never where it must widen."""
    return not is_slow(x.dtype) and x.numel() >= MANY_TOKENS * x.shape[-1] > 0


def native(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    dtype: torch.dtype | None = None,
    scales: Sequence[torch.Tensor | None] | None = None,
    block: Sequence[int] = (128, 128),
) -> list[torch.Tensor]:
    """As multi_linear, always by the native kernel. Rows of weights must be dense, and x must have columns."""
    *tokens, in_features = x.shape
    dtype = x.dtype if dtype is None else dtype
    num_tokens = x.numel() // in_features
    x, stride = rows(x)
    outs: list[torch.Tensor] = []
    plain, fp8 = [], []
    for w, bias, scale in zip(weights, biases, scales or [None] * len(weights), strict=True):
        out = torch.empty(*tokens, w.shape[0], dtype=dtype, device=CPU)
        outs.append(out)
        bias_address = 0 if bias is None else bias.data_ptr()
        operands = (w.data_ptr(), w.stride(0), w.shape[0], bias_address, out.data_ptr())
        (plain if scale is None else fp8).append((operands, scales_of(scale, block)))
    for table in (plain, fp8):
        if table:
            _cpu.multi_linear(
                x.data_ptr(),
                stride,
                num_tokens,
                in_features,
                table,
                NATIVE[x.dtype],
                NATIVE[dtype],
                table is fp8,
            )
    return outs


def multi_linear(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    dtype: torch.dtype | None = None,
    scales: Sequence[torch.Tensor | None] | None = None,
    block: Sequence[int] = (128, 128),
) -> list[torch.Tensor]:
    wide = aten if many_tokens(x) and scales is None else native
    return wide(x, weights, biases, dtype, scales, block)


def _check(x, weights, biases, dtype=None, scales=None, block=(128, 128)) -> str | None:
    if dtype not in (None, x.dtype, torch.float32):
        return f"gives x's dtype {x.dtype} or float32, got dtype {dtype}"
    if x.ndim == 0 or x.shape[-1] == 0:
        return f"needs rows with elements, got x of shape {list(x.shape)}"
    for i, (w, bias) in enumerate(zip(weights, biases, strict=True)):
        scale = scales[i] if scales else None
        if reason := refuse_mixed({f"weight {i}": (w, scale)}, block):
            return reason
        if (scale is None and w.dtype != x.dtype) or w.device.type != "cpu":
            return f"needs weight {i} of x's dtype {x.dtype} on the CPU, got {w.dtype} on {w.device}"
        if w.ndim != 2 or known(w.shape[1] != x.shape[-1]):
            return f"needs weight {i} of {x.shape[-1]} columns, got {list(w.shape)}"
        if not dense_rows(w):
            return f"needs dense rows of weight {i}, got strides {w.stride()}"
        if bias is None:
            continue
        if bias.dtype != x.dtype or bias.device.type != "cpu" or bias.stride() != (1,):
            got = f"{bias.dtype} on {bias.device} with strides {bias.stride()}"
            return f"needs a dense bias {i} of {x.dtype} on the CPU, got {got}"
        if bias.shape != w.shape[:1]:
            return f"needs bias {i} of shape {list(w.shape[:1])}, got {list(bias.shape)}"
    return None


KERNELS = (
    Kernel(
        "multi_linear",
        "cpu",
        plan(multi_linear),
        _check,
        device="cpu",
        dtypes=DTYPES,
        priority=20,
        records=True,
    ),
)

"""Root-mean-square norm in Triton: one program a row, read once, float32 inside.

x, residual (..., hidden) and weight (hidden,) of one dtype, bfloat16, float16 or float32, and of any strides (rows that
do not follow each other at one distance are copied first). A row stays in registers, so hidden is at most MAX_HIDDEN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dsopt.capture import known
from dsopt.op import Kernel

DTYPES = frozenset({torch.bfloat16, torch.float16, torch.float32})
MAX_HIDDEN = 16384
PRIORITY = 30


@triton.jit
def norm_kernel(
    x, residual, weight, out, total, hidden, eps,
    x_row, x_col, residual_row, residual_col, weight_col,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out[row] = y * rsqrt(mean(y^2) + eps) * weight; y = x[row], or total[row] = x[row] + residual[row]."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    inside = col < hidden
    at = col.to(tl.int64)
    y = tl.load(x + row * x_row + at * x_col, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        y += tl.load(residual + row * residual_row + at * residual_col, mask=inside, other=0.0).to(tl.float32)
        rounded = y.to(total.dtype.element_ty)
        tl.store(total + row * hidden + col, rounded, mask=inside)
        y = rounded.to(tl.float32)
    y *= tl.rsqrt(tl.sum(y * y, 0) / hidden + eps)
    if weight is not None:
        y *= tl.load(weight + at * weight_col, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * hidden + col, y.to(out.dtype.element_ty), mask=inside)


def run_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(normalised, total) with total = x + residual, or None without residual."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty_like(out)
    if out.numel() == 0:
        return out, total
    hidden = x.shape[-1]
    x = x.reshape(-1, hidden)
    residual = None if residual is None else residual.reshape(-1, hidden)
    block = triton.next_power_of_2(hidden)
    residual_strides = (0, 0) if residual is None else residual.stride()
    weight_stride = 0 if weight is None else weight.stride(0)
    with torch.cuda.device_of(x):
        norm_kernel[(x.shape[0],)](
            x, residual, weight, out, total, hidden, eps, *x.stride(), *residual_strides, weight_stride,
            BLOCK=block, num_warps=min(16, max(1, block // 512)),
        )  # fmt: skip
    return out, total


def check_norm(x: torch.Tensor, weight: torch.Tensor | None) -> str | None:
    """Why the Triton norm does not take these, or None."""
    if x.ndim == 0:
        return "needs at least one dimension"
    if not known(x.shape[-1] <= MAX_HIDDEN):
        return f"needs rows of at most {MAX_HIDDEN} values, got {x.shape[-1]}"
    if weight is not None and (weight.dtype != x.dtype or weight.device != x.device):
        return f"needs a weight of {x.dtype} on {x.device}, got {weight.dtype} on {weight.device}"
    if weight is not None and (weight.ndim != 1 or known(weight.shape[0] != x.shape[-1])):
        return f"needs a weight as wide as x's rows, got {list(weight.shape)} for {list(x.shape)}"
    return None


def _rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    return run_norm(x, None, weight, eps)[0]


def ahead_of_time(tensor):
    """The norms of V3's and V2-Lite's layers: before attention and experts, of the latent, of a query."""
    for hidden in (7168, 2048, 1536, 512):
        yield tensor(64, hidden), tensor(hidden), 1e-6
    yield tensor(64, 2048, dtype=torch.float32), tensor(2048, dtype=torch.float32), 1e-6
    yield tensor(64, MAX_HIDDEN), None, 1e-6


KERNELS = (
    Kernel(
        "rms_norm",
        "triton",
        lambda *_: _rms_norm,
        lambda x, weight, eps: check_norm(x, weight),
        device="cuda",
        dtypes=DTYPES,
        priority=PRIORITY,
    ),
)

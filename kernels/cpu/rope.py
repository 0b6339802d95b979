"""Native rotary embedding: one pass over x in any layout, float32 inside; x float32 or bfloat16, and so the tables."""

from __future__ import annotations

import torch

from dsopt.kernels.cpu.moe_experts import dense_rows
from dsopt.kernels.cpu.native import _cpu
from dsopt.kernels.cpu.rms_norm import DTYPES
from dsopt.op import Kernel


def _table(table: torch.Tensor, shape: torch.Size) -> tuple[int, tuple[int, ...]]:
    """Address and outer strides of a table spread over x's outer dimensions, three of them."""
    spread = table.expand(*shape[:-1], table.shape[-1])
    return spread.data_ptr(), (*(0,) * (4 - spread.ndim), *spread.stride()[:-1])


def rope(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved_in: bool, interleaved_out: bool
) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=x.dtype)
    if not out.numel():
        return out
    x, cos, sin = (t if dense_rows(t) else t.contiguous() for t in (x, cos, sin))
    _cpu.rope(
        (*(1,) * (4 - x.ndim), *x.shape),
        (x.data_ptr(), (*(0,) * (4 - x.ndim), *x.stride()[:-1])),
        _table(cos, x.shape),
        _table(sin, x.shape),
        out.data_ptr(),
        interleaved_in,
        interleaved_out,
        cos.shape[-1] == x.shape[-1],
        x.dtype == torch.bfloat16,
        cos.dtype == torch.bfloat16,
    )
    return out


def _plan(*args):
    _cpu.isa()  # a bad DSOPT_ISA is reported here rather than in the middle of a model
    return rope


def _check(x, cos, sin, interleaved_in, interleaved_out) -> str | None:
    if not 1 <= x.ndim <= 4 or x.shape[-1] % 2:
        return f"needs one to four dimensions, the last of them even, got {list(x.shape)}"
    if cos.dtype not in DTYPES or sin.dtype != cos.dtype:
        return f"needs tables of one dtype, float32 or bfloat16, got {cos.dtype} and {sin.dtype}"
    if cos.device.type != "cpu" or sin.device.type != "cpu":
        return f"needs tables on the CPU, got {cos.device} and {sin.device}"
    if cos.shape[-1] != sin.shape[-1] or cos.shape[-1] not in (x.shape[-1], x.shape[-1] // 2):
        return f"needs tables as wide as x or half as wide, got {list(cos.shape)} and {list(sin.shape)}"
    return None


KERNELS = (Kernel("rope", "cpu", _plan, _check, device="cpu", dtypes=DTYPES, priority=20),)

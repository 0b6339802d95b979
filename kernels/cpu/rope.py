"""Native rotary embedding: one pass over x in any layout, float32 inside; x and the tables of any of NATIVE."""

from __future__ import annotations

import torch

from dsopt.kernels.cpu.native import DTYPES, NATIVE, _cpu, dense_rows, empty_like, plan, spread
from dsopt.op import Kernel


def rope(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved_in: bool, interleaved_out: bool
) -> torch.Tensor:
    out = empty_like(x)
    if not out.numel():
        return out
    x = x if dense_rows(x) else x.contiguous()
    shape, missing = x.shape, 4 - x.ndim
    of_tables = (*shape[:-1], cos.shape[-1])
    cos_strides, sin_strides = spread(cos, of_tables), spread(sin, of_tables)
    if cos_strides is None or sin_strides is None:
        raise ValueError(
            f"cos and sin must broadcast to {list(of_tables)}, got {list(cos.shape)} and {list(sin.shape)}"
        )
    outer = (0,) * missing
    _cpu.rope(
        (*(1,) * missing, *shape),
        (x.data_ptr(), (*outer, *x.stride()[:-1])),
        (cos.data_ptr(), (*outer, *cos_strides)),
        (sin.data_ptr(), (*outer, *sin_strides)),
        out.data_ptr(),
        interleaved_in,
        interleaved_out,
        of_tables[-1] == shape[-1],
        NATIVE[x.dtype],
        NATIVE[cos.dtype],
    )
    return out


def _check(x, cos, sin, interleaved_in, interleaved_out) -> str | None:
    if not 1 <= x.ndim <= 4 or x.shape[-1] % 2:
        return f"needs one to four dimensions, the last of them even, got {list(x.shape)}"
    if cos.dtype not in DTYPES or sin.dtype != cos.dtype:
        return f"needs tables of one dtype, float32, bfloat16 or float16, got {cos.dtype} and {sin.dtype}"
    if cos.device.type != "cpu" or sin.device.type != "cpu":
        return f"needs tables on the CPU, got {cos.device} and {sin.device}"
    if cos.shape[-1] != sin.shape[-1] or cos.shape[-1] not in (x.shape[-1], x.shape[-1] // 2):
        return f"needs tables as wide as x or half as wide, got {list(cos.shape)} and {list(sin.shape)}"
    return None


KERNELS = (Kernel("rope", "cpu", plan(rope), _check, device="cpu", dtypes=DTYPES, priority=20, records=True),)

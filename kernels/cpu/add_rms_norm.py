"""Native residual add and RMS norm in one pass over the row; see `rms_norm`."""

from __future__ import annotations

import torch

from dsopt.capture import known
from dsopt.kernels.cpu.native import DTYPES, plan
from dsopt.kernels.cpu.rms_norm import check_norm, run_norm
from dsopt.op import Kernel


def _add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return run_norm(x, residual, weight, eps)


def _check(x, residual, weight, eps):
    if residual.dtype != x.dtype or residual.device != x.device:
        return f"needs a residual of x's dtype and device, got {residual.dtype} on {residual.device}"
    if residual.ndim != x.ndim or any(known(a != b) for a, b in zip(residual.shape, x.shape, strict=True)):
        return f"needs a residual of x's shape {list(x.shape)}, got {list(residual.shape)}"
    return check_norm(x, weight)


KERNELS = (
    Kernel(
        "add_rms_norm",
        "cpu",
        plan(_add_rms_norm),
        _check,
        device="cpu",
        dtypes=DTYPES,
        priority=20,
        records=True,
    ),
)

"""Residual add and RMS norm in Triton, in one pass over the row; see `rms_norm`."""

from __future__ import annotations

import torch

from dsopt.capture import known
from dsopt.kernels.triton.rms_norm import DTYPES, MAX_HIDDEN, PRIORITY, check_norm, run_norm
from dsopt.op import Kernel


def _check(x, residual, weight, eps):
    if residual.dtype != x.dtype or residual.device != x.device:
        return f"needs a residual of {x.dtype} on {x.device}, got {residual.dtype} on {residual.device}"
    if residual.ndim != x.ndim or any(known(a != b) for a, b in zip(residual.shape, x.shape)):
        return f"needs a residual of x's shape {list(x.shape)}, got {list(residual.shape)}"
    return check_norm(x, weight)


def ahead_of_time(tensor):
    """The norms behind the residual adds of V3 and V2-Lite."""
    for hidden in (7168, 2048, MAX_HIDDEN):
        yield tensor(64, hidden), tensor(64, hidden), tensor(hidden), 1e-6
    wide = [tensor(*shape, dtype=torch.float32) for shape in ((64, 2048), (64, 2048), (2048,))]
    yield *wide, 1e-6


KERNELS = (
    Kernel(
        "add_rms_norm",
        "triton",
        lambda *_: run_norm,
        _check,
        device="cuda",
        dtypes=DTYPES,
        priority=PRIORITY,
    ),
)

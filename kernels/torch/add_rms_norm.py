"""Residual add, then RMSNorm, through ATen."""

from __future__ import annotations

import torch

from dsopt.kernels.torch.rms_norm import rms_norm
from dsopt.op import Kernel


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    total = (x + residual).contiguous()
    return rms_norm(total, weight, eps), total


KERNELS = (Kernel(op="add_rms_norm", backend="torch", plan=lambda *_: add_rms_norm, priority=1),)

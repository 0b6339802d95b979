"""Sibling projections as one GEMM of `gemm`'s kind each."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dsopt.kernels.torch.gemm import linear
from dsopt.op import Kernel


def multi_linear(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    dtype: torch.dtype | None = None,
    scales: Sequence[torch.Tensor | None] | None = None,
    block: Sequence[int] = (128, 128),
) -> list[torch.Tensor]:
    scales = [None] * len(weights) if scales is None else scales
    if dtype is not None:
        x = x.to(dtype)
        weights = [w.to(dtype) if s is None else w for w, s in zip(weights, scales, strict=True)]
        biases = [None if b is None else b.to(dtype) for b in biases]
    return [linear(x, w, b, s, block) for w, b, s in zip(weights, biases, scales, strict=True)]


KERNELS = (Kernel(op="multi_linear", backend="torch", plan=lambda *_: multi_linear, priority=1),)

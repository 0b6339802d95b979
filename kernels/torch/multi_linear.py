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
) -> list[torch.Tensor]:
    if dtype is not None:
        x = x.to(dtype)
        weights = [w.to(dtype) for w in weights]
        biases = [None if b is None else b.to(dtype) for b in biases]
    return [linear(x, w, b) for w, b in zip(weights, biases, strict=True)]


KERNELS = (Kernel(op="multi_linear", backend="torch", plan=lambda *_: multi_linear, priority=1),)

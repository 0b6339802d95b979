"""Sibling projections as one ATen GEMM each."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dsopt.op import Kernel


def multi_linear(
    x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]
) -> list[torch.Tensor]:
    return [torch.nn.functional.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]


KERNELS = (Kernel(op="multi_linear", backend="torch", plan=lambda *_: multi_linear, priority=1),)

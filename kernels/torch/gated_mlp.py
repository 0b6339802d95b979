"""Gated MLP as three GEMMs of `gemm`'s kind, the activation in place on the first one's result."""

from __future__ import annotations

import torch
from torch.nn.functional import silu

from dsopt.kernels.torch.gemm import linear
from dsopt.op import Kernel


def gated_mlp(
    x: torch.Tensor,
    w_gate: torch.Tensor,
    w_up: torch.Tensor,
    w_down: torch.Tensor,
    b_gate: torch.Tensor | None = None,
    b_up: torch.Tensor | None = None,
    b_down: torch.Tensor | None = None,
) -> torch.Tensor:
    hidden = silu(linear(x, w_gate, b_gate), inplace=True)
    return linear(hidden.mul_(linear(x, w_up, b_up)), w_down, b_down)


KERNELS = (Kernel(op="gated_mlp", backend="torch", plan=lambda *_: gated_mlp, priority=1),)

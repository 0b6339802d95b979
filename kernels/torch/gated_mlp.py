"""Gated MLP as three GEMMs of `gemm`'s kind, the activation in place on the first one's result."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import silu

from dsopt.kernels.torch.gemm import linear
from dsopt.op import Kernel
from dsopt.ops.linear import ACTIVATIONS


def gated_mlp(
    x: torch.Tensor,
    w_gate: torch.Tensor,
    w_up: torch.Tensor,
    w_down: torch.Tensor,
    b_gate: torch.Tensor | None = None,
    b_up: torch.Tensor | None = None,
    b_down: torch.Tensor | None = None,
    activation: str = "silu",
    limit: float | None = None,
    scale_gate: torch.Tensor | None = None,
    scale_up: torch.Tensor | None = None,
    scale_down: torch.Tensor | None = None,
    block: Sequence[int] = (128, 128),
) -> torch.Tensor:
    gate = linear(x, w_gate, b_gate, scale_gate, block)
    if limit is not None:
        gate.clamp_(max=limit)
    hidden = silu(gate, inplace=True) if activation == "silu" else ACTIVATIONS[activation](gate)
    up = linear(x, w_up, b_up, scale_up, block)
    if limit is not None:
        up.clamp_(-limit, limit)
    return linear(hidden.mul_(up), w_down, b_down, scale_down, block)


KERNELS = (Kernel(op="gated_mlp", backend="torch", plan=lambda *_: gated_mlp, priority=1),)

"""Gated MLP: three GEMMs of `multi_linear`'s kind, the activation in place between them."""

from __future__ import annotations

import torch
from torch.nn.functional import silu

from dsopt.kernels.cpu.multi_linear import linear
from dsopt.op import Kernel
from dsopt.ops.linear import refuse_variants


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
) -> torch.Tensor:
    hidden = silu(linear(x, w_gate, b_gate), inplace=True)
    return linear(hidden.mul_(linear(x, w_up, b_up)), w_down, b_down)


def _check(*args) -> str | None:
    return refuse_variants(*args[7:])


KERNELS = (
    Kernel(
        op="gated_mlp",
        backend="cpu",
        plan=lambda *_: gated_mlp,
        check=_check,
        device="cpu",
        dtypes=frozenset({torch.bfloat16}),
        priority=20,
    ),
)

"""Native gated MLP: the experts' kernel with one MLP that all tokens pass; for many tokens ATen's if it is faster."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dsopt.kernels.cpu.fp8 import refuse_mixed, scales
from dsopt.kernels.cpu.moe_experts import (
    ACTIVATIONS,
    NO_MLPS,
    NOTHING,
    UNLIMITED,
    check_weights,
    matrix,
)
from dsopt.kernels.cpu.multi_linear import many_tokens
from dsopt.kernels.cpu.native import CPU, DTYPES, NATIVE, _cpu, plan, rows
from dsopt.kernels.torch.gated_mlp import gated_mlp as aten_gated_mlp
from dsopt.op import Kernel
from dsopt.ops.linear import ACTIVATIONS as MLP_ACTIVATIONS


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
    fp8 = scale_gate is not None
    if many_tokens(x) and not fp8:
        return aten_gated_mlp(x, w_gate, w_up, w_down, b_gate, b_up, b_down, activation, limit)
    *tokens, hidden = x.shape
    out_hidden, intermediate = w_down.shape
    out = torch.empty(*tokens, out_hidden, dtype=x.dtype, device=CPU)
    if not out.numel():
        return out
    num_tokens = x.numel() // hidden
    x, x_stride = rows(x)
    operands = (w_gate, w_up, w_down, b_gate, b_up, b_down)
    mlp = (
        tuple(map(matrix, operands)),
        tuple(scales(s, block) for s in (scale_gate, scale_up, scale_down)),
        intermediate,
        ACTIVATIONS[activation],
        UNLIMITED if limit is None else limit,
    )
    _cpu.moe_experts(
        (num_tokens, hidden, out_hidden, 0, 0),
        x.data_ptr(),
        x_stride,
        NOTHING,
        NOTHING,
        NO_MLPS,
        mlp,
        out.data_ptr(),
        NATIVE[x.dtype],
        fp8,
    )
    return out


def _check(
    x, w_gate, w_up, w_down, b_gate, b_up, b_down, activation, limit, scale_gate, scale_up, scale_down, block
) -> str | None:
    matrices = {"w_gate": (w_gate, scale_gate), "w_up": (w_up, scale_up), "w_down": (w_down, scale_down)}
    if reason := refuse_mixed(matrices, block):
        return reason
    if activation not in MLP_ACTIVATIONS:
        return f"computes {', '.join(MLP_ACTIVATIONS)}, got activation {activation}"
    if limit is not None and limit < 0:
        return f"needs a limit of 0 or more, got {limit}"
    hidden, (out_hidden, intermediate) = x.shape[-1], w_down.shape
    if 0 in (hidden, intermediate):
        return f"needs a hidden and an intermediate width, got {hidden} and {intermediate}"
    return check_weights(
        x.dtype,
        scale_gate is not None,
        {
            "w_gate": (w_gate, (intermediate, hidden)),
            "w_up": (w_up, (intermediate, hidden)),
            "w_down": (w_down, (out_hidden, intermediate)),
            "b_gate": (b_gate, (intermediate,)),
            "b_up": (b_up, (intermediate,)),
            "b_down": (b_down, (out_hidden,)),
        },
    )


KERNELS = (
    Kernel(
        "gated_mlp", "cpu", plan(gated_mlp), _check, device="cpu", dtypes=DTYPES, priority=20, records=True
    ),
)

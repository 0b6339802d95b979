"""Gated MLP in bfloat16: for few tokens the kernel of `moe_experts` with one expert, for many ATen's GEMMs."""

from __future__ import annotations

import torch

from dsopt.kernels.numba.moe_experts import add_mlp
from dsopt.kernels.numba.multi_linear import DTYPES, FEW_TOKENS, check_weight
from dsopt.kernels.torch.gated_mlp import gated_mlp as many_tokens
from dsopt.op import Kernel
from dsopt.ops.quant import refuse_scales


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
    *_,
) -> torch.Tensor:
    tokens = x.shape[:-1].numel()
    if tokens > FEW_TOKENS:
        return many_tokens(x, w_gate, w_up, w_down, b_gate, b_up, b_down, activation, limit)
    out = torch.zeros(tokens, w_down.shape[0])
    if out.numel():
        rows = x.reshape(tokens, x.shape[-1]).float().contiguous()
        biases = (b_gate, b_up, b_down)
        add_mlp(out, rows, w_gate, w_up, w_down, *biases, activation=activation, limit=limit)
    return out.to(x.dtype).view(*x.shape[:-1], w_down.shape[0])


def _check(
    x, w_gate, w_up, w_down, b_gate=None, b_up=None, b_down=None, activation="silu", limit=None, *scales_and_block
):  # fmt: skip
    if reason := refuse_scales(*scales_and_block[:-1]):
        return reason
    wide, narrow = (w_gate.shape[0], x.shape[-1]), (w_down.shape[0], w_gate.shape[0])
    operands = {"w_gate": (w_gate, wide), "w_up": (w_up, wide), "w_down": (w_down, narrow)}
    operands |= {"b_gate": (b_gate, wide[:1]), "b_up": (b_up, wide[:1]), "b_down": (b_down, narrow[:1])}
    reasons = (check_weight(name, w, x, shape) for name, (w, shape) in operands.items() if w is not None)
    return next(filter(None, reasons), None)


KERNELS = (
    Kernel("gated_mlp", "numba", lambda *_: gated_mlp, _check, device="cpu", dtypes=DTYPES, priority=10),
)

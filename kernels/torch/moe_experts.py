"""Experts through ATen: tokens sorted by expert, then GEMMs over each hit expert's rows.

Weights are read where they lie and only those of experts that some token chose.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from dsopt.op import Kernel
from dsopt.ops.experts import activate
from dsopt.ops.linear import gated_mlp_reference


def moe_experts(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    w3: torch.Tensor | None = None,
    b13: torch.Tensor | None = None,
    b2: torch.Tensor | None = None,
    b3: torch.Tensor | None = None,
    activation: str = "silu",
    gated: bool = True,
    interleaved: bool = False,
    limit: float | None = None,
    shared_gate: torch.Tensor | None = None,
    shared_up: torch.Tensor | None = None,
    shared_down: torch.Tensor | None = None,
) -> torch.Tensor:
    num_experts, topk = w13.shape[0], ids.shape[-1]
    out = torch.zeros(
        x.shape[0], w2.shape[1], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device
    )
    if shared_gate is not None:
        out += gated_mlp_reference(x, shared_gate, shared_up, shared_down)
    flat = ids.reshape(-1).long()
    flat, order = torch.where((flat < 0) | (flat > num_experts), num_experts, flat).sort(stable=True)
    counts = torch.bincount(flat, minlength=num_experts + 1)[:num_experts].tolist()
    tokens, weights = order // max(1, topk), weights.reshape(-1)[order].to(out.dtype).unsqueeze(-1)
    start = 0
    for e, count in enumerate(counts):
        if count == 0:
            continue
        rows = slice(start, start + count)
        start += count
        token = tokens[rows]
        picked = x[token]
        h = F.linear(picked, w13[e], None if b13 is None else b13[e])
        other = None if w3 is None else F.linear(picked, w3[e], None if b3 is None else b3[e])
        h = activate(h, other, activation, gated, interleaved, limit)
        y = F.linear(h, w2[e], None if b2 is None else b2[e])
        out.index_add_(0, token, y * weights[rows])
    return out.to(x.dtype)


KERNELS = (Kernel(op="moe_experts", backend="torch", plan=lambda *_: moe_experts, priority=1),)

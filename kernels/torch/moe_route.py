"""Choice of experts through ATen's top-k."""

from __future__ import annotations

import torch

from dsopt.op import Kernel
from dsopt.ops.route import GROUP_SCORES, SCORES


def moe_route(
    logits: torch.Tensor,
    topk: int,
    scoring: str = "softmax",
    bias: torch.Tensor | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    group_score: str = "max",
    outside: float | None = None,
    renormalize: bool = False,
    eps: float = 0.0,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = SCORES[scoring](logits.to(torch.promote_types(logits.dtype, torch.float32)))
    choice = scores if bias is None else scores + bias
    if topk_groups < num_groups:
        grouped = choice.unflatten(-1, (num_groups, choice.shape[-1] // num_groups))
        two = GROUP_SCORES[group_score] == 2 and grouped.shape[-1] > 1
        by_group = grouped.topk(2, -1).values.sum(-1) if two else grouped.amax(-1)
        chosen = _largest(by_group, topk_groups)
        inside = torch.zeros_like(by_group, dtype=torch.bool).scatter_(-1, chosen, True)
        never = float("-inf") if outside is None else outside
        choice = grouped.masked_fill(~inside.unsqueeze(-1), never).flatten(-2)
    ids = _largest(choice, topk)
    weights = scores.gather(-1, ids)
    if renormalize:
        weights /= weights.sum(-1, keepdim=True) + eps
    return weights.mul_(scale), ids


def _largest(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Indices of the k largest, equal ones in order of index, which torch.topk does not promise."""
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :k].contiguous()


KERNELS = (Kernel(op="moe_route", backend="torch", plan=lambda *_: moe_route, priority=1),)

"""Which experts a token goes to, and with what weights."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from dsopt.models.config import Config
from dsopt.models.layers import wide


class Router(nn.Module):
    """x (num_tokens, hidden_size) -> weights and ids, (num_tokens, num_experts_per_tok) each.

    greedy softmax (V2-Lite)   weights, ids = topk(softmax(x @ w^T)) * scale
    group-limited (V2)         the same with the scores outside the groups of highest maximum put out
    sigmoid (V3)               s = sigmoid(x @ w^T); ids = topk(s + bias) within the groups of highest sum of
                               their two best; weights = s[ids] / sum(s[ids]) * scale

    The scores are computed in at least float32; weights are of that dtype, ids int64.

    Source: DeepSeek-V2, arXiv 2405.04434, sections 2.2.1-2.2.2; DeepSeek-V3, arXiv 2412.19437, section 2.1.2.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.topk, self.groups, self.topk_groups = (
            config.num_experts_per_tok,
            config.n_group,
            config.topk_group,
        )
        self.renormalize, self.scale = config.norm_topk_prob, config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        nn.init.normal_(self.weight, std=0.02)
        sigmoid = config.scoring == "sigmoid"
        # balances the load in training without a gradient (V3, section 2.1.2)
        self.bias = nn.Buffer(torch.zeros(config.n_routed_experts)) if sigmoid else None

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = F.linear(wide(x), wide(self.weight))
        scores = logits.softmax(-1) if self.bias is None else logits.sigmoid()
        choice = scores if self.bias is None else scores + wide(self.bias)
        if self.groups > 1:
            choice = self._within_groups(choice)
        ids = choice.topk(self.topk, dim=-1).indices
        weights = scores.gather(-1, ids)
        if self.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights * self.scale, ids

    def _within_groups(self, choice: torch.Tensor) -> torch.Tensor:
        """`choice` with -inf outside the best groups."""
        grouped = choice.unflatten(-1, (self.groups, -1))
        by_group = grouped.amax(-1) if self.bias is None else grouped.topk(2, dim=-1).values.sum(-1)
        best = by_group.topk(self.topk_groups, dim=-1).indices
        outside = torch.ones_like(by_group, dtype=torch.bool).scatter(-1, best, False)
        return grouped.masked_fill(outside.unsqueeze(-1), float("-inf")).flatten(-2)

"""Expert layers in the spellings in use: stacked weights that trace as one graph, and loops over modules that do not.

Each takes x (num_tokens, hidden_size), weights and ids (num_tokens, topk) and returns
sum_k weights[t,k] * expert[ids[t,k]](x[t]) in x's shape and dtype; an expert is a gated MLP.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from dsopt.models.config import Config
from dsopt.models.layers import GatedMLP
from dsopt.models.router import Router


class StackedExperts(nn.Module):
    """All experts in two parameters: w13 (experts, 2 * intermediate, hidden), gate's rows first, and w2.

    bfloat16 sorts the tokens by expert and runs one grouped GEMM for each parameter. Any other dtype, for which
    PyTorch traces no grouped GEMM, gathers a copy of the weights for every (token, choice) pair and runs batched
    ones: for tests and few tokens.
    """

    def __init__(self, config: Config):
        super().__init__()
        experts, hidden, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.w13 = nn.Parameter(torch.empty(experts, 2 * inner, hidden))
        self.w2 = nn.Parameter(torch.empty(experts, hidden, inner))
        for weight in (self.w13, self.w2):
            nn.init.normal_(weight, std=0.02)

    def forward(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        spelling = self._grouped if x.dtype == torch.bfloat16 else self._gathered
        return spelling(x, weights, ids)

    def _grouped(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        topk, experts = ids.shape[-1], self.w13.shape[0]
        expert, order = ids.flatten().sort()
        # counted as floats, the only ones that histc takes on a CPU
        counts = torch.histc(expert.float(), bins=experts, min=0, max=experts - 1)
        ends = counts.cumsum(0, dtype=torch.int32)
        gate, up = torch._grouped_mm(x[order // topk], self.w13.mT, offs=ends).chunk(2, -1)
        y = torch._grouped_mm(F.silu(gate) * up, self.w2.mT, offs=ends)
        return _mix(y[order.argsort()], weights)

    def _gathered(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        expert = ids.flatten()
        pairs = x.repeat_interleave(ids.shape[-1], 0).unsqueeze(-1)
        gate, up = torch.bmm(self.w13[expert], pairs).chunk(2, 1)
        y = torch.bmm(self.w2[expert], F.silu(gate) * up).squeeze(-1)
        return _mix(y, weights)


def _mix(y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """(num_tokens * topk, hidden) of each choice -> (num_tokens, hidden), their sum by weight, in y's dtype."""
    mixed = y.view(*weights.shape, y.shape[-1]) * weights.unsqueeze(-1)
    return mixed.sum(1).to(y.dtype)


class SortedLoopExperts(nn.ModuleList):
    """A loop over runs of tokens sorted by expert, counted on the host: the code beside V2's and V3's checkpoints."""

    def __init__(self, config: Config):
        super().__init__(
            GatedMLP(config.hidden_size, config.moe_intermediate_size) for _ in range(config.n_routed_experts)
        )

    def forward(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        counts = ids.new_zeros((ids.shape[0], len(self))).scatter_(1, ids, 1).sum(0).cpu().numpy()
        order = ids.view(-1).argsort()
        tokens = x[order // ids.shape[1]]
        outputs, start = [], 0
        for expert, count in zip(self, counts, strict=True):
            if count == 0:
                continue
            end = start + count
            outputs.append(expert(tokens[start:end]))
            start = end
        sorted_outputs = torch.cat(outputs) if outputs else torch.empty_like(tokens)
        y = torch.empty_like(sorted_outputs)
        y[order] = sorted_outputs
        y = y.view(*ids.shape, x.shape[-1]).to(weights.dtype)
        return y.mul_(weights.unsqueeze(-1)).sum(1).to(x.dtype)


class WhereLoopExperts(nn.ModuleList):
    """A loop over experts that looks for its tokens: DeepSeek's inference code and transformers before 5."""

    def __init__(self, config: Config):
        super().__init__(
            GatedMLP(config.hidden_size, config.moe_intermediate_size) for _ in range(config.n_routed_experts)
        )

    def forward(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        y = torch.zeros_like(x, dtype=weights.dtype)
        counts = torch.bincount(ids.flatten(), minlength=len(self)).tolist()
        for e, expert in enumerate(self):
            if counts[e] == 0:
                continue
            token, choice = torch.where(ids == e)
            y[token] += expert(x[token]) * weights[token, choice, None]
        return y.to(x.dtype)


EXPERTS: dict[str, Callable[[Config], nn.Module]] = {
    "stacked": StackedExperts,
    "sorted_loop": SortedLoopExperts,
    "where_loop": WhereLoopExperts,
}


class MoE(nn.Module):
    """experts(x) by the router's choice, plus the shared experts, which are one gated MLP that every token passes.

    experts: a key of EXPERTS. Only "stacked" traces as one graph; the loops depend on the data.

    Source: DeepSeekMoE, arXiv 2401.06066, section 3.
    """

    def __init__(self, config: Config, experts: str = "stacked"):
        super().__init__()
        if experts not in EXPERTS:
            raise ValueError(f"experts must be one of {', '.join(EXPERTS)}, got {experts!r}")
        self.router = Router(config)
        self.experts = EXPERTS[experts](config)
        self.shared = GatedMLP(config.hidden_size, config.n_shared_experts * config.moe_intermediate_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., hidden_size) -> the same shape."""
        flat = x.reshape(-1, x.shape[-1])
        weights, ids = self.router(flat)
        return self.experts(flat, weights, ids).view(x.shape) + self.shared(x)

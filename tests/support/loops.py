"""Mixture-of-experts blocks that loop over their experts in Python, in the layouts models are written in."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

HIDDEN, INNER, EXPERTS, TOPK = 16, 12, 6, 2


class Gated(nn.Module):
    """down(act(one(x)) * two(x)), the linears under any names."""

    def __init__(self, inner=INNER, bias=False, names=("gate_proj", "up_proj", "down_proj"), act=F.silu):
        super().__init__()
        self.names, self.act = names, act
        for name, (a, b) in zip(names, ((HIDDEN, inner), (HIDDEN, inner), (inner, HIDDEN)), strict=True):
            self.add_module(name, nn.Linear(a, b, bias=bias))

    def forward(self, x):
        gate, up, down = (getattr(self, name) for name in self.names)
        return down(self.act(gate(x)) * up(x))


class Merged(nn.Module):
    """Gate and up in one linear."""

    def __init__(self):
        super().__init__()
        self.wi, self.wo = nn.Linear(HIDDEN, 2 * INNER, bias=False), nn.Linear(INNER, HIDDEN, bias=False)
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        gate, up = self.wi(x).chunk(2, dim=-1)
        return self.wo(self.drop(F.gelu(gate) * up))


class Plain(nn.Module):
    """No gate."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Linear(HIDDEN, INNER), nn.Linear(INNER, HIDDEN), nn.ReLU()

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Clamped(Gated):
    def forward(self, x):
        gate, up = self.gate_proj(x).clamp(max=0.3), self.up_proj(x).clamp(-0.3, 0.3)
        return self.down_proj(F.silu(gate) * up)


class Router(nn.Module):
    """Returns ids and weights, and perhaps something that is None in eval."""

    def __init__(self, extra=(), choices=EXPERTS):
        super().__init__()
        self.weight, self.extra = nn.Parameter(torch.randn(choices, HIDDEN)), extra

    def forward(self, x):
        wide = torch.promote_types(x.dtype, torch.float32)
        scores = F.linear(x.reshape(-1, HIDDEN).to(wide), self.weight.to(wide)).sigmoid()
        weights, ids = scores.topk(TOPK, dim=-1)
        return (ids, 1.7 * weights / weights.sum(-1, keepdim=True), *self.extra)


class Masked(nn.Module):
    """Every expert's tokens by a one-hot mask, in a method of its own; shared experts beside them."""

    def __init__(self, make=Gated, num_identity=0):
        super().__init__()
        mlps = [make() for _ in range(EXPERTS)]
        self.pool = nn.ModuleList([*mlps, *(nn.Identity() for _ in range(num_identity))])
        self.router = Router(choices=len(self.pool))
        self.common = Gated(2 * INNER)

    def mix(self, tokens, ids, weights):
        total = torch.zeros_like(tokens, dtype=weights.dtype)
        mask = F.one_hot(ids, num_classes=len(self.pool)).permute(2, 0, 1)
        for e in range(len(self.pool)):
            rows, slots = torch.where(mask[e])
            if rows.numel() > 0:
                total.index_add_(0, rows, self.pool[e](tokens[rows]) * weights[rows, slots].unsqueeze(-1))
        return total.type(tokens.dtype)

    def forward(self, x):
        ids, weights = self.router(x)
        y = self.mix(x.view(-1, x.shape[-1]), ids, weights).view(*x.shape)
        return y + self.common(x)


class Inline(nn.Module):
    """Softmax, top-k and a loop over the experts that were hit, all in one forward; the logits are returned too."""

    def __init__(self, make=Gated):
        super().__init__()
        self.route = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList([make() for _ in range(EXPERTS)])

    def forward(self, hidden):
        batch, length, width = hidden.shape
        tokens = hidden.view(-1, width)
        logits = self.route(tokens)
        weights, ids = torch.topk(F.softmax(logits.float(), dim=1), TOPK, dim=-1)
        weights /= weights.sum(dim=-1, keepdim=True)
        weights = weights.to(tokens.dtype)
        total = torch.zeros((batch * length, width), dtype=tokens.dtype, device=tokens.device)
        mask = F.one_hot(ids, num_classes=EXPERTS).permute(2, 1, 0)
        for e in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
            slot, row = torch.where(mask[e].squeeze(0))
            part = self.experts[e](tokens[None, row].reshape(-1, width)) * weights[row, slot, None]
            total.index_add_(0, row, part.to(tokens.dtype))
        return total.reshape(batch, length, width), logits


class Sorted(nn.Module):
    """Tokens sorted by expert and counted on the host, as checkpoints with code of their own do."""

    def __init__(self, extra=(None,), shared=True):
        super().__init__()
        self.experts = nn.ModuleList([Gated() for _ in range(EXPERTS)])
        self.gate = Router(extra)
        self.ranks, self.rank = 1, 0
        if shared:
            self.shared_experts = Gated(2 * INNER)

    def forward(self, x):
        kept, shape = x, x.shape
        ids, weights, *_ = self.gate(x)
        x = x.view(-1, x.shape[-1])
        if not self.training:
            y = self.infer(x, ids, weights).view(*shape)
        if hasattr(self, "shared_experts"):
            y = y + self.shared_experts(kept)
        return y

    @torch.no_grad()
    def infer(self, x, ids, weights):
        hits = ids.new_zeros((ids.shape[0], len(self.experts)))
        hits.scatter_(1, ids, 1)
        counts = hits.sum(dim=0)
        order = ids.view(-1).argsort()
        rows = x[order // ids.shape[1]]
        if self.ranks > 1:
            raise NotImplementedError
        parts, start = [], 0
        for i, count in enumerate(counts.cpu().numpy()):
            end = start + count
            if count == 0:
                continue
            parts.append(self.experts[i + self.rank * EXPERTS](rows[start:end]))
            start = end
        out = torch.cat(parts, dim=0) if len(parts) else rows.new_empty(0)
        back = torch.empty_like(out)
        back[order] = out
        y = back.view(*ids.shape, -1).type(weights.dtype).mul_(weights.unsqueeze(dim=-1)).sum(dim=1)
        return y.type(back.dtype)


class Pool(nn.ModuleList):
    """A list of experts that is itself called with tokens, ids and weights."""

    def __init__(self):
        super().__init__(Gated() for _ in range(EXPERTS))

    def forward(self, x, ids, weights):
        total = torch.zeros_like(x)
        mask = F.one_hot(ids, num_classes=EXPERTS).permute(2, 1, 0)
        for e in (mask.sum((-1, -2)) > 0).nonzero():
            slot, row = torch.where(mask[e[0]])
            part = self[e[0]](x[row]) * weights[row, slot, None]
            total.index_add_(0, row, part.to(x.dtype))
        return total


class Called(nn.Module):
    """A block around a module that is called with tokens, ids and weights."""

    def __init__(self, experts, choices=EXPERTS):
        super().__init__()
        self.experts, self.router = experts, Router(choices=choices)

    def forward(self, x):
        ids, weights = self.router(x)
        return self.experts(x.reshape(-1, HIDDEN), ids, weights).view(*x.shape)


class Stacked(nn.Module):
    """Stacked weights and a loop over the experts hit.

    act(gate, up): of the halves of the first product, or of its even and odd columns if interleaved.
    num_identity: how many ids after the experts' own hand back their input; w_in has rows for them too.
    """

    def __init__(
        self, transposed=False, bias=False, interleaved=False, num_identity=0, limit=None, alpha=None
    ):
        super().__init__()
        self.transposed, self.interleaved, self.limit, self.alpha = transposed, interleaved, limit, alpha
        self.num_experts, self.total = EXPERTS, EXPERTS + num_identity
        w_in, w_out = (self.total, 2 * INNER, HIDDEN), (EXPERTS, HIDDEN, INNER)
        swap = (lambda s: (s[0], s[2], s[1])) if transposed else (lambda s: s)
        self.w_in, self.w_out = nn.Parameter(torch.randn(swap(w_in))), nn.Parameter(torch.randn(swap(w_out)))
        if bias:
            self.c_in, self.c_out = (nn.Parameter(torch.randn(EXPERTS, n)) for n in (2 * INNER, HIDDEN))

    def linear(self, x, e, which):
        w = getattr(self, f"w_{which}")[e]
        y = x @ w if self.transposed else F.linear(x, w)
        return y + getattr(self, f"c_{which}")[e] if hasattr(self, f"c_{which}") else y

    def act(self, h):
        gate, up = (h[..., ::2], h[..., 1::2]) if self.interleaved else h.chunk(2, dim=-1)
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(min=-self.limit, max=self.limit)
        return F.silu(gate) * up if self.alpha is None else (up + 1) * gate * torch.sigmoid(gate * self.alpha)

    def forward(self, hidden, index, scores):
        total = torch.zeros_like(hidden)
        mask = F.one_hot(index, num_classes=self.total).permute(2, 1, 0)
        for e in (mask.sum(dim=(-1, -2)) > 0).nonzero():
            slot, row = torch.where(mask[e[0]])
            part = hidden[row]
            if e[0] < self.num_experts:
                part = self.linear(self.act(self.linear(part, e[0], "in")), e[0], "out")
            total.index_add_(0, row, (part * scores[row, slot, None]).to(total.dtype))
        return total

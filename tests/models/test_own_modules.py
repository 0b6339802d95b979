"""Models that a user writes, from blocks of dsopt.models and from scratch: one graph, every site matched."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dsopt
from dsopt.models import presets
from dsopt.models.config import Config
from dsopt.models.experts import MoE
from dsopt.models.mla import MLA
from dsopt.testing import relative_l2

HEADS, NOPE, ROPE, RANK, VALUE, HIDDEN, MAX_TOKENS = 4, 16, 8, 24, 12, 64, 20


class Parallel(nn.Module):
    """Attention and experts side by side under one norm, the tables of the rotation given from outside."""

    def __init__(self):
        super().__init__()
        config = Config.of(presets.tiny(presets.v3()), num_experts_per_tok=8, n_group=1, topk_group=1)
        self.scale = nn.Parameter(torch.rand(config.hidden_size) + 0.5)
        self.attention, self.experts = MLA(config, absorbed=True), MoE(config)
        angles = torch.outer(
            torch.arange(MAX_TOKENS), 100.0 ** -torch.linspace(0, 1, config.qk_rope_head_dim // 2)
        )
        self.register_buffer("angles", angles)
        self.register_buffer("causal", torch.ones(MAX_TOKENS, MAX_TOKENS, dtype=torch.bool).tril())

    def forward(self, x):
        tokens = x.shape[1]
        h = F.rms_norm(x, (x.shape[-1],), self.scale, 1e-6)
        angles = self.angles[:tokens]
        mask = self.causal[None, :tokens, :tokens]
        return x + self.attention(h, angles.cos(), angles.sin(), mask) + self.experts(h)


def rotate(x, table):
    """Pairs as complex numbers, times a table of unit ones."""
    pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * table).flatten(-2).type_as(x)


class FromScratch(nn.Module):
    """Attention absorbed by hand over a cache of its own, complex rotations, and a dense MLP."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(width, eps=1e-6) for width in (HIDDEN, RANK, HIDDEN))
        self.wq = nn.Linear(HIDDEN, HEADS * (NOPE + ROPE), bias=False)
        self.wkv = nn.Linear(HIDDEN, RANK + ROPE, bias=False)
        self.expand = nn.Parameter(torch.randn(HEADS, NOPE + VALUE, RANK) / RANK**0.5)
        self.wo = nn.Linear(HEADS * VALUE, HIDDEN, bias=False)
        self.w1, self.w3 = (nn.Linear(HIDDEN, 96, bias=False) for _ in range(2))
        self.w2 = nn.Linear(96, HIDDEN, bias=False)
        angles = torch.outer(torch.arange(MAX_TOKENS), 100.0 ** -torch.linspace(0, 1, ROPE // 2))
        self.register_buffer("table", torch.polar(torch.ones_like(angles), angles))
        self.register_buffer("kv", torch.zeros(2, MAX_TOKENS, RANK))
        self.register_buffer("pe", torch.zeros(2, MAX_TOKENS, ROPE))

    def forward(self, x, positions):
        h, table = self.norms[0](x), self.table[positions]
        q_nope, q_pe = self.wq(h).unflatten(-1, (HEADS, -1)).split([NOPE, ROPE], dim=-1)
        kv, pe = self.wkv(h).split([RANK, ROPE], dim=-1)
        self.kv.index_copy_(1, positions, self.norms[1](kv))
        self.pe.index_copy_(1, positions, rotate(pe, table))
        q_nope = torch.einsum("bshd,hdc->bshc", q_nope, self.expand[:, :NOPE])
        q_pe = rotate(q_pe, table.unsqueeze(1))
        scores = torch.einsum("bshc,btc->bsht", q_nope, self.kv) + torch.einsum(
            "bshr,btr->bsht", q_pe, self.pe
        )
        future = torch.arange(MAX_TOKENS, device=x.device) > positions.unsqueeze(-1)
        scores += torch.zeros_like(future, dtype=x.dtype).masked_fill(future, float("-inf")).unsqueeze(1)
        weights = scores.softmax(dim=-1, dtype=torch.float32).type_as(x)
        out = torch.einsum("bsht,btc->bshc", weights, self.kv)
        out = torch.einsum("bshc,hdc->bshd", out, self.expand[:, -VALUE:])
        x = x + self.wo(out.flatten(2))
        h = self.norms[2](x)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))


@pytest.mark.parametrize(
    ("model", "sites"),
    [
        (Parallel, {"mla": 1, "moe": 1, "router": 1, "norm": 3, "rope": 2, "mlp": 1}),
        (FromScratch, {"mla": 1, "norm": 3, "rope": 2, "mlp": 1}),
    ],
)
@torch.inference_mode()
def test_every_site_is_matched(model, sites):
    model = model().eval()
    eager, fast = (
        copy.deepcopy(model),
        torch.compile(model, backend="dsopt", fullgraph=True, options={"strict": True}),
    )
    x = torch.randn(2, 5, HIDDEN)
    args = (x,) if isinstance(model, Parallel) else (x, torch.arange(5))
    assert relative_l2(fast(*args), eager(*args)) < 1e-5
    if isinstance(model, FromScratch):
        for position in (5, 6):
            args = torch.randn(2, 1, HIDDEN), torch.tensor([position])
            assert relative_l2(fast(*args), eager(*args)) < 1e-5
        assert relative_l2(model.kv, eager.kv) < 1e-5
    report = dsopt.report(model)
    assert report.graphs and not report.fallbacks
    for graph in report.graphs:
        matched = {family: n for family, n in graph.matched().items() if n != (0, 0)}
        assert matched == {family: (n, n) for family, n in sites.items()}, graph.to_dict()

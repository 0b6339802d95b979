"""What every DeepSeek model shares: RMS norm, gated MLP, rotary embedding with YaRN."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from dsopt.models.config import Config


def wide(x: torch.Tensor) -> torch.Tensor:
    """x in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dim, in float32 up to the weight."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = wide(x)
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * h.to(x.dtype)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)); three linear layers without bias."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def rope_frequencies(config: Config, device: torch.device | str | None = None) -> torch.Tensor:
    """(qk_rope_head_dim / 2,) float32: the angle by which each pair turns from one position to the next.

    theta^(-2i/dim), and under YaRN divided by `factor` where a pair turns less than beta_slow times in the
    original context, undivided above beta_fast times, and on a ramp in between.

    Source: RoFormer, arXiv 2104.09864; YaRN, arXiv 2309.00071, section 3.2.
    """
    dim, rope = config.qk_rope_head_dim, config.rope
    theta = rope["rope_theta"]
    plain = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
    if "factor" not in rope:
        return plain

    def pair_that_turns(times: float) -> float:
        context = rope["original_max_position_embeddings"]
        return dim * math.log(context / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(rope["beta_fast"])), 0)
    high = min(math.ceil(pair_that_turns(rope["beta_slow"])), dim - 1)
    pairs = torch.arange(dim // 2, dtype=torch.float32, device=device)
    ramp = ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)
    return plain / rope["factor"] * ramp + plain * (1 - ramp)


class Rope(nn.Module):
    """positions (num_tokens,) -> cosines and sines, (num_tokens, qk_rope_head_dim / 2) each, float32."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.register_buffer("frequencies", rope_frequencies(config), persistent=False)

    def _apply(self, fn, recurse=True):
        # a cast of the model must not round the frequencies, nor `to_empty` lose them
        super()._apply(fn, recurse)
        self.frequencies = rope_frequencies(self.config, self.frequencies.device)
        return self

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = positions.to(self.frequencies.dtype).unsqueeze(-1) * self.frequencies
        return angles.cos() * self.config.rope_scale, angles.sin() * self.config.rope_scale


def rotate_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates (x[2i], x[2i+1]) of the last dim in place of themselves; cos and sin broadcast to (..., dim / 2)."""
    h = wide(x)
    a, b = h[..., 0::2], h[..., 1::2]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2).to(x.dtype)


def rotate_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As `rotate_pairs` for the pairs (x[i], x[i + dim / 2])."""
    a, b = wide(x).chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)

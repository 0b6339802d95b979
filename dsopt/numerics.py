"""Seeded random tensors, and how far two results are apart."""

from __future__ import annotations

from collections.abc import Callable

import torch


def rand(device: torch.device | str, dtype: torch.dtype, seed: int = 0) -> Callable[..., torch.Tensor]:
    """A function of sizes returning normal random tensors, the same sequence for the same seed and dtype."""
    generator = torch.Generator("cpu").manual_seed(seed)

    def sample(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

    return sample


def relative_l2(got: torch.Tensor, want: torch.Tensor) -> float:
    """|got - want| / |want| in float64; 0 for two empty or zero tensors, inf where got has NaN or inf."""
    got, want = got.double(), want.double()
    if not torch.isfinite(got).all():
        return float("inf")
    error, norm = (got - want).norm().item(), want.norm().item()
    return error / norm if norm else error

"""Root-mean-square normalisation, alone and behind a residual add."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dsopt.numerics import rand
from dsopt.op import Op


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """x * rsqrt(mean(x^2, -1) + eps) * weight, computed in at least float32 and rounded once.

    x (..., hidden) of any strides; weight (hidden,) of x's dtype or None. Returns x's shape and dtype,
    contiguous. Source: Zhang and Sennrich, arXiv 1910.07467.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    out = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        out = out * weight.to(wide.dtype)
    return out.to(x.dtype, copy=True).contiguous()


def add_rms_norm_reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(total, weight, eps), total) with total = x + residual rounded to x's dtype.

    x and residual (..., hidden) of one shape and dtype, any strides. Both results are contiguous.
    """
    total = (x + residual).contiguous()
    return rms_norm_reference(total, weight, eps), total


def _inputs(
    device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None, float]]:
    r = rand(device, dtype)
    for shape in ((1, 1, 2048), (2, 3, 80), (7, 1), (5, 4001), (4, 17), (0, 64), (3, 0, 8)):
        yield r(*shape), r(shape[-1]), 1e-6
    yield r(2, 5, 64), None, 1e-5
    yield r(3, 200)[:, 7:71], r(64), 1e-6
    yield r(2, 64, 6).transpose(1, 2), r(64), 1e-6
    yield r(6, 130)[::2, 1::2], r(130)[::2], 1e-6
    yield r(2, 256) * 1e-4, r(256), 1e-6
    yield r(2, 256) * 200, r(256), 1e-6
    yield torch.zeros(2, 32, device=device, dtype=dtype), r(32), 1e-6


def _rms_norm_samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple]:
    yield from _inputs(device, dtype)


def _add_rms_norm_samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple]:
    for seed, (x, weight, eps) in enumerate(_inputs(device, dtype)):
        yield x, rand(device, dtype, seed + 1)(*x.shape), weight, eps


rms_norm = Op(
    name="rms_norm",
    schema="(Tensor x, Tensor? weight, float eps) -> Tensor",
    reference=rms_norm_reference,
    samples=_rms_norm_samples,
    family="norm",
)
add_rms_norm = Op(
    name="add_rms_norm",
    schema="(Tensor x, Tensor residual, Tensor? weight, float eps) -> (Tensor, Tensor)",
    reference=add_rms_norm_reference,
    samples=_add_rms_norm_samples,
    family="norm",
)

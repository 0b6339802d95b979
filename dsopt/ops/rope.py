"""Rotary position embedding."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dsopt.numerics import rand
from dsopt.op import Op


def rope_reference(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved_in: bool, interleaved_out: bool
) -> torch.Tensor:
    """Rotates pairs of x: (a, b) -> (a * cos - b * sin, b * cos + a * sin).

    x (..., dim). The pairs are (x[2i], x[2i+1]) if `interleaved_in`, else (x[i], x[i + dim/2]); the results
    are laid out likewise by `interleaved_out`. DeepSeek-V3 in transformers reads interleaved and writes halves.
    cos, sin: broadcastable to (..., dim/2), or to (..., dim), whose first half then serves a' and second half b'.
    Computed in at least float32, returned in x's shape and dtype, contiguous.
    Source: RoFormer, arXiv 2104.09864.
    """
    half = x.shape[-1] // 2
    wide = torch.promote_types(x.dtype, torch.float32)
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved_in else (x[..., :half], x[..., half:])
    a, b, cos, sin = a.to(wide), b.to(wide), cos.to(wide), sin.to(wide)
    split = cos.shape[-1] != half
    cos_a, cos_b = (cos[..., :half], cos[..., half:]) if split else (cos, cos)
    sin_a, sin_b = (sin[..., :half], sin[..., half:]) if split else (sin, sin)
    out_a, out_b = a * cos_a - b * sin_a, b * cos_b + a * sin_b
    out = torch.stack((out_a, out_b), -1).flatten(-2) if interleaved_out else torch.cat((out_a, out_b), -1)
    return out.to(x.dtype).contiguous()


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple]:
    r = rand(device, dtype)

    def table(*shape):
        angle = r(*shape).double() * 100
        return angle.cos(), angle.sin()

    for layout in ((False, False), (True, False), (True, True)):
        for batch, heads, tokens, dim in (
            (1, 5, 1, 64),
            (2, 3, 7, 16),
            (1, 1, 4, 2),
            (2, 4, 0, 8),
            (0, 4, 3, 8),
        ):
            for width in (dim, dim // 2):
                cos, sin = table(1, 1, tokens, width)
                x = r(batch, tokens, heads, dim + 3)[..., 3:].transpose(1, 2)
                yield (x, cos.to(dtype), sin.to(dtype), *layout)
                yield (x, cos.float(), sin.float(), *layout)
        cos, sin = table(2, 5, 1, 4)
        yield (r(2, 5, 3, 8), cos.to(dtype), sin.to(dtype), *layout)


rope = Op(
    name="rope",
    schema="(Tensor x, Tensor cos, Tensor sin, bool interleaved_in, bool interleaved_out) -> Tensor",
    reference=rope_reference,
    samples=_samples,
    family="rope",
)

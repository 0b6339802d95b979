"""RoPE through ATen: six pointwise calls over the tables' own dtype promoted to float32."""

from __future__ import annotations

import torch

from dsopt.op import Kernel


def rope(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved_in: bool, interleaved_out: bool
) -> torch.Tensor:
    half = x.shape[-1] // 2
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    a, b = (wide[..., 0::2], wide[..., 1::2]) if interleaved_in else (wide[..., :half], wide[..., half:])
    cos_a = cos_b = cos
    sin_a = sin_b = sin
    if cos.shape[-1] != half:
        cos_a, cos_b, sin_a, sin_b = cos[..., :half], cos[..., half:], sin[..., :half], sin[..., half:]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    to_a, to_b = (out[..., 0::2], out[..., 1::2]) if interleaved_out else (out[..., :half], out[..., half:])
    to_a.copy_(torch.addcmul(a * cos_a, b, sin_a, value=-1))
    to_b.copy_(torch.addcmul(b * cos_b, a, sin_b))
    return out


KERNELS = (Kernel(op="rope", backend="torch", plan=lambda *_: rope, priority=1),)

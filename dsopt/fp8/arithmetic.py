"""The arithmetic of FP8 in one place: scales, rounding, saturation.

Everything is computed in float32 in the order that DeepSeek published (`inference/kernel.py` of DeepSeek-V3 and -V3.2,
`act_quant` and `weight_dequant`):

    amax = max |x| over a block, but at least 1e-4
    scale = amax / 448;  ue8m0: the next power of two that is not below it
    q = e4m3(clamp(x / scale, -448, 448)), rounded to nearest, ties to even
    x ~ float32(q) * scale, rounded to the result's dtype once
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from dsopt.fp8.formats import FP8Block, FP8Group, FP8Row

E4M3_MAX = 448.0
# DeepSeek's floor: a block of zeros has a scale, too, that is neither zero nor subnormal
AMAX_FLOOR = 1e-4
# elements that are widened at a time, so that a large weight is never there in float32
_STRIP = 1 << 22


def scale_shape(shape: Sequence[int], block: Sequence[int]) -> tuple[int, ...]:
    """The shape of the scales of a tensor (..., N, K): (..., ceil(N / rows), ceil(K / columns))."""
    *leading, n, k = shape
    rows, columns = block
    return (*leading, -(-n // rows), -(-k // columns))


def check_scale(weight: torch.Tensor, scale: torch.Tensor, block: Sequence[int], name: str = "scale") -> None:
    """Raises ValueError unless `scale` has one number for each block of `weight`, partial blocks included."""
    if len(block) != 2 or min(block) < 1:
        raise ValueError(f"block must be two numbers above 0, got {list(block)}")
    if weight.ndim < 2:
        raise ValueError(f"a tensor with scales needs two dimensions or more, got shape {list(weight.shape)}")
    want = scale_shape(weight.shape, block)
    if tuple(scale.shape) != want:
        raise ValueError(
            f"{name} must have shape {list(want)} for a tensor {list(weight.shape)} in blocks of {list(block)}, "
            f"got {list(scale.shape)}"
        )


def quantize(x: torch.Tensor, format: FP8Block | FP8Group | FP8Row) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight, scale) of a tensor (..., N, K), each block of its last two dimensions scaled to fill e4m3.

    x: of any float dtype that float32 holds. Blocks at the lower and right edge may be partial.
    Returns weight (..., N, K), float8_e4m3fn, contiguous, and scale (..., ceil(N / rows), ceil(K / columns)),
    float32, or float8_e8m0fnu for "ue8m0". Raises TypeError for a dtype that is not float, ValueError for fewer than
    two dimensions and for elements that are not finite in float32.
    """
    if not isinstance(format, (FP8Block, FP8Group, FP8Row)):
        raise TypeError(f"format must be FP8Block, FP8Group or FP8Row, got {format!r}")
    if x.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"x must be float64, float32, bfloat16 or float16, got {x.dtype}")
    if x.ndim < 2:
        raise ValueError(f"x must have two dimensions or more, got shape {list(x.shape)}")
    x = x.detach()
    block = format.block_of(x.shape)
    weight = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(scale_shape(x.shape, block), dtype=format.scale_dtype, device=x.device)
    if x.numel() == 0:
        return weight, scale
    n, k = x.shape[-2:]
    rows = block[0] * max(1, _STRIP // (block[0] * k))
    for at in itertools.product(*map(range, x.shape[:-2])):
        for start in range(0, n, rows):
            strip = slice(start, start + rows)
            blocks = slice(start // block[0], -(-min(n, start + rows) // block[0]))
            part = x[(*at, strip)].float()
            if not is_finite(part):
                raise ValueError(
                    "x holds NaN or infinity, or a number beyond float32, and cannot be quantized"
                )
            weight[(*at, strip)], scale[(*at, blocks)] = quantize_matrix(part, format)
    return weight, scale


def is_finite(x: torch.Tensor) -> bool:
    """Whether all elements are finite, without a temporary of x's size."""
    return x.numel() == 0 or all(math.isfinite(extreme.item()) for extreme in torch.aminmax(x))


def quantize_matrix(
    x: torch.Tensor, format: FP8Block | FP8Group | FP8Row
) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize` of a matrix (N, K) in float32 that is not asked whether it is finite, so that it can be traced.

    What is not finite makes its block's scale infinite or NaN, and reads as NaN.
    """
    n, k = x.shape
    block = format.block_of(x.shape)
    rows, columns = block
    partial = -n % rows or -k % columns
    padded = F.pad(x, (0, -k % columns, 0, -n % rows)) if partial else x
    blocked = padded.reshape(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
    amax = blocked.abs().amax((1, 3)).clamp(min=AMAX_FLOOR)
    scale = amax / E4M3_MAX
    if format.scale_fmt == "ue8m0":
        scale = power_of_two(scale)
    q = (blocked / scale[:, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX)
    weight = q.reshape(padded.shape)[:n, :k].to(torch.float8_e4m3fn)
    return weight, scale.to(format.scale_dtype)


def power_of_two(scale: torch.Tensor) -> torch.Tensor:
    """The smallest power of two that is not below each positive normal float32, by its bits.

    The exponent goes up by one where any bit of the fraction is set; a logarithm could round to the wrong side.
    """
    bits = scale.view(torch.int32)
    up = (bits & 0x7FFFFF).ne(0).to(torch.int32)
    return (((bits >> 23) + up) << 23).view(torch.float32)


def dequantize(
    weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, block: Sequence[int] = (128, 128)
) -> torch.Tensor:
    """weight[..., i, j] * scale[..., i // rows, j // columns], the product in float32, rounded to dtype once.

    weight (..., N, K), float8_e4m3fn, any strides; scale (..., ceil(N / rows), ceil(K / columns)), float32, or
    float8_e8m0fnu, whose numbers are powers of two. A wider weight or scale is taken as it is, and a scale in
    float64 makes the product one in float64. Returns (..., N, K), contiguous. Raises ValueError for a scale of
    another shape.
    """
    check_scale(weight, scale, block)
    wide = torch.promote_types(torch.float32, scale.dtype) if scale.dtype.itemsize > 1 else torch.float32
    by_element = repeat_scale(scale.to(wide), weight.shape, block)
    return (weight.to(wide) * by_element).to(dtype).contiguous()


def repeat_scale(scale: torch.Tensor, shape: Sequence[int], block: Sequence[int]) -> torch.Tensor:
    """The scale of each element of a tensor of this shape."""
    n, k = shape[-2:]
    rows = torch.arange(n, device=scale.device) // block[0]
    columns = torch.arange(k, device=scale.device) // block[1]
    return scale[..., rows, :][..., columns]

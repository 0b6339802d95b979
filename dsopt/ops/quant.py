"""Reading what is kept in FP8."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from dsopt.fp8 import FP8Block, FP8Group, FP8Row, arithmetic, quantize
from dsopt.numerics import rand
from dsopt.op import Op


def dequantize_reference(
    weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, block: Sequence[int] = (128, 128)
) -> torch.Tensor:
    """weight[..., i, j] * scale[..., i // rows, j // columns], rounded to dtype once; block = (rows, columns).

    weight (..., N, K), float8_e4m3fn; scale (..., ceil(N / rows), ceil(K / columns)), float32 or float8_e8m0fnu.
    Returns (..., N, K) of dtype, contiguous. See `dsopt.fp8.dequantize`.

    Source: DeepSeek-V3, arXiv 2412.19437, section 3.3.2.
    """
    return arithmetic.dequantize(weight, scale, dtype, block)


def widened(
    weight: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype, block: Sequence[int]
) -> torch.Tensor:
    """The weight itself, or the dequantized one where it has a scale."""
    return weight if scale is None else arithmetic.dequantize(weight, scale, dtype, block)


def refuse_scales(*scales: torch.Tensor | Sequence[torch.Tensor | None] | None) -> str | None:
    """Why a kernel that reads no FP8 refuses these scales of its operands, or None if there are none."""
    given = any(s is not None for x in scales for s in (x if isinstance(x, (list, tuple)) else [x]))
    return "reads no operands in FP8, got one with scales" if given else None


def fp8_operands(
    weights: Sequence[torch.Tensor], format: FP8Block
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[int]]:
    """Weights quantized, their scales, and the block: what samples with FP8 operands are made of."""
    pairs = [quantize(w, format) for w in weights]
    return [w for w, _ in pairs], [s for _, s in pairs], [format.rows, format.columns]


def _fake(weight, scale, dtype, block=(128, 128)):
    return weight.new_empty(weight.shape, dtype=dtype)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple]:
    r = rand(device, dtype)
    small = FP8Block(rows=16, columns=8)
    for shape, format in (
        ((24, 24), small),
        ((128, 256), FP8Block()),
        ((131, 257), FP8Block("ue8m0")),
        ((3, 33, 19), small),
        ((2, 3, 140), FP8Group()),
        ((5, 40), FP8Row("ue8m0")),
        ((0, 16), small),
        ((2, 0, 16), small),
    ):
        yield (*quantize(r(*shape), format), dtype, list(format.block_of(shape)))
    # every code, and rows of a stack taken out of its middle
    codes = torch.arange(256, device=device).to(torch.uint8)
    codes = codes[(codes & 127) != 127].view(torch.float8_e4m3fn)
    yield codes.view(2, 127), r(1, 1).float().abs(), dtype, [128, 128]
    weight, scale = quantize(r(3, 64, 24), small)
    yield weight[1:, 16:48], scale[1:, 1:3], dtype, [16, 8]


dequantize = Op(
    name="dequantize",
    schema="(Tensor weight, Tensor scale, ScalarType dtype, int[2] block=[128, 128]) -> Tensor",
    reference=dequantize_reference,
    samples=_samples,
    # a kernel's product is exact but for one rounding in float32, and another to dtype
    tolerance=dict.fromkeys((torch.float8_e4m3fn, torch.float32, torch.bfloat16, torch.float16), 1e-4),
    fake=_fake,
)

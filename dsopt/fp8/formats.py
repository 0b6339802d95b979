"""How FP8 tensors are scaled: which elements share one scale, and what the scale is kept as."""

from __future__ import annotations

from dataclasses import dataclass

import torch

SCALE_DTYPES = {"float32": torch.float32, "ue8m0": torch.float8_e8m0fnu}


@dataclass(frozen=True)
class _Format:
    """e4m3 elements, `torch.float8_e4m3fn`, and one scale for each block of the last two dimensions.

    scale_fmt: "float32", or "ue8m0": powers of two, kept as their exponents in `torch.float8_e8m0fnu`.
    """

    scale_fmt: str = "float32"

    def __post_init__(self):
        if self.scale_fmt not in SCALE_DTYPES:
            raise ValueError(f"scale_fmt must be one of {', '.join(SCALE_DTYPES)}, got {self.scale_fmt!r}")

    @property
    def scale_dtype(self) -> torch.dtype:
        return SCALE_DTYPES[self.scale_fmt]

    def block_of(self, shape: torch.Size | tuple[int, ...]) -> tuple[int, int]:
        """(rows, columns) of the blocks of a tensor of this shape."""
        raise NotImplementedError


def _positive(**sizes: object) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name} must be a whole number above 0, got {size!r}")


@dataclass(frozen=True)
class FP8Block(_Format):
    """One scale for a block of `rows` x `columns`: how DeepSeek-V3 keeps its weights.

    Source: DeepSeek-V3, arXiv 2412.19437, section 3.3.2; ue8m0 scales are those of DeepSeek-V3.1.
    """

    rows: int = 128
    columns: int = 128

    def __post_init__(self):
        super().__post_init__()
        _positive(rows=self.rows, columns=self.columns)

    def block_of(self, shape):
        return self.rows, self.columns


@dataclass(frozen=True)
class FP8Group(_Format):
    """One scale for `columns` neighbours of a row: DeepSeek-V3's activations, and latents in a cache.

    Source: DeepSeek-V3, arXiv 2412.19437, section 3.3.2.
    """

    columns: int = 128

    def __post_init__(self):
        super().__post_init__()
        _positive(columns=self.columns)

    def block_of(self, shape):
        return 1, self.columns


@dataclass(frozen=True)
class FP8Row(_Format):
    """One scale for each row, whatever its length."""

    def block_of(self, shape):
        return 1, max(1, shape[-1])

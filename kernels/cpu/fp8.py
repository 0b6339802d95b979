"""How the native kernels are handed weights in FP8: their scales, as native code takes them, and when it does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from dsopt.capture import known

# address, elements from one matrix to the next and from one row of blocks to the next, a block's rows and columns,
# whether they are exponents
Scales = tuple[int, int, int, int, int, int]
UNSCALED: Scales = (0, 0, 0, 1, 1, 0)


def scales(scale: torch.Tensor | None, block: Sequence[int], row: int = 0) -> Scales:
    """The scales of a matrix or a stack of them from one row of weights on, where a block starts."""
    if scale is None:
        return UNSCALED
    rows, columns = block
    per_matrix = scale.stride(0) if scale.ndim == 3 else 0
    offset = row // rows * scale.stride(-2) * scale.element_size()
    return (
        scale.data_ptr() + offset, per_matrix, scale.stride(-2), rows, columns,
        int(scale.dtype == torch.float8_e8m0fnu),
    )  # fmt: skip


def refuse_mixed(
    matrices: Mapping[str, tuple[torch.Tensor | None, torch.Tensor | None]], block: Sequence[int]
) -> str | None:
    """Why matrices in FP8 are not read where they lie, or None; also None if no matrix has scales.

    matrices: name -> weight or None, and its scales or None.
    """
    given = {name: pair for name, pair in matrices.items() if pair[0] is not None}
    plain = [name for name, (_, scale) in given.items() if scale is None]
    if len(plain) == len(given):
        return None
    if plain:
        return f"reads all matrices in FP8 or none, got {', '.join(plain)} without scales"
    for name, (w, scale) in given.items():
        if w.dtype != torch.float8_e4m3fn:
            return f"needs {name} in FP8 to be float8_e4m3fn, got {w.dtype}"
        if scale.dtype not in (torch.float32, torch.float8_e8m0fnu) or scale.device.type != "cpu":
            got = f"{scale.dtype} on {scale.device}"
            return f"needs FP8 scales of {name} in float32 or float8_e8m0fnu on the CPU, got {got}"
        wanted = (*w.shape[:-2], *(-(-n // size) for n, size in zip(w.shape[-2:], block, strict=True)))
        if len(wanted) != scale.ndim or any(known(a != b) for a, b in zip(scale.shape, wanted, strict=True)):
            return f"needs FP8 scales of {name} of shape {list(wanted)}, got {list(scale.shape)}"
        if scale.stride(-1) != 1 and scale.shape[-1] != 1:
            return f"needs dense rows of the scales of {name}, got strides {scale.stride()}"
    return None

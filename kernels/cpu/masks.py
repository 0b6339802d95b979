"""Attention masks as the native kernels take them."""

from __future__ import annotations

import torch

from dsopt.capture import known
from dsopt.kernels.cpu.native import _cpu, spread

_KINDS = {
    torch.bool: _cpu.Mask.boolean,
    torch.float32: _cpu.Mask.float32,
    torch.bfloat16: _cpu.Mask.bfloat16,
}
_HIDDEN = -1e30  # a finite value at or below this is some dtype's lowest: it hides a key
_NONE = None, (0, 0, 0, 0), _cpu.Mask.none, _HIDDEN


def native_mask(
    mask: torch.Tensor | None, wanted: tuple[int, int, int, int]
) -> tuple[torch.Tensor | None, tuple[int, ...], _cpu.Mask, float]:
    """The mask in a native dtype with dense rows, its strides, its kind, and the value up to which it hides a key.

    wanted: (batch, heads or 1, tokens, cached). Raises ValueError for a mask that does not broadcast to that, or of
    another kind than bool and float.
    """
    if mask is None:
        return _NONE
    kind = mask.dtype == torch.bool or mask.dtype.is_floating_point
    strides = spread(mask, wanted)
    if not kind or not mask.is_cpu or strides is None:
        raise ValueError(
            f"mask must be bool or float and broadcast to {list(wanted)}, got {list(mask.shape)} of {mask.dtype}"
        )
    hidden = _HIDDEN
    native = mask
    if mask.dtype == torch.float16:
        hidden = torch.finfo(torch.float16).min
        native = mask.float()
    elif mask.dtype == torch.float64:
        # float64's lowest value would turn into -inf, which means something else
        lowest = torch.finfo(torch.float32).min
        native = torch.where(mask == float("-inf"), mask, mask.clamp(min=lowest)).float()
    if wanted[3] > 1 and strides[3] != 1:
        native = native.expand(wanted).contiguous()
    if native is not mask:
        strides = spread(native, wanted)
    return native, strides, _KINDS[native.dtype], hidden


def check_mask(mask: torch.Tensor | None, q: torch.Tensor, heads: int) -> str | None:
    """Why a mask is not one for q's device and for so many heads (1 for one mask for all); None if it is."""
    if mask is None:
        return None
    if mask.device != q.device:
        return f"needs a mask on {q.device}, got {mask.device}"
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        return f"needs a bool or float mask, got {mask.dtype}"
    if mask.ndim >= 3 and not any(known(mask.shape[-3] == n) for n in (1, heads)):
        return "needs one mask for all heads" if heads == 1 else f"needs a mask for 1 or {heads} heads"
    return None

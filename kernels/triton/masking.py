"""Masks of attention and the softmax under them: what a query may see is found once, ahead of the kernel that uses it.

What a mask lacks of (batch, new, cached) is expanded by strides of 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dsopt.capture import known

NONE, BOOL, ADDED = 0, 1, 2
# a finite value at or below this is some dtype's lowest, which hides a key
_HIDDEN = -1e30
# elements between rows of a mask from which offsets inside a block of 128 queries need more than 32 bits
_FAR = 2**23


class Mask(NamedTuple):
    """A mask as kernels read it.

    kind: NONE, BOOL (values of 0 hide) or ADDED (to the scores). values (batch, new, cached): uint8 or float, or None.
    ranges (batch, new, 2): the first visible key of each query and the one after the last, or None.
    """

    kind: int = NONE
    values: torch.Tensor | None = None
    ranges: torch.Tensor | None = None

    @property
    def strides(self) -> tuple[int, ...]:
        """Of values in all dimensions, of ranges in the first two."""
        if self.values is None or self.ranges is None:
            return (0,) * 5
        return *self.values.stride(), *self.ranges.stride()[:2]


@triton.jit(do_not_specialize=["cached"])
def ranges_kernel(
    mask, ranges, cached, hidden, mask_batch, mask_query, mask_key, KIND: tl.constexpr, BLOCK: tl.constexpr
):
    """ranges[batch, query] = (first visible key, last + 1), or (cached, 0) where all are hidden.

    A row of an additive mask that hides every key by a finite value spreads its weight over all of them: it sees all.
    """
    query, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    mask += batch * mask_batch + query * mask_query
    first = tl.zeros((BLOCK,), tl.int32) + cached
    end = tl.zeros((BLOCK,), tl.int32)
    finite = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, cached, BLOCK):
        key = start + tl.arange(0, BLOCK)
        value = tl.load(mask + key.to(tl.int64) * mask_key, mask=key < cached, other=0)
        if KIND == 1:
            seen = (value != 0) & (key < cached)
        else:
            value = value.to(tl.float32)
            # not <=, so that NaN counts as seen
            seen = (value > hidden) | (value != value)
            finite |= ((value > float("-inf")) & (key < cached)).to(tl.int32)
            seen = seen & (key < cached)
        first = tl.where(seen & (key < first), key, first)
        end = tl.where(seen, key + 1, end)
    low, high = tl.min(first, 0), tl.max(end, 0)
    if KIND == 2:
        spread = (high == 0) & (tl.max(finite, 0) > 0)
        low, high = tl.where(spread, 0, low), tl.where(spread, cached, high)
    out = ranges + (batch * tl.num_programs(0) + query) * 2
    tl.store(out, low)
    tl.store(out + 1, high)


@triton.jit
def hide(scores, mask, mask_query, mask_key, query, key, present, KIND: tl.constexpr):
    """Scores (queries, keys) with the mask added, -inf for keys that are hidden or not present.

    mask: at key 0 of the block's first query, from which `query` counts: (queries,), or (1,) where all share a row.
    """
    seen = present[None, :]
    if KIND != 0:
        # 32 bits are enough from a block's first query, and 64 cost registers
        value = tl.load(mask + (query[:, None] * mask_query + key[None, :] * mask_key), mask=seen, other=0)
        if KIND == 1:
            seen = seen & (value != 0)
        else:
            scores += value.to(tl.float32)
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def soften(scores, largest, total):
    """One step of softmax over keys in blocks: (weights, factor of what was summed before, largest, total).

    largest (queries,) begins at -inf, total (queries,) at 0; rows that have seen nothing yet give weights 0, not NaN.
    """
    new = tl.maximum(largest, tl.max(scores, 1))
    base = tl.where(new == float("-inf"), 0.0, new)
    weights = tl.exp(scores - base[:, None])
    factor = tl.exp(largest - base)
    return weights, factor, new, total * factor + tl.sum(weights, 1)


def prepare_mask(mask: torch.Tensor | None, batch: int, new: int, cached: int) -> Mask:
    """The op's mask for kernels, with the keys that each of its rows lets a query see."""
    if mask is None:
        return Mask()
    hidden = max(_HIDDEN, torch.finfo(mask.dtype).min) if mask.is_floating_point() else 0.0
    if mask.dtype == torch.float64:
        # float64's lowest value would turn into -inf, which means something else
        mask = torch.where(
            mask == float("-inf"), mask, mask.clamp(min=torch.finfo(torch.float32).min)
        ).float()
    kind = ADDED if mask.is_floating_point() else BOOL
    mask = mask.view(torch.uint8) if kind == BOOL else mask
    mask = mask[(None,) * (4 - mask.ndim)][:, 0]
    rows = mask.expand(mask.shape[0], mask.shape[1], cached)
    if rows.stride(1) >= _FAR:
        rows = rows.contiguous()
    ranges = torch.empty(*rows.shape[:2], 2, dtype=torch.int32, device=mask.device)
    block = min(4096, max(16, triton.next_power_of_2(cached)))
    with torch.cuda.device_of(mask):
        ranges_kernel[rows.shape[1], rows.shape[0]](
            rows, ranges, cached, hidden, *rows.stride(), KIND=kind, BLOCK=block
        )
    return Mask(kind, rows.expand(batch, new, cached), ranges.expand(batch, new, 2))


def refuse_mask(mask: torch.Tensor | None, device: torch.device, shape: tuple) -> str | None:
    """Why a mask is refused beside operands on `device`, or None; shape: what it must broadcast to."""
    if mask is None:
        return None
    if mask.device != device:
        return f"needs a mask on {device}, got {mask.device}"
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        return f"needs a bool or float mask, got {mask.dtype}"
    if mask.ndim >= 3 and not known(mask.shape[-3] == 1):
        return "needs one mask for all heads"
    sizes = zip(reversed(mask.shape), reversed(shape), strict=False)
    if mask.ndim > 4 or any(known(a != b) and known(a != 1) for a, b in sizes):
        return f"needs a mask that broadcasts to {list(shape)}, got {list(mask.shape)}"
    return None

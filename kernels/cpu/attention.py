"""Attention of heads that share keys on the CPU, in float32 whatever the dtype (float32, bfloat16 or float16).

    out = softmax(scale * q @ k^T + mask) @ v

For few new tokens keys and values are read where they lie, once for all the heads they serve, in fixed splits of 512;
for many they are packed in blocks of 256. Chunks of 64 keys that a mask hides from all queries are not read, so time
follows the visible part of a static cache.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from dsopt.capture import known
from dsopt.kernels.cpu.masks import check_mask, native_mask
from dsopt.kernels.cpu.native import CPU, DTYPES, NATIVE, _cpu, dense_rows, plan, require
from dsopt.op import Kernel

# heads that share keys, times new tokens, up to which keys are read where they lie; with so many, packing them was
# measured to take as long (128 wide, 1024 cached)
FEW_ROWS = 64


def _shapes(q, k, v) -> dict[str, tuple]:
    """The shape each operand must have beside the others."""
    (batch, _, _, width), (_, kv_heads, cached, _) = q.shape, k.shape
    return {
        "q": q.shape,
        "k": (batch, kv_heads, cached, width),
        "v": (batch, kv_heads, cached, v.shape[3]),
    }


def _require(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None) -> None:
    """ValueError, naming the argument, for operands whose shapes or dtypes do not belong together."""
    if q.dtype not in DTYPES:
        raise ValueError(f"q must be float32, bfloat16 or float16, got {q.dtype}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} must have 4 dimensions, got {list(x.shape)}")
    wanted = _shapes(q, k, v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        require(name, x, wanted[name], q.dtype)
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"q must have a multiple of k's {k.shape[1]} heads, got {q.shape[1]}")
    if sinks is not None and (sinks.shape != q.shape[1:2] or not sinks.is_cpu):
        raise ValueError(
            f"sinks must be {[q.shape[1]]} on the CPU, got {list(sinks.shape)} on {sinks.device}"
        )


def _run(kernel: Callable, q, k, v, mask, scale, is_causal, sinks) -> torch.Tensor:
    _require(q, k, v, sinks)
    (batch, heads, tokens, width), (_, kv_heads, cached, value) = q.shape, v.shape
    out = torch.empty(batch, tokens, heads, value, dtype=q.dtype, device=CPU)
    if out.numel() == 0:
        return out
    mask_heads = heads if mask is not None and mask.ndim > 2 and mask.shape[-3] != 1 else 1
    mask, strides, mask_kind, hidden = native_mask(mask, (batch, mask_heads, tokens, cached))
    sinks = None if sinks is None else sinks.float().contiguous()
    # what has no width has no rows either
    dense = [x if not x.shape[-1] or dense_rows(x) else x.contiguous() for x in (q, k, v)]
    kernel(
        (batch, heads, kv_heads, tokens, cached, width, value, mask_heads),
        *[(x.data_ptr(), x.stride()) for x in dense],
        (0 if mask is None else mask.data_ptr(), strides),
        mask_kind,
        hidden,
        0 if sinks is None else sinks.data_ptr(),
        out.data_ptr(),
        scale,
        is_causal,
        NATIVE[q.dtype],
    )
    return out


def few(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    is_causal: bool = False,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Keys read where they lie, for any number of tokens; arguments and result as in `attention_reference`.

    Raises ValueError, naming the argument, for operands whose shapes or dtypes do not belong together.
    """
    return _run(_cpu.attention, q, k, v, mask, scale, is_causal, sinks)


def many(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    is_causal: bool = False,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Keys and values packed a block of the cache at a time, for any number of tokens; otherwise as `few`."""
    return _run(_cpu.attention_prefill, q, k, v, mask, scale, is_causal, sinks)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    is_causal: bool = False,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    rows = q.shape[1] // max(1, k.shape[1]) * q.shape[2]
    return (few if rows <= FEW_ROWS else many)(q, k, v, mask, scale, is_causal, sinks)


def _check(q, k, v, mask, scale, is_causal=False, sinks=None):
    tensors = {"q": q, "k": k, "v": v}
    for name, x in tensors.items():
        if x.dtype != q.dtype or x.device != q.device:
            return f"needs one dtype and device, got {q.dtype} q and {x.dtype} {name} on {x.device}"
        if x.ndim != 4:
            return f"needs {name} of 4 dimensions, got {list(x.shape)}"
    for name, wanted in _shapes(q, k, v).items():
        if any(known(a != b) for a, b in zip(tensors[name].shape, wanted, strict=True)):
            return f"needs {name} of shape {list(wanted)}, got {list(tensors[name].shape)}"
    heads, kv_heads = q.shape[1], k.shape[1]
    if not isinstance(heads, int) or not isinstance(kv_heads, int) or not kv_heads or heads % kv_heads:
        return f"needs a multiple of {kv_heads} heads of queries, got {heads}"
    if sinks is not None and (
        sinks.ndim != 1 or known(sinks.shape[0] != heads) or not sinks.dtype.is_floating_point
    ):
        return f"needs sinks of {heads} floats, got {list(sinks.shape)} of {sinks.dtype}"
    return check_mask(mask, q, heads)


KERNELS = (
    Kernel(
        "attention", "cpu", plan(attention), _check, device="cpu", dtypes=DTYPES, priority=20, records=True
    ),
)

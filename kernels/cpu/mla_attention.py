"""Latent attention on the CPU: absorbed for few new tokens, expanded for many; both native.

Absorbed, a query of each head meets the latent cache as it is:

    q' = q_nope @ w_uk
    out = (softmax(scale * (q' @ latent^T + q_rope @ k_rope^T) + mask) @ latent) @ w_uv^T

in fixed splits of 512 keys. Expanded, keys and values of one head are made from 256 cached tokens at a time and meet
all queries before the next are made, so that neither a matrix of scores nor the expanded cache ever exists.

Both compute in float32 whatever the dtype (float32, bfloat16 or float16). Chunks of 64 keys that a mask hides from all
queries are not read, so time follows the visible part of a static cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dsopt.capture import known
from dsopt.kernels.cpu.fp8 import refuse_mixed, scales
from dsopt.kernels.cpu.masks import check_mask, native_mask
from dsopt.kernels.cpu.native import CPU, DTYPES, NATIVE, _cpu, dense_rows, plan, require
from dsopt.op import Kernel
from dsopt.ops.attention import LATENT_BLOCK

# Few new tokens leave the expanded form's tiles empty. With more, a multiply-add of the absorbed form takes this much
# longer than one of the expanded form: 1.2 to 1.8 was measured with 32 to 192 new tokens behind 0 to 1024 cached ones,
# 16 heads of V2-Lite's widths.
MANY = 24
ABSORBED_COST = 1.35

_NDIMS = {"q_nope": 4, "q_rope": 4, "latent": 3, "k_rope": 3, "w_uk": 3, "w_uv": 3}


def _shapes(q_nope, q_rope, latent, k_rope, w_uk, w_uv) -> tuple[tuple, ...]:
    """The shape each operand must have beside the others."""
    batch, heads, tokens, nope = q_nope.shape
    _, cached, rank = latent.shape
    rope, value = q_rope.shape[3], w_uv.shape[1]
    return (
        (batch, heads, tokens, nope),
        (batch, heads, tokens, rope),
        (batch, cached, rank),
        (batch, cached, rope),
        (heads, nope, rank),
        (heads, value, rank),
    )


def _require(operands: tuple[torch.Tensor, ...], in_fp8: tuple[bool, ...]) -> None:
    """ValueError, naming the argument, for operands whose shapes or dtypes do not belong together."""
    dtype = operands[0].dtype
    if dtype not in DTYPES:
        raise ValueError(f"q_nope must be float32, bfloat16 or float16, got {dtype}")
    for (name, ndim), x in zip(_NDIMS.items(), operands, strict=True):
        if x.ndim != ndim:
            raise ValueError(f"{name} must have {ndim} dimensions, got {list(x.shape)}")
    for name, x, shape, fp8 in zip(_NDIMS, operands, _shapes(*operands), in_fp8, strict=True):
        require(name, x, shape, torch.float8_e4m3fn if fp8 else dtype)


def _run(
    native, q_nope, q_rope, latent, k_rope, w_uk, w_uv, mask, scale, is_causal,
    w_uk_scale, w_uv_scale, latent_scale, block,
) -> torch.Tensor:  # fmt: skip
    operands = (q_nope, q_rope, latent, k_rope, w_uk, w_uv)
    _require(operands, tuple(s is not None for s in (None, None, latent_scale, None, w_uk_scale, w_uv_scale)))
    batch, heads, tokens, nope = q_nope.shape
    _, cached, rank = latent.shape
    rope, value = q_rope.shape[3], w_uv.shape[1]
    out = torch.empty(batch, tokens, heads, value, dtype=q_nope.dtype, device=CPU)
    if out.numel() == 0:
        return out
    mask, strides, mask_kind, hidden = native_mask(mask, (batch, 1, tokens, cached))
    # what has no width has no rows either
    dense = [x if not x.shape[-1] or dense_rows(x) else x.contiguous() for x in operands]
    native(
        (batch, heads, tokens, cached, rank, nope, rope, value),
        *[(x.data_ptr(), x.stride()) for x in dense],
        (0 if mask is None else mask.data_ptr(), (strides[0], *strides[2:])),
        mask_kind,
        hidden,
        out.data_ptr(),
        scale,
        is_causal,
        NATIVE[q_nope.dtype],
        (scales(w_uk_scale, block), scales(w_uv_scale, block), scales(latent_scale, LATENT_BLOCK)),
    )
    return out


def absorbed(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    is_causal: bool = False,
    w_uk_scale: torch.Tensor | None = None,
    w_uv_scale: torch.Tensor | None = None,
    latent_scale: torch.Tensor | None = None,
    block: Sequence[int] = (128, 128),
) -> torch.Tensor:
    """The cache as it is, for any number of tokens; arguments and result as in `mla_attention_reference`.

    Raises ValueError, naming the argument, for operands whose shapes or dtypes do not belong together.
    """
    return _run(
        _cpu.mla_attention, q_nope, q_rope, latent, k_rope, w_uk, w_uv, mask, scale, is_causal,
        w_uk_scale, w_uv_scale, latent_scale, block,
    )  # fmt: skip


def expanded(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    is_causal: bool = False,
    w_uk_scale: torch.Tensor | None = None,
    w_uv_scale: torch.Tensor | None = None,
    latent_scale: torch.Tensor | None = None,
    block: Sequence[int] = (128, 128),
) -> torch.Tensor:
    """Keys and values of a block of the cache at a time, for any number of tokens; otherwise as `absorbed`."""
    return _run(
        _cpu.mla_prefill, q_nope, q_rope, latent, k_rope, w_uk, w_uv, mask, scale, is_causal,
        w_uk_scale, w_uv_scale, latent_scale, block,
    )  # fmt: skip


def prefers_expanded(tokens: int, cached: int, rank: int, rope: int, nope: int, value: int) -> bool:
    """Whether expanding the cache costs less time than attending to it absorbed.

    For each head, expanding costs rank * (nope + value) multiply-adds a cached token and then nope + rope + value for
    each pair of tokens; absorbing costs the former for each new token, and 2 * rank + rope for each pair.
    """
    once, pairs = rank * (nope + value), tokens * cached
    expanding = cached * once + pairs * (nope + rope + value)
    absorbing = tokens * once + pairs * (2 * rank + rope)
    return tokens >= MANY and expanding < absorbing * ABSORBED_COST


def _mla_attention(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    is_causal: bool = False,
    *scales_and_block,
) -> torch.Tensor:
    (tokens, nope), (cached, rank), rope, value = (
        q_nope.shape[2:],
        latent.shape[1:],
        q_rope.shape[3],
        w_uv.shape[1],
    )
    variant = expanded if prefers_expanded(tokens, cached, rank, rope, nope, value) else absorbed
    return variant(q_nope, q_rope, latent, k_rope, w_uk, w_uv, mask, scale, is_causal, *scales_and_block)


def _check(
    q_nope, q_rope, latent, k_rope, w_uk, w_uv, mask, scale, is_causal=False,
    w_uk_scale=None, w_uv_scale=None, latent_scale=None, block=(128, 128),
) -> str | None:  # fmt: skip
    if reason := refuse_mixed({"w_uk": (w_uk, w_uk_scale), "w_uv": (w_uv, w_uv_scale)}, block):
        return reason
    if reason := refuse_mixed({"latent": (latent, latent_scale)}, LATENT_BLOCK):
        return reason
    in_fp8 = {"w_uk": w_uk_scale, "w_uv": w_uv_scale, "latent": latent_scale}
    tensors = {"q_rope": q_rope, "latent": latent, "k_rope": k_rope, "w_uk": w_uk, "w_uv": w_uv}
    for name, x in tensors.items():
        if (in_fp8.get(name) is None and x.dtype != q_nope.dtype) or x.device != q_nope.device:
            return f"needs one dtype and device, got {q_nope.dtype} q_nope and {x.dtype} {name} on {x.device}"
    operands = {"q_nope": q_nope, **tensors}
    for name, x in operands.items():
        if x.ndim != _NDIMS[name]:
            return f"needs {name} of {_NDIMS[name]} dimensions, got {list(x.shape)}"
    for (name, x), wanted in zip(operands.items(), _shapes(*operands.values()), strict=True):
        if any(known(a != b) for a, b in zip(x.shape, wanted, strict=True)):
            return f"needs {name} of shape {list(wanted)}, got {list(x.shape)}"
    return check_mask(mask, q_nope, 1)


KERNELS = (
    Kernel(
        "mla_attention",
        "cpu",
        plan(_mla_attention),
        _check,
        device="cpu",
        dtypes=DTYPES,
        priority=20,
        records=True,
    ),
)

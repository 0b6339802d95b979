"""Latent attention in Triton: `mla_decode` for few new tokens, `mla_prefill` for many.

The first attends to the latent cache itself, the second expands it to keys and values. Per head and cached token the
first costs new * (2 rank + rope) multiply-adds, the second rank * (nope + v) once and new * (nope + rope + v) on top:
equal at 171 new tokens of DeepSeek's widths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from dsopt.capture import known
from dsopt.gpu import capability, multiprocessors
from dsopt.kernels.torch.mla_attention import absorbs
from dsopt.kernels.triton import mla_decode, mla_prefill
from dsopt.kernels.triton.masking import prepare_mask, refuse_mask
from dsopt.kernels.triton.operands import refuse_operands
from dsopt.op import Kernel
from dsopt.ops.quant import refuse_scales

DTYPES = frozenset({torch.bfloat16, torch.float16, torch.float32})


def _plan(q_nope, *_) -> Callable:
    chip, processors = capability(q_nope.device), multiprocessors(q_nope.device)
    itemsize = q_nope.element_size()

    def mla_attention(
        q_nope: torch.Tensor,
        q_rope: torch.Tensor,
        latent: torch.Tensor,
        k_rope: torch.Tensor,
        w_uk: torch.Tensor,
        w_uv: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
        is_causal: bool = False,
        *_,
    ) -> torch.Tensor:
        batch, heads, new, nope = q_nope.shape
        cached, rank = latent.shape[1:]
        rope, v = q_rope.shape[3], w_uv.shape[1]
        if batch * heads * new * v * cached == 0:
            return q_nope.new_zeros(batch, new, heads, v)
        operands = (q_nope, q_rope, latent, k_rope, w_uk, w_uv)
        seen = prepare_mask(mask, batch, new, cached)
        few = absorbs(new, rank, rope, nope, v) or max(nope, v) > mla_prefill.MAX_DIM
        if few or rope > mla_prefill.MAX_ROPE:
            use = mla_decode.tile(heads * new, itemsize, chip)
            programs = batch * -(-heads * new // use.block_h)
            splits = mla_decode.num_splits(programs, cached, processors * use.per_processor)
            with torch.cuda.device_of(q_nope):
                return mla_decode.absorbed(*operands, seen, scale, is_causal, use, splits)
        use = mla_prefill.tile(max(nope, v), itemsize, chip)
        with torch.cuda.device_of(q_nope):
            return mla_prefill.expanded(*operands, seen, scale, is_causal, use)

    return mla_attention


def _check(q_nope, q_rope, latent, k_rope, w_uk, w_uv, mask, scale, is_causal=False, *scales_and_block):
    if reason := refuse_scales(*scales_and_block[:-1]):
        return reason
    if (q_nope.ndim, latent.ndim, w_uv.ndim) != (4, 3, 3):
        got = f"{q_nope.ndim}, {latent.ndim} and {w_uv.ndim}"
        return f"needs q_nope of 4 dimensions, latent and w_uv of 3, got {got}"
    batch, heads, new, nope = q_nope.shape
    cached, rank = latent.shape[1:]
    rope, v = q_rope.shape[-1], w_uv.shape[1]
    if not known(rank <= mla_decode.MAX_RANK):
        return f"needs kv_lora_rank of at most {mla_decode.MAX_RANK}, got {rank}"
    if not known(rope <= mla_decode.MAX_ROPE):
        return f"needs qk_rope_head_dim of at most {mla_decode.MAX_ROPE}, got {rope}"
    operands = {
        "q_rope": (q_rope, (batch, heads, new, rope)),
        "latent": (latent, (batch, cached, rank)),
        "k_rope": (k_rope, (batch, cached, rope)),
        "w_uk": (w_uk, (heads, nope, rank)),
        "w_uv": (w_uv, (heads, v, rank)),
    }
    return refuse_operands(q_nope, operands) or refuse_mask(mask, q_nope.device, (batch, 1, new, cached))


KERNELS = (Kernel("mla_attention", "triton", _plan, _check, device="cuda", dtypes=DTYPES, priority=30),)


def ahead_of_time(tensor: Callable) -> Iterator[tuple]:
    """Decoding and prefill of V2-Lite's and V3's heads, with and without a mask, and of wider heads."""

    def case(heads, new, cached, nope=128, v=128, dtype=torch.bfloat16):
        q_nope = tensor(1, new, heads, nope, dtype=dtype).transpose(1, 2)
        q_rope = tensor(1, new, heads, 64, dtype=dtype).transpose(1, 2)
        latent, k_rope = tensor(1, cached, 512, dtype=dtype), tensor(1, cached, 64, dtype=dtype)
        kv_b = tensor(heads, nope + v, 512, dtype=dtype)
        return q_nope, q_rope, latent, k_rope, kv_b[:, :nope], kv_b[:, nope:]

    for heads in (16, 128):
        for new, cached in ((1, 4096), (4, 4096), (1024, 4096)):
            mask = tensor(1, 1, new, cached, dtype=torch.bool)
            yield *case(heads, new, cached), mask, 0.1
            yield *case(heads, new, cached), tensor(1, 1, new, cached), 0.1
        yield *case(heads, 1, 32768), None, 0.1
        yield *case(heads, 1024, 1024), None, 0.1, True
    yield *case(64, 1024, 1024, nope=192, v=256), None, 0.1, True
    for new in (1, 1024):
        yield *case(16, new, 1024, dtype=torch.float32), None, 0.1

"""Attention over keys and values, and over a latent that both are made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from dsopt.fp8 import FP8Block, FP8Group, quantize
from dsopt.numerics import rand
from dsopt.op import Op
from dsopt.ops.quant import fp8_operands, widened

# rows and columns of a latent that share a scale
LATENT_BLOCK = (1, 128)


def mla_attention_reference(
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
    """Attention over a latent cache, the key and value of each head being linear maps of one latent.

    k[b,h,t] = cat(w_uk[h] @ latent[b,t], k_rope[b,t]);  v[b,h,t] = w_uv[h] @ latent[b,t]
    out[b,s,h] = sum_t softmax_t(scale * <cat(q_nope, q_rope)[b,h,s], k[b,h,t]> + mask[b,0,s,t]) v[b,h,t]

    q_nope (batch, heads, new_tokens, qk_nope_head_dim), q_rope (batch, heads, new_tokens, qk_rope_head_dim)
    latent (batch, cached_tokens, kv_lora_rank), k_rope (batch, cached_tokens, qk_rope_head_dim)
    w_uk (heads, qk_nope_head_dim, kv_lora_rank), w_uv (heads, v_head_dim, kv_lora_rank)
    mask: None; bool (True = attend) or float (added to the scores), broadcastable to
        (batch, 1, new_tokens, cached_tokens).
    is_causal: query s sees keys t <= s (upper-left aligned, as in scaled_dot_product_attention).
    w_uk_scale, w_uv_scale: where those weights are float8_e4m3fn, the scales of each head's matrix, as for
        `dsopt::dequantize` in blocks of `block`: (heads, ceil(qk_nope_head_dim / rows), ceil(kv_lora_rank / columns))
        and so on.
    latent_scale: where the latent is float8_e4m3fn, (batch, cached_tokens, ceil(kv_lora_rank / 128)): one scale for
        128 columns of a token.
    Returns (batch, new_tokens, heads, v_head_dim), contiguous. A query that may see no key gives zeros.

    Source: DeepSeek-V2, arXiv 2405.04434, section 2.1; equations 37-47 of its appendix C.
    """
    w_uk, w_uv = (
        widened(w_uk, w_uk_scale, q_nope.dtype, block),
        widened(w_uv, w_uv_scale, q_nope.dtype, block),
    )
    latent = widened(latent, latent_scale, q_nope.dtype, LATENT_BLOCK)
    k_nope = torch.einsum("btr,hdr->bhtd", latent, w_uk)
    value = torch.einsum("btr,hdr->bhtd", latent, w_uv)
    scores = q_nope @ k_nope.transpose(-1, -2) + q_rope @ k_rope.unsqueeze(1).transpose(-1, -2)
    return (_weights(scores, mask, scale, is_causal).to(value.dtype) @ value).transpose(1, 2).contiguous()


def _weights(
    scores: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    is_causal: bool,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(scale * scores + mask) over the keys, in float32 or wider; zeros where no key may be seen.

    scores (batch, heads, new_tokens, cached_tokens); sinks as in `attention_reference`.
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    if is_causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    unseen = (scores == float("-inf")).all(-1, keepdim=True)
    scores = scores.masked_fill(unseen, 0.0)
    if sinks is not None:
        beside = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, beside), -1)
    weights = scores.softmax(-1)
    return (weights if sinks is None else weights[..., :-1]).masked_fill(unseen, 0.0)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple]:
    def case(batch, heads, new, cached, nope=16, rope=8, rank=32, v=24, seed=0):
        r = rand(device, dtype, seed)
        q = r(batch, new, heads, nope + rope).transpose(1, 2)
        kv_b = r(heads, nope + v, rank) * rank**-0.5
        return (
            q[..., :nope], q[..., nope:], r(batch, cached, rank), r(batch, cached, rope),
            kv_b[:, :nope], kv_b[:, nope:],
        )  # fmt: skip

    scale = 24**-0.5
    yield (*case(1, 4, 1, 40), None, scale)
    yield (*case(3, 5, 1, 1), None, scale)
    yield (*case(2, 6, 7, 7), None, scale, True)
    # positions that nothing rotates
    yield (*case(2, 3, 2, 9, rope=0), None, scale)
    # a static buffer that holds few tokens, more than one key split long
    valid = torch.arange(1100, device=device)[None, None, None, :] < 70
    yield (*case(2, 16, 1, 1100), valid, scale)
    causal = torch.arange(600, device=device)[None, :] <= 590 + torch.arange(3, device=device)[:, None]
    yield (*case(2, 5, 3, 600), causal[None, None], scale)
    # left padding: row 1 cannot see its first keys, and its first queries see none
    padded = causal[:, :80][None, None].repeat(2, 1, 1, 1).clone()
    padded[1, :, :, :9] = False
    padded[1, :, 0] = False
    yield (*case(2, 5, 3, 80, seed=1), padded, scale)
    additive = torch.zeros(padded.shape, dtype=dtype, device=device).masked_fill(
        ~padded, torch.finfo(dtype).min
    )
    yield (*case(2, 5, 3, 80, seed=2), additive, scale)
    yield (*case(1, 2, 40, 40), causal[:1, :40].expand(40, 40).tril()[None, None], scale)
    # wide heads as in V2-Lite, odd ranks, non-contiguous cache, nothing to attend to, no tokens
    yield (*case(1, 16, 1, 530, nope=128, rope=64, rank=512, v=128), None, 192**-0.5)
    yield (*case(1, 3, 2, 33, nope=7, rope=6, rank=19, v=5), None, scale)
    q_nope, q_rope, latent, k_rope, w_uk, w_uv = case(2, 4, 2, 66, seed=3)
    yield (q_nope, q_rope, latent[:, ::2], k_rope[:, ::2], w_uk, w_uv, None, scale)
    yield (q_nope * 30, q_rope * 30, latent, k_rope, w_uk, w_uv, None, scale)
    yield (*case(2, 4, 0, 12), None, scale)
    yield (*case(0, 4, 1, 12), None, scale)
    # FP8: a latent of partial groups, weights, and both
    for sizes, format in (
        ((1, 4, 1, 40, 16, 8, 32, 24), FP8Block(rows=16, columns=16)),
        ((2, 3, 5, 33, 7, 6, 140, 5), FP8Block("ue8m0", 1, 128)),
    ):
        q_nope, q_rope, latent, k_rope, *w = case(*sizes)
        (w_uk, w_uv), scales, block = fp8_operands(w, format)
        latent8, latent_scale = quantize(latent, FP8Group(format.scale_fmt))
        yield q_nope, q_rope, latent, k_rope, w_uk, w_uv, None, scale, False, *scales, None, block
        yield q_nope, q_rope, latent8, k_rope, *w, None, scale, True, None, None, latent_scale
        yield q_nope, q_rope, latent8, k_rope, w_uk, w_uv, None, scale, False, *scales, latent_scale, block
    q_nope, q_rope, latent, k_rope, *w = case(2, 16, 1, 1100, rank=130)
    latent8, latent_scale = quantize(latent, FP8Group())
    yield q_nope, q_rope, latent8, k_rope, *w, valid, scale, False, None, None, latent_scale


def _mla_fake(q_nope, q_rope, latent, k_rope, w_uk, w_uv, *_):
    batch, heads, tokens, _ = q_nope.shape
    return q_nope.new_empty((batch, tokens, heads, w_uv.shape[1]))


mla_attention = Op(
    name="mla_attention",
    schema="(Tensor q_nope, Tensor q_rope, Tensor latent, Tensor k_rope, Tensor w_uk, Tensor w_uv, "
    "Tensor? mask, float scale, bool is_causal=False, Tensor? w_uk_scale=None, Tensor? w_uv_scale=None, "
    "Tensor? latent_scale=None, int[2] block=[128, 128]) -> Tensor",
    reference=mla_attention_reference,
    samples=_samples,
    fake=_mla_fake,
    tolerance={torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 3e-3},
    family="mla",
)


def attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    is_causal: bool = False,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention whose keys and values serve several heads each: multi-head, grouped-query or multi-query.

    score[b,h,s,t] = scale * <q[b,h,s], k[b,h // g,t]> + mask[b,h,s,t],  g = heads // kv_heads
    out[b,s,h] = sum_t exp(score[b,h,s,t]) v[b,h // g,t] / (exp(sinks[h]) + sum_t exp(score[b,h,s,t]))

    q (batch, heads, new_tokens, width), k (batch, kv_heads, cached_tokens, width), heads a multiple of kv_heads
    v (batch, kv_heads, cached_tokens, v_width)
    mask: None; bool (True = attend) or float (added to the scores), broadcastable to
        (batch, heads, new_tokens, cached_tokens).
    is_causal: query s sees keys t <= s (upper-left aligned, as in scaled_dot_product_attention).
    sinks: (heads,), what each head may attend to instead of any key; None leaves exp(sinks) out.
    Returns (batch, new_tokens, heads, v_width), contiguous. A query that may see no key gives zeros.

    Source: GQA, arXiv 2305.13245, section 2.2; sinks as in gpt-oss, arXiv 2508.10925, section 2.2.
    """
    batch, heads, tokens, width = q.shape
    kv_heads, cached = k.shape[1:3]
    shared = heads // kv_heads
    grouped = q.reshape(batch, kv_heads, shared, tokens, width)
    scores = grouped @ k.unsqueeze(2).transpose(-1, -2)
    weights = _weights(scores.view(batch, heads, tokens, cached), mask, scale, is_causal, sinks)
    out = weights.to(v.dtype).view(batch, kv_heads, shared, tokens, cached) @ v.unsqueeze(2)
    return out.view(batch, heads, tokens, v.shape[-1]).transpose(1, 2).contiguous()


def _attention_fake(q, k, v, mask, scale, is_causal=False, sinks=None):
    batch, heads, tokens, _ = q.shape
    return q.new_empty((batch, tokens, heads, v.shape[-1]))


def _attention_samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple]:
    def case(batch, heads, kv_heads, new, cached, width=16, v=16, seed=0):
        r = rand(device, dtype, seed)
        q = r(batch, new, heads, width).transpose(1, 2)
        return q, r(batch, kv_heads, cached, width), r(batch, kv_heads, cached, v)

    scale = 0.25
    yield (*case(1, 4, 2, 1, 40), None, scale)
    yield (*case(3, 5, 5, 1, 1), None, scale)
    yield (*case(2, 6, 2, 7, 7), None, scale, True)
    # fewer new tokens than keys, causal from the first of both; one head of keys for all
    yield (*case(1, 3, 1, 2, 9, width=24, v=8), None, scale, True)
    # a static buffer that holds few tokens, more than one key split long
    valid = torch.arange(1100, device=device)[None, None, None, :] < 70
    yield (*case(2, 16, 4, 1, 1100), valid, scale)
    causal = torch.arange(600, device=device)[None, :] <= 590 + torch.arange(3, device=device)[:, None]
    yield (*case(2, 6, 3, 3, 600), causal, scale)
    # left padding: row 1 cannot see its first keys, and its first query sees none
    padded = causal[:, :80][None, None].repeat(2, 1, 1, 1).clone()
    padded[1, :, :, :9] = False
    padded[1, :, 0] = False
    yield (*case(2, 4, 2, 3, 80, seed=1), padded, scale)
    lowest = torch.finfo(dtype).min
    additive = torch.zeros(padded.shape, dtype=dtype, device=device).masked_fill(~padded, lowest)
    yield (*case(2, 4, 2, 3, 80, seed=2), additive, scale)
    yield (*case(2, 4, 2, 3, 80, seed=1), padded, scale, True)
    # a mask for each head: distances, as in ALiBi
    steps = torch.arange(40, device=device) - 39.0
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], device=device)
    yield (*case(2, 4, 2, 1, 40, seed=3), (slopes[:, None, None] * steps)[None].to(dtype), scale)
    # a window of the newest keys, and what each head may attend to instead
    sinks = rand(device, dtype, 7)(4)
    window = causal & (torch.arange(600, device=device)[None, :] > causal.sum(-1, keepdim=True) - 30)
    yield (*case(1, 4, 2, 3, 600, seed=4), window, scale, False, sinks)
    yield (*case(2, 4, 2, 3, 80, seed=5), padded, scale, False, sinks)
    yield (*case(1, 4, 4, 5, 5, seed=6), None, scale, True, sinks * 20)
    # wide heads, odd widths, a non-contiguous cache, large scores, no tokens
    yield (*case(1, 8, 2, 1, 530, width=128, v=128), None, 128**-0.5)
    yield (*case(1, 6, 3, 2, 33, width=19, v=5), None, scale)
    q, k, v = case(2, 4, 2, 2, 66, seed=8)
    yield (q, k[:, :, ::2], v[:, :, ::2], None, scale)
    yield (q * 30, k, v, None, scale)
    yield (*case(2, 4, 2, 0, 12), None, scale)
    yield (*case(0, 4, 2, 1, 12), None, scale)


attention = Op(
    name="attention",
    schema="(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, bool is_causal=False, "
    "Tensor? sinks=None) -> Tensor",
    reference=attention_reference,
    samples=_attention_samples,
    tolerance={torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 3e-3},
    fake=_attention_fake,
    family="attention",
)

"""Multi-head latent attention."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dsopt.numerics import rand
from dsopt.op import Op


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
    Returns (batch, new_tokens, heads, v_head_dim), contiguous. A query that may see no key gives zeros.

    Source: DeepSeek-V2, arXiv 2405.04434, section 2.1; equations 37-47 of its appendix C.
    """
    k_nope = torch.einsum("btr,hdr->bhtd", latent, w_uk)
    value = torch.einsum("btr,hdr->bhtd", latent, w_uv)
    scores = q_nope @ k_nope.transpose(-1, -2) + q_rope @ k_rope.unsqueeze(1).transpose(-1, -2)
    wide = torch.promote_types(scores.dtype, torch.float32)
    scores = scores.to(wide) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    if is_causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    unseen = (scores == float("-inf")).all(-1, keepdim=True)
    weights = scores.masked_fill(unseen, 0.0).softmax(-1).masked_fill(unseen, 0.0)
    return (weights.to(value.dtype) @ value).transpose(1, 2).contiguous()


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


mla_attention = Op(
    name="mla_attention",
    schema="(Tensor q_nope, Tensor q_rope, Tensor latent, Tensor k_rope, Tensor w_uk, Tensor w_uv, "
    "Tensor? mask, float scale, bool is_causal=False) -> Tensor",
    reference=mla_attention_reference,
    samples=_samples,
    tolerance={torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 3e-3},
    family="mla",
)

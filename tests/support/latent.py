"""Latent attention in the spellings in use, and what its forward takes."""

import torch
from torch import nn
from torch.nn import functional as F

NOPE, ROPE, RANK, VALUE, HIDDEN, CACHED = 8, 4, 12, 6, 32, 7


class MLA(nn.Module):
    """Latent attention, expanded: as transformers spells it unless told otherwise."""

    def __init__(
        self, heads=3, expand="merged", attend="sdpa", rope_first=False, four_d=False, dtype=torch.float32
    ):
        super().__init__()
        self.heads, self.expand, self.attend = heads, getattr(self, expand), getattr(self, attend)
        self.rope_first, self.four_d = rope_first, four_d
        self.scale = (NOPE + ROPE) ** -0.5
        self.q = nn.Linear(HIDDEN, heads * (NOPE + ROPE), bias=False, dtype=dtype)
        self.kv_a = nn.Linear(HIDDEN, RANK + ROPE, bias=False, dtype=dtype)
        self.kv_b = nn.Linear(RANK, heads * (NOPE + VALUE), bias=False, dtype=dtype)
        self.k_b = nn.Linear(RANK, heads * NOPE, bias=False, dtype=dtype)
        self.v_b = nn.Linear(RANK, heads * VALUE, bias=False, dtype=dtype)
        self.w_k = nn.Parameter(torch.randn(heads, NOPE, RANK, dtype=dtype) / RANK**0.5)
        self.w_v = nn.Parameter(torch.randn(heads, VALUE, RANK, dtype=dtype) / RANK**0.5)

    def merged(self, c):
        kv = self.kv_b(c).view(c.shape[0], -1, self.heads, NOPE + VALUE).transpose(1, 2)
        return torch.split(kv, [NOPE, VALUE], dim=-1)

    def split_late(self, c):
        kv = self.kv_b(c).unflatten(-1, (self.heads, NOPE + VALUE))
        return kv[..., :NOPE].transpose(1, 2), kv[..., NOPE:].permute(0, 2, 1, 3)

    def split_first(self, c):
        k, v = self.kv_b(c).split([self.heads * NOPE, self.heads * VALUE], dim=-1)
        k, v = (t.reshape(t.shape[0], -1, self.heads, t.shape[-1] // self.heads) for t in (k, v))
        return k.transpose(1, 2), v.transpose(1, 2)

    def separate(self, c):
        k = self.k_b(c).view(c.shape[0], c.shape[1], self.heads, NOPE).transpose(1, 2)
        return k, self.v_b(c).view(c.shape[0], c.shape[1], self.heads, VALUE).transpose(1, 2)

    def contiguous(self, c):
        return tuple(t.contiguous() for t in self.merged(c))

    def einsum(self, c):
        return torch.einsum("btr,hdr->bhtd", c, self.w_k), torch.einsum("btr,hdr->bhtd", c, self.w_v)

    def einsum_tokens_first(self, c):
        w = self.kv_b.weight.view(self.heads, -1, RANK)
        k, v = torch.einsum("btc,hdc->bthd", c, w).split([NOPE, VALUE], -1)
        return k.transpose(1, 2), v.transpose(1, 2)

    def matmul(self, c):
        return c.unsqueeze(1) @ self.w_k.mT, c.unsqueeze(1) @ self.w_v.transpose(1, 2)

    def sdpa(self, q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)

    def causal(self, q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def eager(self, q, k, v, mask):
        scores = torch.matmul(q, k.transpose(2, 3)) * self.scale
        if mask is not None:
            scores = scores + mask[:, :, :, : k.shape[-2]]
        return F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v

    def forward(self, x, mask=None, cache=None, position=None):
        q = self.q(x).view(*x.shape[:2], self.heads, -1).transpose(1, 2)
        q_nope, q_rope = q.split([NOPE, ROPE], -1)
        c, k_rope = self.kv_a(x).split([RANK, ROPE], -1)
        k_rope = k_rope.unsqueeze(1)
        if self.four_d:
            c = c.unsqueeze(1)
        if position is not None:
            c = cache[0].index_copy_(-2, position, c)
            k_rope = cache[1].index_copy_(-2, position, k_rope)
        elif cache is not None:
            c, k_rope = (torch.cat(both, -2) for both in zip(cache, (c, k_rope), strict=True))
        k_nope, v = self.expand(c.squeeze(1) if self.four_d else c)
        k_rope = k_rope.expand(-1, self.heads, -1, -1)
        parts = (k_rope, k_nope) if self.rope_first else (k_nope, k_rope)
        query = (q_rope, q_nope) if self.rope_first else (q_nope, q_rope)
        out = self.attend(torch.cat(query, -1), torch.cat(parts, -1), v, mask)
        return out.transpose(1, 2).flatten(2)


def inputs(cache="none", batch=2, new=3, dtype=torch.float32, four_d=False):
    """Hidden states, mask, cache, position: what MLA.forward takes."""
    x = torch.randn(batch, new, HIDDEN, dtype=dtype)
    if cache == "none":
        return [x]
    lead = (batch, 1) if four_d else (batch,)
    kept = [torch.randn(*lead, CACHED, RANK, dtype=dtype), torch.randn(batch, 1, CACHED, ROPE, dtype=dtype)]
    if cache == "cat":
        return [x, None, kept]
    mask = (torch.arange(CACHED) <= torch.arange(2, 2 + new)[:, None])[None, None]
    return [x, mask, kept, torch.arange(2, 2 + new)]


def fresh(args):
    return torch.utils._pytree.tree_map(lambda t: t.clone() if isinstance(t, torch.Tensor) else t, args)

"""Layers of experts in the spellings in use, and operands for them."""

import pytest
import torch
from torch.nn import functional as F

from dsopt.testing import rand

transformers_moe = pytest.importorskip("transformers.integrations.moe")

EXPERTS, TOPK, HIDDEN, INNER = 6, 2, 32, 16


def operands(tokens=5, dtype=torch.float32, experts=EXPERTS, topk=TOPK, seed=0):
    r = rand("cpu", dtype, seed)
    ids = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed)).argsort(-1)[:, :topk]
    w13, w2 = r(experts, 2 * INNER, HIDDEN) * HIDDEN**-0.5, r(experts, HIDDEN, INNER) * INNER**-0.5
    return r(tokens, HIDDEN), ids, r(tokens, topk).float().softmax(-1), w13, w2


def grouped_mm(a, w, ends):
    if a.dtype == torch.bfloat16:
        return torch._grouped_mm(a, w, offs=ends)
    return torch.ops.transformers.grouped_mm_fallback(a, w, ends)


def swiglu(h):
    gate, up = h.chunk(2, -1)
    return F.silu(gate) * up


def ends_of(sorted_ids, experts):
    counts = torch.histc(sorted_ids.float(), bins=experts, min=0, max=experts - 1)
    return counts.cumsum(0, dtype=torch.int32)


def grouped(x, ids, weights, w13, w2):
    sorted_ids, order = torch.sort(ids.reshape(-1))
    ends = ends_of(sorted_ids, w13.shape[0])
    h = swiglu(grouped_mm(x[order // ids.shape[1]], w13.transpose(1, 2), ends))
    y = grouped_mm(h, w2.transpose(1, 2), ends) * weights.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.shape[0])
    return y[back].view(*ids.shape, HIDDEN).sum(1).to(x.dtype)


def grouped_counted_by_bincount(x, ids, weights, w13, w2):
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    ends = torch.zeros(w13.shape[0], dtype=torch.int64).scatter_add(0, flat, torch.ones_like(flat)).cumsum(0)
    y = grouped_mm(swiglu(grouped_mm(x[order // ids.shape[1]], w13.mT, ends.int())), w2.mT, ends.int())
    y = y[order.argsort()].unflatten(0, ids.shape)
    return torch.sum(y * weights[..., None], 1).type_as(x)


def grouped_added_to_tokens(x, ids, weights, w13, w2):
    order = ids.flatten().argsort()
    token = order // ids.shape[1]
    ends = ends_of(ids.flatten()[order], w13.shape[0])
    y = grouped_mm(swiglu(grouped_mm(x.index_select(0, token), w13.mT, ends)), w2.mT, ends)
    y = y * weights.flatten()[order, None]
    return torch.zeros(x.shape).index_add_(0, token, y.float()).to(x.dtype)


def grouped_copied_back(x, ids, weights, w13, w2):
    expert, order = ids.flatten().sort()
    ends = ends_of(expert, w13.shape[0])
    y = grouped_mm(swiglu(grouped_mm(x[order // ids.shape[-1]], w13.mT, ends)), w2.mT, ends)
    y = torch.empty_like(y).index_copy(0, order, y)
    return (y.unflatten(0, ids.shape) * weights.unsqueeze(-1)).sum(1).to(x.dtype)


def grouped_with_sentinels(x, ids, weights, w13, w2):
    expert, order = torch.sort(ids.reshape(-1))
    ends = ends_of(expert, w13.shape[0])
    none = (expert >= w13.shape[0]).unsqueeze(-1)
    rows = x[order // ids.shape[1]]
    rows.masked_fill_(none, 0.0)
    h = grouped_mm(rows, w13.mT, ends).masked_fill(none, 0.0)
    y = grouped_mm(swiglu(h), w2.mT, ends).masked_fill(none, 0.0) * weights.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.shape[0])
    return y[back].view(*ids.shape, HIDDEN).sum(1).to(x.dtype)


def batched(x, ids, weights, w13, w2):
    expert = ids.reshape(-1)
    rows = x.repeat_interleave(ids.shape[1], dim=0)
    h = torch.bmm(w13[expert], rows.unsqueeze(-1)).squeeze(-1)
    y = torch.bmm(w2[expert], swiglu(h).unsqueeze(-1)).squeeze(-1)
    return (y * weights.reshape(-1, 1)).view(*ids.shape, HIDDEN).sum(1).to(x.dtype)


def batched_from_the_left(x, ids, weights, w13, w2):
    expert = ids.reshape(-1)
    rows = x.unsqueeze(1).expand(-1, ids.shape[1], -1).reshape(-1, x.shape[-1])
    h = torch.bmm(rows.unsqueeze(1), w13[expert].mT)
    y = torch.bmm(swiglu(h), w2[expert].transpose(-1, -2)).squeeze(1)
    return (y.unflatten(0, ids.shape) * weights.unsqueeze(-1)).sum(dim=1).to(x.dtype)


def batched_with_sentinels(x, ids, weights, w13, w2):
    expert = ids.reshape(-1)
    none = expert >= w13.shape[0]
    expert = expert.clamp(0, w13.shape[0] - 1)
    h = torch.bmm(w13[expert], x.repeat_interleave(ids.shape[1], 0).unsqueeze(-1)).squeeze(-1)
    y = torch.bmm(w2[expert], swiglu(h).unsqueeze(-1)).squeeze(-1)
    y = y * weights.reshape(-1).masked_fill(none, 0.0).unsqueeze(-1)
    return y.view(*ids.shape, HIDDEN).sum(1).to(x.dtype)


def einsums(x, ids, weights, w13, w2):
    h = torch.einsum("tknh,th->tkn", w13[ids], x)
    gate, up = torch.split(h, INNER, -1)
    y = torch.einsum("tkhn,tkn->tkh", w2[ids], up * (gate * gate.sigmoid()))
    return (y * weights.to(y.dtype).unsqueeze(-1)).sum(1)


SPELLINGS = [
    grouped,
    grouped_counted_by_bincount,
    grouped_added_to_tokens,
    grouped_copied_back,
    grouped_with_sentinels,
    batched,
    batched_from_the_left,
    batched_with_sentinels,
    einsums,
]

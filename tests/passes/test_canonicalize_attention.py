import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dsopt.testing import exported, relative_l2, rewritten

PASSES = ("canonicalize", "canonicalize_attention", "canonicalize")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
SCALE = 0.3


def qkv(dtype=torch.float32, batch=2, heads=3, new=4, cached=6, dim=8):
    return [torch.randn(batch, heads, tokens, dim, dtype=dtype) for tokens in (new, cached, cached)]


def check(fn, *args, tolerance=1e-5):
    result = rewritten(fn, *args, passes=PASSES)
    assert result.log("canonicalize_attention").rewrites == 1
    assert result.count("aten.scaled_dot_product_attention") == 1
    assert not {"aten.softmax", "aten.matmul", "aten.einsum"} & set(result.ops())
    assert relative_l2(result.run(*args), fn(*args)) < tolerance
    return result


def scale_as_factor(q, k, v):
    return (q @ k.transpose(-1, -2) * SCALE).softmax(-1) @ v


def scale_in_front(q, k, v):
    return torch.matmul(torch.softmax(SCALE * torch.matmul(q, k.mT), dim=3), v)


def scale_as_divisor(q, k, v):
    return F.softmax(q @ k.transpose(2, 3) / math.sqrt(q.shape[-1]), dim=-1) @ v


def query_scaled_before(q, k, v):
    return torch.softmax((q * SCALE) @ k.mT, -1) @ v


def no_scale(q, k, v):
    return torch.softmax(q @ k.mT, -1) @ v


def float32_softmax(q, k, v):
    weights = F.softmax(q @ k.mT * SCALE, dim=-1, dtype=torch.float32).to(q.dtype)
    return F.dropout(weights, p=0.0) @ v


def float32_scores(q, k, v):
    return ((q @ k.mT).float() * SCALE).softmax(-1).type_as(v) @ v


def einsum(q, k, v):
    weights = torch.softmax(torch.einsum("bhsd,bhtd->bhst", q, k) * SCALE, -1)
    return torch.einsum("bhst,bhtd->bhsd", weights, v)


SPELLINGS = [
    scale_as_factor,
    scale_in_front,
    scale_as_divisor,
    query_scaled_before,
    no_scale,
    float32_softmax,
    float32_scores,
    einsum,
]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("fn", SPELLINGS, ids=lambda f: f.__name__)
def test_spellings(fn, dtype):
    check(fn, *qkv(dtype), tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("fn", [scale_as_factor, float32_softmax, einsum], ids=lambda f: f.__name__)
def test_exported_graphs(fn):
    class Attention(nn.Module):
        def forward(self, q, k, v):
            return fn(q, k, v)

    args = qkv()
    result = exported(Attention(), *args, passes=PASSES)
    assert result.log("canonicalize_attention").rewrites == 1
    assert relative_l2(result.run(*args), fn(*args)) < 1e-5


def test_einsum_with_heads_behind_tokens():
    def attention(q, k, v):
        weights = (torch.einsum("bshd,bthd->bsht", q, k) * SCALE).softmax(-1)
        return torch.einsum("bsht,bthd->bshd", weights, v)

    check(attention, *(x.transpose(1, 2) for x in qkv()))


def test_einsum_with_heads_behind_tokens_and_a_mask():
    """DeepSeek's own code: scores (batch, queries, heads, keys), the mask added in place."""

    def attention(q, k, v, mask):
        scores = torch.einsum("bshd,bthd->bsht", q, k) * SCALE
        scores += mask.unsqueeze(1)
        scores = scores.softmax(dim=-1, dtype=torch.float32).type_as(q)
        return torch.einsum("bsht,bthd->bshd", scores, v)

    mask = torch.full((4, 6), float("-inf")).triu(3)
    check(attention, *(x.transpose(1, 2) for x in qkv()), mask)


def test_einsum_that_reorders_the_result():
    def attention(q, k, v):
        weights = torch.softmax(torch.einsum("bshd,bthd->bhst", q, k) * SCALE, -1)
        return torch.einsum("bhst,bthd->bshd", weights, v).flatten(2)

    check(attention, *(x.transpose(1, 2) for x in qkv()))


def test_repeated_heads():
    def attention(q, k, v):
        k, v = (x[:, :, None].expand(2, 1, 3, 6, 8).reshape(2, 3, 6, 8) for x in (k, v))
        return (q @ k.mT * SCALE).softmax(-1) @ v

    q, k, v = qkv()
    check(attention, q, k[:, :1], v[:, :1])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("mask_dtype", [torch.float32, None], ids=["float32 mask", "same dtype"])
def test_added_mask(dtype, mask_dtype):
    def attention(q, k, v, mask):
        weights = q @ k.mT * SCALE
        return F.softmax(weights + mask, -1, dtype=torch.float32).to(q.dtype) @ v

    q, k, v = qkv(dtype)
    mask_dtype = mask_dtype or dtype
    mask = torch.zeros(2, 1, 4, 6, dtype=mask_dtype)
    mask[1, :, :, 4:] = torch.finfo(mask_dtype).min
    check(attention, q, k, v, mask, tolerance=TOLERANCE[dtype])


def test_mask_in_front_of_the_scores():
    def attention(q, k, v, mask):
        return torch.softmax(mask[:, None] + torch.matmul(q, k.mT) * SCALE, -1) @ v

    mask = torch.zeros(2, 4, 6).masked_fill(torch.rand(2, 4, 6) < 0.3, float("-inf"))
    mask[..., 0] = 0
    check(attention, *qkv(), mask)


@pytest.mark.parametrize("value", [float("-inf"), -1e9, torch.finfo(torch.float32).min])
def test_filled_mask(value):
    def attention(q, k, v, hidden):
        scores = (q @ k.mT * SCALE).masked_fill(hidden, value)
        return scores.softmax(-1) @ v

    hidden = torch.rand(2, 1, 4, 6) < 0.4
    hidden[..., 0] = False
    check(attention, *qkv(), hidden)


def test_all_hidden_by_a_finite_value_is_uniform():
    def attention(q, k, v, hidden):
        return (q @ k.mT * SCALE).masked_fill(hidden, torch.finfo(torch.float32).min).softmax(-1) @ v

    hidden = torch.zeros(2, 1, 4, 6, dtype=torch.bool)
    hidden[1, :, 2] = True
    check(attention, *qkv(), hidden)


def test_additive_mask_built_in_the_graph():
    def attention(q, k, v):
        causal = torch.full((6, 6), float("-inf")).triu(1)
        return (q @ k.mT * SCALE + causal).softmax(-1) @ v

    check(attention, *qkv(new=6))


def test_dynamic_shapes():
    args = qkv()
    torch._dynamo.mark_dynamic(args[0], 2)
    for x in args[1:]:
        torch._dynamo.mark_dynamic(x, 2)
    result = rewritten(float32_softmax, *args, passes=PASSES)
    assert result.log("canonicalize_attention").rewrites == 1
    args = qkv(new=2, cached=9)
    assert relative_l2(result.run(*args), float32_softmax(*args)) < 1e-5
    assert len(result.graphs) == 1


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int32], ids=str)
def test_added_flags_are_numbers(mask_dtype):
    def attention(q, k, v, mask):
        return (q @ k.mT * SCALE + mask).softmax(-1) @ v

    check(attention, *qkv(), (torch.rand(2, 1, 4, 6) > 0.5).to(mask_dtype))


@pytest.mark.parametrize("sizes", [(), (6,), (4, 6), (3, 4, 6)], ids=str)
def test_added_mask_of_any_rank(sizes):
    def attention(q, k, v, mask):
        return (q @ k.mT * SCALE + mask).softmax(-1) @ v

    check(attention, *qkv(), torch.randn(sizes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_all_hidden_by_a_large_value_is_uniform(dtype):
    def attention(q, k, v, hidden):
        return (q @ k.mT * SCALE).masked_fill(hidden, -1e12).softmax(-1) @ v

    hidden = torch.zeros(2, 1, 4, 6, dtype=torch.bool)
    hidden[1, :, 2] = True
    check(attention, *qkv(dtype), hidden)


def test_queries_and_keys_widened_before_the_product():
    def attention(q, k, v):
        return ((q.float() @ k.float().mT) * SCALE).softmax(-1).to(v.dtype) @ v

    check(attention, *qkv(torch.bfloat16), tolerance=TOLERANCE[torch.bfloat16])


def stays(fn, *args, reason=None):
    result = rewritten(fn, *args, passes=PASSES)
    log = result.log("canonicalize_attention")
    assert log.rewrites == 0
    if reason is not None:
        assert len(log.misses) == 1 and reason in log.misses[0]["reason"]
    got, want = result.run(*args), fn(*args)
    for a, b in zip(torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(want), strict=True):
        assert relative_l2(a, b) < 1e-5


def test_weights_read_elsewhere():
    def attention(q, k, v):
        weights = (q @ k.mT * SCALE).softmax(-1)
        return weights @ v, weights

    stays(attention, *qkv(), reason="readers")


def test_scores_read_elsewhere():
    def attention(q, k, v):
        scores = q @ k.mT * SCALE
        return scores.softmax(-1) @ v, scores.amax(-1)

    stays(attention, *qkv(), reason="readers")


def test_scale_that_is_a_tensor():
    def factor(q, k, v, scale):
        return (q @ k.mT * scale).softmax(-1) @ v

    def divisor(q, k, v, scale):
        return (q @ k.mT / scale).softmax(-1) @ v

    def masked(q, k, v, scale):
        return (q @ k.mT * scale + torch.zeros(6)).softmax(-1) @ v

    for fn in (factor, divisor, masked):
        for scale in (torch.tensor(0.7), torch.rand(1, 3, 1, 1)):
            stays(fn, *qkv(), scale, reason="the scale of the scores is a tensor")


def with_sinks(less=lambda scores: scores, sinks_of=lambda sinks: sinks.view(1, -1, 1, 1).expand(2, 3, 4, 1)):
    """Attention with a column beside the scores, `less` what is taken off all of them, as in gpt-oss."""

    def attention(q, k, v, sinks, mask):
        scores = q @ k.mT * SCALE + mask
        scores = torch.cat((scores, sinks_of(sinks)), -1)
        return less(scores).softmax(-1)[..., :-1].to(v.dtype) @ v

    return attention


SINKS = {
    "plain": with_sinks(),
    "less the largest": with_sinks(lambda scores: scores - scores.max(dim=-1, keepdim=True).values),
    "less the largest by amax": with_sinks(lambda scores: scores - scores.amax(-1, keepdim=True)),
    "of three axes": with_sinks(sinks_of=lambda sinks: sinks[:, None, None].expand(2, 3, 4, 1)),
    "of one batch": with_sinks(sinks_of=lambda sinks: sinks.reshape(1, 3, 1, 1).repeat(2, 1, 4, 1)),
}


@pytest.mark.parametrize("name", list(SINKS)[:4])
def test_sinks(name):
    args = (*qkv(), torch.randn(3), torch.randn(2, 1, 4, 6))
    result = rewritten(SINKS[name], *args, passes=PASSES)
    log = result.log("canonicalize_attention")
    assert log.families == {"attention": 1} and log.misses == []
    assert result.count("dsopt.attention") == 1 and not {"aten.softmax", "aten.cat"} & set(result.ops())
    assert relative_l2(result.run(*args), SINKS[name](*args)) < 1e-5


def test_columns_that_are_no_sinks():
    """Repeated in memory, in front of the scores, two of them, kept for the values, less another maximum."""
    q, k, v = qkv()
    one, mask = torch.randn(3), torch.randn(2, 1, 4, 6)

    def in_front(q, k, v, sinks):
        scores = torch.cat((sinks.view(1, 3, 1, 1).expand(2, 3, 4, 1), q @ k.mT * SCALE), -1)
        return scores.softmax(-1)[..., 1:] @ v

    def two(q, k, v, sinks):
        scores = torch.cat((q @ k.mT * SCALE, sinks.view(1, 3, 1, 1).expand(2, 3, 4, 2)), -1)
        return scores.softmax(-1)[..., :-2] @ v

    def kept(q, k, v, sinks):
        scores = torch.cat((q @ k.mT * SCALE, sinks.view(1, 3, 1, 1).expand(2, 3, 4, 1)), -1)
        return scores.softmax(-1) @ torch.cat((v, v[:, :, :1]), 2)

    stays(SINKS["of one batch"], q, k, v, one, mask)
    for fn in (in_front, two):
        stays(fn, q, k, v, one, reason="sink")
    stays(kept, q, k, v, one, reason="sink is multiplied")
    less = with_sinks(lambda scores: scores - scores.amax(-2, keepdim=True))
    stays(less, q, k, v, one, mask, reason="stands between")


def test_softmax_over_another_dim():
    stays(lambda q, k, v: (q @ k.mT * SCALE).softmax(-2) @ v, *qkv())


def test_softcapped_scores():
    stays(lambda q, k, v: (torch.tanh(q @ k.mT / 5) * 5).softmax(-1) @ v, *qkv(), reason="tanh")


def test_active_dropout():
    def attention(q, k, v):
        return F.dropout((q @ k.mT).softmax(-1), 1.0, training=True) @ v

    stays(attention, *qkv())


def test_mask_scaled_with_the_scores():
    def attention(q, k, v, mask):
        return ((q @ k.mT + mask) * SCALE).softmax(-1) @ v

    result = rewritten(attention, *qkv(), mask := torch.randn(2, 1, 4, 6), passes=PASSES)
    args = *qkv(), mask
    assert relative_l2(result.run(*args), attention(*args)) < 1e-5


def test_filled_with_an_ordinary_number():
    def attention(q, k, v, hidden):
        return (q @ k.mT * SCALE).masked_fill(hidden, -1.0).softmax(-1) @ v

    stays(attention, *qkv(), torch.rand(2, 1, 4, 6) < 0.5)


def test_weights_on_the_right():
    def attention(q, k, v):
        return v.mT @ (k @ q.mT * SCALE).softmax(-1)

    stays(attention, *qkv())


def test_scaled_sum_with_alpha():
    def attention(q, k, v, mask):
        return torch.add(q @ k.mT, mask, alpha=3).softmax(-1) @ v

    stays(attention, *qkv(), torch.randn(2, 1, 4, 6))


def test_router_softmax_is_left_alone():
    def route(x, w):
        return F.softmax(F.linear(x, w), -1, dtype=torch.float32).topk(2)

    result = rewritten(route, torch.randn(5, 8), torch.randn(6, 8), passes=PASSES)
    assert result.log("canonicalize_attention").rewrites == 0
    assert result.log("canonicalize_attention").misses == []


def test_values_of_another_dtype():
    def attention(q, k, v):
        return (q @ k.mT * SCALE).softmax(-1).to(v.dtype) @ v

    q, k, v = qkv()
    stays(attention, q, k, v.double(), reason="not of one dtype")


@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn, torch.bfloat16], ids=str)
def test_rounding_of_scores_and_weights_is_kept(dtype):
    def scores(q, k, v):
        return (q @ k.mT).to(dtype).float().softmax(-1) @ v

    def weights(q, k, v):
        return (q @ k.mT).softmax(-1).to(dtype).float() @ v

    stays(scores, *qkv())
    stays(weights, *qkv(), reason="rounded")


def test_scale_computed_from_sizes():
    def attention(q, k, v):
        return (q @ k.mT / q.shape[2]).softmax(-1) @ v

    result = rewritten(attention, *qkv(), passes=PASSES, dynamic=True)
    assert result.log("canonicalize_attention").rewrites == 0
    assert "not a number" in result.log("canonicalize_attention").misses[0]["reason"]
    args = qkv(new=5)
    assert relative_l2(result.run(*args), attention(*args)) < 1e-5

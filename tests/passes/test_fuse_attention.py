"""Attention of heads that share keys becomes one op, without the repeated keys; what it is not stays."""

import pytest
import torch
from torch.nn import functional as F

from dsopt.census import census
from dsopt.testing import exported, relative_l2, rewritten

PASSES = ("canonicalize", "canonicalize_attention", "absorb_mla", "fuse_attention", "canonicalize")
BATCH, HEADS, KV_HEADS, NEW, CACHED, WIDTH = 2, 6, 3, 4, 9, 8
SHARED = HEADS // KV_HEADS


def operands(kv_heads=KV_HEADS, new=NEW, cached=CACHED, dtype=torch.float32):
    """Queries, keys and values as a model's layers give them: tokens before heads."""
    sizes = (new, HEADS), (cached, kv_heads), (cached, kv_heads)
    return [torch.randn(BATCH, *size, WIDTH, dtype=dtype).transpose(1, 2) for size in sizes]


def expanded(x):
    batch, heads, tokens, width = x.shape
    return x[:, :, None].expand(batch, heads, SHARED, tokens, width).reshape(batch, -1, tokens, width)


def expanded_copy(x):
    return x.unsqueeze(2).expand(-1, -1, SHARED, -1, -1).contiguous().flatten(1, 2)


def interleaved(x):
    return x.repeat_interleave(SHARED, 1)


def tokens_first(x):
    x = x.transpose(1, 2)
    batch, tokens, heads, width = x.shape
    x = x[:, :, :, None].expand(batch, tokens, heads, SHARED, width).reshape(batch, tokens, -1, width)
    return x.transpose(1, 2)


def tokens_first_interleaved(x):
    return x.transpose(1, 2).repeat_interleave(SHARED, dim=-2).transpose(1, 2)


REPEATS = [expanded, expanded_copy, interleaved, tokens_first, tokens_first_interleaved]


def sdpa(q, k, v, mask=None, **kwargs):
    return F.scaled_dot_product_attention(q, k, v, mask, **kwargs).transpose(1, 2).flatten(2)


def eager(q, k, v, mask=None):
    scores = q @ k.transpose(-1, -2) * WIDTH**-0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = F.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
    return (weights @ v).transpose(1, 2).reshape(q.shape[0], q.shape[2], -1)


def fresh(args):
    return [x.clone() if isinstance(x, torch.Tensor) else x for x in args]


def check(fn, *args, tolerance=1e-5):
    """One attention, nothing repeated, the outputs and the written inputs of eager."""
    assert census(rewritten(fn, *fresh(args), passes=()).graphs[-1])["attention"] == 1
    result = rewritten(fn, *fresh(args), passes=PASSES)
    log = result.log("fuse_attention")
    assert log.families == {"attention": 1} and log.misses == []
    assert result.count("dsopt.attention") == 1
    left = set(result.ops())
    assert not {"aten.scaled_dot_product_attention", "aten.repeat_interleave", "aten.contiguous"} & left
    got_args, want_args = fresh(args), fresh(args)
    assert relative_l2(result.run(*got_args), fn(*want_args)) < tolerance
    for got, want in zip(got_args, want_args, strict=True):
        assert not isinstance(got, torch.Tensor) or torch.equal(got, want)
    return result


@pytest.mark.parametrize("repeat", REPEATS)
@pytest.mark.parametrize("attend", [sdpa, eager])
def test_repeated_heads(repeat, attend):
    result = check(lambda q, k, v: attend(q, repeat(k), repeat(v)), *operands())
    assert "aten.expand" not in result.ops()


def test_bfloat16():
    args = operands(dtype=torch.bfloat16)
    check(lambda q, k, v: eager(q, expanded(k), expanded(v)), *args, tolerance=2e-2)


def test_grouped_call():
    """ATen's own grouping, one head of keys for all, a head of keys for each, values of another width."""
    q, k, v = operands()
    check(lambda q, k, v: sdpa(q, k, v, enable_gqa=True), q, k, v)
    check(lambda q, k, v: sdpa(q, k, v, scale=0.3, enable_gqa=True), q, k, v[..., :5])
    check(lambda q, k, v: sdpa(q, k, v, is_causal=True, enable_gqa=True), q, k, v)
    check(lambda q, k, v: sdpa(q, k[:, :1], v[:, :1], enable_gqa=True), q, k, v)
    check(sdpa, *operands(HEADS))
    module = torch.nn.Module()
    module.forward = lambda q, k, v: sdpa(q, k, v, enable_gqa=True)
    result = exported(module, q, k, v, passes=PASSES)
    assert result.log("fuse_attention").families == {"attention": 1}
    assert relative_l2(result.run(q, k, v), module(q, k, v)) < 1e-5


def test_one_head_of_keys_expanded():
    """An expand of one head is a view, and the op reads it as such."""
    q, k, v = operands(1)
    check(lambda q, k, v: sdpa(q, k.expand(-1, HEADS, -1, -1), v.expand(-1, HEADS, -1, -1)), q, k, v)


@pytest.mark.parametrize("form", ["flags", "by_head", "repeated", "added", "two_axes"])
def test_masks(form):
    q, k, v = operands()
    seen = torch.arange(CACHED) <= torch.arange(NEW)[:, None] + 3
    masks = {
        "flags": seen.expand(BATCH, 1, NEW, CACHED).clone(),
        "by_head": seen & (torch.rand(1, HEADS, 1, CACHED) > 0.3),
        "repeated": seen[None, None],
        "added": torch.randn(BATCH, 1, NEW, CACHED),
        "two_axes": seen,
    }

    def fn(q, k, v, mask):
        if form == "repeated":
            mask = mask.expand(BATCH, HEADS, NEW, CACHED)
        return sdpa(q, expanded(k), expanded(v), mask)

    result = check(fn, q, k, v, masks[form])
    assert "aten.expand" not in result.ops()


def test_static_cache_is_read_after_it_is_written():
    q, _, _ = operands(new=2)
    cache = torch.randn(2, BATCH, KV_HEADS, CACHED, WIDTH)
    new = torch.randn(2, BATCH, KV_HEADS, 2, WIDTH)
    seen = torch.arange(CACHED) <= torch.arange(3, 5)[:, None]

    def fn(q, keys, values, new, position):
        k, v = keys.index_copy_(2, position, new[0]), values.index_copy_(2, position, new[1])
        return sdpa(q, expanded(k), expanded(v), seen)

    check(fn, q, *cache.unbind(), new, torch.arange(3, 5))


def test_any_number_of_tokens_is_one_graph():
    def by_head(x, heads):
        return x.view(*x.shape[:2], heads, WIDTH).transpose(1, 2)

    def fn(q, k, v):
        k, v = (expanded(by_head(x, KV_HEADS)) for x in (k, v))
        return sdpa(by_head(q, HEADS), k, v)

    def args(new, cached):
        return [torch.randn(BATCH, n, h * WIDTH) for n, h in ((new, HEADS), *[(cached, KV_HEADS)] * 2)]

    result = rewritten(fn, *args(4, 9), passes=PASSES, dynamic=True)
    for new, cached in ((3, 7), (5, 12)):
        mine = args(new, cached)
        assert relative_l2(result.run(*mine), fn(*mine)) < 1e-5
    assert len(result.logs) == 1 and result.log("fuse_attention").families == {"attention": 1}


def stay(fn, *args, reason):
    result = rewritten(fn, *fresh(args), passes=PASSES)
    log = result.log("fuse_attention")
    assert log.rewrites == 0 and result.count("dsopt.attention") == 0
    assert [reason in miss["reason"] for miss in log.misses] == [True], log.misses
    torch.manual_seed(0)
    got = result.run(*fresh(args))
    torch.manual_seed(0)
    torch.testing.assert_close(got, fn(*fresh(args)))


def test_near_misses():
    q, k, v = operands(HEADS)
    stay(lambda q, k, v: sdpa(q, k, v, dropout_p=0.5), q, k, v, reason="dropout with p=0.5")
    stay(lambda q, k, v: sdpa(q, k[:1], v), q, k, v, reason="different batch sizes")
    stay(lambda q, k, v: sdpa(q, k[:, :1], v), q, k, v, reason="numbers of heads")
    three = (lambda q, k, v: F.scaled_dot_product_attention(q[0], k[0], v[0]), q, k, v)
    stay(*three, reason="not (batch, heads, tokens, dim)")


def test_cache_written_before_it_is_attended_to():
    """The keys were repeated before the write, and so are another cache's keys."""
    q, k, v = operands()

    def fn(q, k, v):
        keys, values = expanded(k), expanded(v)
        k.mul_(0.5)
        return sdpa(q, keys, values)

    stay(fn, q, k, v, reason="writes between")


def test_heads_repeated_the_other_way_stay_repeated():
    """x x x y y y is shared keys, x y x y is not."""

    def fn(q, k, v):
        return sdpa(q, k.repeat(1, SHARED, 1, 1), v.repeat(1, SHARED, 1, 1))

    result = rewritten(fn, *operands(), passes=PASSES)
    assert result.log("fuse_attention").rewrites == 1 and result.count("aten.repeat") == 2
    args = operands()
    assert relative_l2(result.run(*args), fn(*args)) < 1e-5


def test_keys_repeated_otherwise_than_values():
    def fn(q, k, v):
        return sdpa(q, expanded(k), v.repeat(1, SHARED, 1, 1))

    args = operands()
    result = rewritten(fn, *args, passes=PASSES)
    assert result.log("fuse_attention").rewrites == 1
    assert relative_l2(result.run(*args), fn(*args)) < 1e-5


def test_sinks_beside_repeated_keys():
    def fn(q, k, v, sinks):
        scores = q @ expanded(k).mT * 0.3
        scores = torch.cat((scores, sinks.view(1, -1, 1, 1).expand(BATCH, HEADS, NEW, 1)), -1)
        weights = scores.softmax(-1)[..., :-1]
        return (weights @ expanded(v)).transpose(1, 2).flatten(2)

    args = (*operands(), torch.randn(HEADS))
    result = rewritten(fn, *args, passes=PASSES)
    assert result.log("canonicalize_attention").families == {"attention": 1}
    assert result.log("fuse_attention").rewrites == 1 and result.log("fuse_attention").families == {}
    assert result.count("dsopt.attention") == 1 and "aten.expand" not in result.ops()
    assert relative_l2(result.run(*args), fn(*args)) < 1e-5

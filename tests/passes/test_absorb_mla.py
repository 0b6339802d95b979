import itertools
import math

import pytest
import torch
from latent import CACHED, HIDDEN, MLA, NOPE, RANK, ROPE, VALUE, fresh, inputs
from torch import nn
from torch.nn import functional as F

from dsopt.testing import exported, relative_l2, rewritten

PASSES = ("canonicalize", "canonicalize_attention", "absorb_mla", "canonicalize")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def check(model, args, tolerance=1e-5, export=False):
    results = [rewritten(model, *fresh(args), passes=PASSES)]
    if export:
        results.append(exported(model, *fresh(args), passes=PASSES))
    for result in results:
        assert result.log("absorb_mla").families == {"mla": 1}, result.log("absorb_mla").misses
        assert result.count("dsopt.mla_attention") == 1
        assert not {"aten.scaled_dot_product_attention", "aten.expand"} & set(result.ops())
        got_args, want_args = fresh(args), fresh(args)
        assert relative_l2(result.run(*got_args), model(*want_args)) < tolerance
        for got, want in zip(*map(torch.utils._pytree.tree_leaves, (got_args, want_args)), strict=True):
            assert got is None or torch.equal(got, want)
    return results[0]


EXPANSIONS = [
    "merged",
    "split_late",
    "split_first",
    "separate",
    "contiguous",
    "einsum",
    "einsum_tokens_first",
    "matmul",
]


@pytest.mark.parametrize("attend", ["sdpa", "causal", "eager"])
@pytest.mark.parametrize("expand", EXPANSIONS)
def test_expansions(expand, attend):
    check(MLA(expand=expand, attend=attend), inputs())


@pytest.mark.parametrize("expand", ["merged", "separate", "einsum"])
def test_exported_graphs(expand):
    check(MLA(expand=expand), inputs(), export=True)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("cache", "rope_first", "four_d"),
    list(itertools.product(("none", "cat", "static"), (False, True), (False, True))),
)
def test_caches(cache, rope_first, four_d, dtype):
    model = MLA(rope_first=rope_first, four_d=four_d, dtype=dtype)
    check(model, inputs(cache, dtype=dtype, four_d=four_d), TOLERANCE[dtype])


@pytest.mark.parametrize(("batch", "heads", "new"), [(1, 1, 1), (1, 5, 1), (2, 1, 3), (2, 5, 1), (1, 3, 9)])
@pytest.mark.parametrize("expand", ["merged", "separate", "einsum"])
def test_sizes(expand, batch, heads, new):
    check(MLA(heads, expand), inputs("cat", batch, new))


@pytest.mark.parametrize("attend", ["sdpa", "eager"])
def test_masks(attend):
    model, new = MLA(attend=attend), 3
    for heads in (1, None):
        mask = torch.zeros(2, 1, new, CACHED + new)
        mask[1, :, :, :4] = float("-inf")
        if heads is None:
            mask = mask.expand(2, 3, new, CACHED + new) if attend == "sdpa" else mask[:1]
        x, _, cache = inputs("cat")
        if attend == "sdpa" and heads is None:
            # a mask that a graph repeats for every head is one mask

            def repeated(x, mask, cache):
                return model(x, mask.expand(2, 3, new, CACHED + new), cache)

            result = rewritten(repeated, x, mask[:, :1], cache, passes=PASSES)
            assert result.log("absorb_mla").families == {"mla": 1}
            assert relative_l2(result.run(x, mask[:, :1], cache), model(x, mask, cache)) < 1e-5
        else:
            check(model, [x, mask, cache])


def test_default_scale():
    model = MLA()
    model.scale = None
    check(model, inputs())


def test_integer_scale():
    model = MLA()
    model.scale = 1
    check(model, inputs())


def test_wider_scale():
    model = MLA()
    model.scale = 0.1 * math.log(40) + 1.0
    check(model, inputs())


def test_causal_over_a_cut_cache():
    """A static cache longer than the prompt, cut to it before the causal attention."""

    def prefill(model, x, cache, position):
        c, k_rope = model.kv_a(x).split([RANK, ROPE], -1)
        c = cache[0].index_copy_(1, position, c)
        k_rope = cache[1].index_copy_(1, position, k_rope)[:, None]
        k_nope, v = model.merged(c)
        q = model.q(x).view(*x.shape[:2], model.heads, -1).transpose(1, 2)
        k = torch.cat((k_nope, k_rope.expand(-1, model.heads, -1, -1)), -1)
        k, v = k[:, :, : x.shape[1]], v[:, :, : x.shape[1]]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    model, x, position = MLA(), torch.randn(2, 3, HIDDEN), torch.arange(3)
    cache = [torch.randn(2, CACHED, RANK), torch.randn(2, CACHED, ROPE)]

    def fn(x, cache, position):
        return prefill(model, x, cache, position)

    result = rewritten(fn, x, fresh(cache), position, passes=PASSES)
    assert result.log("absorb_mla").families == {"mla": 1}
    got, want = fresh(cache), fresh(cache)
    assert relative_l2(result.run(x, got, position), fn(x, want, position)) < 1e-5
    assert torch.equal(got[0], want[0])


def test_dynamic_shapes():
    model = MLA()

    def fn(x, latents, ropes):
        return model(x, None, [latents, ropes])

    def args(new, cached):
        return torch.randn(2, new, HIDDEN), torch.randn(2, cached, RANK), torch.randn(2, 1, cached, ROPE)

    result = rewritten(fn, *args(3, 7), passes=PASSES, dynamic=True)
    assert result.log("absorb_mla").families == {"mla": 1}
    for sizes in ((2, 9), (5, 30)):
        example = args(*sizes)
        assert relative_l2(result.run(*example), fn(*example)) < 1e-5
    assert len(result.graphs) == 1


@pytest.mark.parametrize("cached", [False, True])
def test_keys_without_a_rotary_part(cached):
    model = MLA(heads=4)

    def attend(x, cache=None):
        q = model.q(x).view(*x.shape[:2], 4, -1).transpose(1, 2)[..., :NOPE]
        c = model.kv_a(x)[..., :RANK]
        c = c if cache is None else torch.cat((cache, c), 1)
        return model.sdpa(q, *model.merged(c), None)

    args = [torch.randn(2, 3, HIDDEN), *([torch.randn(2, CACHED, RANK)] if cached else [])]
    result = rewritten(attend, *args, passes=PASSES)
    assert result.log("absorb_mla").families == {"mla": 1}
    assert relative_l2(result.run(*args), attend(*args)) < 1e-5


def test_keys_of_plain_attention_stay():
    """Keys no wider than what they are projected from: nothing is gained by not making them."""
    w_k, w_v = torch.randn(HIDDEN, HIDDEN), torch.randn(HIDDEN, HIDDEN)

    def attend(x):
        q, k, v = (t.view(2, 3, 4, HIDDEN // 4).transpose(1, 2) for t in (x * 2, x @ w_k.T, x @ w_v.T))
        return F.scaled_dot_product_attention(q, k, v)

    x = torch.randn(2, 3, HIDDEN)
    result = rewritten(attend, x, passes=PASSES)
    assert result.log("absorb_mla").rewrites == 0
    assert relative_l2(result.run(x), attend(x)) < 1e-5


@pytest.mark.parametrize("rope_first", [False, True])
@pytest.mark.parametrize("batch_heads", [(2, 3), (1, 1), (3, 3)], ids=str)
def test_keys_joined_before_heads_and_tokens_change_places(rope_first, batch_heads):
    """cat along (batch, tokens, heads, dim), with the rotary part repeated for the heads there."""
    batch, heads = batch_heads
    model = MLA(heads)

    def joined(x):
        q = model.q(x).view(*x.shape[:2], heads, -1)
        c, k_rope = model.kv_a(x).split([RANK, ROPE], -1)
        k_nope, v = model.kv_b(c).view(*x.shape[:2], heads, -1).split([NOPE, VALUE], -1)
        parts = [k_nope, k_rope.unsqueeze(2).expand(-1, -1, heads, -1)]
        query = [q[..., :NOPE].tanh(), q[..., NOPE:].sin()]
        q, k = (torch.cat(p[::-1] if rope_first else p, -1) for p in (query, parts))
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))

    x = torch.randn(batch, 3, HIDDEN)
    result = rewritten(joined, x, passes=PASSES)
    assert result.log("absorb_mla").families == {"mla": 1}, result.log("absorb_mla").misses
    assert not {"aten.cat", "aten.scaled_dot_product_attention", "aten.expand"} & set(result.ops())
    assert relative_l2(result.run(x), joined(x)) < 1e-5


@pytest.mark.parametrize("sizes", [(1, 3, 1, ROPE), (2, 1, 1, ROPE), (2, 3, 3, ROPE)], ids=str)
def test_rotary_part_before_heads_and_tokens_change_places(sizes):
    """As many tokens as heads: only a part that the heads share, and nothing else does, is one."""
    model, k_rope = MLA(), torch.randn(sizes)

    def fn(x, k_rope):
        q = model.q(x).view(2, 3, 3, -1).transpose(1, 2)
        k_nope, v = model.kv_b(model.kv_a(x)[..., :RANK]).view(2, 3, 3, -1).split([NOPE, VALUE], -1)
        k = torch.cat((k_nope, k_rope.expand(2, 3, 3, ROPE)), -1).transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v.transpose(1, 2))

    stays(fn, X, k_rope, reason="the rotary part differs by head")


def with_parts(model, change):
    """The attention of `model` with (q, k_nope, k_rope, v, mask) changed before it runs."""

    def fn(x, *more):
        q = model.q(x).view(*x.shape[:2], model.heads, -1).transpose(1, 2)
        c, k_rope = model.kv_a(x).split([RANK, ROPE], -1)
        k_nope, v = model.expand(c)
        parts = {"q": q, "k_nope": k_nope, "k_rope": k_rope[:, None].expand(-1, model.heads, -1, -1), "v": v}
        parts |= {"mask": None, "dropout_p": 0.0} | change(parts, x, *more)
        k = torch.cat((parts["k_nope"], parts["k_rope"]), -1)
        return F.scaled_dot_product_attention(
            parts["q"], k, parts["v"], parts["mask"], parts["dropout_p"], scale=model.scale
        )

    return fn


def stays(fn, *args, reason):
    result = rewritten(fn, *fresh(args), passes=PASSES)
    log = result.log("absorb_mla")
    assert log.rewrites == 0
    assert len(log.misses) == 1 and reason in log.misses[0]["reason"], log.misses
    assert relative_l2(result.run(*fresh(args)), fn(*fresh(args))) < 1e-5


X = torch.randn(2, 3, HIDDEN)


def test_values_from_elsewhere():
    model = MLA()
    other = nn.Linear(HIDDEN, 3 * VALUE)

    def from_hidden_states(parts, x):
        return {"v": other(x).view(2, 3, 3, VALUE).transpose(1, 2)}

    def from_another_latent(parts, x):
        return {"v": model.expand(model.kv_a(x * 2)[..., :RANK])[1]}

    def changed_on_the_way(parts, x):
        return {"v": torch.tanh(parts["v"])}

    stays(with_parts(model, from_hidden_states), X, reason="values: the expansion of the latent has a bias")
    stays(with_parts(model, from_another_latent), X, reason="not expanded from the latent that the keys")
    stays(with_parts(model, changed_on_the_way), X, reason="values: not a linear map of a latent")


def test_biased_expansion():
    model = MLA()
    model.kv_b = nn.Linear(RANK, 3 * (NOPE + VALUE))
    stays(model, X, reason="bias")


def test_mask_that_differs_by_head():
    stays(MLA(), X, torch.randn(2, 3, 3, 3), reason="the mask differs by head")
    stays(MLA(), X, torch.rand(3, 3, 3) < 0.9, reason="the mask differs by head")


def test_rotary_part_that_differs_by_head():
    model, k_rope = MLA(), torch.randn(2, 3, 3, ROPE)
    fn = with_parts(model, lambda parts, x, k_rope: {"k_rope": k_rope})
    stays(fn, X, k_rope, reason="the rotary part differs by head")


@pytest.mark.parametrize("sizes", [(1, 1, 3, ROPE), (2, 1, 1, ROPE), (1, 3, ROPE), (ROPE,)], ids=str)
def test_rotary_part_shared_by_more_than_heads(sizes):
    """The op reads (batch, tokens, dim): nothing that batches or tokens share may be taken for that."""
    model, k_rope = MLA(), torch.randn(sizes)
    fn = with_parts(model, lambda parts, x, k_rope: {"k_rope": k_rope.expand(2, 3, 3, ROPE)})
    stays(fn, X, k_rope, reason="the rotary part differs by head")


@pytest.mark.parametrize("shared", ["queries", "latent"])
def test_batches_that_broadcast(shared):
    model, one = MLA(), torch.randn(1, 3, HIDDEN)
    wide = torch.randn(2, 3, 3, NOPE + ROPE)
    fn = with_parts(model, lambda parts, x, wide: {"q": wide})
    args = (one, wide) if shared == "latent" else (X, wide[:1])
    stays(fn, *args, reason="different batch sizes")


def test_causal_over_every_second_key():
    model = MLA()

    def fn(q, x):
        c, k_rope = model.kv_a(x).split([RANK, ROPE], -1)
        k_nope, v = model.expand(c)
        k = torch.cat((k_nope, k_rope[:, None].expand(-1, 3, -1, -1)), -1)
        return F.scaled_dot_product_attention(q, k[:, :, ::2], v[:, :, ::2], is_causal=True)

    args = torch.randn(2, 3, 2, NOPE + ROPE), X
    result = rewritten(fn, *args, passes=PASSES)
    assert result.log("absorb_mla").rewrites == 0
    assert relative_l2(result.run(*args), fn(*args)) < 1e-5


def test_parts_of_two_dtypes():
    model = MLA()

    def narrow_keys(parts, x):
        return {"k_rope": parts["k_rope"][:, :1].bfloat16().expand(2, 3, 3, ROPE)}

    def narrow_queries(parts, x):
        q = parts["q"]
        return {"q": torch.cat((q[..., :NOPE].bfloat16(), q[..., NOPE:]), -1)}

    stays(with_parts(model, narrow_keys), X, reason="not of one dtype")
    fn = with_parts(model, narrow_queries)
    result = rewritten(fn, X, passes=PASSES)
    assert result.log("absorb_mla").families == {"mla": 1}
    assert relative_l2(result.run(X), fn(X)) < 1e-5


@pytest.mark.parametrize("write", ["cat", "index_copy_"])
def test_expanded_cache(write):
    model = MLA()

    def store(parts, x, keys, values):
        if write == "cat":
            keys, values = (torch.cat(t, 2) for t in ((keys, parts["k_nope"]), (values, parts["v"])))
        else:
            at = torch.arange(3) + 2
            keys, values = keys.index_copy_(2, at, parts["k_nope"]), values.index_copy_(2, at, parts["v"])
        return {"k_nope": keys, "v": values, "k_rope": torch.ones(2, 3, keys.shape[2], ROPE)}

    cache = torch.randn(2, 3, CACHED, NOPE), torch.randn(2, 3, CACHED, VALUE)
    stays(with_parts(model, store), X, *cache, reason="cache is expanded")


def test_whole_keys_cached():
    model = MLA()

    def fn(x, keys, values):
        q = model.q(x).view(2, 3, 3, -1).transpose(1, 2)
        c, k_rope = model.kv_a(x).split([RANK, ROPE], -1)
        k_nope, v = model.expand(c)
        k = torch.cat((k_nope, k_rope[:, None].expand(-1, 3, -1, -1)), -1)
        k, v = torch.cat((keys, k), 2), torch.cat((values, v), 2)
        return F.scaled_dot_product_attention(q, k, v)

    cache = torch.randn(2, 3, CACHED, NOPE + ROPE), torch.randn(2, 3, CACHED, VALUE)
    stays(fn, X, *cache, reason="cache is expanded")


def test_dropout():
    model = MLA()
    result = rewritten(with_parts(model, lambda parts, x: {"dropout_p": 0.1}), X, passes=PASSES)
    assert result.log("absorb_mla").rewrites == 0
    assert "dropout" in result.log("absorb_mla").misses[0]["reason"]


def test_tokens_and_heads_exchanged():
    """With as many tokens as heads, an attention over heads has the same sizes as one over tokens."""
    model = MLA()

    def exchanged(parts, x):
        return {"k_nope": parts["k_nope"].transpose(1, 2), "v": parts["v"].transpose(1, 2)}

    def batch_and_tokens(parts, x):
        return {"k_nope": parts["k_nope"].permute(2, 1, 0, 3), "v": parts["v"].permute(2, 1, 0, 3)}

    stays(with_parts(model, exchanged), X, reason="not (batch, heads, tokens, dim)")
    square = torch.randn(3, 3, HIDDEN)
    stays(with_parts(model, batch_and_tokens), square, reason="not (batch, heads, tokens, dim)")


def test_ordinary_attention_is_no_near_miss():
    q, k, v = (nn.Linear(HIDDEN, 24) for _ in range(3))

    def attention(x):
        heads = [p(x).view(2, 3, 3, 8).transpose(1, 2) for p in (q, k, v)]
        return F.scaled_dot_product_attention(*heads)

    result = rewritten(attention, X, passes=PASSES)
    assert result.log("absorb_mla").rewrites == 0 and result.log("absorb_mla").misses == []
    assert relative_l2(result.run(X), attention(X)) < 1e-5


@pytest.mark.parametrize("case", ["sink", "weights", "scale"])
def test_eager_attention_that_stays(case):
    model, extra = MLA(), torch.rand(1, 3, 1, 1)

    def fn(x, extra):
        q = model.q(x).view(2, 3, 3, -1).transpose(1, 2)
        c, k_rope = model.kv_a(x).split([RANK, ROPE], -1)
        k_nope, v = model.expand(c)
        k = torch.cat((k_nope, k_rope[:, None].expand(-1, 3, -1, -1)), -1)
        scores = q @ k.mT * (extra if case == "scale" else model.scale)
        if case == "sink":
            scores = torch.cat((scores, extra.expand(2, 3, 3, 1)), -1)
        weights = scores.softmax(-1)[..., :3]
        return weights @ v, weights if case == "weights" else None

    result = rewritten(fn, X, extra, passes=PASSES)
    assert result.log("absorb_mla").rewrites == 0
    assert result.log("canonicalize_attention").misses
    assert relative_l2(result.run(X, extra)[0], fn(X, extra)[0]) < 1e-5

"""Latent attention with its expansion absorbed by hand, as people write it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dsopt.census import census
from dsopt.testing import exported, relative_l2, rewritten

PASSES = ("canonicalize", "fuse_absorbed_mla", "canonicalize_attention", "absorb_mla", "canonicalize")
NOPE, ROPE, RANK, VALUE, HIDDEN, CACHED = 8, 4, 12, 6, 40, 7
SCALE = 0.3
INF = float("inf")


class MLA(nn.Module):
    """Projections, and the attention as one of the methods below spells it."""

    def __init__(self, spelling="deepseek", heads=3, dtype=torch.float32):
        super().__init__()
        self.heads, self.spelling = heads, getattr(self, spelling)
        self.q = nn.Linear(HIDDEN, heads * (NOPE + ROPE), bias=False, dtype=dtype)
        self.kv_a = nn.Linear(HIDDEN, RANK + ROPE, bias=False, dtype=dtype)
        self.kv_b = nn.Linear(RANK, heads * (NOPE + VALUE), bias=False, dtype=dtype)
        self.w_uk = nn.Parameter(torch.randn(heads, NOPE, RANK, dtype=dtype) / RANK**0.5)
        self.w_uv = nn.Parameter(torch.randn(heads, VALUE, RANK, dtype=dtype) / RANK**0.5)

    def split(self):
        w = self.kv_b.weight.view(self.heads, -1, RANK)
        return w[:, :NOPE], w[:, -VALUE:]

    def deepseek(self, q_nope, q_rope, c, k_rope, mask):
        """Einsums over (batch, tokens, heads), a mask added, softmax in float32."""
        w_uk, w_uv = self.split()
        q = torch.einsum("bshd,hdc->bshc", q_nope, w_uk)
        scores = torch.einsum("bshc,btc->bsht", q, c) + torch.einsum("bshr,btr->bsht", q_rope, k_rope)
        scores = scores * SCALE
        if mask is not None:
            scores = scores + torch.zeros_like(mask, dtype=c.dtype).masked_fill(~mask, -INF).unsqueeze(1)
        weights = scores.softmax(dim=-1, dtype=torch.float32).type_as(c)
        return torch.einsum("bshc,hdc->bshd", torch.einsum("bsht,btc->bshc", weights, c), w_uv)

    def filled(self, q_nope, q_rope, c, k_rope, mask):
        """Weights of their own, the rotary product first, a mask filled in, the heads before the tokens."""
        q = torch.einsum("hdc,bshd->bhsc", self.w_uk, q_nope)
        scores = torch.einsum("bshr,btr->bhst", q_rope, k_rope) + torch.einsum("btc,bhsc->bhst", c, q)
        scores = scores / 5
        if mask is not None:
            scores = scores.masked_fill(mask.logical_not()[None, None], -INF)
        context = torch.einsum("bhst,btc->bhsc", scores.softmax(-1), c)
        return torch.einsum("bhsc,hdc->bshd", context, self.w_uv)

    def matmul(self, q_nope, q_rope, c, k_rope, mask):
        """Matmuls that repeat the latent for the heads."""
        w_uk, w_uv = self.split()
        q_nope, q_rope = torch.matmul(q_nope.transpose(1, 2), w_uk), q_rope.transpose(1, 2)
        scores = torch.matmul(q_rope, k_rope.unsqueeze(1).mT) + torch.matmul(q_nope, c.unsqueeze(-3).mT)
        scores = SCALE * scores
        if mask is not None:
            scores = scores + torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(c.dtype).min)[None, None]
        weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(c.dtype)
        context = torch.einsum("bhql,blc->bhqc", weights, c)
        return torch.matmul(context, w_uv.mT).transpose(1, 2)

    def joined(self, q_nope, q_rope, c, k_rope, mask):
        """One product of joined queries and keys."""
        w_uk, w_uv = self.split()
        q = torch.cat((torch.einsum("bshd,hdc->bshc", q_nope, w_uk), q_rope), -1)
        scores = torch.einsum("bshc,btc->bhst", q, torch.cat((c, k_rope), -1)) * SCALE
        if mask is not None:
            scores = scores.masked_fill(~mask, -INF)
        context = torch.einsum("bhst,btc->bshc", scores.softmax(-1), c)
        return torch.einsum("bshc,hdc->bshd", context, w_uv)

    def fused(self, q_nope, q_rope, c, k_rope, mask):
        """A fused attention of many queries with one key and value head, repeated."""
        w_uk, w_uv = self.split()
        q = torch.cat((q_nope.transpose(1, 2) @ w_uk, q_rope.transpose(1, 2)), -1)
        k = torch.cat((c, k_rope), -1).unsqueeze(1).expand(-1, self.heads, -1, -1)
        v = c.unsqueeze(1).expand(-1, self.heads, -1, -1)
        out = F.scaled_dot_product_attention(q, k, v, mask, scale=SCALE)
        return torch.einsum("bhsc,hdc->bshd", out, w_uv)

    def side_by_side(self, q_nope, q_rope, c, k_rope, mask):
        """A cache that holds the latent and the rotary part side by side; the rotary query first in the cat."""
        w_uk, w_uv = self.split()
        kv = torch.cat((k_rope.cos(), c.sin()), -1).exp()
        q = torch.cat((q_rope.transpose(1, 2), q_nope.transpose(1, 2) @ w_uk), -1)
        k = kv.unsqueeze(1)
        out = F.scaled_dot_product_attention(q, k, k[..., ROPE:], mask, scale=SCALE, enable_gqa=True)
        return (out @ w_uv.mT).transpose(1, 2)

    def wide(self, q_nope, q_rope, c, k_rope, mask):
        """All of the attention in float32."""
        w_uk, w_uv = (w.float() for w in self.split())
        dtype, c = c.dtype, c.float()
        q = torch.einsum("bshd,hdc->bshc", q_nope.float(), w_uk)
        scores = torch.einsum("bshc,btc->bsht", q, c)
        scores = (scores + torch.einsum("bshr,btr->bsht", q_rope.float(), k_rope.float())) * SCALE
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], torch.finfo(torch.float32).min)
        context = torch.einsum("bsht,btc->bshc", scores.softmax(-1), c)
        return torch.einsum("bshc,hdc->bshd", context, w_uv).to(dtype)

    def forward(self, x, mask=None, cache=None, position=None):
        q = self.q(x).view(*x.shape[:2], self.heads, -1)
        c, k_rope = self.kv_a(x).split([RANK, ROPE], -1)
        c = F.rms_norm(c, (RANK,))
        if position is not None:
            c, k_rope = (
                kept.index_copy_(1, position, new) for kept, new in zip(cache, (c, k_rope), strict=True)
            )
        elif cache is not None:
            c, k_rope = (torch.cat(both, 1) for both in zip(cache, (c, k_rope), strict=True))
        return self.spelling(*q.split([NOPE, ROPE], -1), c, k_rope, mask).flatten(2)


SPELLINGS = ["deepseek", "filled", "matmul", "joined", "fused", "side_by_side", "wide"]


def inputs(cache="none", batch=2, new=3, dtype=torch.float32):
    """Hidden states, mask, cache, position: what MLA.forward takes."""
    x = torch.randn(batch, new, HIDDEN, dtype=dtype)
    kept = [torch.randn(batch, CACHED, width, dtype=dtype) for width in (RANK, ROPE)]
    if cache == "none":
        return [x]
    if cache == "cat":
        return [x, None, kept]
    mask = torch.arange(CACHED) <= torch.arange(2, 2 + new)[:, None]
    return [x, mask, kept, torch.arange(2, 2 + new)]


def fresh(args):
    return torch.utils._pytree.tree_map(lambda t: t.clone() if isinstance(t, torch.Tensor) else t, args)


def check(model, args, tolerance=1e-5, result=None):
    result = result or rewritten(model, *fresh(args), passes=PASSES)
    misses = result.log("fuse_absorbed_mla").misses
    assert result.log("fuse_absorbed_mla").families == {"mla": 1}, misses
    assert result.count("dsopt.mla_attention") == 1 and misses == []
    left = {"aten.scaled_dot_product_attention", "aten.softmax", "aten.einsum", "aten.matmul", "aten.bmm"}
    assert not left & set(result.ops())
    got_args, want_args = fresh(args), fresh(args)
    assert relative_l2(result.run(*got_args), model(*want_args)) < tolerance
    for got, want in zip(*map(torch.utils._pytree.tree_leaves, (got_args, want_args)), strict=True):
        assert got is None or torch.equal(got, want)
    return result


def often(names):
    """All spellings, those not named as slow ones."""
    return [s if s in names else pytest.param(s, marks=pytest.mark.slow) for s in SPELLINGS]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings(spelling):
    check(MLA(spelling), inputs("static"))


@pytest.mark.parametrize("spelling", often(["deepseek", "wide"]))
def test_bfloat16(spelling):
    check(MLA(spelling, dtype=torch.bfloat16), inputs("static", dtype=torch.bfloat16), 3e-2)


@pytest.mark.parametrize("spelling", often(["deepseek", "matmul", "fused", "side_by_side"]))
def test_totals_count_it_once(spelling):
    graph = rewritten(MLA(spelling), *inputs("static"), passes=()).graphs[-1]
    assert census(graph)["mla"] == 1


@pytest.mark.parametrize("spelling", ["deepseek", "side_by_side"])
@pytest.mark.parametrize(
    ("batch", "heads", "new", "cache"), [(1, 1, 1, "cat"), (1, 5, 1, "static"), (2, 1, 3, "none")]
)
def test_sizes(spelling, batch, heads, new, cache):
    """Axes of size 1, which run together with nothing or with anything."""
    check(MLA(spelling, heads), inputs(cache, batch, new))


@pytest.mark.parametrize("spelling", ["matmul", "filled"])
def test_as_many_tokens_as_heads_and_rows(spelling):
    check(MLA(spelling), inputs("none", batch=3, new=3))


def test_exported_graphs():
    model, args = MLA(), inputs("static")
    check(model, args, result=exported(model, *fresh(args), passes=PASSES))


def test_dynamic_shapes():
    model = MLA()

    def fn(x, latents, ropes):
        return model(x, None, [latents, ropes])

    def args(new, cached):
        return torch.randn(2, new, HIDDEN), torch.randn(2, cached, RANK), torch.randn(2, cached, ROPE)

    result = rewritten(fn, *args(3, 7), passes=PASSES, dynamic=True)
    assert result.log("fuse_absorbed_mla").families == {"mla": 1}
    for sizes in ((2, 9), (5, 30)):
        example = args(*sizes)
        assert relative_l2(result.run(*example), fn(*example)) < 1e-5
    assert len(result.graphs) == 1


def test_rows_that_see_nothing():
    """A finite value that hides everything leaves a uniform average, as it did."""
    model, (x, mask, cache, position) = MLA("matmul"), inputs("static")
    mask[1] = False
    check(model, [x, mask, cache, position])
    model = MLA("wide")
    check(model, [x, mask, cache, position])


def stays(fn, *args, reason):
    result = rewritten(fn, *fresh(args), passes=PASSES)
    log = result.log("fuse_absorbed_mla")
    assert log.rewrites == 0 and result.count("dsopt.mla_attention") == 0
    found = [miss["reason"] for miss in log.misses]
    assert (found == []) if reason is None else (len(found) == 1 and reason in found[0]), found
    assert relative_l2(result.run(*fresh(args)), fn(*fresh(args))) < 1e-5
    return result


def changed(**changes):
    """The deepseek spelling with parts of it put through other functions."""
    model = MLA()

    def part(name, x):
        return changes[name](x) if name in changes else x

    def fn(x):
        q_nope, q_rope = model.q(x).view(*x.shape[:2], 3, -1).split([NOPE, ROPE], -1)
        c, k_rope = model.kv_a(x).split([RANK, ROPE], -1)
        w_uk, w_uv = model.split()
        q = part("q", torch.einsum("bshd,hdc->bshc", q_nope, w_uk))
        first = torch.einsum("bshc,btc->bsht", q, part("keys", c))
        second = torch.einsum("bshr,btr->bsht", q_rope, k_rope)
        scores = part("scores", (first + part("second", second)) * SCALE)
        weights = part("weights", scores.softmax(-1))
        context = part("context", torch.einsum("bsht,btc->bshc", weights, part("values", c)))
        return part("out", torch.einsum("bshc,hdc->bshd", context, w_uv))

    return fn


X = torch.randn(2, 3, HIDDEN)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"values": lambda c: c * 2}, "the values are not the latent"),
        ({"values": lambda c: c.flip(1)}, "the values are not the latent"),
        ({"values": lambda c: c.transpose(0, 1)[:2, [0, 1, 1]]}, "the values are not the latent"),
        ({"keys": torch.tanh}, "the values are not the latent"),
        ({"context": torch.tanh}, "not expanded by one product"),
        ({"q": torch.tanh}, None),
        ({"second": torch.tanh}, None),
        ({"second": lambda s: -s}, None),
        ({"scores": lambda s: s * s.detach().amax()}, "the scale of the scores is a tensor"),
        ({"scores": torch.tanh}, "stands between the scores and the softmax"),
        ({"scores": lambda s: s + torch.randn(3, 1)}, "the mask differs by head"),
        ({"weights": lambda w: w * 2}, "not multiplied with values"),
        ({"weights": lambda w: w.bfloat16().float()}, "rounded to less"),
    ],
)
def test_near_misses(changes, reason):
    torch.manual_seed(0)
    fn = changed(**changes)
    if reason == "the mask differs by head":
        bias = torch.randn(3, 1)
        fn = changed(scores=lambda s: s + bias)
    stays(fn, X, reason=reason)


@pytest.mark.parametrize("shared", ["queries", "latent", "rotary part", "heads"])
def test_einsums_that_broadcast(shared):
    """An einsum repeats an axis of size 1; the op does not."""
    model = MLA()
    w_uk, w_uv = (w.detach() for w in model.split())
    sizes = {"q_nope": (2, 3, 3, NOPE), "q_rope": (2, 3, 3, ROPE), "c": (2, 5, RANK), "k_rope": (2, 5, ROPE)}
    if shared == "heads":
        w_uk = w_uk[:1]
    for name in {"queries": ("q_nope", "q_rope"), "latent": ("c",), "rotary part": ("k_rope",)}.get(
        shared, ()
    ):
        sizes[name] = (1, *sizes[name][1:])

    def fn(q_nope, q_rope, c, k_rope):
        q = torch.einsum("bshd,hdc->bshc", q_nope, w_uk)
        scores = torch.einsum("bshc,btc->bsht", q, c) + torch.einsum("bshr,btr->bsht", q_rope, k_rope)
        context = torch.einsum("bsht,btc->bshc", (scores * SCALE).softmax(-1), c)
        return torch.einsum("bshc,hdc->bshd", context, w_uv)

    result = rewritten(fn, *(args := [torch.randn(size) for size in sizes.values()]), passes=PASSES)
    assert result.count("dsopt.mla_attention") == 0
    assert relative_l2(result.run(*args), fn(*args)) < 1e-5


def test_one_row_that_attends_to_several():
    """The weights of one row meet the latents of two: the product repeats them."""
    w_uk, w_uv = torch.randn(3, NOPE, RANK), torch.randn(3, VALUE, RANK)

    def fn(q_nope, q_rope, c, k_rope):
        scores = q_nope @ w_uk @ c[:1].mT + q_rope @ k_rope.mT
        return scores.softmax(-1) @ c @ w_uv.mT

    args = [
        torch.randn(sizes) for sizes in ((1, 3, 4, NOPE), (1, 3, 4, ROPE), (2, 1, 5, RANK), (1, 1, 5, ROPE))
    ]
    stays(fn, *args, reason="the values are not the latent")


def test_results_read_elsewhere():
    def also(name):
        kept = []
        inner = changed(**{name: lambda x: kept.append(x) or x})

        def fn(x):
            kept.clear()
            out = inner(x)
            return torch.cat((out.flatten(), kept[0].flatten()))

        return fn

    stays(also("scores"), X, reason="is read by another node")
    stays(also("second"), X, reason="is read by another node")
    stays(also("weights"), X, reason="not multiplied with values")
    stays(also("context"), X, reason="not expanded by one product")


def test_a_cache_written_in_between():
    """The scores read the latent before it changes and the values after it."""
    model = MLA()

    def fn(x, cache):
        q_nope, q_rope = model.q(x).view(*x.shape[:2], 3, -1).split([NOPE, ROPE], -1)
        w_uk, w_uv = model.split()
        c, k_rope = cache
        q = torch.einsum("bshd,hdc->bshc", q_nope, w_uk)
        scores = torch.einsum("bshc,btc->bsht", q, c) + torch.einsum("bshr,btr->bsht", q_rope, k_rope)
        weights = (scores * SCALE).softmax(-1)
        c[:, 1:].mul_(2)
        return torch.einsum("bshc,hdc->bshd", torch.einsum("bsht,btc->bshc", weights, c), w_uv)

    cache = [torch.randn(2, CACHED, width) for width in (RANK, ROPE)]
    stays(fn, X, cache, reason="writes between the reads")


def test_two_products_that_are_no_latent_attention():
    """Keys of every head in two parts; and one tensor that is both key and value of plain heads."""

    def two_parts(q, k, v):
        scores = q[..., :4] @ k[..., :4].mT + q[..., 4:] @ k[..., 4:].mT
        return scores.softmax(-1) @ v

    heads = torch.randn(2, 3, 5, 8)
    stays(two_parts, heads, heads.flip(2), heads, reason=None)
    tied = MLA()

    def shared(x):
        q = tied.q(x).view(2, 3, 3, -1).transpose(1, 2)
        kv = F.linear(x, tied.q.weight[: NOPE + ROPE]).unsqueeze(1)
        return F.scaled_dot_product_attention(q, kv, kv, enable_gqa=True)

    result = stays(shared, X, reason=None)
    assert census(rewritten(shared, X, passes=()).graphs[-1])["mla"] == 0
    assert result.count("aten.scaled_dot_product_attention") == 1


def test_keys_joined_to_a_cache_that_is_empty_yet():
    """Partly rotated queries over keys that an empty (0,) tensor was joined to: ordinary attention, left alone."""

    def fn(q_rope, q_nope, k, v, empty):
        k, v = (torch.cat((empty, x), -2) for x in (k, v))
        return F.scaled_dot_product_attention(torch.cat((q_rope, q_nope), -1), k, v)

    args = [torch.randn(2, 3, 5, width) for width in (ROPE, NOPE, ROPE + NOPE, VALUE)]
    result = rewritten(fn, *args, torch.empty(0), passes=PASSES)
    assert result.log("fuse_absorbed_mla").rewrites == 0
    assert relative_l2(result.run(*args, torch.empty(0)), fn(*args, torch.empty(0))) < 1e-6

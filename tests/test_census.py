"""Totals are counted from the captured graph, whatever the passes do to it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dsopt
from dsopt.backend import dsopt_backend
from dsopt.census import FAMILIES, census
from dsopt.fp8 import FP8Block, quantize
from dsopt.testing import rewritten

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
X = torch.randn(2, 3, 32)
HEADS, NOPE, ROPE, RANK, VALUE = 4, 8, 4, 12, 6


def totals(fn, *args):
    """Families that are not zero in the graph as captured."""
    return {family: n for family, n in census(rewritten(fn, *args, passes=()).graphs[-1]).items() if n}


def norm(x, w=1.0):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w


@pytest.mark.parametrize(
    "fn",
    [
        norm,
        lambda x: x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6),
        lambda x: x * ((x * x).mean(-1, keepdim=True) + 1e-6) ** -0.5,
        lambda x: F.rms_norm(x, (32,)),
        lambda x: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / 32 + 1e-6),
        lambda x: x * torch.rsqrt((x - x[:1].mean(-1, True)).pow(2).mean(-1, True) + 1e-6),
        # what the pass refuses is a site all the same
        lambda x: x * torch.rsqrt((x.pow(2) + 1e-6).mean(-1, keepdim=True)),
        lambda x: x * (torch.rsqrt(x.pow(2).mean(-1, keepdim=True)) + 1e-6),
        lambda x: x.bfloat16() * torch.rsqrt(x.bfloat16().float().pow(2).mean(-1, keepdim=True) + 1e-6),
    ],
)
def test_norms(fn):
    assert totals(fn, X) == {"norm": 1}


def test_norms_are_counted_one_by_one():
    assert totals(lambda x: norm(norm(x) + norm(x * 2)), X) == {"norm": 3}


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: F.layer_norm(x, (32,)),
        lambda x: (x - x.mean(-1, True)) * torch.rsqrt((x - x.mean(-1, True)).pow(2).mean(-1, True) + 1e-6),
        lambda x: x / torch.sqrt(x.pow(2).sum(-1, keepdim=True) / 31 + 1e-6),
        lambda x: x / torch.sqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6),
        lambda x: x * x[:1] + x * x[:1],
        lambda x: torch.rsqrt(x.abs() + 1),
        lambda x: x.softmax(-1),
    ],
)
def test_what_is_no_norm(fn):
    assert totals(fn, X) == {}


def rotate_half(x):
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def test_rotations_by_tables_that_are_given():
    tables = torch.randn(2, 3, 32)
    assert totals(lambda x, c, s: x * c[0] + rotate_half(x) * s[0], X, tables, tables) == {"rope": 1}
    assert totals(lambda x, c, s: x * c[0] + rotate_half(x + 1) * s[0], X, tables, tables) == {}
    assert totals(lambda x, c, s: x * c.exp()[0] + rotate_half(x) * s[0], X, tables, tables) == {}


def test_rotations_by_complex_tables_that_are_given():
    def turned(x, table):
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (16, 2))) * table).flatten(-2)

    table, rows = torch.randn(9, 16, dtype=torch.complex64), torch.tensor([2, 5, 6])
    assert totals(lambda x, t: turned(x, t[:3]), X, table) == {"rope": 1}
    assert totals(lambda x, t, rows: turned(x, t[rows]), X, table, rows) == {"rope": 1}
    assert totals(lambda x, t: t * t.conj(), X, table) == {}


def test_counting_adds_no_guard():
    from dsopt.capture import guard_count

    def attention(x, a, b):
        k = x @ a @ b
        return F.scaled_dot_product_attention(x[:, None], k[:, None], k[:, None])

    rank, out = torch.randn(32, 12), torch.randn(12, 32)
    torch._dynamo.mark_dynamic(rank, 1)
    torch._dynamo.mark_dynamic(out, 0)
    graph = rewritten(attention, X, rank, out, passes=()).graphs[-1]
    before = guard_count(graph)
    census(graph)
    assert guard_count(graph) == before


def half_split(x, angle):
    return x * angle.cos() + rotate_half(x) * angle.sin()


def interleaved(x, angle):
    even, odd = x[..., ::2], x[..., 1::2]
    cos, sin = angle[..., ::2].cos(), angle[..., ::2].sin()
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def complex_table(x, angle):
    table = torch.polar(torch.ones(3, 16), angle[..., ::2])
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (16, 2))) * table).flatten(-2)


@pytest.mark.parametrize("fn", [half_split, interleaved, complex_table], ids=lambda f: f.__name__)
def test_rotations(fn):
    angle = torch.randn(3, 32)
    assert totals(fn, X, angle) == {"rope": 1}
    assert totals(lambda x, a: fn(x, a) + fn(x * 2, a), X, angle) == {"rope": 2}


@pytest.mark.parametrize(
    "hidden",
    [
        lambda g, u: F.silu(g) * u,
        lambda g, u: u * (g * torch.sigmoid(g)),
        lambda g, u: F.silu(g.float()).to(g.dtype) * u,
        lambda g, u: F.silu(g.clamp(max=2.0)) * u.clamp(-2.0, 2.0),
        lambda g, u: F.gelu(g, approximate="tanh") * u,
    ],
)
def test_gated_mlps(hidden):
    def fn(x, w1, w2, w3):
        return F.linear(hidden(F.linear(x, w1), F.linear(x, w2)), w3)

    weights = torch.randn(48, 32), torch.randn(48, 32), torch.randn(32, 48)
    assert totals(fn, X, *weights) == {"mlp": 1}
    assert totals(lambda x, w: F.linear(F.gelu(x), w), X, weights[0]) == {}


@pytest.mark.parametrize(
    "state", [lambda x: x.cumsum(0), lambda x: (x[None] @ x.mT[None])[0] @ x], ids=["scan", "attention"]
)
def test_gated_states_are_no_mlps(state):
    """The gate of a state space or of an attention stands beside what no linear layer made."""

    def fn(x, w_gate, w_out):
        return F.linear(F.silu(F.linear(x, w_gate)) * state(x), w_out)

    assert totals(fn, X, torch.randn(32, 32), torch.randn(32, 32)) == {}


class MLA(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(32, HEADS * (NOPE + ROPE), bias=False)
        self.kv_a = nn.Linear(32, RANK + ROPE, bias=False)
        self.kv_b = nn.Linear(RANK, HEADS * (NOPE + VALUE), bias=False)

    def parts(self, x):
        q = self.q(x).view(2, 3, HEADS, -1).transpose(1, 2)
        c, k_rope = self.kv_a(x).split([RANK, ROPE], -1)
        k_nope, v = self.kv_b(norm(c)).view(2, 3, HEADS, -1).transpose(1, 2).split([NOPE, VALUE], -1)
        return q, torch.cat((k_nope, k_rope[:, None].expand(-1, HEADS, -1, -1)), -1), v

    def forward(self, x):
        return F.scaled_dot_product_attention(*self.parts(x))


def test_latent_attention():
    model = MLA()

    def eager(x):
        q, k, v = model.parts(x)
        return (q @ k.transpose(2, 3) * 0.3).softmax(-1) @ v

    def with_sink(x):
        q, k, v = model.parts(x)
        scores = torch.cat((q @ k.transpose(2, 3) * 0.3, torch.zeros(2, HEADS, 3, 1)), -1)
        return scores.softmax(-1)[..., :-1] @ v

    def expanded_cache(x, keys, values):
        q, k, v = model.parts(x)
        return F.scaled_dot_product_attention(q, torch.cat((keys, k), 2), torch.cat((values, v), 2))

    assert totals(model, X) == {"mla": 1, "norm": 1}
    assert totals(eager, X) == {"mla": 1, "norm": 1}
    assert totals(with_sink, X) == {"mla": 1, "norm": 1}
    cache = torch.randn(2, HEADS, 5, NOPE + ROPE), torch.randn(2, HEADS, 5, VALUE)
    assert totals(expanded_cache, X, *cache) == {"mla": 1, "norm": 1}


def test_ordinary_attention_is_not_latent():
    q, k, v = (nn.Linear(32, 32) for _ in range(3))

    def attention(x):
        return F.scaled_dot_product_attention(*(p(x).view(2, 3, 4, 8).transpose(1, 2) for p in (q, k, v)))

    assert totals(attention, X) == {"attention": 1}


@pytest.mark.parametrize("scores", [lambda z: z.softmax(-1), torch.sigmoid])
def test_routers(scores):
    def route(x, w):
        weights, ids = scores(F.linear(x, w).float()).topk(2, dim=-1)
        return weights / weights.sum(-1, keepdim=True), ids

    assert totals(route, X[0], torch.randn(8, 32)) == {"router": 1}


def test_a_top_k_of_anything_else_is_no_router():
    assert totals(lambda x: x.topk(2), X) == {}


def test_totals_do_not_depend_on_the_passes():
    model = MLA().eval()
    expected = {f: [0, {"mla": 1, "norm": 1}.get(f, 0)] for f in FAMILIES}
    for passes in ((), ("canonicalize",)):
        torch._dynamo.reset()
        fast = torch.compile(model, backend=dsopt_backend, options={"passes": passes, "fallback": "eager"})
        with torch.no_grad():
            fast(X)
        assert dsopt.report(model).matched == expected
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=dsopt_backend)(X)
    assert dsopt.report(model).matched == {f: [n, n] for f, (_, n) in expected.items()}


def test_what_is_kept_in_fp8():
    w, s = quantize(torch.randn(32, 16), FP8Block(rows=16, columns=16))

    def by_hand(x, w, s):
        weight = w.float() * s.repeat_interleave(16, 0).repeat_interleave(16, 1)
        return F.linear(x, weight) * x.sum()

    def by_op(x, w, s):
        return F.linear(x, torch.ops.dsopt.dequantize(w, s, torch.float32, [16, 16]))

    def by_reader(x, w, s):
        return torch.ops.dsopt.multi_linear(x, [w], [None], None, [s], [16, 16])[0]

    for fn in (by_hand, by_op, by_reader):
        assert totals(fn, torch.randn(3, 16), w, s) == {"fp8": 1}
    assert totals(lambda x, w: x * w.float(), torch.randn(32, 16), w.float()) == {}

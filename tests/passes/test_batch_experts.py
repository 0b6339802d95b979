"""Expert layers in the spellings in use, and near misses that must stay as they are."""

import pytest
import torch
from expert_spellings import (
    EXPERTS,
    HIDDEN,
    INNER,
    SPELLINGS,
    TOPK,
    batched,
    einsums,
    ends_of,
    grouped,
    grouped_added_to_tokens,
    grouped_mm,
    grouped_with_sentinels,
    operands,
    swiglu,
)
from torch.nn import functional as F

from dsopt.ops.experts import moe_experts, moe_experts_reference
from dsopt.testing import exported, rand, relative_l2, rewritten

PASSES = ("canonicalize", "batch_experts", "canonicalize")
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2}


def check(fn, args, result, options=(), tolerance=1e-6):
    """The graph is one op, and computes what the reference computes in float64 of the same operands."""
    assert result.log("batch_experts").families == {"moe": 1}, result.log("batch_experts").misses
    assert result.count("dsopt.moe_experts") == 1
    assert not any(op.endswith(("_mm", "fallback", "bmm", "einsum")) for op in result.ops())
    wide = [a.double() if a.dtype.is_floating_point else a for a in args]
    got = result.run(*args)
    assert got.dtype == args[0].dtype
    assert relative_l2(got, moe_experts_reference(*wide, *options)) < tolerance


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("fn", SPELLINGS, ids=lambda f: f.__name__)
def test_spellings(fn, dtype):
    args = operands(dtype=dtype)
    check(fn, args, rewritten(fn, *args, passes=PASSES), tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("fn", [grouped, grouped_added_to_tokens, batched, einsums], ids=lambda f: f.__name__)
def test_one_graph_for_any_number_of_tokens(fn):
    def routed(x, w13, w2):
        weights, ids = x[:, :EXPERTS].softmax(-1).topk(TOPK)
        return fn(x, ids, weights, w13, w2)

    x, _, _, *w = operands()
    torch._dynamo.mark_dynamic(x, 0)
    result = rewritten(routed, x, *w, passes=PASSES)
    assert result.log("batch_experts").families == {"moe": 1}, result.log("batch_experts").misses
    for tokens in (5, 2, 40, 16):
        x = operands(tokens)[0]
        assert relative_l2(result.run(x, *w), routed(x, *w)) < 1e-6
    assert len(result.graphs) == 1
    # Dynamo always has a graph of its own for no tokens
    assert result.run(x[:0], *w).shape == (0, HIDDEN)


@pytest.mark.parametrize(
    ("tokens", "experts", "topk"), [(1, 6, 2), (1, 6, 1), (3, 5, 5), (4, 257, 3), (2, 1, 1)]
)
@pytest.mark.parametrize("fn", [grouped, batched], ids=lambda f: f.__name__)
def test_sizes(fn, tokens, experts, topk):
    args = operands(tokens, experts=experts, topk=topk)
    check(fn, args, rewritten(fn, *args, passes=PASSES))


def test_exported_graph():
    class Experts(torch.nn.Module):
        def forward(self, *args):
            return batched(*args)

    args = operands()
    check(batched, args, exported(Experts(), *args, passes=PASSES))


def test_sentinels_add_nothing():
    x, ids, weights, w13, w2 = operands()
    result = rewritten(grouped_with_sentinels, x, ids, weights, w13, w2, passes=PASSES)
    ids = torch.where(torch.arange(5).unsqueeze(-1) % 2 == 0, EXPERTS, ids)
    got, want = (f(x, ids, weights, w13, w2) for f in (result.run, grouped_with_sentinels))
    assert relative_l2(got, want) < 1e-6 and not got[0].any()


def gathered(x, ids, w13, w2, act, b13=None, b2=None):
    h = torch.bmm(w13[ids], x.unsqueeze(-1)).squeeze(-1)
    h = act(h if b13 is None else h.add_(b13[ids]))
    y = torch.bmm(w2[ids], h.unsqueeze(-1)).squeeze(-1)
    return y if b2 is None else y.add_(b2[ids])


def with_activation(act):
    def fn(x, ids, weights, w13, w2, b13=None, b2=None):
        y = gathered(x.repeat_interleave(ids.shape[1], 0), ids.reshape(-1), w13, w2, act, b13, b2)
        return (y * weights.reshape(-1, 1)).view(*ids.shape, HIDDEN).sum(1)

    return fn


def gpt_oss(h):
    gate, up = h[..., ::2].clamp(max=0.7), h[..., 1::2].clamp(min=-0.7, max=0.7)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


def limited(h):
    gate, up = h.chunk(2, -1)
    return F.silu(gate.clamp(max=0.5)) * up.clamp(min=-0.5, max=0.5)


def gelu(h):
    gate, up = h.chunk(2, -1)
    return F.gelu(gate, approximate="tanh") * up


@pytest.mark.parametrize(
    ("act", "options"),
    [
        (gpt_oss, ("swiglu_oai", True, True, 0.7)),
        (limited, ("silu", True, False, 0.5)),
        (gelu, ("gelu_tanh", True, False, None)),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_gated_activations(act, options):
    fn, args = with_activation(act), operands()
    check(fn, args, rewritten(fn, *args, passes=PASSES), (None, None, None, None, *options))


@pytest.mark.parametrize(
    ("act", "name"), [(F.silu, "silu"), (lambda h: F.relu(h).square(), "relu2"), (F.gelu, "gelu")]
)
def test_experts_without_gate(act, name):
    x, ids, weights, w13, w2 = operands()
    fn, args = with_activation(act), (x, ids, weights, w13[:, :INNER].contiguous(), w2)
    check(fn, args, rewritten(fn, *args, passes=PASSES), (None, None, None, None, name, False))


def test_biases():
    r = rand("cpu", torch.float32, 3)
    args, biases = operands(), (r(EXPERTS, 2 * INNER), r(EXPERTS, HIDDEN))
    fn = with_activation(swiglu)
    result = rewritten(fn, *args, *biases, passes=PASSES)
    assert result.count("dsopt.moe_experts") == 1
    wide = [a.double() if a.dtype.is_floating_point else a for a in args]
    want = moe_experts_reference(*wide, None, *(b.double() for b in biases))
    assert relative_l2(result.run(*args, *biases), want) < 1e-6


def test_split_gate_and_up():
    def fn(x, ids, weights, w1, w2, w3):
        expert, rows = ids.reshape(-1), x.repeat_interleave(ids.shape[1], 0).unsqueeze(-1)
        h = F.silu(torch.bmm(w1[expert], rows)) * torch.bmm(w3[expert], rows)
        y = torch.bmm(w2[expert], h).squeeze(-1)
        return (y * weights.reshape(-1, 1)).view(*ids.shape, HIDDEN).sum(1)

    x, ids, weights, w13, w2 = operands()
    w1, w3 = (w.contiguous() for w in w13.chunk(2, 1))
    check(fn, (x, ids, weights, w1, w2, w3), rewritten(fn, x, ids, weights, w1, w2, w3, passes=PASSES))


def test_transposed_storage():
    def fn(x, ids, weights, w13, w2):
        expert, order = ids.reshape(-1).sort()
        ends = ends_of(expert, EXPERTS)
        y = grouped_mm(swiglu(grouped_mm(x[order // TOPK], w13, ends)), w2, ends)
        y = y * weights.reshape(-1)[order].unsqueeze(-1)
        return torch.zeros_like(x).index_add_(0, order // TOPK, y)

    x, ids, weights, w13, w2 = operands()
    stored = (x, ids, weights, w13.mT.contiguous(), w2.mT.contiguous())
    result = rewritten(fn, *stored, passes=PASSES)
    assert result.log("batch_experts").families == {"moe": 1}
    assert relative_l2(result.run(*stored), batched(x, ids, weights, w13, w2)) < 1e-6


def test_an_op_of_the_users_own_counts():
    def fn(*args):
        return torch.ops.dsopt.moe_experts(*args) * 2

    result = rewritten(fn, *operands(), passes=PASSES)
    log = result.log("batch_experts")
    assert log.families == {"moe": 1} and log.rewrites == 0


# each differs from an expert layer in one thing


def weights_of_sorted_choices(x, ids, weights, w13, w2):
    expert, order = ids.reshape(-1).sort()
    ends = ends_of(expert, EXPERTS)
    y = grouped_mm(swiglu(grouped_mm(x[order // TOPK], w13.mT, ends)), w2.mT, ends)
    return (y * weights.reshape(-1, 1))[order.argsort()].view(*ids.shape, HIDDEN).sum(1)


def never_put_back(x, ids, weights, w13, w2):
    expert, order = ids.reshape(-1).sort()
    ends = ends_of(expert, EXPERTS)
    y = grouped_mm(swiglu(grouped_mm(x[order // TOPK], w13.mT, ends)), w2.mT, ends)
    return (y * weights.reshape(-1)[order].unsqueeze(-1)).view(*ids.shape, HIDDEN).sum(1)


def tokens_of_other_rows(x, ids, weights, w13, w2):
    expert, order = ids.reshape(-1).sort()
    ends = ends_of(expert, EXPERTS)
    y = grouped_mm(swiglu(grouped_mm(x[order % x.shape[0]], w13.mT, ends)), w2.mT, ends)
    y = y * weights.reshape(-1)[order].unsqueeze(-1)
    return y[order.argsort()].view(*ids.shape, HIDDEN).sum(1)


def next_expert(x, ids, weights, w13, w2):
    y = gathered(x.repeat_interleave(TOPK, 0), (ids.reshape(-1) + 1) % EXPERTS, w13, w2, swiglu)
    return (y * weights.reshape(-1, 1)).view(*ids.shape, HIDDEN).sum(1)


def two_experts_in_turn(x, ids, weights, w13, w2):
    rows, expert = x.repeat_interleave(TOPK, 0), ids.reshape(-1)
    h = swiglu(torch.bmm(w13[expert], rows.unsqueeze(-1)).squeeze(-1))
    y = torch.bmm(w2[EXPERTS - 1 - expert], h.unsqueeze(-1)).squeeze(-1)
    return (y * weights.reshape(-1, 1)).view(*ids.shape, HIDDEN).sum(1)


def repeated_in_turn(x, ids, weights, w13, w2):
    y = gathered(x.repeat(TOPK, 1), ids.reshape(-1), w13, w2, swiglu)
    return (y * weights.reshape(-1, 1)).view(*ids.shape, HIDDEN).sum(1)


def averaged(x, ids, weights, w13, w2):
    y = gathered(x.repeat_interleave(TOPK, 0), ids.reshape(-1), w13, w2, swiglu)
    return (y * weights.reshape(-1, 1)).view(*ids.shape, HIDDEN).mean(1)


def without_weights(x, ids, weights, w13, w2):
    return (
        gathered(x.repeat_interleave(TOPK, 0), ids.reshape(-1), w13, w2, swiglu)
        .view(*ids.shape, HIDDEN)
        .sum(1)
    )


def weights_twice(x, ids, weights, w13, w2):
    y = gathered(x.repeat_interleave(TOPK, 0), ids.reshape(-1), w13, w2, swiglu) * weights.reshape(-1, 1)
    return (y * weights.reshape(-1, 1)).view(*ids.shape, HIDDEN).sum(1)


def up_before_gate(x, ids, weights, w13, w2):
    def act(h):
        up, gate = h.chunk(2, -1)
        return F.silu(gate) * up

    return with_activation(act)(x, ids, weights, w13, w2)


def overlapping_halves(x, ids, weights, w13, w2):
    return with_activation(lambda h: F.silu(h[..., :INNER]) * h[..., 1 : INNER + 1])(x, ids, weights, w13, w2)


def normed_between(x, ids, weights, w13, w2):
    return with_activation(lambda h: F.normalize(swiglu(h), dim=-1))(x, ids, weights, w13, w2)


def one_sided_limit(x, ids, weights, w13, w2):
    def act(h):
        gate, up = h.chunk(2, -1)
        return F.silu(gate.clamp(max=0.5)) * up

    return with_activation(act)(x, ids, weights, w13, w2)


def added_to_more_than_zeros(x, ids, weights, w13, w2):
    y = gathered(x.repeat_interleave(TOPK, 0), ids.reshape(-1), w13, w2, swiglu) * weights.reshape(-1, 1)
    out = torch.zeros_like(x)
    out[:, 0] = 1.0
    return out.index_add_(0, torch.arange(x.shape[0]).repeat_interleave(TOPK), y)


def twice_the_bias(x, ids, weights, w13, w2):
    expert = ids.reshape(-1)
    y = gathered(x.repeat_interleave(TOPK, 0), expert, w13, w2, swiglu)
    y = torch.add(y, w2[:, :, 0][expert], alpha=2.0)
    return (y * weights.reshape(-1, 1)).view(*ids.shape, HIDDEN).sum(1)


def small_weights_dropped(x, ids, weights, w13, w2):
    y = gathered(x.repeat_interleave(TOPK, 0), ids.reshape(-1), w13, w2, swiglu)
    w = weights.reshape(-1)
    return (y * w.masked_fill(w < 0.2, 0.0).unsqueeze(-1)).view(*ids.shape, HIDDEN).sum(1)


def limited_capacity(x, ids, weights, w13, w2):
    expert = ids.reshape(-1)
    y = gathered(x.repeat_interleave(TOPK, 0), expert, w13, w2, swiglu)
    order = F.one_hot(expert, EXPERTS).cumsum(0).gather(1, expert.unsqueeze(-1))
    return (y.masked_fill(order > 40, 0.0) * weights.reshape(-1, 1)).view(*ids.shape, HIDDEN).sum(1)


def ids_taken_around(x, ids, weights, w13, w2):
    y = gathered(x.repeat_interleave(TOPK, 0), ids.reshape(-1) % EXPERTS, w13, w2, swiglu)
    return (y * weights.reshape(-1, 1)).view(*ids.shape, HIDDEN).sum(1)


def ids_kept_in_range(x, ids, weights, w13, w2):
    y = gathered(x.repeat_interleave(TOPK, 0), ids.reshape(-1).clamp(0, EXPERTS - 1), w13, w2, swiglu)
    return (y * weights.reshape(-1, 1)).view(*ids.shape, HIDDEN).sum(1)


def summed_in_less(x, ids, weights, w13, w2):
    y = gathered(x.repeat_interleave(TOPK, 0), ids.reshape(-1), w13, w2, swiglu)
    return (y * weights.reshape(-1, 1)).view(*ids.shape, HIDDEN).sum(1, dtype=torch.bfloat16)


NEAR_MISSES = [
    added_to_more_than_zeros,
    twice_the_bias,
    small_weights_dropped,
    limited_capacity,
    ids_taken_around,
    ids_kept_in_range,
    summed_in_less,
    weights_of_sorted_choices,
    never_put_back,
    tokens_of_other_rows,
    next_expert,
    two_experts_in_turn,
    repeated_in_turn,
    averaged,
    without_weights,
    weights_twice,
    up_before_gate,
    overlapping_halves,
    normed_between,
    one_sided_limit,
]


@pytest.mark.parametrize("fn", NEAR_MISSES, ids=lambda f: f.__name__)
def test_near_misses_stay_and_say_why(fn):
    args = operands()
    result = rewritten(fn, *args, passes=PASSES)
    log = result.log("batch_experts")
    assert log.rewrites == 0 and result.count("dsopt.moe_experts") == 0
    assert len(log.misses) == 1 and log.misses[0]["reason"]
    assert relative_l2(result.run(*args), fn(*args)) < 1e-6


def test_result_of_the_products_that_is_read_elsewhere():
    def fn(x, ids, weights, w13, w2):
        y = gathered(x.repeat_interleave(TOPK, 0), ids.reshape(-1), w13, w2, swiglu)
        return (y * weights.reshape(-1, 1)).view(*ids.shape, HIDDEN).sum(1), y

    args = operands()
    result = rewritten(fn, *args, passes=PASSES)
    assert result.count("dsopt.moe_experts") == 0 and result.log("batch_experts").misses
    for got, want in zip(result.run(*args), fn(*args), strict=True):
        assert relative_l2(got, want) < 1e-6


def test_weights_written_between_the_products_are_read_in_order():
    def fn(x, ids, weights, w13, w2):
        rows, expert = x.repeat_interleave(TOPK, 0), ids.reshape(-1)
        h = swiglu(torch.bmm(w13[expert], rows.unsqueeze(-1)).squeeze(-1))
        w13.mul_(2.0)
        y = torch.bmm(w2[expert], h.unsqueeze(-1)).squeeze(-1)
        return (y * weights.reshape(-1, 1)).view(*ids.shape, HIDDEN).sum(1)

    args = operands()
    result = rewritten(fn, *operands(), passes=PASSES)
    assert result.count("dsopt.moe_experts") == 0
    want = fn(*operands())
    assert relative_l2(result.run(*args), want) < 1e-6


def test_a_wrong_layer_beside_a_right_one():
    def fn(x, ids, weights, w13, w2):
        def layer(token, added):
            y = gathered(x[token], ids.reshape(-1), w13, w2, swiglu) * weights.reshape(-1, 1)
            return torch.zeros_like(x).index_add(0, added, y)

        token = torch.arange(x.shape[0]).repeat_interleave(TOPK)
        other = token.flip(0)
        return layer(token, token), layer(token, other)

    args = operands()
    result = rewritten(fn, *args, passes=PASSES)
    assert result.log("batch_experts").families == {"moe": 1}
    for got, want in zip(result.run(*args), fn(*args), strict=True):
        assert relative_l2(got, want) < 1e-6


def test_two_layers():
    def fn(x, ids, weights, w13, w2):
        y = grouped(x, ids, weights, w13, w2)
        return batched(y, ids, weights, w13, w2)

    args = operands()
    result = rewritten(fn, *args, passes=PASSES)
    assert result.log("batch_experts").families == {"moe": 2}
    assert relative_l2(result.run(*args), fn(*args)) < 1e-6
    first, second = [n for n in result.graphs[-1].graph.nodes if n.target is moe_experts.overload]
    assert first in second.all_input_nodes

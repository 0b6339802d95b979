"""Routers in the spellings of checkpoints and papers, and near misses that must stay as they are."""

import pytest
import torch
from torch.nn import functional as F

from dsopt.ops.route import moe_route, moe_route_error
from dsopt.testing import exported, rewritten

PASSES = ("canonicalize", "fuse_router", "canonicalize")
EXPERTS, GROUPS, TOPK = 24, 4, 3
NEVER = float("-inf")


def greedy(logits, bias):
    return torch.topk(logits.softmax(-1, dtype=torch.float32), TOPK, dim=-1, sorted=False)


def greedy_scaled(logits, bias):
    weights, ids = F.softmax(logits.float(), dim=1).topk(TOPK, -1)
    return 4 * (weights * 0.5), ids


def renormalized(logits, bias):
    weights, ids = torch.topk(F.softmax(logits, dim=-1, dtype=torch.float), TOPK)
    weights /= weights.sum(dim=-1, keepdim=True)
    return weights.to(logits.dtype), ids


def softmax_of_chosen(logits, bias):
    values, ids = torch.topk(logits, TOPK, dim=-1)
    return F.softmax(values, dim=-1, dtype=torch.float32), ids


def softmax_in_the_dtype_of_the_chosen(logits, bias):
    """gpt-oss: large logits lose what their dtype has no digits for."""
    values, ids = torch.topk(logits, TOPK, dim=-1)
    return F.softmax(values, dim=-1, dtype=values.dtype), ids


def softmax_of_gathered(logits, bias):
    ids = logits.float().topk(TOPK).indices
    return torch.gather(logits.float(), 1, ids).softmax(1) / TOPK, ids


def sigmoid_of_chosen(logits, bias):
    values, ids = logits.float().topk(TOPK)
    return values.sigmoid(), ids


def sigmoid_biased(logits, bias):
    scores = logits.float().sigmoid()
    ids = (scores + bias).topk(TOPK, sorted=False)[1]
    weights = scores.gather(-1, ids)
    return weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.5, ids


def softmax_biased(logits, bias):
    scores = logits.float().softmax(-1)
    ids = (bias.unsqueeze(0) + scores.view(-1, EXPERTS)).topk(TOPK)[1]
    return scores.gather(1, ids) * 6.0, ids


def square_root_of_softplus(logits, bias):
    scores = F.softplus(logits.float()).sqrt()
    ids = torch.topk(scores + bias, TOPK, dim=-1).indices
    weights = scores.gather(1, ids)
    return weights / weights.sum(-1, keepdim=True) * 1.5, ids


def _spread(group_mask):
    return group_mask.unsqueeze(-1).expand(-1, GROUPS, EXPERTS // GROUPS).reshape(-1, EXPERTS)


def groups_by_max(logits, bias):
    scores = logits.softmax(dim=-1, dtype=torch.float32)
    by_group = scores.view(-1, GROUPS, EXPERTS // GROUPS).max(dim=-1).values
    best = by_group.topk(2, dim=-1, sorted=False)[1]
    mask = _spread(torch.zeros_like(by_group).scatter_(1, best, 1))
    weights, ids = scores.masked_fill(~mask.bool(), 0.0).topk(TOPK, sorted=False)
    return weights * 16.0, ids


def groups_by_max_multiplied(logits, bias):
    scores = logits.float().softmax(-1)
    by_group = scores.unflatten(-1, (GROUPS, -1)).amax(-1)
    best = by_group.topk(2, -1).indices
    mask = _spread(torch.zeros_like(by_group).scatter(1, best, 1.0))
    ids = (scores * mask).topk(TOPK)[1]
    return scores.gather(1, ids), ids


def groups_by_top2(logits, bias):
    scores = logits.float().sigmoid()
    choice = scores + bias
    by_group = choice.view(-1, GROUPS, EXPERTS // GROUPS).topk(2, dim=-1)[0].sum(dim=-1)
    best = torch.topk(by_group, k=2, dim=-1, sorted=False)[1]
    mask = _spread(torch.zeros_like(by_group).scatter_(1, best, 1))
    ids = choice.masked_fill(~mask.bool(), NEVER).topk(TOPK, sorted=False)[1]
    weights = scores.gather(1, ids)
    weights /= weights.sum(dim=-1, keepdim=True) + 1e-20
    return weights * 2.5, ids


def groups_put_out(logits, bias):
    scores = logits.float().sigmoid()
    choice = (scores + bias).view(-1, GROUPS, EXPERTS // GROUPS)
    best = choice.topk(2, dim=-1)[0].sum(-1).topk(2, dim=-1)[1]
    out = choice.new_ones(choice.shape[0], GROUPS, dtype=torch.bool).scatter_(1, best, False)
    ids = choice.masked_fill_(out.unsqueeze(-1), NEVER).flatten(1).topk(TOPK, dim=-1)[1]
    weights = scores.gather(1, ids)
    weights /= weights.sum(-1, keepdim=True)
    weights *= 2.5
    return weights.type_as(logits), ids


def groups_filled_with_zero(logits, bias):
    scores = logits.float().sigmoid()
    choice = scores + bias
    by_group = choice.view(-1, GROUPS, EXPERTS // GROUPS).topk(2, dim=-1)[0].sum(dim=-1)
    best = by_group.topk(2, dim=-1)[1]
    inside = _spread(torch.zeros_like(by_group, dtype=torch.bool).scatter(1, best, True))
    ids = torch.where(inside, choice, 0.0).topk(TOPK)[1]
    return scores.gather(1, ids), ids


UNBIASED = [
    greedy,
    greedy_scaled,
    renormalized,
    softmax_of_chosen,
    softmax_in_the_dtype_of_the_chosen,
    softmax_of_gathered,
    sigmoid_of_chosen,
    groups_by_max,
    groups_by_max_multiplied,
]
BIASED = [
    sigmoid_biased,
    softmax_biased,
    square_root_of_softplus,
    groups_by_top2,
    groups_put_out,
    groups_filled_with_zero,
]


def inputs(tokens=17, dtype=torch.float32):
    # a bias that changes who is chosen, and puts some choice scores below zero
    return torch.randn(tokens, EXPERTS).to(dtype) * 2, torch.randn(EXPERTS) * 0.7


def error(result, fn, logits, bias, topk=TOPK):
    args = moe_route.bind((logits, topk))
    return moe_route_error(args, result.run(logits, bias), fn(logits.clone(), bias))


def fused(result):
    (node,) = [n for n in result.graphs[-1].graph.nodes if n.target is moe_route.overload]
    names = [a.name for a in moe_route.overload._schema.arguments]
    return dict(zip(names, moe_route.bind(node.args, node.kwargs), strict=True))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("fn", UNBIASED + BIASED, ids=lambda f: f.__name__)
def test_spellings(fn, dynamic):
    logits, bias = inputs()
    if dynamic:
        torch._dynamo.mark_dynamic(logits, 0)
    result = rewritten(fn, logits, bias, passes=PASSES)
    assert result.log("fuse_router").families == {"router": 1}
    assert result.count("dsopt.moe_route") == 1 and result.count("aten.topk") == 0
    for tokens in (17, 5, 64) if dynamic else (17,):
        assert error(result, fn, *inputs(tokens)) < 1e-6
    assert len(result.graphs) == 1
    assert (fused(result)["bias"] is not None) == (fn in BIASED)


@pytest.mark.parametrize("fn", UNBIASED + BIASED, ids=lambda f: f.__name__)
def test_bfloat16_logits(fn):
    result = rewritten(fn, *inputs(dtype=torch.bfloat16), passes=PASSES)
    assert result.count("dsopt.moe_route") == 1
    # rounded as the spelling rounds: weights end in its dtype
    logits, bias = inputs(40, torch.bfloat16)
    got, want = result.run(logits, bias), fn(logits.clone(), bias)
    assert got[0].dtype == want[0].dtype
    assert moe_route_error(moe_route.bind((logits, TOPK)), got, want) < 1e-2


def test_few_weights_of_large_rounded_logits():
    """Two of eight, as in gpt-oss: rounding large logits moves each weight by more than it rounds the weight."""

    def fn(logits, bias):
        values, ids = torch.topk(logits, 2, dim=-1)
        return F.softmax(values, dim=1, dtype=values.dtype), ids

    logits = torch.randn(5, 8).bfloat16()
    result = rewritten(fn, logits, torch.zeros(8), passes=PASSES)
    assert result.log("fuse_router").families == {"router": 1}
    assert error(result, fn, logits, torch.zeros(8), topk=2) < 1e-2


def test_exported_graph():
    class Router(torch.nn.Module):
        def forward(self, logits, bias):
            return groups_by_top2(logits, bias)

    logits, bias = inputs()
    result = exported(Router(), logits, bias, passes=PASSES)
    assert result.count("dsopt.moe_route") == 1
    assert error(result, groups_by_top2, logits, bias) < 1e-6


def test_what_was_read_off_the_spellings():
    logits, bias = inputs()
    top2 = fused(rewritten(groups_by_top2, logits, bias, passes=PASSES))
    expected = {"scoring": "sigmoid", "num_groups": GROUPS, "topk_groups": 2, "group_score": "top2"}
    expected |= {"outside": None, "renormalize": True, "eps": 1e-20, "scale": 2.5}
    assert {k: top2[k] for k in expected} == expected
    assert fused(rewritten(groups_by_max, logits, bias, passes=PASSES))["group_score"] == "max"
    assert fused(rewritten(groups_filled_with_zero, logits, bias, passes=PASSES))["outside"] == 0.0
    assert fused(rewritten(greedy_scaled, logits, bias, passes=PASSES))["scale"] == 2.0


@pytest.mark.parametrize(("experts", "topk"), [(257, 8), (5, 5), (1, 1), (8, 1), (64, 6)])
@pytest.mark.parametrize("tokens", [1, 2, 33])
def test_sizes(experts, topk, tokens):
    def fn(logits, bias):
        scores = logits.sigmoid()
        ids = (scores + bias).topk(topk, -1)[1]
        weights = scores.gather(1, ids)
        return weights / weights.sum(-1, keepdim=True), ids

    logits, bias = torch.randn(tokens, experts), torch.randn(experts) * 0.3
    result = rewritten(fn, logits, bias, passes=PASSES)
    assert result.count("dsopt.moe_route") == 1
    assert error(result, fn, logits, bias, topk) < 1e-6


def test_no_tokens_through_a_dynamic_graph():
    logits, bias = inputs()
    torch._dynamo.mark_dynamic(logits, 0)
    result = rewritten(groups_by_top2, logits, bias, passes=PASSES)
    assert result.count("dsopt.moe_route") == 1
    weights, ids = result.run(*inputs(0))
    assert weights.shape == ids.shape == (0, TOPK) and ids.dtype == torch.int64


def bias_is_mixed(logits, bias):
    choice = logits.sigmoid() + bias
    return torch.topk(choice, TOPK)


def bias_on_logits(logits, bias):
    ids = (logits + bias).topk(TOPK)[1]
    return logits.gather(1, ids).sigmoid(), ids


def bias_by_token(logits, bias):
    scores = logits.sigmoid()
    ids = (scores + scores.mean(-1, keepdim=True) * bias).topk(TOPK)[1]
    return scores.gather(1, ids), ids


def groups_by_sum(logits, bias):
    scores = logits.sigmoid()
    choice = (scores + bias).view(-1, GROUPS, EXPERTS // GROUPS)
    best = choice.topk(3, -1)[0].sum(-1).topk(2)[1]
    out = choice.new_ones(choice.shape[0], GROUPS, dtype=torch.bool).scatter_(1, best, False)
    ids = choice.masked_fill(out.unsqueeze(-1), NEVER).flatten(1).topk(TOPK)[1]
    return scores.gather(1, ids), ids


def groups_of_strided_experts(logits, bias):
    scores = logits.sigmoid()
    choice = (scores + bias).view(-1, EXPERTS // GROUPS, GROUPS).transpose(1, 2)
    best = choice.topk(2, -1)[0].sum(-1).topk(2)[1]
    out = torch.ones_like(best[:, :1].expand(-1, GROUPS), dtype=torch.bool).scatter(1, best, False)
    ids = choice.masked_fill(out.unsqueeze(-1), NEVER).transpose(1, 2).flatten(1).topk(TOPK)[1]
    return scores.gather(1, ids), ids


def scores_of_another_temperature(logits, bias):
    ids = logits.softmax(-1).topk(TOPK)[1]
    return (logits * 2).softmax(-1).gather(1, ids), ids


def smallest(logits, bias):
    return torch.topk(logits.softmax(-1), TOPK, largest=False)


def softmax_over_tokens(logits, bias):
    return torch.topk(logits.softmax(0), TOPK)


def chosen_over_tokens(logits, bias):
    return torch.topk(logits.softmax(-1), TOPK, dim=0)


def rounded_before_the_choice(logits, bias):
    scores = logits.softmax(-1).to(torch.bfloat16)
    ids = scores.topk(TOPK)[1]
    return logits.softmax(-1).gather(1, ids), ids


def scores_kept_above_a_floor(logits, bias):
    scores = logits.sigmoid().clamp(min=1e-4)
    ids = (scores + bias).topk(TOPK)[1]
    return scores.gather(1, ids), ids


def bias_kept_within_limits(logits, bias):
    scores = logits.sigmoid()
    ids = (scores + bias.clamp(-3, 3)).topk(TOPK)[1]
    return scores.gather(1, ids), ids


def small_scores_dropped(logits, bias):
    scores = logits.softmax(-1)
    return torch.where(scores > 1e-3, scores, 0.0).topk(TOPK)


NEAR_MISSES = [
    scores_kept_above_a_floor,
    bias_kept_within_limits,
    small_scores_dropped,
    bias_is_mixed,
    bias_on_logits,
    bias_by_token,
    groups_by_sum,
    groups_of_strided_experts,
    scores_of_another_temperature,
    smallest,
    softmax_over_tokens,
    chosen_over_tokens,
]


@pytest.mark.parametrize("fn", NEAR_MISSES, ids=lambda f: f.__name__)
def test_near_misses_stay(fn):
    logits, bias = inputs()
    result = rewritten(fn, logits, bias, passes=PASSES)
    assert result.log("fuse_router").rewrites == 0 and result.count("dsopt.moe_route") == 0
    for got, want in zip(result.run(logits, bias), fn(logits, bias), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    "fn", [bias_is_mixed, bias_on_logits, bias_by_token, groups_by_sum], ids=lambda f: f.__name__
)
def test_near_misses_have_a_reason(fn):
    (miss,) = rewritten(fn, *inputs(), passes=PASSES).log("fuse_router").misses
    assert miss["reason"] and "topk" in miss["site"]


def test_scores_that_others_read_stay_for_them():
    def fn(logits, bias):
        scores = logits.softmax(-1)
        weights, ids = scores.topk(TOPK)
        return weights / weights.sum(-1, keepdim=True), ids, scores.mean(0), weights

    logits, bias = inputs()
    result = rewritten(fn, logits, bias, passes=PASSES)
    assert result.count("dsopt.moe_route") == 1
    for got, want in zip(result.run(logits, bias), fn(logits, bias), strict=True):
        torch.testing.assert_close(got, want)


def test_a_bias_written_between_choice_and_weights_stays_in_order():
    def fn(logits, bias):
        scores = logits.sigmoid()
        bias.add_(1.0)
        ids = (scores + bias).topk(TOPK)[1]
        bias.mul_(2.0)
        return scores.gather(1, ids), ids

    logits, bias = inputs()
    result = rewritten(fn, logits, bias.clone(), passes=PASSES)
    mine, theirs = bias.clone(), bias.clone()
    assert (
        moe_route_error(moe_route.bind((logits, TOPK)), result.run(logits, mine), fn(logits, theirs)) < 1e-6
    )
    assert torch.equal(mine, theirs)


def test_groups_put_at_another_number():
    def fn(logits, bias):
        scores = logits.sigmoid()
        choice = (scores + bias).view(-1, GROUPS, EXPERTS // GROUPS)
        best = choice.topk(2, dim=-1)[0].sum(-1).topk(2, dim=-1)[1]
        out = torch.ones(choice.shape[:2], dtype=torch.bool).scatter_(1, best, False)
        ids = choice.masked_fill(out.unsqueeze(-1), -1.0).flatten(1).topk(TOPK, dim=-1)[1]
        return scores.gather(1, ids), ids

    assert fused(rewritten(fn, *inputs(), passes=PASSES))["outside"] == -1.0


def test_two_routers_of_one_graph():
    def fn(logits, bias):
        return *groups_by_top2(logits, bias), *greedy(logits + 1, bias)

    logits, bias = inputs()
    result = rewritten(fn, logits, bias, passes=PASSES)
    assert result.log("fuse_router").families == {"router": 2}
    got, want = result.run(logits, bias), fn(logits, bias)
    for i in (0, 2):
        args = moe_route.bind((logits, TOPK))
        assert moe_route_error(args, got[i : i + 2], want[i : i + 2]) < 1e-6

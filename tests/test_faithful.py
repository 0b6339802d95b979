"""What a rewrite may not change about a model, one property a test: compiled parts of a layer against float64 eager.

`test_mutants.py` breaks each property on purpose, and its test here has to fail then.
"""

from __future__ import annotations

import pytest
import torch
from blocks import TOKENS, Block, Shard, block

import dsopt
from dsopt.testing import relative_l2

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

CLOSE = 2e-6


@torch.no_grad()
def routed(family: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixing weights (num_tokens, num_experts) of a compiled router and of eager; 0 for experts not chosen."""
    of = block(family, "experts")
    results = []
    for router in (dsopt.compile(of.layer.mlp.gate, strict=True), of.to(torch.float64).layer.mlp.gate):
        _, weights, ids = router(of.tokens())
        dense = torch.zeros(2 * TOKENS, of.config.n_routed_experts, dtype=torch.float64)
        results.append(dense.scatter(-1, ids, weights.double()))
    return results[0], results[1]


@torch.no_grad()
def assert_mlp_is_faithful(of: Block) -> None:
    truth = of.to(torch.float64)
    fast = dsopt.compile(of.layer.mlp, strict=True)
    assert relative_l2(fast(of.tokens()), truth.layer.mlp(truth.tokens())) < CLOSE


@torch.no_grad()
def assert_attention_is_faithful(of: Block, situation: str = "prefill", **how) -> None:
    """The result of a layer without MLP, and what it leaves in its cache."""
    truth = of.to(torch.float64)
    given, expected = getattr(of, situation)(**how), getattr(truth, situation)(**how)
    fast = dsopt.compile(of.layer, strict=True)
    assert relative_l2(fast(**given), truth.layer(**expected)) < CLOSE
    if "past_key_values" in given:
        ours, theirs = (inputs["past_key_values"].layers[0] for inputs in (given, expected))
        assert relative_l2(ours.keys, theirs.keys) < CLOSE
        assert relative_l2(ours.values, theirs.values) < CLOSE


def without(weight: torch.nn.Parameter) -> None:
    with torch.no_grad():
        weight.zero_()


def test_routed_scaling_is_applied_once():
    got, want = routed("v3")
    assert relative_l2(got, want) < CLOSE
    assert got.sum(-1).allclose(torch.full((), 2.5, dtype=got.dtype)), "they are renormalized before"


def test_bias_chooses_experts_and_is_never_mixed():
    got, want = routed("v3")
    assert torch.equal(got != 0, want != 0)
    assert relative_l2(got, want) < CLOSE


def test_groups_of_v3_are_ranked_by_their_best_two():
    got, want = routed("v3")
    assert torch.equal(got != 0, want != 0)


def test_groups_of_v2_are_ranked_by_their_best():
    got, want = routed("v2")
    assert torch.equal(got != 0, want != 0)


def test_weights_of_v3_are_renormalized():
    got, want = routed("v3")
    assert got.sum(-1).allclose(want.sum(-1))


def test_weights_of_v2_are_scaled_as_they_are():
    got, want = routed("v2")
    assert relative_l2(got, want) < CLOSE


def test_shared_experts_are_added():
    of = block("v3", "experts")
    without(of.layer.mlp.experts.down_proj)
    assert_mlp_is_faithful(of)


def test_experts_activate_the_gate_and_not_up():
    of = block("v3", "experts")
    without(of.layer.mlp.shared_experts.down_proj.weight)
    assert_mlp_is_faithful(of)


def test_each_expert_is_mixed_by_its_own_weight():
    of = block("v2", "experts")
    without(of.layer.mlp.shared_experts.down_proj.weight)
    assert_mlp_is_faithful(of)


@torch.no_grad()
def test_experts_of_other_shards_add_nothing():
    of = block("v3", "experts")
    shard, truth = Shard(of), of.to(torch.float64).layer.mlp
    x = of.tokens().flatten(0, 1)
    _, weights, ids = truth.gate(x.double())
    want = truth.experts(x.double(), ids, weights.masked_fill(ids >= shard.held, 0.0))
    assert relative_l2(dsopt.compile(shard, strict=True)(x), want) < CLOSE


def test_dense_mlp_activates_the_gate_and_not_up():
    assert_mlp_is_faithful(block("v3", "dense"))


def test_rope_turns_pairs_of_neighbours_in_v2():
    assert_attention_is_faithful(block("v2", "none"))


def test_rope_turns_pairs_of_neighbours_in_v3():
    assert_attention_is_faithful(block("v3", "none"))


def test_cache_holds_rotated_keys_as_eager_lays_them_out():
    assert_attention_is_faithful(block("v2", "none"), "decode")


def test_yarn_scales_softmax_and_tables():
    of = block("v2", "none")
    assert of.layer.self_attn.scaling > 1.2 * of.layer.self_attn.qk_head_dim**-0.5
    assert of.rotary.attention_scaling > 1.2
    assert_attention_is_faithful(of)


@torch.no_grad()
def assert_no_query_sees_the_future(situation: str) -> None:
    of = block("v2", "none")
    fast = dsopt.compile(of.layer, strict=True)
    given, changed = getattr(of, situation)(), getattr(of, situation)()
    changed["hidden_states"][:, -1] += 1
    assert relative_l2(fast(**given)[:, :-1], fast(**changed)[:, :-1]) < CLOSE


def test_prefill_sees_no_future():
    assert_no_query_sees_the_future("prefill")


def test_decode_sees_no_future():
    assert_no_query_sees_the_future("decode")


def test_latent_is_expanded_once():
    of = block("v2", "none")
    assert of.config.qk_nope_head_dim == of.config.kv_lora_rank, "else the shapes would tell"
    assert_attention_is_faithful(of, "decode")


def test_norms_add_their_epsilon():
    assert_attention_is_faithful(block("v2", "none"), size=1e-3)


def test_weights_in_fp8_have_their_own_scales():
    assert_mlp_is_faithful(block("v3-fp8", "dense"))


def test_experts_in_fp8_have_their_own_scales():
    assert_mlp_is_faithful(block("v3-fp8", "experts"))

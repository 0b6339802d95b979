"""Wrong rewrites on purpose: one thing changed in the graphs that a pass leaves, or in what computes an op.

MUTANTS and MORE_MUTANTS say of each where it is put, which site `dsopt.verify` must name, and which test of
`test_faithful.py` is there to catch it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from blocks import STRONG_YARN, NormedMLP, Shard, block
from pytest import MonkeyPatch

from dsopt.op import Kernel, Op, kernels
from dsopt.ops.attention import mla_attention
from dsopt.ops.experts import moe_experts
from dsopt.ops.linear import gated_mlp
from dsopt.ops.norm import rms_norm
from dsopt.ops.rope import rope
from dsopt.ops.route import SCORES, moe_route
from dsopt.pipeline import load_pass
from dsopt.rewrite import Emitter, aten, shape, val


@dataclass(frozen=True)
class Rewritten:
    """Every call of `op` as the pass `after` leaves it, with what `change(emit, arguments by name)` returns."""

    after: str
    op: Op
    change: Callable[[Emitter, dict[str, Any]], dict[str, Any]]

    def inject(self, monkeypatch: MonkeyPatch) -> list[str]:
        """Puts the mutant into the pipeline. The list gains the name of each call it changed."""
        module, changed = load_pass(self.after), []
        run, names = module.run, [a.name for a in self.op.overload._schema.arguments]

        def run_and_change(gm, log):
            run(gm, log)
            for node in gm.graph.find_nodes(op="call_function", target=self.op.overload):
                given = dict(zip(names, self.op.bind(node.args, node.kwargs), strict=True))
                new = given | self.change(Emitter(gm, node), given)
                if new != given:
                    node.args, node.kwargs = tuple(new.values()), {}
                    changed.append(node.name)

        monkeypatch.setattr(module, "run", run_and_change)
        return changed


@dataclass(frozen=True)
class Computed:
    """`op` computed by `fn` instead of its kernels."""

    op: Op
    fn: Callable[..., Any]

    def inject(self, monkeypatch: MonkeyPatch) -> list[str]:
        """Puts the mutant in the place of the op's kernels. The list gains the op's name at each call."""
        calls = []

        def call(*args):
            calls.append(self.op.name)
            return self.fn(*args)

        mutant = Kernel(self.op.name, "mutant", lambda *_: call)
        monkeypatch.setattr(
            "dsopt.op.kernels", lambda op: ((mutant,), ()) if op == self.op.name else kernels(op)
        )
        return calls


@dataclass(frozen=True)
class Mutant:
    """What is wrong, in which subject; the module that verify must name; the test that must fail."""

    wrong: Rewritten | Computed
    family: str
    situation: str
    site: str
    caught_by: str


def subject(family: str, situation: str, dtype: torch.dtype) -> tuple[torch.nn.Module, Any]:
    """A module and its inputs for `dsopt.verify`: an attention in one of three situations, or an MLP."""
    mlp = {"shard": "experts", "experts": "experts", "dense": "dense"}.get(situation, "none")
    of = block(family, mlp, dtype)
    if situation == "shard":
        return Shard(of), of.tokens().flatten(0, 1)
    if situation in ("experts", "dense"):
        return NormedMLP(of), of.tokens()
    if situation == "decode":
        return of.layer, of.decode()
    return of.layer, of.prefill(1e-3 if situation == "small prefill" else 1.0)


def put(**new: Any) -> Callable[[Emitter, dict[str, Any]], dict[str, Any]]:
    """Other values of arguments."""
    return lambda emit, old: new


def swapped(a: str, b: str) -> Callable[[Emitter, dict[str, Any]], dict[str, Any]]:
    """Two arguments in each other's place."""
    return lambda emit, old: {a: old[b], b: old[a]}


def double_scale(emit, old):
    return {"scale": old["scale"] ** 2}


def mixed_from_choice(
    logits, topk, scoring, bias, groups, topk_groups, group_score, outside, renormalize, eps, scale
):
    _, ids = moe_route.reference(logits, topk, scoring, bias, groups, topk_groups, group_score, outside)
    weights = (SCORES[scoring](logits.float()) + (0 if bias is None else bias)).gather(-1, ids)
    return (weights / (weights.sum(-1, keepdim=True) + eps) if renormalize else weights) * scale, ids


def turned_ids(emit, old):
    return {"ids": emit(aten.flip.default, old["ids"], [-1])}


def up_before_gate(emit, old):
    rows = shape(old["w13"])[1]
    gate = emit(aten.slice.Tensor, old["w13"], 1, 0, rows // 2)
    up = emit(aten.slice.Tensor, old["w13"], 1, rows // 2, rows)
    return {"w13": emit(aten.cat.default, [up, gate], 1)}


def clamped_ids(x, ids, weights, w13, *rest):
    return moe_experts.reference(x, ids.clamp(max=w13.shape[0] - 1), weights, w13, *rest)


def scales_of_the_first(emit, old):
    first = emit(aten.slice.Tensor, old["scale13"], 0, 0, 1)
    return {"scale13": emit(aten.clone.default, emit(aten.expand.default, first, shape(old["scale13"])))}


def other_pairs(emit, old):
    return {"interleaved_in": not old["interleaved_in"]}


def other_layout(emit, old):
    return {"interleaved_out": not old["interleaved_out"]}


def plain_softmax_scale(emit, old):
    return {"scale": (shape(old["q_nope"])[-1] + shape(old["q_rope"])[-1]) ** -0.5}


def plain_tables(emit, old):
    yarn, log = STRONG_YARN, 0.1 * math.log(STRONG_YARN["factor"])
    scale = (1 + yarn["mscale"] * log) / (1 + yarn["mscale_all_dim"] * log)
    return {name: emit(aten.div.Tensor, old[name], scale) for name in ("cos", "sin")}


def one_key_more(emit, old):
    """Each query also sees the key behind its last one."""
    if old["is_causal"]:
        seen = emit(aten.ones.default, [shape(old["q_nope"])[2], shape(old["latent"])[1]], dtype=torch.bool)
        return {"mask": emit(aten.tril.default, seen, 1), "is_causal": False}
    if old["mask"] is None or val(old["mask"]).dtype != torch.bool:
        return {}
    later = emit(aten.roll.default, old["mask"], [1], [-1])
    return {"mask": emit(aten.logical_or.default, old["mask"], later)}


def absorbed_queries(emit, old):
    """Queries that w_uk was absorbed into already, which the op absorbs into them once more."""
    return {"q_nope": emit(aten.matmul.default, old["q_nope"], old["w_uk"])}


MUTANTS = {
    "double routed scaling": Mutant(
        Rewritten("fuse_router", moe_route, double_scale),
        "v3", "experts", "mlp.gate", "test_routed_scaling_is_applied_once",
    ),
    "bias used for mixing": Mutant(
        Computed(moe_route, mixed_from_choice),
        "v3", "experts", "mlp.gate", "test_bias_chooses_experts_and_is_never_mixed",
    ),
    "group score by max instead of top-2": Mutant(
        Rewritten("fuse_router", moe_route, put(group_score="max")),
        "v3", "experts", "mlp.gate", "test_groups_of_v3_are_ranked_by_their_best_two",
    ),
    "missing renormalisation": Mutant(
        Rewritten("fuse_router", moe_route, put(renormalize=False)),
        "v3", "experts", "mlp.gate", "test_weights_of_v3_are_renormalized",
    ),
    "shared expert dropped": Mutant(
        Rewritten("fold_shared_experts", moe_experts, put(shared_gate=None, shared_up=None, shared_down=None)),
        "v3", "experts", "mlp", "test_shared_experts_are_added",
    ),
    "gate and up of experts swapped": Mutant(
        Rewritten("batch_experts", moe_experts, up_before_gate),
        "v3", "experts", "mlp", "test_experts_activate_the_gate_and_not_up",
    ),
    "gate and up of a dense MLP swapped": Mutant(
        Rewritten("fuse_gated_mlp", gated_mlp, swapped("w_gate", "w_up")),
        "v3", "dense", "mlp.down_proj", "test_dense_mlp_activates_the_gate_and_not_up",
    ),
    "RoPE layout swapped": Mutant(
        Rewritten("fuse_rope", rope, other_pairs),
        "v3", "prefill", "self_attn", "test_rope_turns_pairs_of_neighbours_in_v3",
    ),
    "YaRN scale of the softmax lost": Mutant(
        Rewritten("absorb_mla", mla_attention, plain_softmax_scale),
        "v2", "prefill", "self_attn", "test_yarn_scales_softmax_and_tables",
    ),
    "causal offset by one, prefill": Mutant(
        Rewritten("absorb_mla", mla_attention, one_key_more),
        "v2", "prefill", "self_attn", "test_prefill_sees_no_future",
    ),
    "causal offset by one, decode": Mutant(
        Rewritten("absorb_mla", mla_attention, one_key_more),
        "v2", "decode", "self_attn", "test_decode_sees_no_future",
    ),
    "kv_b absorbed twice": Mutant(
        Rewritten("absorb_mla", mla_attention, absorbed_queries),
        "v2", "decode", "self_attn", "test_latent_is_expanded_once",
    ),
}  # fmt: skip
MORE_MUTANTS = {
    "bias forgotten": Mutant(
        Rewritten("fuse_router", moe_route, put(bias=None)),
        "v3", "experts", "mlp.gate", "test_bias_chooses_experts_and_is_never_mixed",
    ),
    "group score by top-2 instead of max": Mutant(
        Rewritten("fuse_router", moe_route, put(group_score="top2")),
        "v2", "experts", "mlp.gate", "test_groups_of_v2_are_ranked_by_their_best",
    ),
    "weights of other experts": Mutant(
        Rewritten("batch_experts", moe_experts, turned_ids),
        "v2", "experts", "mlp", "test_each_expert_is_mixed_by_its_own_weight",
    ),
    "gate and up of experts take turns": Mutant(
        Rewritten("batch_experts", moe_experts, put(interleaved=True)),
        "v3", "experts", "mlp", "test_experts_activate_the_gate_and_not_up",
    ),
    "scales of gate and up swapped": Mutant(
        Rewritten("fold_dequantize", gated_mlp, swapped("scale_gate", "scale_up")),
        "v3-fp8", "dense", "mlp.down_proj", "test_weights_in_fp8_have_their_own_scales",
    ),
    "scales of one expert for all": Mutant(
        Rewritten("fold_dequantize", moe_experts, scales_of_the_first),
        "v3-fp8", "experts", "mlp", "test_experts_in_fp8_have_their_own_scales",
    ),
    "sentinel counted as the last expert": Mutant(
        Computed(moe_experts, clamped_ids),
        "v3", "shard", "experts", "test_experts_of_other_shards_add_nothing",
    ),
    "gate and up of shared experts swapped": Mutant(
        Rewritten("fold_shared_experts", moe_experts, swapped("shared_gate", "shared_up")),
        "v3", "experts", "mlp", "test_shared_experts_are_added",
    ),
    "RoPE layout swapped, v2": Mutant(
        Rewritten("fuse_rope", rope, other_pairs),
        "v2", "prefill", "self_attn", "test_rope_turns_pairs_of_neighbours_in_v2",
    ),
    "RoPE result laid out otherwise": Mutant(
        Rewritten("fuse_rope", rope, other_layout),
        "v2", "decode", "self_attn", "test_cache_holds_rotated_keys_as_eager_lays_them_out",
    ),
    "YaRN scale of the tables lost": Mutant(
        Rewritten("fuse_rope", rope, plain_tables),
        "v2", "prefill", "self_attn", "test_yarn_scales_softmax_and_tables",
    ),
    "epsilon of norms lost": Mutant(
        Rewritten("fuse_rms_norm", rms_norm, put(eps=0.0)),
        "v2", "small prefill", "input_layernorm", "test_norms_add_their_epsilon",
    ),
}  # fmt: skip

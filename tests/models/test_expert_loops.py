"""dsopt.compile on transformers' models whose experts run in a Python loop."""

import copy

import pytest
import torch
from families import MLA, SHARED, _heads, build
from transformers import AutoConfig, AutoModelForCausalLM

import dsopt
from dsopt.testing import relative_l2

OTHERS = {
    # identity experts after the others, and no implementation but the loop
    "longcat_flash": {
        **MLA,
        **_heads(4, 64),
        "num_layers": 1,
        "q_lora_rank": 32,
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 32,
        "zero_expert_num": 3,
        "moe_topk": 3,
    },
    # transposed, biased, interleaved and clamped, with an activation of its own
    "gpt_oss": {**SHARED, **_heads(4, 64), "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
}

EVERY = {
    "v2": {"n_routed_experts": 4, "num_experts_per_tok": 4, "n_group": 2, "topk_group": 2},
    "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 3},
}


def looping(family, dtype):
    if family not in OTHERS:
        # in bfloat16 rounding may choose other experts, so there all are chosen
        model = build(family, dtype, **(EVERY[family] if dtype == torch.bfloat16 else {}))
    else:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **OTHERS[family])).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.normal_(std=0.7 * p.shape[-1] ** -0.5)
        model = model.to(dtype)
    model.set_experts_implementation("eager")
    return model


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *((family, torch.float32) for family in ("v2", "v3", "mixtral", "qwen3_moe", *OTHERS)),
        ("v2", torch.bfloat16),
        ("mixtral", torch.bfloat16),
    ],
)
def test_a_call_is_one_graph(family, dtype):
    model = looping(family, dtype)
    truth = copy.deepcopy(model).double()
    fast = dsopt.compile(model, strict=True, fallback="eager")
    batched = [p.site for p in dsopt.report(fast).prepared if p.refused is None]
    assert batched and all(site.endswith("mlp.experts") for site in batched)
    ids = torch.randint(3, 100, (3, 4), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        got, eager, want = (m(ids).logits for m in (fast, model, truth))
    (graph,) = dsopt.report(fast).graphs
    assert {"moe_experts", "moe_route"} <= {k.op for k in graph.kernels} and graph.fallback is None
    slack = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    assert relative_l2(got, want) <= 1.5 * relative_l2(eager, want) + slack


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_no_loop_is_left_to_the_passes(implementation, dtype, caplog):
    model = build("v2", dtype)
    model.set_experts_implementation(implementation)
    assert dsopt.report(dsopt.compile(model, strict=True)).prepared == []
    assert not caplog.records

"""`generate`: the tokens of eager, every fused op called, and no recompiles after two prompts."""

from __future__ import annotations

import contextlib
import copy
import warnings

import pytest
import torch
from families import build
from transformers import CompileConfig

import dsopt

PROMPTS = (5, 9, 3, 12, 7)
FUSED = {"rms_norm", "add_rms_norm", "rope", "multi_linear", "gated_mlp", "mla_attention"}
FUSED |= {"moe_route", "moe_experts"}


def prompt(length: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, 120, (batch, length), generator=torch.Generator().manual_seed(length))


def assert_fused_ops_ran(report):
    assert report.graphs and not report.fallbacks
    assert {k.op for g in report.graphs for k in g.kernels} == FUSED
    assert all(k.calls > 0 for g in report.graphs for k in g.kernels)


@pytest.mark.parametrize(
    "how, cache",
    [
        ("model.compile", "dynamic"),
        ("dsopt.compile", "static"),
        pytest.param("dsopt.compile", "dynamic", marks=pytest.mark.slow),
        pytest.param("model.compile", "static", marks=pytest.mark.slow),
    ],
)
def test_greedy_over_five_prompts(how, cache):
    """32 tokens for each of 5 prompts of different lengths; after two prompts a recompile is an error."""
    model = build("v3")
    eager = copy.deepcopy(model)
    if how == "dsopt.compile":
        fast = dsopt.compile(model)
    else:
        fast = model
        fast.compile(backend="dsopt")
    options = {"max_new_tokens": 32, "do_sample": False, "eos_token_id": None}
    if cache == "static":
        options["cache_implementation"] = "static"
    for i, length in enumerate(PROMPTS):
        stance = torch.compiler.set_stance("fail_on_recompile") if i >= 2 else contextlib.nullcontext()
        with stance:
            got = fast.generate(prompt(length), **options)
        assert got.shape[1] == length + 32
        assert torch.equal(got, eager.generate(prompt(length), **options))
    report = dsopt.report(fast)
    assert 1 <= len(report.graphs) <= 4
    assert_fused_ops_ran(report)


def test_every_way_of_decoding():
    """Sampling with a seed, beam search, several sequences, and a chat that goes on with its cache."""
    model = build("v2")
    fast = dsopt.compile(model)
    common = {"max_new_tokens": 6, "eos_token_id": None}
    for options in (
        {"do_sample": True, "temperature": 0.8, "top_k": 20},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True, "num_return_sequences": 2},
    ):
        outputs = []
        for m in (model, fast):
            torch.manual_seed(1)
            outputs.append(m.generate(prompt(6), **options, **common))
        assert torch.equal(*outputs), options

    turns = []
    for m in (model, fast):
        said = prompt(5)
        first = m.generate(said, do_sample=False, return_dict_in_generate=True, **common)
        said = torch.cat((first.sequences, prompt(4)), 1)
        turns.append(m.generate(said, do_sample=False, past_key_values=first.past_key_values, **common))
    assert torch.equal(*turns)
    assert_fused_ops_ran(dsopt.report(fast))


def test_left_padded_batch():
    model = build("v3")
    fast = dsopt.compile(model)
    ids = prompt(8, batch=3)
    mask = torch.ones_like(ids)
    mask[0, :5] = mask[1, :2] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **options), fast.generate(ids, **options))


def test_transformers_own_compilation_is_ours():
    """On accelerators `generate` compiles by itself; forced here on the CPU, it ends in dsopt and stays right."""
    model = build("v3")
    config = dsopt.prepare.compile_config()
    assert isinstance(config, CompileConfig)
    config._compile_all_devices = True
    options = {
        "max_new_tokens": 6,
        "do_sample": False,
        "eos_token_id": None,
        "cache_implementation": "static",
    }
    want = model.generate(prompt(6), disable_compile=True, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = model.generate(prompt(6), compile_config=config, **options)
    assert torch.equal(got, want)
    assert_fused_ops_ran(dsopt.report(model))


def test_wrapper_forwards_generate_to_eager():
    """torch.compile's wrapper does not compile `generate`: documented, and visible in the report."""
    model = build("v2")
    wrapped = torch.compile(model, backend="dsopt")
    wrapped.generate(prompt(4), max_new_tokens=2, do_sample=False)
    assert dsopt.report(model).graphs == []

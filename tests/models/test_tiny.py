"""The trained model that is shipped: it loads, it is what its log says, and FP8 costs it next to nothing."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

import dsopt
from dsopt.bench import accuracy
from dsopt.models import tiny

LOG = json.loads((tiny.PATH / "training.json").read_text())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(tiny.PATH, local_files_only=True).eval()


@pytest.fixture(scope="module")
def tokens():
    return tiny.text(tiny.HELDOUT).tokens[10_000:12_100]


def test_the_checkpoint_is_small_and_bfloat16(model):
    assert sum(file.stat().st_size for file in tiny.PATH.iterdir()) <= 12_000_000
    assert model.config.model_type == "deepseek_v3" and model.dtype == torch.bfloat16
    assert sum(p.numel() for p in model.parameters()) == LOG["parameters"] in range(4_000_000, 6_000_000)
    assert {b.dtype for n, b in model.named_buffers() if "correction_bias" in n} == {torch.float32}
    assert model.generation_config.eos_token_id == tiny.END


def test_it_knows_the_text_it_was_not_trained_on(model, tokens):
    guess = math.log(256)  # nats a byte of one that knows nothing
    assert accuracy.predict(model, tokens, 512, 1).loss < guess / 3
    assert LOG["heldout"]["loss"] < guess / 3 and LOG["log"][-1]["loss"] < LOG["log"][0]["loss"] / 2
    assert LOG["heldout"]["perplexity"] == pytest.approx(math.exp(LOG["heldout"]["loss"]), rel=1e-4)
    assert not set(LOG["heldout"]["files"]) & set(tiny.text(tiny.MODULES).files)


def test_fp8_weights_and_cache_keep_its_perplexity(model, tokens):
    narrow = copy.deepcopy(model)
    dsopt.quantize_(narrow, progress=False)
    base = accuracy.predict(model, tokens, 512, 1).loss
    weights = accuracy.predict(narrow, tokens, 512, 1).loss
    both = accuracy.predict(narrow, tokens, 512, 1, lambda: dsopt.LatentCache(model.config)).loss
    assert weights != base != both != weights
    # the targets are for the whole text; 2048 bytes vary more
    assert abs(math.expm1(weights - base)) < 0.01 and abs(math.expm1(both - base)) < 0.015


def test_an_fp8_cache_picks_the_same_tokens(model, tokens):
    assert accuracy.same_steps(model, tokens[:200].view(2, 100).long(), 16) >= accuracy.SAME_TOKEN

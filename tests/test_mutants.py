"""Tests of the tests: each wrong rewrite on purpose is named by `dsopt.verify` and fails the test made for it."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from families import build
from mutants import MUTANTS, subject

import dsopt

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

FAITHFUL = runpy.run_path(str(Path(__file__).with_name("test_faithful.py")))
DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "situation", sorted({(m.family, m.situation) for m in MUTANTS.values()}), ids="-".join
)
def test_verify_passes_without(situation, dtype):
    assert dsopt.verify(*subject(*situation, dtype)).first is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MUTANTS)
def test_verify_names_the_module(name, dtype, monkeypatch):
    mutant = MUTANTS[name]
    module, inputs = subject(mutant.family, mutant.situation, dtype)
    changed = mutant.wrong.inject(monkeypatch)
    with pytest.raises(dsopt.VerifyError) as caught:
        dsopt.verify(module, inputs)
    first = caught.value.result.first
    assert changed and first.site == mutant.site and first.kernel.endswith(f"_{mutant.wrong.op.name}")


def test_verify_names_the_layer_of_a_model(monkeypatch):
    model = build("v3", n_group=1, topk_group=1)
    inputs = {"input_ids": torch.randint(3, 120, (2, 7)), "use_cache": False}
    MUTANTS["missing renormalisation"].wrong.inject(monkeypatch)
    with pytest.raises(dsopt.VerifyError, match=r"first departs at model\.layers\.1\.mlp\.gate "):
        dsopt.verify(model, inputs)


@pytest.mark.parametrize("name", MUTANTS)
def test_its_own_test_fails(name, monkeypatch):
    mutant = MUTANTS[name]
    changed = mutant.wrong.inject(monkeypatch)
    with pytest.raises(AssertionError):
        FAITHFUL[mutant.caught_by]()
    assert changed

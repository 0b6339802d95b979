"""Tests of the tests: each wrong rewrite on purpose is named by `dsopt.verify` and fails the test made for it."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from families import build
from mutants import MORE_MUTANTS, MUTANTS, subject

import dsopt

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

FAITHFUL = runpy.run_path(str(Path(__file__).with_name("test_faithful.py")))
DTYPES = (torch.float32, torch.bfloat16)
ALL = MUTANTS | MORE_MUTANTS


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("situation", sorted({(m.family, m.situation) for m in ALL.values()}), ids="-".join)
def test_verify_passes_without(situation, dtype):
    assert dsopt.verify(*subject(*situation, dtype)).first is None


@pytest.mark.parametrize(
    "name, dtype",
    [
        *((name, dtype) for name in MUTANTS for dtype in DTYPES),
        *((name, torch.float32) for name in MORE_MUTANTS),
        *(pytest.param(name, torch.bfloat16, marks=pytest.mark.slow) for name in MORE_MUTANTS),
    ],
    ids=str,
)
def test_verify_names_the_module(name, dtype, monkeypatch):
    mutant = ALL[name]
    module, inputs = subject(mutant.family, mutant.situation, dtype)
    changed = mutant.wrong.inject(monkeypatch)
    with pytest.raises(dsopt.VerifyError) as caught:
        dsopt.verify(module, inputs)
    first = caught.value.result.first
    assert changed and first.site == mutant.site and first.kernel.endswith(f"_{mutant.wrong.op.name}")


def test_verify_names_the_layer_of_a_model(monkeypatch):
    model = build("v3", num_hidden_layers=1, first_k_dense_replace=0)
    inputs = {"input_ids": torch.randint(3, 120, (2, 7)), "use_cache": False}
    MUTANTS["missing renormalisation"].wrong.inject(monkeypatch)
    with pytest.raises(dsopt.VerifyError, match=r"first departs at model\.layers\.0\.mlp\.gate "):
        dsopt.verify(model, inputs)


@pytest.mark.parametrize("name", ALL)
def test_its_own_test_fails(name, monkeypatch):
    mutant = ALL[name]
    changed = mutant.wrong.inject(monkeypatch)
    with pytest.raises(AssertionError):
        FAITHFUL[mutant.caught_by]()
    assert changed

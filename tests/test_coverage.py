"""docs/coverage.md says what was measured, of every family there is."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path

import pytest

import dsopt

ROOT = Path(dsopt.__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "coverage.py"
if not SCRIPT.is_file():
    pytest.skip("dsopt is installed without its sources", allow_module_level=True)


def load_script():
    spec = importlib.util.spec_from_file_location("coverage_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


coverage = load_script()
RESULTS = json.loads(coverage.RESULTS.read_text())


def test_the_table_is_made_of_the_results():
    assert coverage.TABLE.read_text() == coverage.document(RESULTS)


@pytest.fixture
def measured_version():
    transformers = pytest.importorskip("transformers")
    if transformers.__version__ != RESULTS["versions"]["transformers"]:
        pytest.skip("the table is of another version of transformers")


def test_every_family_is_listed(measured_version):
    found = {f.name: (f.has_latent, f.has_experts) for f in coverage.families()}
    listed = {n: (r["has_latent"], r["has_experts"]) for n, r in RESULTS["families"].items()}
    assert listed == found


def result(**changes):
    """A made-up result of a family with everything matched, changed at the given paths."""
    run = {
        "graphs": 2,
        "breaks": {},
        "fallbacks": [],
        "matched": {f: [2, 2] for f in coverage.FAMILIES},
        "misses": [],
        "error": 1e-7,
    }
    made = {"has_latent": True, "has_experts": True, "float32": run, "bfloat16": copy.deepcopy(run)}
    made["bfloat16"] |= {"error": 1e-2, "error_of_eager": 1e-2}
    for path, value in changes.items():
        dtype, key = path.split("__")
        made[dtype][key] = value
    return made


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"float32__matched": {**{f: [2, 2] for f in coverage.FAMILIES}, "rope": [1, 2]}},
            "rope: no reason given",
        ),
        ({"bfloat16__breaks": {"Data dependent operator": 1}}, "graph break: Data dependent operator"),
        ({"float32__fallbacks": ["nothing to fuse"]}, "fallback: nothing to fuse"),
        ({"float32__error": 1e-3}, "**wrong**: float32 error 1.0e-03"),
        ({"float32__error": float("nan")}, "**wrong**: float32 error nan"),
        ({"bfloat16__error": 3e-2}, "**wrong**: bfloat16 error 3.0e-02, eager 1.0e-02"),
        (
            {
                "float32__misses": [
                    {"family": "moe", "reason": "left out, it failed: KeyError: 1", "count": 1}
                ]
            },
            "failed pass: left out, it failed: KeyError: 1",
        ),
    ],
)
def test_what_is_not_fully_matched_says_why(changes, says):
    assert coverage.is_full(result(), "mla") and coverage.why_not(result()) == []
    changed = result(**changes)
    assert not coverage.is_full(changed, "mla")
    assert coverage.why_not(changed) == [says]
    results = {"versions": RESULTS["versions"], "families": {"one": result(), "other": changed}}
    document = coverage.document(results)
    assert "latent attention: 1 of 2 families fully matched" in document and says in document


def test_families_without_a_site_are_not_fully_matched():
    none = {f: [0, 0] for f in coverage.FAMILIES}
    assert not coverage.is_full(result(float32__matched=none, bfloat16__matched=none), "moe")


def test_what_was_not_measured_is_listed():
    one = {"has_latent": True, "has_experts": False, "reason": "ValueError: no causal model"}
    document = coverage.document({"versions": RESULTS["versions"], "families": {"one": one}})
    assert "latent attention: 0 of 1" in document and "- `one`: ValueError: no causal model" in document

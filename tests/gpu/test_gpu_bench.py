"""The benchmarks on a GPU, at tiny sizes: everything that is measured is right, and nothing fails."""

import pytest
import torch

from dsopt.bench import ceilings, model
from dsopt.bench.cases import Sizes, cases, geometry
from dsopt.bench.clock import medians
from dsopt.bench.run import Choice, Runner
from dsopt.ops import OPS

WHERE = {"preset": "v3", "dtype": "bfloat16", "device": "cuda", "threads": 0}


@pytest.fixture(scope="module")
def limits():
    return ceilings.measure("cuda", (0,), quick=True)


def test_ceilings_of_the_gpu(limits):
    found = {c.what: c.rate for c in limits.found}
    assert {ceilings.BANDWIDTH, "float32", "bfloat16"} <= set(found) and all(
        rate > 0 for rate in found.values()
    )
    assert {c.threads for c in limits.found} == {0}


@pytest.mark.parametrize("op", OPS)
def test_every_op_is_measured(op, limits):
    runner = Runner(Choice(baselines=("reference", "eager"), seconds=0, cold=False), limits, lambda *_: None)
    geo = geometry("v3", torch.bfloat16, "cuda", quick=True)
    for case in cases(OPS[op], geo, (Sizes(1, 9), Sizes(7, 7), Sizes(2, 5, 3))):
        rows, problems = runner.measure(case, WHERE)
        assert not [p for p in problems if p["what"] in ("wrong", "failed")], problems
        assert {"eager", f"torch.{op}"} <= {row["name"] for row in rows}
        assert all(row["seconds"] > 0 and row["share"] > 0 for row in rows)


def test_calls_take_turns_on_the_device():
    x, order = torch.randn(1 << 20, device="cuda"), []
    fns = {name: lambda x, name=name: (order.append(name), x * 2) for name in "ab"}
    found = medians(fns, lambda: (x,), budget=0, device="cuda")
    assert order == ["a", "b"] * (1 + 3), "once to see how long the host takes, then three rounds"
    assert all(t.rounds == 3 and t.fastest > 0 for t in found.values())


def test_a_model_is_measured():
    pytest.importorskip("transformers")
    plan = model.ModelPlan(
        "v3", 2, device="cuda", context=(8,), prefill=(5,), ways=("eager", "dsopt"), overhead=(), tiny=True
    )
    parts = list(model.units(plan, model.Loaded(lambda *_: None)))
    assert [(what, size) for what, size, _ in parts] == [("decode", 8), ("prefill", 5)], (
        "starts are measured on CPUs"
    )
    for _, _, measure in parts:
        found = measure()
        assert not found["failed"] and set(found["tokens_per_s"]) == {"eager", "dsopt"}
        assert found["error"]["dsopt"] < 0.02

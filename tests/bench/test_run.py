"""The runner: what is wrong, broken or refused is told and not timed; what is right gets a row."""

from types import SimpleNamespace

import pytest
import torch

from dsopt.bench import baselines, run
from dsopt.bench.cases import Sizes, cases, geometry
from dsopt.bench.ceilings import BANDWIDTH, Ceiling, Ceilings
from dsopt.bench.eager import EAGER
from dsopt.bench.run import Choice, Runner
from dsopt.op import Kernel, Refusal, backends
from dsopt.ops import OPS
from dsopt.ops.norm import rms_norm_reference

WHERE = {"preset": "v2-lite", "dtype": "bfloat16", "device": "cpu", "threads": 1}
LIMITS = Ceilings([Ceiling(BANDWIDTH, 1, 1e9), Ceiling("float32", 1, 1e9)])


THREE_TOKENS = (Sizes(3),)


def measured(choice=None, op="rms_norm", sizes=THREE_TOKENS):
    geo = geometry("v2-lite", torch.bfloat16, "cpu", quick=True)
    choice = choice or Choice(baselines=(), seconds=0, cold=False)
    runner = Runner(choice, LIMITS, lambda what, detail: None)
    rows, problems = [], []
    for case in cases(OPS[op], geo, sizes):
        more = runner.measure(case, WHERE)
        rows += more[0]
        problems += more[1]
    return rows, problems


def kernel(name, fn, **given):
    return Kernel("rms_norm", "cpu", lambda *_: fn, name=name, **given)


@pytest.fixture
def only(monkeypatch):
    """Measures these kernels instead of the registered ones."""

    def only(*found, broken=()):
        monkeypatch.setattr(run, "kernels", lambda op: (found, broken))

    return only


def unwritten(x, weight, eps):
    out = torch.empty_like(x)
    out[..., :-1] = rms_norm_reference(x, weight, eps)[..., :-1]
    return out


def broken(x, weight, eps):
    raise RuntimeError("out of luck\nand more")


def test_only_right_kernels_are_timed(only):
    only(
        kernel("good", rms_norm_reference),
        kernel("zero", lambda x, weight, eps: torch.zeros_like(x)),
        kernel("unwritten", unwritten),
        kernel("broken", broken),
        kernel("picky", rms_norm_reference, check=lambda *_: "needs another width"),
        Kernel("rms_norm", "cpu", broken, name="unplanned"),
        kernel("unsure", rms_norm_reference, check=broken),
        broken=(Refusal("gone.rms_norm", "import failed: no such module"),),
    )
    rows, problems = measured()
    assert [row["name"] for row in rows] == ["cpu.good"]
    assert {(p["name"], p["what"]) for p in problems} == {
        ("cpu.zero", "wrong"),
        ("cpu.unwritten", "wrong"),
        ("cpu.broken", "failed"),
        ("cpu.picky", "refused"),
        ("cpu.unplanned", "failed"),
        ("cpu.unsure", "failed"),
        ("gone.rms_norm", "refused"),
    }
    reasons = {p["name"]: p["reason"] for p in problems}
    assert reasons["cpu.broken"] == "RuntimeError: out of luck"
    assert reasons["cpu.picky"] == "needs another width"
    assert "off by 1.0e+00" in reasons["cpu.zero"] and "off by inf" in reasons["cpu.unwritten"]


def test_a_row_says_what_was_measured(only):
    only(kernel("good", rms_norm_reference))
    ((row,), _) = measured()
    assert (row["op"], row["tokens"], row["batch"], row["preset"]) == ("rms_norm", 3, 1, "v2-lite")
    assert (row["bytes"], row["flops"]) == (2 * (3 * 64 * 2 + 64), 4 * 3 * 64)
    assert row["bound"] == "memory" and row["share"] == pytest.approx(row["bytes"] / 1e9 / row["seconds"])
    assert row["rounds"] == 3 and 0 < row["fastest"] <= row["seconds"] and row["error"] < 1e-2


@pytest.mark.parametrize("op", OPS)
def test_every_registered_kernel_of_every_op_is_measured_or_refused(op):
    rows, problems = measured(Choice(baselines=("reference", "eager"), seconds=0, cold=False), op)
    names = {row["name"] for row in rows}
    assert not [p for p in problems if p["what"] in ("wrong", "failed")], problems
    kernels = {k.label for k in run.kernels(op)[0]}
    assert kernels <= names | {p["name"] for p in problems} and f"torch.{op}" in names
    assert "eager" in names and ("reference" in names) != any(p["name"] == "reference" for p in problems)


def test_inductor_compiles_what_eager_runs():
    rows, problems = measured(Choice((), ("eager", "inductor"), 0, False))
    assert {row["name"] for row in rows} | {p["name"] for p in problems} == {"eager", "inductor"}
    assert all("C++" in p["reason"] or "compiler" in p["reason"] for p in problems), problems


@pytest.mark.parametrize("op", OPS)
def test_what_inductor_gets_is_one_graph(op, fresh_dynamo):
    for case in cases(OPS[op], geometry("v3", torch.bfloat16, "cpu", quick=True), (Sizes(2, 4),)):
        with torch.inference_mode():
            torch.compile(EAGER[op], backend="eager", fullgraph=True)(*case.make(0))


def test_transformers_experts_are_a_peer():
    pytest.importorskip("transformers")
    rows, problems = measured(Choice((), ("peers",), 0, False), "moe_experts", (Sizes(1), Sizes(5)))
    peers = [(row["name"], row["tokens"]) for row in rows if row["column"] == "peers"]
    assert len(peers) == 5 and ("transformers batched_mm", 5) not in peers
    assert any(p["name"] == "transformers batched_mm" and "four tokens" in p["reason"] for p in problems)


def test_only_chosen_backends_and_baselines_are_measured():
    rows, _ = measured(Choice(("torch",), ("eager",), 0, False))
    assert [row["name"] for row in rows] == ["torch.rms_norm", "eager"]


def test_a_disabled_backend_is_refused(monkeypatch):
    monkeypatch.setenv("DSOPT_DISABLE", "torch")
    rows, problems = measured(Choice(("torch",), (), 0, False))
    assert not rows and problems[0]["reason"] == "disabled by DSOPT_DISABLE"


def test_a_slow_baseline_is_left_out_of_the_next_sizes(monkeypatch):
    monkeypatch.setattr(run, "SLOW", 0.0)
    sizes = Sizes(2), Sizes(3), Sizes(2, batch=2), Sizes(1, batch=3)
    rows, problems = measured(Choice(("torch",), ("eager",), 0, False), sizes=sizes)
    assert [(row["tokens"], row["batch"]) for row in rows if row["column"]] == [(2, 1), (1, 3)]
    assert len([row for row in rows if not row["column"]]) == 4, "kernels are always measured"
    left_out = [p for p in problems if p["name"] == "eager"]
    assert [(p["tokens"], p["batch"]) for p in left_out] == [(3, 1), (2, 2)]
    assert all("left out: it took" in p["reason"] and "2 tokens" in p["reason"] for p in left_out)


def test_interrupts_come_through(only, monkeypatch):
    only(kernel("good", rms_norm_reference))

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "medians", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measured()


@pytest.mark.parametrize(
    ("kind", "given"), [("backend", {"backends": ["gnu"]}), ("baseline", {"baselines": ["gnu"]})]
)
def test_unknown_names_are_refused_with_those_that_exist(kind, given):
    with pytest.raises(ValueError, match=f"unknown {kind} 'gnu'") as error:
        Choice(**given)
    known = {
        "backend": set(backends()) - {"reference"},
        "baseline": {"reference", "eager", "inductor", "peers"},
    }
    assert all(name in str(error.value) for name in known[kind])


def test_baselines_of_other_packages(monkeypatch):
    mine = baselines.Baseline("mine", lambda case, args: rms_norm_reference, frozenset({"rms_norm"}))

    def fails():
        raise OSError("no such library")

    entries = [SimpleNamespace(name="mine", load=lambda: mine), SimpleNamespace(name="theirs", load=fails)]
    monkeypatch.setattr(baselines, "entry_points", lambda group: entries)
    rows, problems = measured(Choice((), ("peers",), 0, False))
    assert [(row["name"], row["column"]) for row in rows] == [("mine", "peers")]
    assert [(p["name"], p["reason"]) for p in problems] == [
        ("theirs", "import failed: OSError: no such library")
    ]

"""Each script in benchmarks/ runs at tiny sizes, and its examples are commands that it takes."""

import json
import re
import runpy
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import dsopt
from dsopt import compare
from dsopt.bench import command, session
from dsopt.ops import OPS

ROOT = Path(dsopt.__file__).resolve().parents[1]
SCRIPTS = {
    "run": tuple(OPS),
    "bench_attention": ("mla_attention", "attention", "rope"),
    "bench_linear": ("multi_linear", "gated_mlp"),
    "bench_model": ("model",),
    "bench_moe": ("moe_route", "moe_experts"),
    "bench_norm": ("rms_norm", "add_rms_norm"),
}
pytestmark = pytest.mark.skipif(
    not (ROOT / "benchmarks").is_dir(), reason="dsopt is installed without its sources"
)


@pytest.fixture
def start(monkeypatch):
    """Runs a script in this process and returns its exit code."""

    def start(name, *args):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *args])
        monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py"), run_name="__main__")
        return ended.value.code or 0

    return start


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "bench_model"])
def test_a_script_measures_its_ops(start, name, tmp_path, capsys):
    file = tmp_path / "result.json"
    given = (
        "--quick",
        "--backend",
        "torch",
        "--baseline",
        "eager",
        *(("--tokens", "2") if name == "run" else ()),
    )
    plot = tmp_path / "plot.png"
    drawn = ("--plot", str(plot)) if find_spec("matplotlib") else ()
    assert start(name, *given, "--json", str(file), *drawn) == 0
    found = json.loads(file.read_text())
    assert tuple(dict.fromkeys(row["op"] for row in found["rows"])) == SCRIPTS[name]
    assert {row["name"] for row in found["rows"]} == {"eager", *(f"torch.{op}" for op in SCRIPTS[name])}
    printed = capsys.readouterr().out
    assert all(f"torch.{op}" in printed for op in SCRIPTS[name])
    assert not drawn or plot.stat().st_size > 10_000


def test_the_model_script_measures_rates_starts_and_overhead(
    start, tmp_path, capsys, monkeypatch, fresh_dynamo
):
    pytest.importorskip("transformers")
    file, run = tmp_path / "result.json", {"first_s": 2.0, "compile_s": 1.5, "peak_growth": 3_000_000}
    monkeypatch.setattr(compare, "starts", lambda *_: [run, {**run, "first_s": 1.0}])
    assert start("bench_model", "--quick", "--layers", "1", "--baseline", "dsopt", "--json", str(file)) == 0
    found = {row["what"]: row for row in json.loads(file.read_text())["models"]}
    assert set(found) == {"start of dsopt", "overhead", "decode", "prefill"}
    assert found["decode"]["tokens_per_s"]["dsopt"] > 0 and not found["decode"]["failed"]
    assert found["start of dsopt"]["warm"]["first_s"] == 1.0
    assert found["overhead"]["size"] == 1 and found["overhead"]["whole"] > 0
    printed = capsys.readouterr().out
    for text in (
        "decode, 16 cached",
        "prefill of 5",
        "first step of a process",
        "+3 MB",
        "guards",
        "allocation",
    ):
        assert text in printed


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.usefixtures("threads")
def test_the_script_about_threads(start, capsys):
    pytest.importorskip("dsopt._cpu")
    assert start("bench_threads", "--calls", "20", "--threads", "2") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("2 threads, 20 calls of each") and "of the sum" in printed
    before, after = re.search(r"(\d+) before, (\d+) after", printed).groups()
    assert before == after


@pytest.mark.slow
def test_starts_are_those_of_fresh_processes():
    pytest.importorskip("transformers")
    cold, warm = compare.starts("dsopt", "v2-lite", 1, 8, tiny=True)
    for run in (cold, warm):
        assert run["first_s"] > run["compile_s"] > 0 and run["peak_growth"] > 0
    with pytest.raises(RuntimeError, match="KeyError: 'gnu'"):
        compare.starts("gnu", "v2-lite", 1, 8, tiny=True, count=1)


@pytest.mark.parametrize("name", SCRIPTS)
def test_examples_are_shown_and_can_be_asked_for(start, name, capsys, monkeypatch, tmp_path):
    assert start(name, "--help") == 0
    examples = re.findall(
        rf"^\s*python benchmarks/{name}\.py\b(.*?)(?:   *\S.*)?$", capsys.readouterr().out, re.M
    )
    assert len(examples) >= 3
    asked = []
    monkeypatch.setattr(command, "_run", lambda request, document, file: asked.append(request))
    monkeypatch.setattr(command, "_show", lambda *_: None)
    monkeypatch.setattr(command, "_check_files", lambda *_: None)
    monkeypatch.setattr(session, "read_document", lambda path: session.new_document())
    monkeypatch.setattr(session.torch.cuda, "is_available", lambda: True)
    for example in examples:
        assert start(name, *shlex.split(example, comments=True)) == 0, example
    assert len(asked) == len(examples) and asked[0].ops == SCRIPTS[name]


def test_the_script_about_accuracy_takes_its_examples(start, monkeypatch, capsys):
    pytest.importorskip("transformers")
    from dsopt.bench import accuracy_command

    assert start("accuracy", "--help") == 0
    examples = re.findall(
        r"^\s*python benchmarks/accuracy\.py\b(.*?)(?:  #.*)?$", capsys.readouterr().out, re.M
    )
    asked = []
    rows = {"rows": [], "text": {}, "steps": {"steps": 1, "prompts": 1, "prompt": 1, "same_token": 1.0}}
    monkeypatch.setattr(accuracy_command, "measure", lambda *given: asked.append(given) or rows)
    monkeypatch.setattr(accuracy_command.terminal, "write", lambda *_: None)
    for example in examples:
        assert start("accuracy", *shlex.split(example)) == 0
    assert [(given[1].numel(), given[2]) for given in asked[1:]] == [(20000, 32), (asked[0][1].numel(), 256)]


def test_the_readme_shows_each_script():
    text = (ROOT / "README.md").read_text()
    assert all(f"python benchmarks/{name}.py" in text for name in (*SCRIPTS, "accuracy"))

"""The command line: what it prints, its JSON, and its errors."""

import json

import pytest
from typer.testing import CliRunner

import dsopt
from dsopt import demo
from dsopt.cli import VARIABLES, app
from dsopt.models import presets
from dsopt.op import Kernel, kernels
from dsopt.ops import OPS
from dsopt.ops.rope import rope

pytest.importorskip("transformers")


@pytest.fixture
def call():
    def call(*args):
        return CliRunner().invoke(app, list(args))

    return call


def test_help_names_the_commands(call):
    result = call("--help")
    assert result.exit_code == 0
    assert all(command in result.output for command in ("demo", "env", "compile", "verify", "bench"))


def test_version(call):
    assert call("--version").output.strip() == dsopt.__version__


def test_env_says_which_kernels_there_are(call, tmp_path):
    result = call("env", "--json", str(tmp_path / "env.json"))
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "env.json").read_text())
    assert {row["op"] for row in found["kernels"]} == set(OPS)
    assert all(row["accepts"] for row in found["kernels"] if row["kernel"].startswith("reference."))
    assert set(found["environment"]) == set(VARIABLES)
    assert all(name in result.output for name in (*VARIABLES, "mla_attention", found["versions"]["torch"]))


def test_env_shows_the_graphs_that_are_kept(call, monkeypatch, tmp_path):
    monkeypatch.setenv("DSOPT_CACHE", "1")
    monkeypatch.setenv("DSOPT_CACHE_DIR", str(tmp_path))
    (tmp_path / "a.graph").write_text("x" * 10)
    found = json.loads(call("env", "--json", "-").stdout)["graph_cache"]
    assert found == {"folder": str(tmp_path), "graphs": 1, "bytes": 10}
    monkeypatch.setenv("DSOPT_CACHE", "0")
    found = json.loads(call("env", "--json", "-").stdout)["graph_cache"]
    assert found == {"folder": None, "graphs": 0, "bytes": 0}


def test_env_shows_a_disabled_backend(call, monkeypatch):
    monkeypatch.setenv("DSOPT_DISABLE", "torch")
    rows = json.loads(call("env", "--json", "-").stdout)["kernels"]
    verdicts = {row["verdict"] for row in rows if row["kernel"].startswith("torch.")}
    assert verdicts == {"disabled by DSOPT_DISABLE"}


def test_env_refuses_an_unknown_backend(call, monkeypatch):
    monkeypatch.setenv("DSOPT_DISABLE", "gnu")
    result = call("env")
    assert result.exit_code == 1
    assert "gnu" in result.output and "torch" in result.output


@pytest.mark.parametrize("model", ["deepseek_v3", "v2-lite", "llama"])
def test_compile_reports_what_was_fused(call, model):
    result = call(
        "compile", model, "--tiny", "--tokens", "9", "--steps", "2", "--dtype", "float32", "--json", "-"
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["fallbacks"] == []
    families = {"norm", "rope", "mlp"} | ({"mla"} if model != "llama" else set())
    for family in families:
        matched, total = found["matched"][family]
        assert matched == total > 0, family
    assert all(kernel["calls"] > 0 for graph in found["graphs"] for kernel in graph["kernels"])


def test_compile_quantizes_first(call, fresh_dynamo):
    result = call(
        "compile", "v3", "--tiny", "--layers", "1", "--fp8", "--tokens", "5", "--steps", "1", "--json", "-"
    )
    assert result.exit_code == 0, result.output
    matched, total = json.loads(result.stdout)["matched"]["fp8"]
    assert matched == total > 0


def test_compile_explains_module_by_module(call, fresh_dynamo):
    given = ["deepseek_v3", "--tiny", "--layers", "4", "--tokens", "9", "--steps", "1"]
    result = call("compile", *given, "--explain", "--json", "-")
    assert result.exit_code == 0, result.output
    assert "what runs in each module" in result.stderr
    lines = json.loads(result.stdout)["explain"][-1]["lines"]
    at = {(line["path"], line["family"]) for line in lines}
    assert {("model.layers.0.mlp.down_proj", "mlp"), ("model.layers.1-3.self_attn", "mla")} <= at
    assert all((line["kernel"] == "") == (line["reason"] != "") for line in lines)


def test_compile_checks_what_it_is_asked_before_filling_weights(call, monkeypatch):
    monkeypatch.setattr("dsopt.trial.build", lambda *_: pytest.fail("weights were filled"))
    for given, message in (("rms_norm", "OP=BACKEND"), ("rms_norm=gpux", "known backends")):
        result = call("compile", "v2-lite", "--tiny", "--kernel", given)
        assert result.exit_code == 1 and message in result.stderr
    monkeypatch.setenv("DSOPT_FUEL", "some")
    result = call("compile", "v2-lite", "--tiny")
    assert result.exit_code == 1 and "DSOPT_FUEL" in result.stderr


def test_compile_takes_a_folder_and_a_kernel_choice(call, tmp_path):
    presets.config(presets.tiny(presets.v3())).save_pretrained(tmp_path)
    result = call(
        "compile",
        str(tmp_path),
        "--layers",
        "1",
        "--tokens",
        "5",
        "--steps",
        "1",
        "--kernel",
        "rms_norm=torch",
        "--json",
        "-",
    )
    assert result.exit_code == 0, result.output
    graphs = json.loads(result.stdout)["graphs"]
    assert {k["backend"] for g in graphs for k in g["kernels"] if k["op"] == "rms_norm"} == {"torch"}


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["no-such-model"], ["no-such-model", "v2-lite"]),
        (["v3"], ["GiB", "--layers", "--tiny"]),
        (["v3", "--tiny", "--dtype", "int8"], ["int8", "bfloat16"]),
        (["v3", "--tiny", "--kernel", "rms_norm=gnu"], ["gnu", "torch"]),
        (["v3", "--tiny", "--kernel", "no_op=torch"], ["no_op", "rms_norm"]),
    ],
)
def test_compile_errors_name_what_is_known(call, arguments, names):
    result = call("compile", *arguments)
    assert result.exit_code == 1
    assert all(name in result.output for name in names), result.output


SMALL = ["deepseek_v3", "--tiny", "--layers", "1", "--dtype", "float32", "--tokens", "5", "--json", "-"]


def test_verify_compares_the_prompt_and_a_decode_step(call):
    result = call("verify", *SMALL)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["model"] == "deepseek_v3" and found["layers"] == 1
    assert list(found["steps"]) == ["prompt", "decode step 1"]
    for step in found["steps"].values():
        assert step["first"] is None and 0 < step["worst"] < 1e-4
        paths = [row["site"] for row in step["sites"]]
        assert paths.index("model.layers.0.input_layernorm") < paths.index("model.layers.0.self_attn")
    assert "model.layers.0.self_attn" in result.stderr


def test_verify_names_the_first_site_that_departs(call, monkeypatch, fresh_dynamo):
    wrong = Kernel("rope", "wrong", lambda *_: lambda *args: rope.reference(*args) * 1.02)
    monkeypatch.setattr("dsopt.op.kernels", lambda op: ((wrong,), ()) if op == "rope" else kernels(op))
    result = call("verify", *SMALL)
    assert result.exit_code == 1
    assert "first departs at model.layers.0.self_attn (wrong_rope): error 2.00e-02 > 1e-04" in result.stderr
    steps = json.loads(result.stdout)["steps"].values()
    assert [step["first"] for step in steps] == ["model.layers.0.self_attn"] * 2
    result = call("verify", *SMALL, "--kernel", "rope=gnu")
    assert result.exit_code == 1 and "known backends" in result.stderr


def test_presets_build_every_model_small():
    for name, make in presets.PRESETS.items():
        model = presets.random_model(presets.config(presets.tiny(make())))
        weights = [p for p in model.parameters() if p.ndim > 1]
        assert all(0.01 < p.float().std() < 0.03 for p in weights if p.numel() > 1000), name
        assert model.model.rotary_emb.inv_freq.max() == 1, name


def test_layers_within_a_budget():
    per_layer = [presets.weight_bytes(presets.config(presets.v2_lite(), num_hidden_layers=n)) for n in (3, 4)]
    assert demo.layers_within("v2-lite", per_layer[1] - 1, 100) == 3
    assert demo.layers_within("v2-lite", per_layer[1], 100) == 4
    assert demo.layers_within("v2-lite", per_layer[1], 2) == 2
    assert demo.layers_within("v3", 1000, 100) == 0


def seconds(eager, inductor, fast):
    return {"eager": eager, "inductor": inductor, "dsopt": fast}


def test_targets_compare_with_what_was_measured():
    rows = {
        "weight_bytes": 3_000_000_000,
        "decode": [
            {"cached": 4096, "threads": 2, "seconds": seconds(1.0, 0.6, 0.1), "error": {"dsopt": 0.5}},
            {"cached": 8192, "threads": 2, "seconds": seconds(2.0, 1.2, 0.15), "error": {"dsopt": 0.5}},
        ],
        "buffers": [{"seconds": {"dsopt": 0.1}}, {"seconds": {"dsopt": 0.2}}],
        "prefill": {"tokens": 1024, "seconds": seconds(3.0, 2.0, 2.5)},
        "cold": {
            "inductor": {"compile_s": 30.0, "peak_growth": 10**9},
            "dsopt": {"compile_s": 9.0, "peak_growth": 4 * 10**8},
        },
        "greedy": {"steps": 8, "same": {"eager": 8, "dsopt": 8}},
    }
    found = {row["what"]: (round(row["value"], 3), row["met"]) for row in demo.targets(rows)}
    assert found == {
        "decode at 4096 cached, 2 threads: eager / dsopt": (10.0, True),
        "decode at 4096 cached, 2 threads: Inductor / dsopt": (6.0, True),
        "decode at 8192 cached, 2 threads: Inductor / dsopt": (8.0, False),
        "decode at 8192 cached / at 4096": (1.5, True),
        "512 cached: StaticCache of 16384 / of 1024": (2.0, False),
        "prefill of 1024: best other / dsopt": (0.8, False),
        "peak memory of the first decode": (400.0, True),
        "cold compile: dsopt / Inductor": (0.3, True),
        "relative L2 of logits against eager, 4096 cached": (0.5, False),
        "greedy tokens equal to eager's": (8, True),
    }
    # an interrupted run has only some of it
    assert demo.targets({"decode": rows["decode"][1:], "weight_bytes": 1})[-1]["value"] == 0.5


def test_demo_keeps_finished_rows_when_interrupted(call, monkeypatch, tmp_path):
    def interrupted(plan, rows, step):
        rows |= {"title": "a model", "preset": plan.preset, "layers": 1, "weight_bytes": 1, "buffers": []}
        rows["decode"] = [
            {
                "cached": 7,
                "buffer": 8,
                "threads": 1,
                "seconds": seconds(0.5, 0.25, 0.125),
                "error": {"dsopt": 0.0},
            }
        ]
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "measure", interrupted)
    result = call("demo", "--quick", "--json", str(tmp_path / "demo.json"))
    assert result.exit_code == 130
    assert "8.00 tok/s" in result.output and "4.0x" in result.output
    found = json.loads((tmp_path / "demo.json").read_text())
    assert found["interrupted"] and found["machine"]["cpu"]["model"]
    assert found["models"][0]["decode"][0]["seconds"]["dsopt"] == 0.125


@pytest.mark.slow
def test_demo_measures_a_small_model(monkeypatch, call):
    small = presets.tiny(presets.v2_lite())
    monkeypatch.setitem(presets.PRESETS, "v2-lite", lambda: small)
    plan = demo.Plan("v2-lite", 3, ((16, 2), (32, 1)), prefill=8, buffer_ways=("dsopt",))
    monkeypatch.setattr(demo, "plans", lambda quick, layers: [plan])
    result = call("demo", "--json", "-")
    assert result.exit_code == 0, result.output
    (rows,) = json.loads(result.stdout)["models"]
    assert rows["failed"] == {}
    assert [set(row["seconds"]) for row in rows["decode"]] == [{"eager", "inductor", "dsopt"}] * 2
    assert rows["decode"][0]["error"]["dsopt"] < 0.05
    assert rows["report"]["matched"]["mla"][0] > 0

"""The command line: results written, kept, continued and compared; the plot; errors that say what there is."""

import json

import pytest
import torch
from typer.testing import CliRunner

from dsopt.bench import changes, clock, command, model, roofline, run, session
from dsopt.bench.table import duration
from dsopt.cli import app
from dsopt.models.presets import PRESETS
from dsopt.ops import OPS

ONE = ("--quick", "--backend", "torch", "--baseline", "eager", "--threads", "1")


@pytest.fixture
def call():
    def call(*args):
        return CliRunner().invoke(app, ["bench", *args], env={"COLUMNS": "120"})

    return call


@pytest.fixture
def result(call, tmp_path):
    """A finished result of two ops, and its file."""
    file = tmp_path / "result.json"
    done = call("--op", "rms_norm,gated_mlp", *ONE, "--json", str(file))
    assert done.exit_code == 0, done.output
    return json.loads(file.read_text()), file


def test_a_result_has_the_machine_its_ceilings_and_a_row_for_each_way(result):
    found, _ = result
    assert torch.__version__.startswith(found["machine"]["versions"]["torch"])
    assert {c["what"] for c in found["ceilings"]} == {"bandwidth", "float32", "bfloat16"}
    rows = {(row["op"], row["case"], row["tokens"], row["name"]) for row in found["rows"]}
    assert len(rows) == len(found["rows"]) == (2 + 2 * 2) * 2
    assert all(row["seconds"] > 0 and row["device"] == "cpu" and row["threads"] == 1 for row in found["rows"])


def test_standard_output_is_json_alone(call):
    done = call("--op", "rope", *ONE, "--tokens", "2", "--json", "-")
    assert done.exit_code == 0 and "torch.rope" in done.stderr
    assert {row["tokens"] for row in json.loads(done.stdout)["rows"]} == {2}


def test_tables_show_every_way_and_who_is_missing(call, monkeypatch):
    monkeypatch.setenv("DSOPT_DISABLE", "cpu")
    done = call("--op", "rms_norm", "--quick", "--backend", "torch,cpu", "--baseline", "eager,reference")
    for text in (
        "rms_norm, width 64: v2-lite, bfloat16",
        "torch.rms_norm",
        "over eager",
        "of ceiling",
        "5 tokens",
    ):
        assert text in done.output
    assert "refused: cpu.rms_norm: disabled by DSOPT_DISABLE" in done.output
    assert "measured ceilings: bandwidth" in done.output


def test_threads_are_rows_of_their_own(call):
    before = torch.get_num_threads()
    done = call("--op", "rms_norm", *ONE[:-1], "1,2", "--tokens", "1", "--json", "-")
    assert {row["threads"] for row in json.loads(done.stdout)["rows"]} == {1, 2}
    assert torch.get_num_threads() == before


def test_an_interrupt_keeps_what_was_finished(call, tmp_path, monkeypatch):
    file, rounds = tmp_path / "result.json", []

    def medians(*args, **given):
        rounds.append(0)
        if len(rounds) == 2:
            raise KeyboardInterrupt
        return clock.medians(*args, **given)

    monkeypatch.setattr(run, "medians", medians)
    done = call("--op", "rms_norm", *ONE, "--json", str(file))
    assert done.exit_code == 130
    assert (
        "1 token" in done.output
        and "interrupted" in done.output
        and "5 tokens" not in done.output.split("way")[1]
    )
    found = json.loads(file.read_text())
    assert found["interrupted"] and {row["tokens"] for row in found["rows"]} == {1}

    again = call("--op", "rms_norm", *ONE, "--json", str(file), "--resume")
    assert again.exit_code == 0 and len(rounds) == 3, "only what was missing is measured"
    whole = json.loads(file.read_text())
    assert "interrupted" not in whole and [row["tokens"] for row in whole["rows"]] == [1, 1, 5, 5]
    assert whole["rows"][:2] == found["rows"] and whole["ceilings"] == found["ceilings"]


def test_a_wrong_kernel_fails_the_command(call, monkeypatch):
    from dsopt.op import Kernel

    wrong = Kernel("rms_norm", "torch", lambda *_: lambda x, *_: x.clone(), name="wrong")
    monkeypatch.setattr(run, "kernels", lambda op: ((wrong,), ()))
    done = call("--op", "rms_norm", *ONE)
    assert done.exit_code == 1 and "wrong: torch.wrong (1 token): off by" in done.output


def test_comparison_gives_ratios_and_names_what_differs(call, result, tmp_path):
    found, _ = result
    old = json.loads(json.dumps(found))
    for row in old["rows"]:
        row["seconds"] *= 2
    old["machine"]["cpu"]["model"] = "Abacus"
    old["machine"]["memory"]["available"] = 1
    ratios = changes.changes(old, found)
    assert len(ratios) == len(found["rows"]) and all(row["ratio"] == pytest.approx(0.5) for row in ratios)
    assert [name for name, _, _ in changes.differences(old["machine"], found["machine"])] == ["cpu.model"]

    (tmp_path / "old.json").write_text(json.dumps(old))
    done = call("--op", "rms_norm", *ONE, "--compare", str(tmp_path / "old.json"))
    assert done.exit_code == 0 and "new / old" in done.output
    assert "machines differ: cpu.model: Abacus then" in done.output
    nothing = call("--op", "rope", *ONE, "--compare", str(tmp_path / "old.json"))
    assert "nothing to compare" in nothing.output


def test_the_plot_shows_every_kernel(result, tmp_path):
    image = pytest.importorskip("matplotlib.image")
    found, _ = result
    count = roofline.draw(tmp_path / "plot.png", found, "title")
    assert count == len([row for row in found["rows"] if not row["column"]]) == 6
    pixels = image.imread(tmp_path / "plot.png")[..., :3]
    height, width, _ = pixels.shape
    inside = pixels[height // 10 : -height // 8, width // 10 : -width // 20]
    assert (inside < 0.95).any(-1).mean() > 0.005, "ink within the axes"
    assert len({tuple(p) for p in inside.reshape(-1, 3).tolist()}) > 50, (
        "lines, labels and points, antialiased"
    )
    color = torch.tensor([int(roofline.COLORS[0][i : i + 2], 16) / 255 for i in (1, 3, 5)])
    hits = (torch.tensor(inside) - color).abs().amax(-1) < 0.02
    assert hits.sum() > 6 * 20, "each point covers some pixels"


def test_a_plot_of_nothing_is_refused(call, tmp_path):
    pytest.importorskip("matplotlib")
    done = call("--op", "moe_route", *ONE, "--plot", str(tmp_path / "plot.png"))
    assert done.exit_code == 1 and "nothing to plot" in done.output


@pytest.mark.parametrize(
    ("given", "message", "known"),
    [
        (["--op", "gnu"], "unknown op 'gnu'", [*OPS, "model"]),
        (["--model", "gnu"], "unknown preset 'gnu'", PRESETS),
        (["--backend", "gnu"], "unknown backend 'gnu'", ["cpu", "numba", "torch", "triton"]),
        (["--baseline", "gnu"], "unknown baseline 'gnu'", ["reference", "eager", "inductor", "peers"]),
        (["--op", "model", "--baseline", "gnu"], "unknown way 'gnu'", ["eager", "inductor", "dsopt"]),
        (["--dtype", "int4"], "unknown dtype 'int4'", ["bfloat16", "float32", "float16"]),
        (["--device", "tpu"], "unknown device 'tpu'", ["cpu", "cuda"]),
        (["--tokens", "0"], "--tokens", ["at least 1"]),
        (["--threads", "two"], "--threads", ["whole numbers"]),
        (["--resume"], "--resume", ["--json"]),
        (["--json", "nowhere/result.json"], "--json", ["no folder nowhere"]),
        (["--plot", "nowhere/plot.png"], "--plot", ["no folder nowhere"]),
        (["--compare", "nowhere.json"], "--compare", ["no such file"]),
    ],
)
def test_errors_say_what_there_is(call, given, message, known):
    done = call(*given)
    output = " ".join(done.output.split())
    assert done.exit_code == 1 and message in output
    assert all(word in output for word in known)


@pytest.mark.parametrize("text", ["no json", "[]", '{"format": 0}'])
def test_a_file_that_is_no_result_is_refused(call, tmp_path, text):
    (tmp_path / "old.json").write_text(text)
    done = call("--compare", str(tmp_path / "old.json"))
    assert done.exit_code == 1 and "old.json" in done.output


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="PyTorch sees no GPU"):
        session.Request(device="cuda")


def test_a_model_is_planned_for_each_number_of_layers():
    request = session.Request(ops=("model",), layers=(3, 10), context=(64,), baselines=("dsopt", "eager"))
    (where,) = session._places(request)
    first, second = session._plans(request, where)
    assert (first.layers, second.layers) == (3, 10) and first.context == second.context == (64,)
    assert first.overhead == (3, 27) and second.overhead == ()
    assert first.ways == ("eager", "dsopt") and first.prefill and not first.tiny


def test_a_part_of_a_model_that_fails_is_told(call, monkeypatch):
    def fails():
        raise MemoryError("the weights take 9 GiB")

    found = {"tokens_per_s": {"dsopt": 2.0}, "failed": {"inductor": "decode: no compiler"}, "threads": 7}
    parts = [("decode", 16, lambda: found), ("prefill", 5, fails)]
    monkeypatch.setattr(model, "units", lambda plan, loaded: iter(parts))
    done = call("--op", "model", "--quick", "--threads", "1", "--json", "-")
    assert done.exit_code == 0
    first, second = json.loads(done.stdout)["models"]
    assert first["threads"] == 1 and second["error"] == "the weights take 9 GiB"
    for text in ("2.00", "failed: inductor: decode: no compiler", "failed: prefill: the weights take 9 GiB"):
        assert text in done.stderr


def test_a_dated_name_says_what_and_where():
    name = command.auto_name("rms_norm,rope")
    assert name.startswith("benchmarks/results/2") and "-rmsnorm-rope-" in name and name.endswith(".json")


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.5, "1.50 s"), (0.0123, "12.3 ms"), (4.56e-4, "456 us"), (2e-8, "0.02 us")]
)
def test_durations_have_three_digits(seconds, text):
    assert duration(seconds) == text

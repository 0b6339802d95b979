"""The benchmark of FP8 checkpoints: what it counts, and that it runs."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from checkpoints import preset, tensors

pytest.importorskip("transformers", minversion="5.17")

import dsopt
from dsopt.bench import checkpoint
from dsopt.models import synthetic

SCRIPT = Path(dsopt.__file__).resolve().parents[1] / "benchmarks" / "bench_checkpoint.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    synthetic.write(folder, preset("v2-lite", num_experts_per_tok=3), progress=False)
    return folder


def test_bytes_of_a_step(folder):
    want = 0
    for name, tensor in tensors(folder).items():
        if name == "model.embed_tokens.weight":
            want += tensor[0].nbytes
        elif ".experts." in name:
            want += tensor.nbytes * 3 / 8  # of 8 experts 3 are chosen
        else:
            want += tensor.nbytes
    assert checkpoint.step_bytes(dsopt.load(folder)) == want


@pytest.mark.skipif(not SCRIPT.is_file(), reason="dsopt is installed without its sources")
def test_the_script(folder, tmp_path, monkeypatch, capsys, threads, fresh_dynamo):
    threads(1)
    given = ["--context", "4", "--steps", "2", "--quick", "--threads", "1"]
    monkeypatch.setattr(
        sys, "argv", [SCRIPT.name, str(folder), *given, "--json", str(tmp_path / "result.json")]
    )
    monkeypatch.setattr(sys, "path", [str(SCRIPT.parent), *sys.path])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert not ended.value.code
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["layers"] == 2 and found["threads"] == 1 and found["machine"]["cpu"]
    (row,) = found["decode"]
    assert row["cached"] == 4 and row["tokens_per_s"] == pytest.approx(1 / row["seconds"])
    latents = 4 * 2 * (32 + 16) * 2  # tokens, layers, widths, bytes
    assert row["bytes_per_s"] * row["seconds"] == pytest.approx(found["step_bytes"] + latents)
    out = capsys.readouterr().out
    assert "Loading" in out and "tokens/s" in out


@pytest.mark.skipif(not SCRIPT.is_file(), reason="dsopt is installed without its sources")
def test_what_is_wrong_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, str(tmp_path), "--quick", "--threads", "1"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert ended.value.code == 1 and "neither model.safetensors" in " ".join(capsys.readouterr().err.split())

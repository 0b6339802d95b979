"""The writer of synthetic checkpoints: the same bytes again, whole files kept, sane activations."""

import pytest
import torch
from checkpoints import preset, read_json, tensors
from typer.testing import CliRunner

pytest.importorskip("transformers", minversion="5.17")

import dsopt
from dsopt.fp8 import FP8Block, dequantize, quantize
from dsopt.models import synthetic

SIZES = {"max_shard_size": "50KB", "progress": False}


def state_of(folder):
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.glob("*.safetensors")}


def test_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    synthetic.write(tmp_path / "whole", preset(), **SIZES)
    write, written = synthetic.write_shard, []

    def interrupted(path, *rest):
        written.append(path)
        if len(written) == 3:
            raise KeyboardInterrupt
        write(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(synthetic, "write_shard", interrupted)
        with pytest.raises(KeyboardInterrupt):
            synthetic.write(tmp_path / "again", preset(), **SIZES)
    first = state_of(tmp_path / "again")
    assert len(first) == 2 and not (tmp_path / "again" / "config.json").exists()
    # what is there but not whole is written again
    damaged = tmp_path / "again" / min(first)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    synthetic.write(tmp_path / "again", preset(), **SIZES)
    second, whole = state_of(tmp_path / "again"), state_of(tmp_path / "whole")
    assert {name: data for name, (_, data) in second.items()} == {
        name: data for name, (_, data) in whole.items()
    }
    kept = [name for name in first if second[name][0] == first[name][0]]
    assert kept == [max(first)]
    assert sorted(path.name for path in (tmp_path / "again").iterdir() if path.name.startswith(".")) == []


def test_other_weights_are_left_alone(tmp_path):
    synthetic.write(tmp_path, preset(), **SIZES)
    before = state_of(tmp_path)
    with pytest.raises(ValueError, match="holds other weights, such as model-0"):
        synthetic.write(tmp_path, preset(layers=3), **SIZES)
    assert state_of(tmp_path) == before


def test_a_full_disk_is_told_before(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic.shutil, "disk_usage", lambda path: type("", (), {"free": 1000}))
    with pytest.raises(OSError, match="GB are free"):
        synthetic.write(tmp_path / "new", preset(), **SIZES)
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
def test_weights_are_as_quantized_normal_numbers(tmp_path, scale_fmt):
    """Of 128x128 blocks: near N(0, 0.02), and using e4m3's range as `quantize` would."""
    synthetic.write(tmp_path, preset(hidden_size=256, intermediate_size=512), scale_fmt=scale_fmt, **SIZES)
    found = tensors(tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    weight, scale = found[name], found[f"{name}_scale_inv"]
    wide = dequantize(weight, scale, torch.float32)
    assert 0.01 < wide.std() < 0.04 and wide.mean().abs() < 1e-3
    _, want = quantize(torch.randn(512, 256) * 0.02, FP8Block())
    assert 0.5 < scale.float().mean() / want.mean() < 2
    assert (weight.float().abs() > 200).any()


def test_activations_stay_sane(tmp_path):
    synthetic.write(tmp_path, preset("v2-lite", layers=3), **SIZES)
    model = dsopt.load(tmp_path, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(torch.arange(16)[None]).logits
    assert torch.isfinite(logits).all() and 0.01 < logits.std() < 10
    assert len(logits[0].argmax(-1).unique()) > 1


def test_command(tmp_path):
    app = synthetic.typer.Typer()
    app.command()(synthetic.main)
    call = CliRunner().invoke
    result = call(app, ["v3", str(tmp_path / "new"), "--tiny", "--layers", "2", "--mtp", "--ue8m0"])
    assert result.exit_code == 0 and str(tmp_path / "new") in result.output
    assert read_json(tmp_path / "new" / "config.json")["quantization_config"]["scale_fmt"] == "ue8m0"
    assert len(dsopt.load(tmp_path / "new").model.layers) == 2
    assert call(app, ["v9", str(tmp_path / "other")]).exit_code == 1
    assert call(app, ["v3", str(tmp_path / "new"), "--tiny", "--max-shard-size", "40KB"]).exit_code == 1

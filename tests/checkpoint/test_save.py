"""`dsopt.save`: what transformers and `dsopt.load` read again, and what is left where it fails."""

import pytest
import torch
from checkpoints import INDEX, assert_same, assert_same_weights, preset, read_json, tensors
from transformers import AutoConfig, AutoModelForCausalLM

import dsopt
from dsopt.checkpoint import saving
from dsopt.models import presets, synthetic


def model_of(**changes):
    return presets.random_model(presets.config(preset(**changes)))


@pytest.mark.parametrize("size", ["5GB", "60KB", 60_000])
def test_transformers_reads_it(tmp_path, size):
    model = model_of()
    dsopt.save(model, tmp_path / "new", max_shard_size=size)
    files = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert ("model.safetensors" in files) == (size == "5GB") == (INDEX not in files)
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype=torch.bfloat16)
    state = model.state_dict()
    for name, tensor in got.state_dict().items():
        assert torch.equal(tensor, state[name].to(tensor.dtype)), name
    assert "model.layers.1.mlp.experts.7.up_proj.weight" in tensors(tmp_path / "new")
    assert_same(dsopt.load(tmp_path / "new"), got)
    assert read_json(tmp_path / "new" / "config.json")["architectures"] == ["DeepseekV3ForCausalLM"]


@pytest.mark.parametrize("family", ["qwen3", "gpt_oss", "mixtral"])
def test_other_families(tmp_path, family):
    config = AutoConfig.for_model(family, **presets.TINY, tie_word_embeddings=family == "qwen3")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    dsopt.save(model, tmp_path / "new")
    assert_same(
        AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype=torch.bfloat16),
        dsopt.load(tmp_path / "new"),
    )
    state = model.state_dict()
    for name, tensor in dsopt.load(tmp_path / "new").state_dict().items():
        assert torch.equal(tensor, state[name])
    assert ("lm_head.weight" in tensors(tmp_path / "new")) == (family != "qwen3")


@pytest.mark.parametrize("name", ["v2-lite", "v3.2"])
def test_a_model_that_was_quantized_here(tmp_path, name):
    model = model_of(name=name)
    dsopt.quantize_(model, dsopt.FP8Block(rows=16, columns=16), progress=False)
    dsopt.save(model, tmp_path / "new")
    settings = read_json(tmp_path / "new" / "config.json")["quantization_config"]
    assert settings["weight_block_size"] == [16, 16] and "modules_to_not_convert" not in settings
    assert_same_weights(dsopt.load(tmp_path / "new"), model)
    pytest.importorskip("accelerate")
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype=torch.float32)
    ids = torch.arange(6)[None]
    with torch.inference_mode():
        torch.testing.assert_close(
            got.float()(ids).logits, dsopt.load(tmp_path / "new", dtype=torch.float32)(ids).logits
        )


def test_what_was_left_wide_is_named(tmp_path):
    synthetic.write(tmp_path / "a", preset(), block=(16, 16), progress=False)
    model = dsopt.load(tmp_path / "a")
    for path in ("model.layers.0.self_attn.o_proj", "model.layers.1.mlp.shared_experts.up_proj"):
        module = model.get_submodule(path)
        linear = torch.nn.Linear(module.in_features, module.out_features, bias=False, dtype=torch.bfloat16)
        model.set_submodule(path, linear)
    dsopt.save(model, tmp_path / "b")
    settings = read_json(tmp_path / "b" / "config.json")["quantization_config"]
    assert settings["modules_to_not_convert"] == [
        "lm_head",
        "model.layers.0.self_attn.o_proj",
        "model.layers.1.mlp.shared_experts.up_proj",
    ]
    assert_same_weights(dsopt.load(tmp_path / "b"), model)


def test_a_wide_model_has_no_quantization_config(tmp_path):
    model = model_of()
    model.config.quantization_config = {"quant_method": "fp8"}
    dsopt.save(model, tmp_path / "new")
    assert "quantization_config" not in read_json(tmp_path / "new" / "config.json")
    assert model.config.quantization_config == {"quant_method": "fp8"}


def test_nothing_is_left_of_what_fails(tmp_path, monkeypatch):
    model, (write, written) = model_of(), (saving.write_shard, [])

    def fails(path, *rest):
        written.append(path)
        if len(written) == 2:
            raise OSError("the disk is gone")
        write(path, *rest)

    monkeypatch.setattr(saving, "write_shard", fails)
    with pytest.raises(OSError, match="disk is gone"):
        dsopt.save(model, tmp_path / "new", max_shard_size="60KB")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_before(tmp_path, monkeypatch):
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: type("", (), {"free": 1000}))
    with pytest.raises(OSError, match="GB of the disk are free"):
        dsopt.save(model_of(), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_overwrite(tmp_path, monkeypatch):
    old, new = model_of(), model_of(layers=1)
    folder = tmp_path / "checkpoint"
    dsopt.save(old, folder, max_shard_size="60KB")
    (folder / "tokenizer.json").write_text("{}")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(FileExistsError, match="overwrite=True"):
        dsopt.save(new, folder)
    with monkeypatch.context() as patch:
        patch.setattr(saving, "write_index", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            dsopt.save(new, folder, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    dsopt.save(new, folder, overwrite=True)
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert {path.name for path in folder.iterdir()} == names
    assert list(tmp_path.iterdir()) == [folder]
    assert len(dsopt.load(folder).model.layers) == 1


def test_only_a_checkpoint_is_overwritten(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="is no checkpoint"):
        dsopt.save(model_of(), tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(TypeError, match="a model of transformers, got Linear"):
        dsopt.save(torch.nn.Linear(2, 2), tmp_path / "new")
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(presets.config(preset()))
    with pytest.raises(ValueError, match="no values for model"):
        dsopt.save(empty, tmp_path / "new")
    assert not (tmp_path / "new").exists()

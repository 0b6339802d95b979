"""Checkpoints without FP8: what `dsopt.load` makes of them is what `from_pretrained` makes."""

import pytest
import torch
from checkpoints import assert_same, change_json, preset, put, tensors
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

import dsopt
from dsopt import machine
from dsopt.models import presets


def random_model(dtype=torch.bfloat16, **changes):
    model = presets.random_model(presets.config(preset(**changes)), dtype)
    for name, buffer in model.named_buffers():
        if "correction_bias" in name:
            buffer.data = buffer.float() + 1e-3
    return model


def from_pretrained(folder, dtype=torch.bfloat16):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize("name", ["v2-lite", "v2", "v3", "v3.2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_is_what_from_pretrained_makes(tmp_path, name, dtype):
    random_model(name=name).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    got = dsopt.load(tmp_path, dtype=dtype)
    assert_same(got, from_pretrained(tmp_path, dtype))
    assert next(got.parameters()).dtype == dtype
    if name in ("v3", "v3.2"):
        assert got.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_other_dtypes_are_rounded_as_transformers_does(tmp_path, stored):
    random_model(stored).save_pretrained(tmp_path)
    assert_same(dsopt.load(tmp_path), from_pretrained(tmp_path))


def test_stacked_experts(tmp_path):
    model = random_model()
    model.config.save_pretrained(tmp_path)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    assert any(name.endswith("experts.gate_up_proj") for name in state)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    assert_same(dsopt.load(tmp_path), from_pretrained(tmp_path))


def test_a_family_without_experts_and_with_tied_weights(tmp_path):
    config = AutoConfig.for_model("qwen3", **presets.TINY, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in tensors(tmp_path)
    got = dsopt.load(tmp_path, dtype=torch.float32)
    assert_same(got, from_pretrained(tmp_path, torch.float32))
    assert got.lm_head.weight is got.model.embed_tokens.weight


def test_computed_buffers_beside_weights(tmp_path):
    """gemma3's embeddings have a factor of their own, which is in no checkpoint."""
    config = AutoConfig.for_model("gemma3_text", **presets.TINY, sliding_window=16)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    got = dsopt.load(tmp_path)
    assert got.model.embed_tokens.embed_scale == torch.tensor(8.0)
    assert_same(got, from_pretrained(tmp_path))


def test_tied_weights_where_only_the_other_is_there(tmp_path):
    config = AutoConfig.for_model("qwen3", **presets.TINY, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    embeddings = tensors(tmp_path)["model.embed_tokens.weight"]
    put(tmp_path / "model.safetensors", {"model.embed_tokens.weight": None, "lm_head.weight": embeddings})
    got = dsopt.load(tmp_path, dtype=torch.float32)
    assert got.lm_head.weight is got.model.embed_tokens.weight
    assert torch.equal(got.lm_head.weight, embeddings)


def test_computed_buffers_of_older_checkpoints(tmp_path):
    random_model().save_pretrained(tmp_path)
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.full((8,), 7.0)}
    put(tmp_path / "model.safetensors", old)
    assert_same(dsopt.load(tmp_path), from_pretrained(tmp_path))


def test_the_first_layers_of_a_deeper_one(tmp_path):
    random_model(layers=3, name="v3.2").save_pretrained(tmp_path, max_shard_size="100KB")
    got = dsopt.load(tmp_path, layers=2)
    whole = dsopt.load(tmp_path)
    assert got.config.num_hidden_layers == len(got.model.layers) == 2
    state = whole.state_dict()
    for name, value in got.state_dict().items():
        assert torch.equal(value, state[name])
    ids = torch.arange(5)[None]
    del whole.model.layers[2]
    whole.config = whole.model.config = got.config
    with torch.inference_mode():
        assert torch.equal(got(ids).logits, whole(ids).logits)


def test_wrong_arguments(tmp_path):
    random_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="dtype must be float32, bfloat16 or float16, got"):
        dsopt.load(tmp_path, dtype=torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="layers must be at least 1, got 0"):
        dsopt.load(tmp_path, layers=0)


def test_more_than_the_machine_has(tmp_path, monkeypatch):
    random_model().save_pretrained(tmp_path)
    size = sum(tensor.nbytes for tensor in tensors(tmp_path).values())
    for total, fits in ((size - 1, False), (size, True), (None, True)):
        monkeypatch.setattr(machine, "memory", lambda total=total: {"total": total, "available": 0})
        if fits:
            dsopt.load(tmp_path)
        else:
            with pytest.raises(MemoryError, match="layers=N loads the first N layers only"):
                dsopt.load(tmp_path)


def test_generation_config_and_generate(tmp_path):
    random_model().save_pretrained(tmp_path)
    change_json(tmp_path / "generation_config.json", max_new_tokens=3, do_sample=False)
    got = dsopt.load(tmp_path)
    assert got.generation_config.max_new_tokens == 3
    assert got.generate(torch.arange(4)[None]).shape == (1, 7)


def test_linked_files_as_in_the_cache_of_the_hub(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    random_model().save_pretrained(tmp_path / "blobs", max_shard_size="100KB")
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    assert_same(dsopt.load(tmp_path / "snapshot"), dsopt.load(tmp_path / "blobs"))


def test_nothing_is_shared_with_the_files(tmp_path):
    random_model().save_pretrained(tmp_path)
    got = dsopt.load(tmp_path)
    before = {name: t.clone() for name, t in got.state_dict().items()}
    path = tmp_path / "model.safetensors"
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(path.stat().st_size // 2))
    assert all(torch.equal(t, before[name]) for name, t in got.state_dict().items())


def test_config_code_in_the_folder_is_not_run(tmp_path):
    random_model().save_pretrained(tmp_path)
    (tmp_path / "modeling_own.py").write_text("raise SystemExit('ran')")
    classes = {"AutoConfig": "modeling_own.Config", "AutoModelForCausalLM": "modeling_own.Model"}
    change_json(tmp_path / "config.json", auto_map=classes)
    assert type(dsopt.load(tmp_path)).__name__ == "DeepseekV3ForCausalLM"
    change_json(tmp_path / "config.json", model_type="own")
    with pytest.raises(dsopt.CheckpointError, match="describes no model"):
        dsopt.load(tmp_path)

"""DeepSeek's FP8 layout: what is loaded is what is in the files, and what transformers dequantizes."""

import json

import pytest
import torch
from checkpoints import assert_same, assert_same_weights, file_of, preset, put, read_json, tensor, tensors
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import dsopt
from dsopt import trial
from dsopt.fp8 import dequantize
from dsopt.fp8.modules import FP8Experts, FP8Linear
from dsopt.models import synthetic

# multiples of 16, so that blocks of 16 are whole, as transformers demands
WHOLE = (16, 16)
RAGGED = (24, 40)


def written(folder, name="v3", block=WHOLE, layers=2, **settings):
    synthetic.write(
        folder, preset(name, layers), block=block, max_shard_size="100KB", progress=False, **settings
    )
    return folder


def dequantized(model):
    """The weights of a model under transformers' names, those in FP8 in float32."""
    state = model.state_dict()
    found = {}
    for path, module in model.named_modules():
        if not isinstance(module, FP8Linear | FP8Experts):
            continue
        for name, parameter in module.named_parameters():
            if f"{name}_scale_inv" not in module._parameters:
                continue
            scale = getattr(module, f"{name}_scale_inv")
            halves = [(parameter, scale)]
            if name == "gate_up_proj":
                halves = zip(parameter.chunk(2, 1), scale.chunk(2, 1), strict=True)
            wide = [dequantize(w, s, torch.float32, module.block) for w, s in halves]
            found[f"{path}.{name}"] = torch.cat(wide, -2)
    return {name: found.get(name, t) for name, t in state.items() if not name.endswith("_scale_inv")}


@pytest.mark.parametrize("name", ["v2-lite", "v3", "v3.2"])
@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
def test_is_what_transformers_dequantizes(tmp_path, name, scale_fmt):
    pytest.importorskip("accelerate")
    written(tmp_path, name, scale_fmt=scale_fmt)
    want = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    got = dequantized(dsopt.load(tmp_path, dtype=torch.float32))
    assert got.keys() == want.keys()
    for key in got:
        # transformers leaves wide tensors of an FP8 checkpoint in the dtype they are stored in
        assert torch.equal(got[key].to(want[key].dtype), want[key]), key
    assert want["model.layers.0.mlp.up_proj.weight"].dtype == torch.float32
    assert want["model.layers.1.mlp.experts.down_proj"].dtype == torch.float32


@pytest.mark.parametrize("block", [WHOLE, RAGGED, (128, 128)])
@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
def test_bytes_are_those_of_the_files(tmp_path, block, scale_fmt):
    files = tensors(written(tmp_path, block=block, scale_fmt=scale_fmt))
    model = dsopt.load(tmp_path)
    state = model.state_dict()
    seen = 0
    for key, stored in files.items():
        if ".experts." in key:
            path, _, rest = key.rpartition(".experts.")
            number, matrix, kind = rest.split(".")
            scale = "_scale_inv" if kind.endswith("_scale_inv") else ""
            if matrix == "down_proj":
                got = state[f"{path}.experts.down_proj{scale}"][int(number)]
            else:
                stack = state[f"{path}.experts.gate_up_proj{scale}"][int(number)]
                got = stack.chunk(2)[matrix == "up_proj"]
        else:
            got = state[key]
        assert (got.dtype, got.shape) == (stored.dtype, stored.shape), key
        assert torch.equal(got.contiguous().view(torch.uint8), stored.view(torch.uint8)), key
        seen += 1
    assert seen == len(files) > 90
    kinds = {type(m) for m in model.modules()}
    assert {FP8Linear, FP8Experts} <= kinds
    assert type(model.lm_head) is torch.nn.Linear
    assert not any(p.requires_grad for p in model.parameters() if p.dtype == torch.float8_e4m3fn)


@pytest.mark.parametrize("block", [WHOLE, RAGGED])
def test_runs_as_the_dequantized_model(tmp_path, block):
    model = dsopt.load(written(tmp_path, block=block), dtype=torch.float32)
    wide = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32).eval()
    wide.load_state_dict(dequantized(model))
    ids = torch.arange(7)[None]
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, wide(ids).logits, rtol=1e-4, atol=1e-5)
        assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 10)


def test_the_command_line_keeps_it(tmp_path):
    written(tmp_path)
    model = trial.build(trial.Request(str(tmp_path), weights=True, layers=1), lambda *told: None)
    assert isinstance(model.model.layers[0].mlp.up_proj, FP8Linear) and len(model.model.layers) == 1


def test_the_block_that_predicts_one_token_more_is_left_aside(tmp_path):
    files = tensors(written(tmp_path, mtp=True))
    extra = [key for key in files if key.startswith("model.layers.61.")]
    assert len(extra) > 50
    model = dsopt.load(tmp_path)
    assert not any(".61." in name for name in model.state_dict())
    assert model.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
@pytest.mark.parametrize("block", [WHOLE, RAGGED])
def test_saved_and_loaded_again(tmp_path, scale_fmt, block):
    model = dsopt.load(written(tmp_path / "a", "v3.2", block, scale_fmt=scale_fmt))
    dsopt.save(model, tmp_path / "b", max_shard_size="150KB")
    assert_same(dsopt.load(tmp_path / "b"), model)
    old, new = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key].view(torch.uint8), new[key].view(torch.uint8)) for key in old)
    settings = read_json(tmp_path / "b" / "config.json")["quantization_config"]
    assert settings == read_json(tmp_path / "a" / "config.json")["quantization_config"]


@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.bfloat16, torch.float16])
def test_scales_of_other_dtypes_in_one_stack(tmp_path, dtype):
    """All are float32 where one is, and as exact."""
    name = "model.layers.1.mlp.experts.5.up_proj.weight_scale_inv"
    new = torch.exp2(tensor(written(tmp_path), name).log2().round()).to(dtype)
    put(file_of(tmp_path, name), {name: new})
    experts = dsopt.load(tmp_path).model.layers[1].mlp.experts
    assert experts.gate_up_proj_scale_inv.dtype == torch.float32
    assert torch.equal(experts.gate_up_proj_scale_inv[5].chunk(2)[1], new.float())


def test_stacks_of_weights_or_of_scales_alone(tmp_path):
    """What a writer leaves that knows experts, but not their scales, or the other way round."""
    model = dsopt.load(written(tmp_path, block=RAGGED))
    single, path = tensors(tmp_path), tmp_path / "model.safetensors"
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    for is_stacked in (
        lambda name: name.endswith("_scale_inv"),
        lambda name: not name.endswith("_scale_inv"),
    ):
        mixed = {name: tensor for name, tensor in single.items() if not is_stacked(name)}
        mixed |= {name: tensor for name, tensor in state.items() if is_stacked(name)}
        assert mixed.keys() != single.keys() and mixed.keys() != state.keys()
        save_file(mixed, path, {"format": "pt"})
        assert_same(dsopt.load(tmp_path), model)


DEEPSEEK = {
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
    "ep_size": 1,
    "moe_layer_freq": 1,
    "num_nextn_predict_layers": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "rope_theta": 10000,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 32,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 128,
        "type": "yarn",
    },
}


def test_a_config_in_the_words_of_deepseek(tmp_path):
    want = dsopt.load(written(tmp_path, mtp=True))
    config = read_json(tmp_path / "config.json")
    del config["rope_parameters"], config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config | DEEPSEEK))
    got = dsopt.load(tmp_path)
    assert_same_weights(got, want)
    ids = torch.arange(6)[None]
    with torch.inference_mode():
        assert torch.equal(got(ids).logits, want(ids).logits)

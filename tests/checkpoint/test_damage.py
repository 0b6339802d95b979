"""Checkpoints that are wrong: each is one error that names tensors and files, and nothing is read into a model."""

import json
import shutil

import pytest
import torch
from checkpoints import INDEX, change_json, file_of, header_bytes, preset, put, read_json, tensor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dsopt
from dsopt.checkpoint import loading
from dsopt.models import synthetic

Q = "model.layers.0.self_attn.q_a_proj.weight"
GATE = "model.layers.1.mlp.experts.3.gate_proj.weight"
DOWN = "model.layers.1.mlp.experts.7.down_proj.weight"
NORM = "model.norm.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """DeepSeek-V3 at 2 layers in FP8, with the block of layer 61, in files of 50 KB."""
    folder = tmp_path_factory.mktemp("whole")
    settings = {"block": (16, 16), "mtp": True, "max_shard_size": "50KB", "progress": False}
    synthetic.write(folder, preset(), **settings)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "checkpoint")


@pytest.fixture(autouse=True)
def nothing_read(monkeypatch, request):
    """Fails where weights were read into a model that was then refused."""
    filled = []
    fill = loading._fill
    monkeypatch.setattr(loading, "_fill", lambda *args: (filled.append(1), fill(*args)))
    yield
    assert not filled or "model" in request.fixturenames


def refused(folder, *words) -> str:
    """The message of the error; each of the words must be in it."""
    with pytest.raises(dsopt.CheckpointError) as error:
        dsopt.load(folder)
    message = str(error.value)
    for word in (str(folder), *words):
        assert word in message, message
    return message


def problems(message: str) -> list[str]:
    return message.split("\n  ")[1:]


def replace(folder, name, new):
    put(file_of(folder, name), {name: new})


def move(folder, name, file):
    """Writes in the index that a tensor is in another file."""
    places = read_json(folder / INDEX)["weight_map"]
    change_json(folder / INDEX, weight_map=places | {name: file})


def test_the_whole_one_loads(whole, monkeypatch):
    monkeypatch.undo()
    assert dsopt.load(whole).model.layers[1].mlp.experts.num_experts == 8


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated(folder, keep):
    path = file_of(folder, Q)
    path.write_bytes(path.read_bytes()[:keep])
    assert len(problems(refused(folder, path.name))) == 1


def test_longer_than_its_header_says(folder):
    path = file_of(folder, Q)
    path.write_bytes(path.read_bytes() + b"more")
    refused(folder, path.name)


def test_no_safetensors(folder):
    path = file_of(folder, Q)
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    refused(folder, path.name)


def test_missing_shard(folder):
    path = file_of(folder, Q)
    path.unlink()
    assert problems(refused(folder)) == [f"{path.name}: there is no such file"]


def test_a_folder_in_the_place_of_a_shard(folder):
    path = file_of(folder, Q)
    path.unlink()
    path.mkdir()
    refused(folder, path.name)


@pytest.mark.parametrize("name", [Q, GATE, DOWN, NORM, BIAS, f"{Q}_scale_inv", f"{GATE}_scale_inv"])
def test_missing(folder, name):
    replace(folder, name, None)
    places = read_json(folder / INDEX)["weight_map"]
    file = places.pop(name)
    message = refused(folder, name, file)
    assert len(problems(message)) == 2
    change_json(folder / INDEX, weight_map=places)
    assert problems(refused(folder)) == [f"{name}: missing"]


@pytest.mark.parametrize("name", [Q.replace("weight", "extra"), GATE.replace("3", "8")])
def test_unexpected(folder, name):
    path = file_of(folder, Q)
    put(path, {name: torch.ones(2, 2)})
    refused(folder, name, path.name, "not in the model", f"not in {INDEX}")
    move(folder, name, path.name)
    assert problems(refused(folder)) == [f"{name}: in {path.name}, but not in the model"]


@pytest.mark.parametrize("name", [Q, GATE, DOWN, NORM, BIAS, f"{Q}_scale_inv", f"{DOWN}_scale_inv"])
@pytest.mark.parametrize("change", [lambda t: t[1:], lambda t: t[..., None], lambda t: torch.cat((t, t))])
def test_misshapen(folder, name, change):
    old = tensor(folder, name)
    new = change(old).contiguous()
    replace(folder, name, new)
    message = refused(
        folder, name, file_of(folder, name).name, f"shape {list(new.shape)}, not {list(old.shape)}"
    )
    assert len(problems(message)) == 1


@pytest.mark.parametrize(
    "name, dtype, words",
    [
        (Q, torch.bfloat16, "dtype BF16, not F8_E4M3"),
        (GATE, torch.float32, "dtype F32, not F8_E4M3"),
        (DOWN, torch.uint8, "dtype U8, not F8_E4M3"),
        (Q, torch.float8_e5m2, "dtype F8_E5M2, not F8_E4M3"),
        (NORM, torch.int64, "dtype I64, not F64 or F32 or F16 or BF16"),
        (NORM, torch.complex64, "dtype C64, not"),
        (f"{Q}_scale_inv", torch.float8_e4m3fn, "dtype F8_E4M3, not F32 or BF16 or F16 or F8_E8M0"),
        (f"{GATE}_scale_inv", torch.int32, "dtype I32, not"),
        ("lm_head.weight", torch.float8_e4m3fn, "lm_head.weight_scale_inv: missing"),
        (
            "model.embed_tokens.weight",
            torch.float8_e4m3fn,
            "model.embed_tokens: is in FP8, which Embedding cannot be",
        ),
    ],
)
def test_wrong_dtype(folder, name, dtype, words):
    replace(folder, name, tensor(folder, name).float().to(dtype))
    refused(folder, name.removesuffix(".weight"), words)


@pytest.mark.parametrize("block", [[128, 128], [16, 32], [8, 16]])
def test_wrong_block_size(folder, block):
    settings = read_json(folder / "config.json")["quantization_config"]
    change_json(folder / "config.json", quantization_config=settings | {"weight_block_size": block})
    message = refused(folder, f"{Q}_scale_inv", "shape")
    assert len(problems(message)) == 21 and problems(message)[-1].endswith("more")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"weight_block_size": [128]}, "weight_block_size must be two numbers above 0, got [128]"),
        ({"weight_block_size": [0, 128]}, "weight_block_size"),
        ({"weight_block_size": [16.0, 16]}, "weight_block_size"),
        ({"weight_block_size": "16x16"}, "weight_block_size"),
        ({"weight_block_size": None}, "weight_block_size"),
        ({"quant_method": "gptq"}, "quant_method must be 'fp8', got 'gptq'"),
        ({"fmt": "e5m2"}, "fmt must be 'e4m3', got 'e5m2'"),
        ({"scale_fmt": "int8"}, "scale_fmt must be 'float' or 'ue8m0', got 'int8'"),
        ({"activation_scheme": "static"}, "activation_scheme must be 'dynamic', got 'static'"),
    ],
)
def test_quantization_config(folder, changes, words):
    settings = read_json(folder / "config.json")["quantization_config"]
    change_json(folder / "config.json", quantization_config=settings | changes)
    assert len(problems(refused(folder, words))) == 1


def test_no_quantization_config(folder):
    config = read_json(folder / "config.json")
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "no quantization_config, but", "are in FP8")


@pytest.mark.parametrize("name", [Q, GATE, DOWN])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -1.0])
def test_scale_of_no_use(folder, name, value):
    scale = tensor(folder, f"{name}_scale_inv")
    scale[-1, 1] = value
    replace(folder, f"{name}_scale_inv", scale)
    message = refused(
        folder, f"{name}_scale_inv", file_of(folder, name).name, f"{value} at [{len(scale) - 1}, 1]"
    )
    assert len(problems(message)) == 1


def test_nan_among_powers_of_two(folder):
    scale = tensor(folder, f"{Q}_scale_inv")
    powers = torch.full(scale.shape, 120, dtype=torch.uint8)
    powers[0, 0] = 255
    replace(folder, f"{Q}_scale_inv", powers.view(torch.float8_e8m0fnu))
    refused(folder, f"{Q}_scale_inv", "nan at [0, 0]")


def test_swapped_scales(folder):
    names = [f"{name}_scale_inv" for name in (GATE, DOWN)]
    first, second = (tensor(folder, name) for name in names)
    replace(folder, names[0], second)
    replace(folder, names[1], first)
    message = refused(folder, *names)
    assert len(problems(message)) == 2


def test_in_two_files(folder):
    first, second = file_of(folder, Q), file_of(folder, DOWN)
    assert first != second
    put(second, {Q: tensor(folder, Q)})
    assert problems(refused(folder)) == [f"{Q}: in both {first.name} and {second.name}"]


def test_twice_in_one_file(folder):
    path = file_of(folder, NORM)
    data, length = path.read_bytes(), header_bytes(path)
    header = data[8:length].decode().rstrip()
    entry = json.dumps(json.loads(header)[NORM], separators=(",", ":"))
    header = f'{header[:-1]},"{NORM}":{entry}}}'.encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[length:])
    refused(folder, path.name, f"'{NORM}' is there 2 times")


def test_the_index_names_the_wrong_file(folder):
    right, wrong = file_of(folder, Q).name, file_of(folder, DOWN).name
    move(folder, Q, wrong)
    message = refused(folder, Q, wrong, INDEX)
    assert right != wrong and len(problems(message)) == 1


@pytest.mark.parametrize(
    "file",
    [
        "../model.safetensors",
        "a/../../model.safetensors",
        "/etc/model.safetensors",
        "C:\\model.safetensors",
        "..\\model.safetensors",
        "\\\\host\\share\\model.safetensors",
        "model.bin",
        "config.json",
        "nul\0.safetensors",
        "",
        7,
        None,
        ["model.safetensors"],
    ],
)
def test_names_of_files_that_are_none(folder, file, whole):
    # what lies outside would serve, if it were read
    shutil.copy(file_of(whole, Q), folder.parent / "model.safetensors")
    move(folder, Q, file)
    assert len(problems(refused(folder, INDEX, repr(file)))) == 1


NO_INDEX = b"", b"{", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {}}', b"[" * 10000, b"\xff"


@pytest.mark.parametrize("text", NO_INDEX, ids=range(len(NO_INDEX)))
def test_no_index(folder, text):
    (folder / INDEX).write_bytes(text)
    refused(folder, "missing" if text == b'{"weight_map": {}}' else INDEX)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model_type": "nothing"}', '{"model_type": "bert"}'])
def test_no_config(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(dsopt.CheckpointError):
        dsopt.load(folder)


def test_config_of_another_geometry(folder):
    change_json(folder / "config.json", hidden_size=80, num_hidden_layers=3)
    message = refused(folder, "shape [256, 64], not [256, 80]", "model.layers.2.")
    assert "and" in problems(message)[-1]


def test_empty_folder_and_pickles(tmp_path):
    with pytest.raises(dsopt.CheckpointError, match="is no folder"):
        dsopt.load(tmp_path / "nothing")
    refused(tmp_path, "neither model.safetensors nor model.safetensors.index.json")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refused(tmp_path, "pytorch_model.bin is a pickle")


def test_both_layouts_of_one_layer(folder):
    path, name = file_of(folder, GATE), "model.layers.1.mlp.experts.down_proj"
    put(path, {name: torch.zeros(8, 64, 32).to(torch.float8_e4m3fn)})
    move(folder, name, path.name)
    message = refused(folder, f"{DOWN}: in {file_of(folder, DOWN).name}, but not in the model")
    assert len(problems(message)) == 8


def test_every_problem_is_in_one_error(folder):
    replace(folder, NORM, torch.ones(3))
    scale = tensor(folder, f"{DOWN}_scale_inv")
    replace(folder, f"{DOWN}_scale_inv", scale.fill_(float("nan")))
    file_of(folder, Q).unlink()
    message = refused(folder, NORM, f"{DOWN}_scale_inv", "no such file")
    assert len(problems(message)) == 3


QUIET = settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)


@QUIET
@given(data=st.data())
def test_any_byte_of_any_header(whole, tmp_path_factory, model, data):
    """One byte more, less or another in a header, the index or the config: an error, or a model of finite numbers."""
    folder = shutil.copytree(whole, tmp_path_factory.mktemp("fuzz") / "checkpoint")
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    content = bytearray(path.read_bytes())
    end = header_bytes(path) if path.suffix == ".safetensors" else len(content)
    at = data.draw(st.integers(0, end - 1))
    byte = data.draw(st.binary(max_size=1))
    content[at : at + data.draw(st.integers(0, 1))] = byte
    path.write_bytes(content)
    try:
        loaded = dsopt.load(folder)
    except dsopt.CheckpointError:
        return
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))


@pytest.fixture
def model():
    """Says that a test may load a model."""

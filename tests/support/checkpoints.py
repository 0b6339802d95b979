"""Small checkpoints on disk, what is in them, and how to damage them."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dsopt.models import presets

INDEX = "model.safetensors.index.json"


def preset(name: str = "v3", layers: int = 2, **changes) -> dict:
    return {**presets.tiny(presets.PRESETS[name]()), "num_hidden_layers": layers, **changes}


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def change_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(read_json(path) | changes))


def file_of(folder: Path, name: str) -> Path:
    return folder / read_json(folder / INDEX)["weight_map"][name]


def tensor(folder: Path, name: str) -> torch.Tensor:
    return load_file(file_of(folder, name))[name]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def put(path: Path, new: dict[str, torch.Tensor | None]) -> None:
    """Puts tensors in a file, in the place of others; None takes one out."""
    every = load_file(path) | new
    save_file({name: t for name, t in every.items() if t is not None}, path, {"format": "pt"})


def header_bytes(path: Path) -> int:
    with open(path, "rb") as file:
        return 8 + struct.unpack("<Q", file.read(8))[0]


def assert_same_weights(got, want) -> None:
    """Parameters, buffers and flags of two models are alike, bit for bit."""
    assert type(got) is type(want) and got.training == want.training
    for name in ("named_parameters", "named_buffers"):
        ours, theirs = (dict(getattr(model, name)(remove_duplicate=False)) for model in (got, want))
        assert ours.keys() == theirs.keys()
        for key in ours:
            a, b = ours[key], theirs[key]
            assert (a.dtype, a.shape, a.requires_grad) == (b.dtype, b.shape, b.requires_grad), key
            assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)), key


def assert_same(got, want) -> None:
    """And so are their configs, but for where they are from."""
    assert_same_weights(got, want)
    for name in ("config", "generation_config"):
        ours, theirs = (getattr(model, name).to_dict() for model in (got, want))
        assert ours | {"_name_or_path": ""} == theirs | {"_name_or_path": ""}

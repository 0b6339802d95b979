"""Writes a checkpoint's folder: tensors in safetensors files with an index, as transformers lays them out."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from dsopt.checkpoint.files import DTYPES, INDEX
from dsopt.files import write_text

CODES = {dtype: code for code, dtype in DTYPES.items()}
STRIP = 4 << 20


@dataclass(frozen=True)
class Spec:
    """What a file's header says of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def shards(specs: Mapping[str, Spec], max_shard_size: int | str) -> dict[str, list[str]]:
    """name of a file -> names of its tensors, in the order given, by transformers' own rule.

    max_shard_size: bytes, or a number with a unit of powers of ten, such as "5GB".
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    return split_state_dict_into_shards_factory(
        dict(specs),
        get_storage_size=lambda spec: spec.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    ).filename_to_tensors


def write_shard(
    path: Path,
    specs: Mapping[str, Spec],
    tensor_of: Callable[[str], torch.Tensor],
    advance: Callable[[int], None] = lambda count: None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes one safetensors file, which is there once it is whole.

    tensor_of: asked for each tensor in turn, which is dropped once it is written. Raises ValueError if its shape or
    dtype is not that of its spec. advance: called with numbers of bytes written. metadata: goes into the header.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(_header(specs, metadata))
            for name in _order(specs):
                tensor = tensor_of(name).detach()
                if (tuple(tensor.shape), tensor.dtype) != (tuple(specs[name].shape), specs[name].dtype):
                    raise ValueError(f"{name}: {tensor.dtype} {list(tensor.shape)} is not {specs[name]}")
                _write(file, tensor, advance)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def is_written(path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str] | None = None) -> bool:
    """Whether a file is one that `write_shard` made of these specs and metadata."""
    header = _header(specs, metadata)
    size = len(header) + sum(spec.nbytes for spec in specs.values())
    if not path.is_file() or path.stat().st_size != size:
        return False
    with open(path, "rb") as file:
        return file.read(len(header)) == header


def _order(specs: Mapping[str, Spec]) -> list[str]:
    """The names in a file's order: the widest first, so that each tensor is aligned to its elements."""
    return sorted(specs, key=lambda name: -specs[name].dtype.itemsize)


def _header(specs: Mapping[str, Spec], metadata: Mapping[str, str] | None) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name in _order(specs):
        spec = specs[name]
        end = offset + spec.nbytes
        header[name] = {"dtype": CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write(file, tensor: torch.Tensor, advance: Callable[[int], None]) -> None:
    # a tensor on another device, or one that is not contiguous, is copied row by row of its first axis
    rows = tensor.reshape(1) if tensor.ndim == 0 else tensor
    step = max(1, STRIP // max(1, rows[:1].nbytes))
    for start in range(0, len(rows), step):
        strip = rows[start : start + step].cpu().contiguous()
        advance(file.write(strip.view(-1).view(torch.uint8).numpy().data))


def write_index(folder: Path, files: Mapping[str, list[str]], specs: Mapping[str, Spec]) -> None:
    """Writes the index, where there is more than one file."""
    if len(files) > 1:
        places = {name: file for file, names in files.items() for name in names}
        total = sum(spec.nbytes for spec in specs.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")

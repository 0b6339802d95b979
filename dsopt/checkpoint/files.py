"""The safetensors files of a checkpoint: which there are, what they hold and where.

Only headers are read here. A file is eight bytes with the length of a JSON object, that object, which has dtype, shape
and offsets of each tensor, and the tensors' bytes.
"""

from __future__ import annotations

import json
import re
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch

from dsopt.checkpoint.problems import Problems

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# what safetensors calls the dtypes that PyTorch computes with
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file. file: its name within the folder; dtype: in the format's words; start, end: its bytes."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Files:
    """What a checkpoint holds. unreadable: names that the index places in files that cannot be read."""

    tensors: dict[str, Stored]
    unreadable: frozenset[str] = frozenset()

    @property
    def names(self) -> set[str]:
        return {*self.tensors, *self.unreadable}

    def of_layers(self, count: int) -> Files:
        """Without the tensors of layers behind the first so many."""

        def is_kept(name: str) -> bool:
            layer = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
            return layer is None or int(layer[1]) < count

        kept = {name: stored for name, stored in self.tensors.items() if is_kept(name)}
        return Files(kept, frozenset(filter(is_kept, self.unreadable)))


def read(folder: Path, problems: Problems) -> Files:
    """The tensors of all files of a checkpoint. What is wrong goes to `problems`.

    `model.safetensors` comes before an index, as in transformers. Files that the index names lie in the folder or
    below it; links are followed, because the cache of Hugging Face's hub is made of them.
    """
    if (folder / SINGLE).exists():
        return Files(_read_header(folder, SINGLE, problems) or {})
    if (folder / INDEX).exists():
        return _read_shards(folder, _read_index(folder, problems), problems)
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    hint = f"; {pickled[0]} is a pickle, which dsopt does not read" if pickled else ""
    problems.add(f"there is neither {SINGLE} nor {INDEX}{hint}")
    return Files({})


def _read_shards(folder: Path, places: dict[str, str | None], problems: Problems) -> Files:
    """The tensors of the files that an index names, each in the file where the index places it."""
    files = sorted({file for file in places.values() if file is not None})
    headers = {file: _read_header(folder, file, problems) for file in files}
    tensors: dict[str, Stored] = {}
    for file, header in headers.items():
        for name, stored in (header or {}).items():
            if name in tensors:
                problems.add(f"{name}: in both {tensors[name].file} and {file}")
            elif name not in places:
                problems.add(f"{name}: in {file}, but not in {INDEX}")
            tensors[name] = stored
    unreadable = set()
    for name, file in places.items():
        if headers.get(file) is None:
            unreadable.add(name)
        elif name not in headers[file]:
            problems.add(f"{name}: not in {file}, where {INDEX} places it")
    return Files(tensors, frozenset(unreadable))


def _read_index(folder: Path, problems: Problems) -> dict[str, str | None]:
    """name of a tensor -> name of its file, None for what is no name of a file in the folder."""
    try:
        places = json.loads((folder / INDEX).read_text(encoding="utf-8"), object_pairs_hook=_object)
        places = places["weight_map"]
        if not isinstance(places, dict):
            raise TypeError("weight_map is no object")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        problems.add(f"{INDEX}: no JSON object with a weight_map: {error}")
        return {}
    for file, count in Counter(repr(file) for file in places.values() if not _is_inside(file)).items():
        problems.add(f"{INDEX}: {file} (of {count} tensors) is no name of a safetensors file in the folder")
    return {name: file if _is_inside(file) else None for name, file in places.items()}


def _is_inside(file: object) -> bool:
    """Whether what an index says is the name of a safetensors file in the folder or below it, on any system."""
    if not isinstance(file, str) or not file.endswith(".safetensors") or "\0" in file:
        return False
    paths = PurePosixPath(file), PureWindowsPath(file)
    return not any(path.anchor or ".." in path.parts for path in paths)


def _read_header(folder: Path, file: str, problems: Problems) -> dict[str, Stored] | None:
    """The tensors of a file by name; None, and a problem, if it cannot be read."""
    from safetensors import SafetensorError, safe_open

    path = folder / file
    try:
        if not path.is_file():
            raise OSError("there is no such file")
        # the library compares shapes, offsets and the length of the file, but does not tell the offsets
        with safe_open(path, framework="pt"):
            pass
        with open(path, "rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(length), object_pairs_hook=_object)
    except (OSError, SafetensorError, ValueError) as error:
        problems.add(f"{file}: {error}")
        return None
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        tensors[name] = Stored(file, entry["dtype"], tuple(entry["shape"]), start, end)
    return tensors


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object, in which a name that comes twice is an error."""
    found = dict(pairs)
    if len(found) < len(pairs):
        name, count = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{name!r} is there {count} times")
    return found

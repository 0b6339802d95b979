"""Whether what a checkpoint holds is what its model needs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from dsopt.checkpoint.files import DTYPES, Files, Stored
from dsopt.checkpoint.layout import SCALE, Part
from dsopt.checkpoint.mapped import Mapped
from dsopt.checkpoint.problems import Problems

WIDE = ("F64", "F32", "F16", "BF16")
# buffers that transformers computes, and that older checkpoints hold
COMPUTED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
SCALES = ("F32", "BF16", "F16", "F8_E8M0")


def check(
    model: torch.nn.Module,
    targets: Mapping[str, torch.Tensor],
    parts: Mapping[str, Part],
    files: Files,
    problems: Problems,
) -> dict[str, Stored]:
    """The tensors to read, by their names in the checkpoint.

    targets: the model's tensors. parts: what it needs, by the names that the checkpoint has or would have for it.
    What is missing, unexpected, of another shape or dtype goes to `problems`.
    """
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    ignored = _matcher(model._keys_to_ignore_on_load_missing)
    for key in parts:
        if not (key in files.tensors or key in files.unreadable or key in tied or ignored(key)):
            problems.add(f"{key}: missing")
    for target, source in model.all_tied_weights_keys.items():
        if not {target, source} & {*files.tensors, *files.unreadable}:
            problems.add(f"{source}: missing, and so is {target}, which is tied to it")
    ignored = _matcher({*(model._keys_to_ignore_on_load_unexpected or ()), *COMPUTED})
    found = {}
    for key, stored in files.tensors.items():
        if key in parts:
            found[key] = stored
            _check_one(key, stored, parts[key], targets[parts[key].name].dtype, problems)
        elif not ignored(key):
            problems.add(f"{key}: in {stored.file}, but not in the model")
    return found


def _matcher(patterns: Iterable[str] | None) -> Callable[[str], bool]:
    """Whether a name has a match of any of a model's patterns."""
    pattern = re.compile("|".join(f"({pattern})" for pattern in patterns)) if patterns else None
    return lambda name: pattern is not None and pattern.search(name) is not None


def _check_one(key: str, stored: Stored, part: Part, dtype: torch.dtype, problems: Problems) -> None:
    if key.endswith(SCALE):
        allowed = SCALES
    elif dtype.is_floating_point and dtype.itemsize > 1:
        allowed = WIDE
    else:
        allowed = tuple(code for code, known in DTYPES.items() if known == dtype)
    where = f"{key} in {stored.file}"
    if stored.dtype not in allowed:
        problems.add(f"{where}: dtype {stored.dtype}, not {' or '.join(allowed)}")
    if stored.shape != part.shape:
        problems.add(f"{where}: shape {list(stored.shape)}, not {list(part.shape)}")


def check_scales(folder: Path, found: Mapping[str, Stored], problems: Problems) -> None:
    """Reads every scale: each must be finite and not negative."""
    by_file: dict[str, list[str]] = {}
    for key, stored in found.items():
        if key.endswith(SCALE) and stored.dtype in SCALES:
            by_file.setdefault(stored.file, []).append(key)
    for file, keys in by_file.items():
        mapped = Mapped(folder / file, "random")
        for key in sorted(keys, key=lambda key: found[key].start):
            scale = mapped.read(found[key]).float()
            wrong = ~torch.isfinite(scale) | (scale < 0)
            if wrong.any():
                at = wrong.nonzero()[0].tolist()
                value = scale[tuple(at)].item()
                problems.add(f"{key} in {file}: {int(wrong.sum())} scales of no use, such as {value} at {at}")

"""`dsopt.save`: a model as a checkpoint that transformers and `dsopt.load` read."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dsopt.checkpoint import layout
from dsopt.checkpoint.quantization import settings_for
from dsopt.checkpoint.writer import Spec, shards, write_index, write_shard
from dsopt.files import new_folder
from dsopt.fp8.modules import FP8Experts, FP8Linear
from dsopt.progress import Bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# what an older checkpoint's folder must not leave beside the new weights
WEIGHTS = ("*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "config.json", "generation_config.json")


def save(
    model: PreTrainedModel,
    path: str | Path,
    *,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    progress: bool = True,
) -> None:
    """Writes a model to a folder that transformers and `dsopt.load` read: config, weights, index.

    Weights keep their dtypes: what `dsopt.load` reads again is the same, bit for bit. FP8 weights and scales are
    written in DeepSeek-V3's layout, with `quantization_config`; experts one by one, where transformers has them so for
    the model's family. Of tied weights one is written.

    max_shard_size: of a file, in bytes or as in "5GB". overwrite: replaces a checkpoint that is there; its other
    files, such as a tokenizer's, are kept. progress: a bar on standard error, if that is a terminal.

    The folder is written under a temporary name and renamed, so that it is either whole or as it was; tensors are
    written where they lie, without copies. Raises FileExistsError if the folder is there, TypeError for what is no
    model of transformers, ValueError for weights without values or blocks of several sizes, OSError if the disk is
    too small.
    """
    from transformers import PreTrainedModel

    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a model of transformers, got {type(model).__name__}")
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} is there already; overwrite=True replaces it")
    if path.exists() and not (path / "config.json").is_file():
        raise FileExistsError(f"{path} is no checkpoint, and is not overwritten")
    tensors = _tensors(model)
    specs = {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    files = shards(specs, max_shard_size)
    total = sum(spec.nbytes for spec in specs.values())
    with new_folder(path, overwrite) as folder:
        if (free := shutil.disk_usage(folder).free) < total:
            raise OSError(f"{path} takes {total / 1e9:.1f} GB, and {free / 1e9:.1f} GB of the disk are free")
        if path.exists():
            shutil.copytree(path, folder, ignore=shutil.ignore_patterns(*WEIGHTS), dirs_exist_ok=True)
        _write_configs(model, folder)
        with Bytes(f"saving {path.name}", total, progress) as bar:
            for file, names in files.items():
                part = {name: specs[name] for name in names}
                write_shard(folder / file, part, tensors.__getitem__, bar.advance)
        write_index(folder, files, specs)


def _tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """name in the checkpoint -> a tensor of the model or a view of it; of tied weights only the first."""
    state = model.state_dict()
    for target, source in model.all_tied_weights_keys.items():
        if target in state and source in state and state[target].data_ptr() == state[source].data_ptr():
            del state[target]
    if empty := [name for name, tensor in state.items() if tensor.is_meta]:
        raise ValueError(
            f"the model has no values for {', '.join(empty[:3])} and {len(empty)} tensors in all"
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    parts = layout.parts(shapes, layout.published_singly(model))
    return {key: part.of(state[part.name]) for key, part in parts.items()}


def _write_configs(model: PreTrainedModel, folder: Path) -> None:
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    if (settings := _quantization(model)) is not None:
        config.quantization_config = settings
    elif hasattr(config, "quantization_config"):
        del config.quantization_config
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _quantization(model: PreTrainedModel) -> dict[str, Any] | None:
    """The `quantization_config` of a model; None if nothing in it is in FP8. Raises ValueError for several blocks."""
    quantized = {n: m for n, m in model.named_modules() if isinstance(m, FP8Linear | FP8Experts)}
    if not quantized:
        return None
    blocks = {module.block for module in quantized.values()}
    if len(blocks) > 1:
        raise ValueError(
            f"a checkpoint has one weight_block_size, but the model's modules have {sorted(blocks)}"
        )
    scales = {
        p.dtype for m in quantized.values() for n, p in m.named_parameters() if n.endswith(layout.SCALE)
    }
    settings = dict(getattr(model.config, "quantization_config", None) or {})
    if scales == {torch.float8_e8m0fnu}:
        settings["scale_fmt"] = "ue8m0"
    return settings | settings_for(blocks.pop(), settings.get("scale_fmt"), _wide(model))


def _wide(model: PreTrainedModel) -> list[str]:
    """The modules that a reader of the `quantization_config` would take to be in FP8, but are not."""
    # routers are no linear layers in transformers, and these it leaves alone by itself
    kept = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
    head = model.get_output_embeddings()
    wide, heads = [], []
    for name, module in model.named_modules():
        stack = name.endswith(".experts") and not isinstance(module, FP8Experts | torch.nn.ModuleList)
        if module is head:
            heads.append(name)
        elif (stack or isinstance(module, torch.nn.Linear)) and not any(pattern in name for pattern in kept):
            wide.append(name)
    return sorted(wide + heads) if wide else []

"""`dsopt.load`: a checkpoint of transformers into transformers' model, FP8 kept as it is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dsopt import machine
from dsopt.checkpoint import files as checkpoint_files
from dsopt.checkpoint import layout
from dsopt.checkpoint.check import check, check_scales
from dsopt.checkpoint.files import Stored
from dsopt.checkpoint.fp8_modules import install
from dsopt.checkpoint.layout import Part
from dsopt.checkpoint.mapped import Mapped
from dsopt.checkpoint.problems import CheckpointError, Problems
from dsopt.checkpoint.quantization import block_of
from dsopt.progress import Bytes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def load(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    layers: int | None = None,
    progress: bool = True,
) -> PreTrainedModel:
    """A checkpoint in a local folder as transformers' causal language model, in eval mode; FP8 stays FP8.

    The folder has a config.json and safetensors files, as transformers and DeepSeek publish them: one file, or several
    with an index; wide (float32, bfloat16, float16) or FP8 in blocks, `quantization_config` in DeepSeek-V3's words;
    experts one by one (`mlp.experts.E.gate_proj.weight`) or in transformers' stacks. Experts are stacked. An FP8
    weight w[i, j] = weight[i, j] * weight_scale_inv[i // rows, j // columns] is kept with its scales, bit for bit, in
    an `FP8Linear` or `FP8Experts`. Everything else is what `from_pretrained` makes of it: rounded to dtype, correction
    biases in float32, tied weights tied, names that the model's class leaves aside left aside (the block behind
    DeepSeek-V3's last layer that predicts one token more).

    dtype: of wide weights. device: where weights go, one by one. layers: at most the first so many layers, for a look
    at a model that is too large; what belongs to others is neither checked nor read. progress: a bar on standard error,
    if that is a terminal.

    Files are read through memory maps, a strip at a time, so that memory holds little more than the model. No code of
    the folder is run, no pickle read, nothing downloaded. Files that the index names lie within the folder; links are
    followed.

    Raises CheckpointError, one for all that is wrong (files that are missing, truncated or damaged, tensors that are
    missing, unexpected, in two files, of another shape or dtype, scales that are not finite or below zero, settings
    that are not supported) before any weight is read; ValueError for another dtype or fewer layers than 1;
    MemoryError for more than the machine has.
    """
    folder, device = Path(path), torch.device(device)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    if layers is not None and layers < 1:
        raise ValueError(f"layers must be at least 1, got {layers}")
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is no folder; dsopt.load reads local checkpoints and downloads nothing"
        )
    problems = Problems(folder)
    files = checkpoint_files.read(folder, problems)
    if not files.tensors:
        problems.raise_any()
    if layers is not None:
        files = files.of_layers(layers)
    model = _build(folder, dtype, layers)
    install(model, files.tensors, block_of(model.config, problems), problems)
    targets = model.state_dict(keep_vars=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in targets.items()}
    parts = layout.parts(shapes, layout.stored_singly(files.names))
    found = check(model, targets, parts, files, problems)
    check_scales(folder, found, problems)
    problems.raise_any()
    if device.type == "cpu":
        _check_memory(targets[name] for name in {parts[key].name for key in found})
    _fill(model, folder, found, parts, device, progress)
    _finish(model, targets.keys() - {parts[key].name for key in found}, device)
    return model


def _build(folder: Path, dtype: torch.dtype, layers: int | None) -> PreTrainedModel:
    """The model that a folder's config.json describes, on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if layers is not None:
            _shorten(config, layers)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        if model.can_generate():
            own = (folder / "generation_config.json").exists()
            source = {} if own else {"config_file_name": "config.json", "_from_model_config": True}
            model.generation_config = GenerationConfig.from_pretrained(
                folder, local_files_only=True, **source
            )
    except Exception as error:
        # what a config says wrongly, transformers finds in one of many ways
        raise CheckpointError(f"{folder}: its config describes no model: {error}") from error
    for pattern, kept in model._get_dtype_plan(dtype).items():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if re.search(pattern.replace("*", ".*"), name):
                _put(model, name, tensor.detach().to(kept))
    return model


def _shorten(config: PreTrainedConfig, layers: int) -> None:
    """Makes a config one of at most so many layers."""
    config.num_hidden_layers = min(layers, config.num_hidden_layers)
    for name in ("layer_types", "mlp_layer_types"):
        if (types := getattr(config, name, None)) is not None:
            setattr(config, name, types[:layers])


def _put(model: PreTrainedModel, name: str, tensor: torch.Tensor) -> None:
    """Makes a tensor what a parameter or buffer of the model is from now on."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if (old := module._parameters.get(leaf)) is not None:
        tensor = torch.nn.Parameter(tensor, requires_grad=old.requires_grad)
    # transformers initializes what has no such mark
    tensor._is_hf_initialized = True
    setattr(module, leaf, tensor)


def _check_memory(targets: Iterable[torch.Tensor]) -> None:
    """Raises MemoryError for more than this machine has in all; what is free now may be a cache that makes room."""
    size, total = sum(tensor.nbytes for tensor in targets), machine.memory()["total"]
    if total is not None and size > total:
        raise MemoryError(
            f"the weights take {size / 2**30:.1f} GiB, and this machine has {total / 2**30:.1f} GiB; "
            "layers=N loads the first N layers only"
        )


def _fill(
    model: PreTrainedModel,
    folder: Path,
    found: Mapping[str, Stored],
    parts: Mapping[str, Part],
    device: torch.device,
    progress: bool,
) -> None:
    """Reads the weights, file by file in the order they lie there."""
    targets = model.state_dict(keep_vars=True)
    new: dict[str, torch.Tensor] = {}
    total = sum(stored.end - stored.start for stored in found.values())
    mapped, file = None, None
    with Bytes(f"loading {folder.name}", total, progress) as bar:
        for key in sorted(found, key=lambda key: (found[key].file, found[key].start)):
            stored, part = found[key], parts[key]
            if stored.file != file:
                mapped, file = Mapped(folder / stored.file), stored.file
            if part.name not in new:
                new[part.name] = torch.empty_like(targets[part.name], device=device, requires_grad=False)
            mapped.copy(stored, part.of(new[part.name]), bar.advance)
    for name, tensor in new.items():
        _put(model, name, tensor)


@torch.no_grad()
def _finish(model: PreTrainedModel, missing: set[str], device: torch.device) -> None:
    """What a checkpoint does not hold: tied weights, and computed buffers such as rotary frequencies."""
    computed = dict(model.named_non_persistent_buffers())
    for name in missing - model.all_tied_weights_keys.keys():
        computed[name] = model.get_parameter_or_buffer(name)
    for module in model.modules():
        module._is_hf_initialized = True
    for name, tensor in computed.items():
        _put(model, name, torch.zeros_like(tensor, device=device))
        model.get_parameter_or_buffer(name)._is_hf_initialized = False
        model.get_submodule(name.rpartition(".")[0])._is_hf_initialized = False
    model.initialize_weights()
    model.tie_weights(missing_keys=set(missing), recompute_mapping=False)
    model.eval()

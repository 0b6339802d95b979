"""A checkpoint with random weights as DeepSeek publishes V3: FP8 in blocks of 128x128, each expert on its own.

`python -m dsopt.models.synthetic v2-lite FOLDER` writes 16 GB, file by file, and goes on where it was interrupted.
"""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from dsopt import terminal
from dsopt.checkpoint import layout
from dsopt.checkpoint.quantization import settings_for
from dsopt.checkpoint.writer import Spec, is_written, shards, write_index, write_shard
from dsopt.models import presets
from dsopt.progress import Bytes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

STD = 0.02
# the largest of 128x128 normal numbers is near 4.2 standard deviations, and becomes e4m3's largest number
SCALE = STD * 4.2 / 448
SCALE_DTYPES = {None: torch.float32, "ue8m0": torch.float8_e8m0fnu}
# the block behind V3's last layer that predicts one token more; transformers leaves it aside
MTP = "model.layers.61"


def write(
    folder: str | Path,
    preset: dict[str, Any],
    *,
    block: tuple[int, int] = (128, 128),
    scale_fmt: str | None = None,
    mtp: bool = False,
    max_shard_size: int | str = "5GB",
    seed: int = 0,
    progress: bool = True,
) -> int:
    """Writes the checkpoint of a preset of `dsopt.models.presets`; returns the bytes of its weights.

    Linear layers and experts are float8_e4m3fn with a `weight_scale_inv`, correction biases float32, the rest
    bfloat16. Weights times scales are near N(0, 0.02), norms 1. Takes the memory of the largest tensor. Files that
    an earlier call has finished are kept.

    block: (rows, columns) that share a scale. scale_fmt: "ue8m0" for powers of two in float8_e8m0fnu, None for
    float32. mtp: with the block of layer 61 that V3 and R1 carry. Raises ValueError for a folder with other weights,
    OSError if the disk has too little room.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    folder, config = Path(folder), presets.config(preset)
    specs = dict(_specs(config, block, SCALE_DTYPES[scale_fmt], mtp))
    files = {
        file: {name: specs[name] for name in names} for file, names in shards(specs, max_shard_size).items()
    }
    if others := [path.name for path in folder.glob("*.safetensors") if path.name not in files]:
        raise ValueError(f"{folder} holds other weights, such as {others[0]}")
    metadata = {"seed": str(seed)}
    done = {file for file, part in files.items() if is_written(folder / file, part, metadata)}
    folder.mkdir(parents=True, exist_ok=True)
    need = sum(_bytes(part) for file, part in files.items() if file not in done)
    if need > (free := shutil.disk_usage(folder).free):
        raise OSError(f"{need / 1e9:.1f} GB are to be written to {folder}, and {free / 1e9:.1f} GB are free")
    make = _Maker(seed)
    with Bytes(f"writing {folder.name}", _bytes(specs), progress) as bar:
        for file, part in files.items():
            if file in done:
                bar.advance(_bytes(part))
            else:
                write_shard(folder / file, part, lambda name: make(name, specs[name]), bar.advance, metadata)
    config.quantization_config = settings_for(block, scale_fmt, [])
    config.dtype = torch.bfloat16
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]
    config.save_pretrained(folder)
    write_index(folder, files, specs)
    return _bytes(specs)


def _bytes(specs: dict[str, Spec]) -> int:
    return sum(spec.nbytes for spec in specs.values())


def _specs(
    config: PreTrainedConfig, block: tuple[int, int], scale_dtype: torch.dtype, mtp: bool
) -> Iterator[tuple[str, Spec]]:
    """Names, shapes and dtypes of a checkpoint's tensors, each weight before its scale."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    quantized = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not name.endswith(("lm_head", "weights_proj"))
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    parts = layout.parts(shapes, layout.published_singly(model))
    last = f"model.layers.{config.num_hidden_layers - 1}."
    if mtp:
        parts |= {
            f"{MTP}.{key.removeprefix(last)}": part for key, part in parts.items() if key.startswith(last)
        }
        quantized |= {f"{MTP}.{key.removeprefix(last)}" for key in quantized if key.startswith(last)}
        for name in ("enorm", "hnorm", "shared_head.norm"):
            yield f"{MTP}.{name}.weight", Spec((config.hidden_size,), torch.bfloat16)
        yield f"{MTP}.eh_proj.weight", Spec((config.hidden_size, 2 * config.hidden_size), torch.bfloat16)
    for key, part in parts.items():
        if key in quantized or part.expert is not None:
            yield key, Spec(part.shape, torch.float8_e4m3fn)
            scales = tuple(-(-size // step) for size, step in zip(part.shape, block, strict=True))
            yield key + layout.SCALE, Spec(scales, scale_dtype)
        else:
            wide = key.endswith("e_score_correction_bias")
            yield key, Spec(part.shape, torch.float32 if wide else torch.bfloat16)


class _Maker:
    """Makes the tensor of a name: the same one again for the same seed, whatever was made before.

    Weights repeat one random block: gigabytes then take the time of a copy, not of a random generator.
    """

    def __init__(self, seed: int):
        generator = torch.Generator().manual_seed(seed)
        normal = torch.randn(presets.BLOCK, generator=generator)
        uniform = torch.rand(presets.BLOCK, generator=generator)
        self.pools = {
            torch.float8_e4m3fn: (normal * (448 / 4.2)).clamp_(-448, 448).to(torch.float8_e4m3fn),
            torch.bfloat16: (normal * STD).bfloat16(),
            torch.float32: SCALE * (0.8 + 0.4 * uniform),
            # SCALE lies between 2**-13 and 2**-12
            torch.float8_e8m0fnu: torch.exp2((uniform > 0.5).float() - 13).to(torch.float8_e8m0fnu),
        }

    def __call__(self, name: str, spec: Spec) -> torch.Tensor:
        tensor = torch.empty(spec.shape, dtype=spec.dtype)
        if len(spec.shape) == 1 and name.endswith("norm.weight"):
            return tensor.fill_(1)
        pool, rest = self.pools[spec.dtype], tensor.view(-1)
        position = zlib.crc32(name.encode()) % len(pool)
        while rest.numel():
            count = min(rest.numel(), len(pool) - position)
            rest[:count].copy_(pool[position : position + count])
            rest, position = rest[count:], 0
        return tensor


def main(
    model: Annotated[str, typer.Argument(help=f"One of {', '.join(presets.PRESETS)}.")],
    folder: Annotated[Path, typer.Argument(help="Where to write; goes on with what is there.")],
    layers: Annotated[int | None, typer.Option(min=1, help="Number of layers, instead of all.")] = None,
    tiny: Annotated[bool, typer.Option(help="Shrink every width to a test's size.")] = False,
    ue8m0: Annotated[bool, typer.Option(help="Scales that are powers of two, as V3.1 has them.")] = False,
    mtp: Annotated[bool, typer.Option(help="With the block of layer 61 that V3 and R1 carry.")] = False,
    max_shard_size: Annotated[str, typer.Option(help="Largest size of a file.")] = "5GB",
    seed: Annotated[int, typer.Option(help="Of the random numbers.")] = 0,
) -> None:
    """Write an FP8 checkpoint with random weights in the layout of DeepSeek-V3."""
    if model not in presets.PRESETS:
        raise terminal.fail(f"unknown model {model!r}; known: {', '.join(presets.PRESETS)}")
    preset = presets.tiny(presets.PRESETS[model]()) if tiny else presets.PRESETS[model]()
    if layers is not None:
        preset["num_hidden_layers"] = layers
    settings = {"scale_fmt": "ue8m0" if ue8m0 else None, "mtp": mtp, "max_shard_size": max_shard_size}
    try:
        size = write(folder, preset, seed=seed, **settings)
    except (ValueError, OSError) as error:
        raise terminal.fail(str(error)) from error
    print(f"{folder}: {size / 1e9:.2f} GB")


if __name__ == "__main__":
    typer.run(main)

"""What a checkpoint's config.json says about quantized weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsopt.checkpoint.problems import Problems

BLOCK = (128, 128)


def block_of(config: Any, problems: Problems) -> tuple[int, int] | None:
    """(rows, columns) that share a scale, by a config's `quantization_config`; None where there is none.

    What it says beside float8_e4m3fn weights with scales by block goes to `problems`. Raises CheckpointError with all
    of them where the block is none: nothing could be compared with it.
    """
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    where = "config.json: quantization_config"
    if not isinstance(settings, Mapping):
        problems.add(f"{where}: no object")
        problems.raise_any()
    accepted = {
        "quant_method": ("fp8",),
        "fmt": (None, "e4m3"),
        "scale_fmt": (None, "float", "ue8m0"),
        "activation_scheme": (None, "dynamic"),
    }
    for name, values in accepted.items():
        if (value := settings.get(name)) not in values:
            known = " or ".join(repr(value) for value in values if value is not None)
            problems.add(f"{where}: {name} must be {known}, got {value!r}")
    block = settings.get("weight_block_size", BLOCK)
    if (
        not isinstance(block, list | tuple)
        or len(block) != 2
        or not all(isinstance(size, int) and size > 0 for size in block)
    ):
        problems.add(f"{where}: weight_block_size must be two numbers above 0, got {block!r}")
        problems.raise_any()
    return tuple(block)


def settings_for(block: tuple[int, int], scale_fmt: str | None, wide: list[str]) -> dict[str, Any]:
    """A `quantization_config` in DeepSeek's words. wide: linear layers, beside lm_head, that are not in FP8."""
    settings = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": list(block),
    }
    if scale_fmt is not None:
        settings["scale_fmt"] = scale_fmt
    if wide:
        settings["modules_to_not_convert"] = wide
    return settings

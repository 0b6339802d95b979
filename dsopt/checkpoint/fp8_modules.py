"""Puts FP8 modules where a checkpoint has FP8 weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from dsopt.checkpoint.files import Stored
from dsopt.checkpoint.layout import ONE, SCALE
from dsopt.checkpoint.problems import Problems
from dsopt.fp8 import scale_shape
from dsopt.fp8.modules import FP8Experts, FP8Linear
from dsopt.ops.experts import ACTIVATIONS


def install(
    model: nn.Module, tensors: Mapping[str, Stored], block: tuple[int, int] | None, problems: Problems
) -> None:
    """Replaces the modules of a model on the meta device whose weights are in FP8, or come with scales.

    block: (rows, columns) that share a scale; None where the config names none, which is a problem if there are any.
    """
    scales = _scales(tensors)
    if block is None:
        if scales:
            name = min(scales)
            problems.add(
                f"config.json: no quantization_config, but {len(scales)} modules such as {name} are in FP8"
            )
        return
    for path in sorted(scales):
        try:
            module = model.get_submodule(path)
        except AttributeError:
            continue
        new = _fp8(module, scales[path], block)
        if new is None:
            problems.add(f"{path}: is in FP8, which dsopt has no {type(module).__name__} for")
        else:
            model.set_submodule(path, new)


def _scales(tensors: Mapping[str, Stored]) -> dict[str, torch.dtype]:
    """path of a module with FP8 weights or scales -> the dtype of its scales: float8_e8m0fnu if all of them are."""
    wide: dict[str, bool] = {}
    for name, stored in tensors.items():
        if stored.dtype == "F8_E4M3" or name.endswith(SCALE):
            one = ONE.fullmatch(name)
            path = one["experts"] if one else name.rpartition(".")[0]
            wide[path] = wide.get(path, False) or (name.endswith(SCALE) and stored.dtype != "F8_E8M0")
    return {path: torch.float32 if is_wide else torch.float8_e8m0fnu for path, is_wide in wide.items()}


def _fp8(module: nn.Module, scale_dtype: torch.dtype, block: tuple[int, int]) -> nn.Module | None:
    """An FP8 module without values in the place of one; None where there is none that computes the same."""

    def scales(*shape: int) -> torch.Tensor:
        return torch.empty(scale_shape(shape, block), dtype=scale_dtype, device="meta")

    def weights(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float8_e4m3fn, device="meta")

    if type(module) is nn.Linear:
        shape = module.out_features, module.in_features
        return FP8Linear(weights(*shape), scales(*shape), module.bias, block=block)
    activation = _activation(module)
    if activation is None:
        return None
    experts, hidden, intermediate = module.down_proj.shape
    half = scales(experts, intermediate, hidden)
    return FP8Experts(
        weights(experts, 2 * intermediate, hidden),
        torch.cat((half, half), 1),
        weights(experts, hidden, intermediate),
        scales(experts, hidden, intermediate),
        activation=activation,
        block=block,
    )


def _activation(module: nn.Module) -> str | None:
    """The activation of stacked experts as DeepSeek-V3's are in transformers: gate above up, no biases; or None."""
    names = {name for name, _ in module.named_parameters()}
    if names != {"gate_up_proj", "down_proj"} or not hasattr(module, "_apply_gate"):
        return None
    experts, hidden, intermediate = module.down_proj.shape
    if module.gate_up_proj.shape != (experts, 2 * intermediate, hidden):
        return None
    generator = torch.Generator().manual_seed(0)
    # from numbers near 0 to those beyond what an activation may be limited to
    gate, up = (torch.randn(4, 64, generator=generator).double() * torch.logspace(-1, 2, 4)[:, None]).chunk(
        2, -1
    )
    got = module._apply_gate(torch.cat((gate, up), -1))
    for name, activation in ACTIVATIONS.items():
        if torch.allclose(got, activation(gate) * up, rtol=1e-9):
            return name
    return None

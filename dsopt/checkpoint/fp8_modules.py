"""Puts FP8 modules where a checkpoint has FP8 weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn

from dsopt.checkpoint.files import Stored
from dsopt.checkpoint.layout import ONE, SCALE
from dsopt.checkpoint.problems import Problems
from dsopt.expert_form import Refused
from dsopt.expert_tensors import Layout
from dsopt.fp8 import scale_shape
from dsopt.fp8.convert import experts_layout
from dsopt.fp8.modules import FP8Experts, FP8Linear


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
    known: dict = {}
    for path in sorted(scales):
        try:
            module = model.get_submodule(path)
        except AttributeError:
            continue
        try:
            model.set_submodule(path, _fp8(module, scales[path], block, known))
        except Refused as reason:
            problems.add(f"{path}: is in FP8, which {type(module).__name__} cannot be: {reason}")


def _scales(tensors: Mapping[str, Stored]) -> dict[str, torch.dtype]:
    """path of a module with FP8 weights or scales -> the dtype of its scales: float8_e8m0fnu if all of them are."""
    wide: dict[str, bool] = {}
    for name, stored in tensors.items():
        if stored.dtype == "F8_E4M3" or name.endswith(SCALE):
            one = ONE.fullmatch(name)
            path = one["experts"] if one else name.rpartition(".")[0]
            wide[path] = wide.get(path, False) or (name.endswith(SCALE) and stored.dtype != "F8_E8M0")
    return {path: torch.float32 if is_wide else torch.float8_e8m0fnu for path, is_wide in wide.items()}


def _fp8(module: nn.Module, scale_dtype: torch.dtype, block: tuple[int, int], known: dict) -> nn.Module:
    """An FP8 module without values in the place of one. Raises Refused if there is none that computes the same."""

    def scales(*shape: int) -> torch.Tensor:
        return torch.empty(scale_shape(shape, block), dtype=scale_dtype, device="meta")

    def weights(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float8_e4m3fn, device="meta")

    if type(module) is nn.Linear:
        shape = module.out_features, module.in_features
        return FP8Linear(weights(*shape), scales(*shape), module.bias, block=block)
    layout = _stacks(module, known)
    experts, hidden, intermediate = module.down_proj.shape
    half = scales(experts, intermediate, hidden)
    return FP8Experts(
        weights(experts, 2 * intermediate, hidden),
        torch.cat((half, half), 1),
        weights(experts, hidden, intermediate),
        scales(experts, hidden, intermediate),
        activation=layout.activation,
        limit=layout.limit,
        block=block,
    )


def _stacks(module: nn.Module, known: dict) -> Layout:
    """The layout of experts in stacks, tried on random weights. Raises Refused for any other module."""
    if set(module._parameters) != {"gate_up_proj", "down_proj"}:
        raise Refused("it is no linear layer, and has no gate_up_proj and down_proj alone")
    probe = copy.copy(module)
    # of the shapes and dtype of the real ones, in the memory of one number
    vars(probe)["_parameters"] = {
        name: nn.Parameter(torch.zeros((), dtype=p.dtype).expand(p.shape), requires_grad=False)
        for name, p in module._parameters.items()
    }
    layout = experts_layout(probe.eval(), known)
    if layout.w13 != "gate_up_proj":
        raise Refused("its gate_up_proj does not hold the rows of gate, then those of up")
    return layout

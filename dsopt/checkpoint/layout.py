"""Names of weights: a model's own, and those of checkpoints that hold each expert on its own.

DeepSeek's checkpoints have a tensor for each matrix of each expert; transformers 5 stacks them, gate above up:

    X.experts.E.gate_proj.weight            X.experts.gate_up_proj[E, :rows / 2]
    X.experts.E.up_proj.weight              X.experts.gate_up_proj[E, rows / 2:]
    X.experts.E.down_proj.weight            X.experts.down_proj[E]
    X.experts.E.gate_proj.weight_scale_inv  X.experts.gate_up_proj_scale_inv[E, :rows / 2], and so on
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

SCALE = "_scale_inv"
STACK = re.compile(r"(?P<experts>.*\.experts)\.(?P<matrix>gate_up_proj|down_proj)(?P<scale>_scale_inv)?")
ONE = re.compile(
    r"(?P<experts>.*\.experts)\.\d+\.(?P<matrix>gate_proj|up_proj|down_proj)\.weight(?P<scale>_scale_inv)?"
)


@dataclass(frozen=True)
class Part:
    """The tensor or part of a tensor of a model that one tensor of a checkpoint holds.

    name: the model's name. expert: the row of a stack, None for all. start, stop: the rows of that expert's matrix.
    """

    name: str
    shape: tuple[int, ...]
    expert: int | None = None
    start: int = 0
    stop: int = 0

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part as a view, contiguous where the tensor is."""
        return tensor if self.expert is None else tensor[self.expert, self.start : self.stop]


def parts(shapes: Mapping[str, tuple[int, ...]], single: Collection[str]) -> dict[str, Part]:
    """name in a checkpoint -> what it holds of a model, whose names and shapes are given.

    single: the stacks that the checkpoint holds expert by expert.
    """
    found = {}
    for name, shape in shapes.items():
        stack = STACK.fullmatch(name)
        if stack is None or name not in single or len(shape) != 3:
            found[name] = Part(name, shape)
            continue
        rows = shape[1]
        halves = {"down_proj": (0, rows)}
        if stack["matrix"] == "gate_up_proj":
            halves = {"gate_proj": (0, rows // 2), "up_proj": (rows // 2, rows)}
        for expert in range(shape[0]):
            for matrix, (start, stop) in halves.items():
                key = f"{stack['experts']}.{expert}.{matrix}.weight{stack['scale'] or ''}"
                found[key] = Part(name, (stop - start, shape[2]), expert, start, stop)
    return found


def stored_singly(names: Collection[str]) -> set[str]:
    """The stacks that a checkpoint with these names holds expert by expert; what it has as a stack is none."""
    found = set()
    for name in names:
        if one := ONE.fullmatch(name):
            matrix = "down_proj" if one["matrix"] == "down_proj" else "gate_up_proj"
            found.add(f"{one['experts']}.{matrix}{one['scale'] or ''}")
    return found - set(names)


def published_singly(model: torch.nn.Module) -> set[str]:
    """The stacks of a model that checkpoints of its family hold expert by expert, as transformers knows it."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    sources = {p for conversion in get_model_conversion_mapping(model) for p in conversion.source_patterns}
    if "mlp.experts.*.gate_proj.weight" not in sources:
        return set()
    return {name for name in model.state_dict() if STACK.fullmatch(name)}

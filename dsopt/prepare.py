"""`dsopt.compile`: what a backend cannot do, because Dynamo has traced by the time it is called."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch

from dsopt.backend import Options, dsopt_backend
from dsopt.report import report

Module = TypeVar("Module", bound=torch.nn.Module)


def compile(model: Module, **options: Any) -> Module:
    """A shallow copy of a model, sharing its weights, whose calls and whose `generate` run compiled by dsopt.

    The model given is left as it was. Weights, buffers and submodules are the same objects in both, so
    training, quantizing or moving one does so to the other, and train() or eval() of one switches the other's
    submodules. Hooks of the model itself, unlike its submodules', are each one's own from then on. The copy's
    generation config names dsopt for the compilation that transformers starts itself on accelerators.

    options: fields of `dsopt.Options`. Raises ValueError naming what is known for an unknown option, op,
    backend or pass, and TypeError for one of another type or if `model` is no module; nothing is changed then.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    Options.of(options)
    fast = copy.copy(model)
    for name, value in vars(model).items():
        if name.startswith(("_forward_", "_backward_")) and "hooks" in name and isinstance(value, dict):
            setattr(fast, name, value.copy())
    fast.compile(backend=dsopt_backend, options=options or None)
    device = next((p.device.type for p in model.parameters()), "cpu")
    if hasattr(model, "generation_config"):
        fast.generation_config = copy.deepcopy(model.generation_config)
        if device != "cpu":
            # transformers compiles by itself on accelerators, with Inductor unless told otherwise
            fast.generation_config.compile_config = compile_config(**options)
    return fast


def compile_config(**options: Any):
    """transformers' CompileConfig that makes `generate` compile with dsopt. options: as for `compile`."""
    from transformers import CompileConfig

    Options.of(options)
    return CompileConfig(backend="dsopt", mode=None, fullgraph=False, dynamic=None, options=options or None)


def refresh(model: torch.nn.Module) -> int:
    """Rebuilds whatever kernels derived from the model's weights, and returns how many such things there were.

    Kernels in this tree read the weights where they lie, so a changed weight shows at once and this returns 0.
    A kernel that packs weights (a third party's, say) gives its callable a `refresh` method, called here; use
    it after changing weights through `.data`, which autograd's version counter does not see.
    """
    refreshers = [r for graph in report(model).graphs for use in graph.kernels for r in use.refreshers]
    for rebuild in refreshers:
        rebuild()
    return len(refreshers)

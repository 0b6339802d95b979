"""`dsopt.compile`: what a backend cannot do, because Dynamo has traced by the time it is called."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from dsopt.backend import Options, dsopt_backend
from dsopt.expert_form import Refused, Stacks
from dsopt.expert_loops import batch_loop, experts_of
from dsopt.expert_tensors import batch_tensors, is_loop
from dsopt.fp8 import FP8Block
from dsopt.fp8.convert import SKIP, plan
from dsopt.report import Prepared, report

Module = TypeVar("Module", bound=torch.nn.Module)


def compile(model: Module, **options: Any) -> Module:
    """A shallow copy of a model, sharing its weights, whose calls and whose `generate` run compiled by dsopt.

    The model given computes what it did. Weights, buffers and submodules are the same objects in both, so
    training, quantizing or moving one does so to the other, and train() or eval() of one switches the other's
    submodules. Hooks of the model itself, unlike its submodules', are each one's own from then on. The copy's
    generation config names dsopt for the compilation that transformers starts itself on accelerators.

    A Python loop over a list of experts, which no graph can hold, becomes one call of `moe_experts` in the copy
    (option `prepare`). Each such block is run on a few random tokens first and left alone if the result differs;
    `report` says why. The experts' weights are stacked layer by layer, which takes the memory of one layer more
    for as long, and the model's own parameters become views of the stacks: what changes them in place shows in
    both. What moves, converts or replaces them (`to`, `load_state_dict(assign=True)`) is noticed by the copy's
    next call, a RuntimeError that asks to compile again. A batched block and the modules it lies in are copies:
    train(), hooks and new submodules of one are then not the other's. With gradients enabled, or in training
    mode, the copy runs the loop.

    With fp8=True, or an FP8Block for other blocks or scales, the copy's linears and experts are quantized as
    `dsopt.quantize_` would, whose errors may be raised, with its own list of what stays wide. The model given keeps its
    weights, so that memory holds both until it is freed: `model = dsopt.compile(model, fp8=True)`, where nothing else
    refers to it. What was quantized is shared no more: training or loading of one does not show in the other. Where
    memory is short, `dsopt.quantize_` replaces the weights one by one before the model is compiled.

    options: fields of `dsopt.Options`. Raises ValueError naming what is known for an unknown option, op,
    backend or pass, and TypeError for one of another type or if `model` is no module; nothing is changed then.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    choices = Options.of(options)
    options.pop("fp8", None)
    source = _quantized(model, choices.fp8) if choices.fp8 else model
    prepared, new, stacks = prepare(source, choices.strict) if choices.prepare else ([], {}, {})
    fast = _with(source, new)
    fast = copy.copy(model) if fast is model else fast
    for name, value in vars(model).items():
        if name.startswith(("_forward_", "_backward_")) and "hooks" in name and isinstance(value, dict):
            setattr(fast, name, value.copy())
    fast.dsopt_prepared = prepared
    fast.compile(backend=dsopt_backend, options=options or None)
    if stacks:
        fast._compiled_call_impl = _guarded(fast._compiled_call_impl, stacks)
    device = next((p.device.type for p in model.parameters()), "cpu")
    if hasattr(model, "generation_config"):
        fast.generation_config = copy.deepcopy(model.generation_config)
        if device != "cpu":
            # transformers compiles by itself on accelerators, with Inductor unless told otherwise
            fast.generation_config.compile_config = compile_config(**options)
    return fast


def _quantized(model: Module, fp8: bool | FP8Block) -> Module:
    """The model with modules in FP8 in the places of its own: a shallow copy. Errors as of `dsopt.quantize_`."""
    with torch.inference_mode(False), torch.no_grad():
        jobs = plan(model, FP8Block() if fp8 is True else fp8, SKIP, {})
        for path in (path for job in jobs for path in job.paths):
            try:
                _check_chain(model, path)
            except Refused as reason:
                raise ValueError(f"cannot quantize {path} in a copy: {reason}") from None
        return _with(model, {id(job.module): job.make() for job in jobs})


def prepare(
    model: torch.nn.Module, strict: bool = False
) -> tuple[list[Prepared], dict[int, torch.nn.Module], dict[str, Stacks]]:
    """Makes batched experts of the loops over experts in a model, layer by layer.

    Returns what was done or refused; id of a module -> the module to take its place; and by site the stacked
    weights that the new modules read. The model computes what it did, on weights that are views of the stacks.
    strict: raise what goes wrong unexpectedly, instead of leaving the module alone.
    """
    done: list[Prepared] = []
    new: dict[int, torch.nn.Module] = {}
    stacks: dict[str, Stacks] = {}
    with torch.inference_mode(False), torch.no_grad():
        uses, known = _uses(model), {}
        for site, module in model.named_modules():
            experts = experts_of(module)
            if experts is None and not is_loop(module):
                continue
            what = (
                "loop over stacked experts" if experts is None else f"loop over {len(experts.paths)} experts"
            )
            try:
                _check_chain(model, site)
                if experts is None:
                    new[id(module)] = batch_tensors(module, known)
                else:
                    new[id(module)], stacks[site] = batch_loop(module, experts, uses)
            except Refused as refused:
                done.append(Prepared(site, what, str(refused)))
            except Exception as error:
                if strict:
                    raise
                done.append(Prepared(site, what, f"{type(error).__name__}: {error}"))
            else:
                done.append(Prepared(site, what))
    return done, new, stacks


def _uses(model: torch.nn.Module) -> Counter:
    """How many parameters and buffers lie in the storage at each address, one in two places counted twice."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return Counter(t.untyped_storage().data_ptr() for _, t in tensors)


def _check_chain(model: torch.nn.Module, site: str) -> None:
    """Raises Refused where a copy of a module on the way to a site would call the original's submodules."""
    names = site.split(".")
    for i in range(len(names)):
        path = ".".join(names[:i])
        if "forward" in vars(model.get_submodule(path)):
            raise Refused(
                f"the forward of {path or 'the model'} was replaced on the instance, as hooks of accelerate do"
            )


def _with(
    module: Module, new: Mapping[int, torch.nn.Module], made: dict[int, torch.nn.Module] | None = None
) -> Module:
    """The module with others in the places of some below it: itself if there are none, else a shallow copy."""
    made = {} if made is None else made
    if id(module) not in made:
        children = {name: child and _with(child, new, made) for name, child in module._modules.items()}
        result = new.get(id(module), module)
        if any(child is not module._modules[name] for name, child in children.items()):
            result = copy.copy(module) if result is module else result
            vars(result)["_modules"] = children
        made[id(module)] = result
    return made[id(module)]


def _guarded(call: Callable, stacks: Mapping[str, Stacks]) -> Callable:
    """A compiled call that first looks whether the stacked weights are still the model's."""

    def guarded(*args, **kwargs):
        if not torch.compiler.is_compiling():
            for site, stack in stacks.items():
                if stack.stale():
                    raise RuntimeError(
                        f"weights of the experts in {site or 'the model'} were moved, converted or replaced after "
                        "dsopt.compile, which had stacked them; call dsopt.compile on the model again"
                    )
        return call(*args, **kwargs)

    return guarded


def compile_config(**options: Any):
    """transformers' CompileConfig that makes `generate` compile with dsopt. options: as for `compile`."""
    from transformers import CompileConfig

    Options.of(options)
    options.pop("fp8", None)  # what it compiles was quantized before
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

"""`dsopt.quantize_`: the weights of a model's linears and experts in FP8, in place."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from rich.console import Console
from torch import nn

from dsopt.expert_calls import Role
from dsopt.expert_form import Refused
from dsopt.expert_tensors import Layout, batch_tensors, layout_of
from dsopt.fp8.arithmetic import is_finite, quantize, scale_shape
from dsopt.fp8.formats import FP8Block
from dsopt.fp8.modules import FP8Experts, FP8Linear
from dsopt.progress import Steps

# what DeepSeek's own FP8 checkpoints keep wide: the output layer, routers, and the weights of V3.2's indexer heads
SKIP = ("lm_head", "*.lm_head", "*.gate", "*.router", "*.weights_proj")
_WIDE = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Quantized:
    """What `quantize_` did. modules: paths of the modules that are in FP8 now; left: path -> why one is not."""

    modules: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0

    def __str__(self) -> str:
        before, after = self.bytes_before / 2**20, self.bytes_after / 2**20
        lines = [f"{len(self.modules)} modules in FP8: {before:.1f} MiB of weights are {after:.1f} MiB"]
        return "\n".join([*lines, *(f"{path or 'the model'} left: {why}" for path, why in self.left.items())])


@dataclass(frozen=True)
class Job:
    """One module to be replaced: its paths, the first that names it first, and what makes the new one."""

    paths: tuple[str, ...]
    module: nn.Module
    make: Callable[[], nn.Module]


def quantize_(
    model: nn.Module, format: FP8Block | None = None, skip: Iterable[str] = SKIP, progress: bool = True
) -> Quantized:
    """Replaces a model's linear layers by `FP8Linear` and its stacks of experts by `FP8Experts`, in place.

    Layer by layer, each freed once it was replaced: no more memory is taken than the wide weights and one layer. Left
    as they are: norms, embeddings and whatever is no plain `nn.Linear`; modules whose path fits a pattern of `skip`;
    routers, which are linears beside experts with one output for each; and experts that are no gated MLPs of the form
    that `FP8Experts` has. Experts in a list are linears, each quantized for itself, and `dsopt.compile` does not batch
    a loop over such. Stacks of experts are found by what they compute, tried on a few random tokens.

    format: blocks and kind of scales, FP8Block() by default. skip: patterns as of `fnmatch`, on the paths of modules;
        SKIP by default, to which what is given is no addition. progress: whether to show a bar on a terminal.
    Returns what was done. Nothing is changed where it raises ValueError, naming every weight that is in the way, for
    one that is tied to or shares memory with another, is no plain parameter, has hooks that would be lost or holds NaN
    or infinity, for a pattern of skip that fits nothing and for a model in training mode; or TypeError for another type
    or format.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    done = Quantized()
    jobs = plan(model, FP8Block() if format is None else format, skip, done.left)
    console = Console(stderr=True)
    with torch.inference_mode(False), torch.no_grad(), Steps(console) as step:
        step.expect(len(jobs))
        while jobs:
            job = jobs.pop(0)  # which holds the old module
            if progress and console.is_terminal:
                step("quantizing", job.paths[0])
            done.bytes_before += _nbytes(job.module)
            new = job.make()
            for path in job.paths:
                parent, _, name = path.rpartition(".")
                model.get_submodule(parent)._modules[name] = new
            done.modules.append(job.paths[0])
            done.bytes_after += _nbytes(new)
            step.advance()
    return done


def plan(model: nn.Module, format: FP8Block, skip: Iterable[str], left: dict[str, str]) -> list[Job]:
    """What there is to replace in a model, everything checked as `quantize_` says; left: gains what is left and why."""
    if not isinstance(format, FP8Block):
        raise TypeError(f"format must be an FP8Block, got {format!r}")
    if model.training:
        raise ValueError("the model is in training mode; call eval() first")
    paths: dict[nn.Module, list[str]] = defaultdict(list)
    for path, module in model.named_modules(remove_duplicate=False):
        paths[module].append(path)
    skip = _patterns(skip, [path for names in paths.values() for path in names])
    routers = _routers(paths)
    uses = _uses(model)
    jobs, wrong, known = [], [], {}
    for module, names in paths.items():
        path = names[0]
        if not _may_be(module) or "" in names:
            continue
        if module in routers or any(fnmatchcase(name, p) for name in names for p in skip):
            left[path] = "a router" if module in routers else "skipped"
            continue
        make = _maker(module, format, known)
        if isinstance(make, str):
            left[path] = make
            continue
        problems = list(_problems(path, module, uses))
        wrong += problems
        jobs.append(Job(tuple(names), module, make))
    if wrong:
        raise ValueError("cannot quantize: " + "; ".join(wrong) + "; name what is to stay wide in skip")
    return jobs


def _patterns(skip: Iterable[str], paths: list[str]) -> tuple[str, ...]:
    if isinstance(skip, str):
        raise TypeError(f"skip must be a sequence of patterns, got the string {skip!r}")
    skip = tuple(skip)
    unused = [p for p in skip if p not in SKIP and not any(fnmatchcase(path, p) for path in paths)]
    if unused:
        raise ValueError(f"skip names no module: {', '.join(map(repr, unused))}")
    return skip


def _may_be(module: nn.Module) -> bool:
    """True for a plain linear layer, and for a module that owns matrices in stacks."""
    return type(module) is nn.Linear or bool(_stacks(module))


def _stacks(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of three dimensions that are a module's own and not in FP8 already."""
    return [p for p in module._parameters.values() if p is not None and p.ndim == 3 and p.dtype.itemsize > 1]


def _routers(modules: Iterable[nn.Module]) -> set[nn.Module]:
    """Linears with one output for each of the experts that their parent holds beside them."""
    found = set()
    for parent in modules:
        children = [child for child in parent.children() if not isinstance(child, nn.Linear)]
        counts = {len(child) for child in children if isinstance(child, nn.ModuleList)}
        counts |= {p.shape[0] for child in children for p in _stacks(child)}
        found |= {m for m in parent.children() if type(m) is nn.Linear and m.out_features in counts}
    return found


def _uses(model: nn.Module) -> dict[int, list[str]]:
    """The names of the parameters and buffers in the storage at each address."""
    found = defaultdict(list)
    seen = set()
    for module_path, module in model.named_modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and (id(module), name) not in seen:
                seen.add((id(module), name))
                found[tensor.untyped_storage().data_ptr()].append(f"{module_path}.{name}".lstrip("."))
    return found


def _problems(path: str, module: nn.Module, uses: dict[int, list[str]]) -> Iterator[str]:
    """What stands in the way of replacing a module."""
    if "forward" in vars(module):
        yield f"the forward of {path} was replaced on the instance"
    if any(value for name, value in vars(module).items() if name.endswith("hooks")):
        yield f"{path} has hooks, which would be lost"
    for name, p in module._parameters.items():
        if p is None or p.ndim < 2:
            continue
        at = f"{path}.{name}"
        others = [use for use in uses[p.untyped_storage().data_ptr()] if use != at]
        if type(p) is not nn.Parameter:
            yield f"{at} is a {type(p).__name__}, not a plain parameter"
        elif p.is_meta:
            yield f"{at} is on the meta device"
        elif p.dtype not in _WIDE:
            yield f"{at} is {p.dtype}, not float32, bfloat16 or float16"
        elif others:
            yield f"{at} is tied to or shares memory with {', '.join(others)}"
        elif not is_finite(p.detach()):
            yield f"{at} holds NaN or infinity"


def _maker(module: nn.Module, format: FP8Block, known: dict) -> Callable[[], nn.Module] | str:
    """What makes the module's replacement, or why there is none."""
    if type(module) is nn.Linear:
        return lambda: _linear(module, format)
    try:
        kinds = len(known)
        layout = experts_layout(module, known)
        if len(known) > kinds:
            batch_tensors(module, known)  # the first of its kind is compared on its own weights
    except Refused as reason:
        return str(reason)
    return lambda: _experts(module, layout, format)


def experts_layout(module: nn.Module, known: dict) -> Layout:
    """How a module's experts are laid out; Refused where `FP8Experts` would not compute the same.

    known: what was found for modules of the same kind; added to.
    """
    call, layout, _ = layout_of(module, known)
    order = [role for role in call.values() if isinstance(role, Role)]
    if order != ["x", "ids", "weights"]:
        raise Refused(f"experts called with {', '.join(order)}, not with x, ids, weights")
    for name, is_so in _BEYOND.items():
        if is_so(layout):
            raise Refused(f"experts with {name}, which FP8Experts have not")
    return layout


_BEYOND: dict[str, Callable[[Layout], bool]] = {
    "transposed weights": lambda layout: layout.transposed,
    "biases": lambda layout: layout.b13 is not None,
    "gate and up in two stacks": lambda layout: layout.w3 is not None,
    "no gate": lambda layout: not layout.gated,
    "rows of gate and up that take turns": lambda layout: layout.interleaved,
    "ids that hand back x": lambda layout: layout.num_identity > 0,
    "the activation of gpt-oss": lambda layout: layout.activation == "swiglu_oai",
}


def _linear(module: nn.Linear, format: FP8Block) -> FP8Linear:
    new = FP8Linear(*quantize(module.weight, format), module.bias, format.block_of(module.weight.shape))
    return new.train(module.training)


def _experts(module: nn.Module, layout: Layout, format: FP8Block) -> FP8Experts:
    gate_up, down = getattr(module, layout.w13), getattr(module, layout.w2)
    halves = gate_up.detach().chunk(2, 1)
    block = format.block_of(gate_up.shape)
    num_experts, blocks, columns = scale_shape(halves[0].shape, block)
    wide = torch.empty(gate_up.shape, dtype=torch.float8_e4m3fn, device=gate_up.device)
    scale = torch.empty(num_experts, 2 * blocks, columns, dtype=format.scale_dtype, device=gate_up.device)
    for half, weight_rows, scale_rows in zip(halves, wide.chunk(2, 1), scale.chunk(2, 1), strict=True):
        for e in range(num_experts):
            weight_rows[e], scale_rows[e] = quantize(half[e], format)
    options = {"activation": layout.activation, "limit": layout.limit, "block": block}
    return FP8Experts(wide, scale, *quantize(down, format), **options).train(module.training)


def _nbytes(module: nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())

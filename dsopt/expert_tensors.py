"""Experts modules that hold stacked weights and loop over the experts hit, as one call of `moe_experts`.

Such a module is called with x, ids and weights. How its parameters are laid out and what its activation is, is
found by trying: a copy of it, whose experts all have the same random weights, against each way `moe_experts`
can read them. Then the module itself is compared on its own weights.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import types
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dsopt.expert_calls import (
    Given,
    Role,
    batched_experts,
    compare,
    defaults,
    inference_only,
    inputs,
    settings,
    tensors_of,
    undisturbed,
)
from dsopt.expert_form import Refused
from dsopt.numerics import rand, relative_l2
from dsopt.ops.experts import ACTIVATIONS


@dataclass(frozen=True)
class Layout:
    """Names of the parameters that `moe_experts` calls w13, w2 and so on, and its other arguments.

    transposed: the parameters hold the transposes. num_experts: how many there are, each with w13 and w2;
    num_identity: how many ids after theirs hand back x.
    """

    w13: str
    w2: str
    w3: str | None
    b13: str | None
    b2: str | None
    b3: str | None
    transposed: bool
    num_experts: int
    num_identity: int
    gated: bool
    interleaved: bool = False
    activation: str = "silu"
    limit: float | None = None

    def experts(
        self, owner: nn.Module, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """What `owner` computes, from its parameters as they are."""

        def read(name: str | None) -> torch.Tensor | None:
            if name is None:
                return None
            p = getattr(owner, name)
            p = p.mT if self.transposed and p.ndim == 3 else p
            return p[: self.num_experts]

        return batched_experts(
            x,
            ids,
            weights,
            read(self.w13),
            read(self.w2),
            read(self.b13),
            read(self.b2),
            read(self.w3),
            read(self.b3),
            activation=self.activation,
            gated=self.gated,
            interleaved=self.interleaved,
            limit=self.limit,
            num_identity=self.num_identity,
        )


@torch.no_grad()
def is_loop(owner: nn.Module) -> bool:
    """True for a module of stacked weights whose forward asks for the values of the ids it is given."""
    widths = {width for _, width in _layouts(owner)}
    for call, width in itertools.product(_calls(owner) if widths else (), sorted(widths)):
        given = tensors_of(inputs(call, next(owner.parameters()), width, 2, 3, 0))
        try:
            with undisturbed(owner), _AsksInPython() as python, _AsksInOps() as ops:
                type(owner).forward(owner, **given)
        except Refused:
            pass
        except Exception:  # not the width or the order it is called with
            continue
        return python.asked or ops.asked
    return False


class _AsksInOps(TorchDispatchMode):
    """Notes operators whose result, or its shape, follows from values: nonzero, item, indexing with a mask."""

    asked = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_values = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output} & set(func.tags)
        if func is torch.ops.aten.index.Tensor:
            by_values = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        self.asked |= bool(by_values)
        return func(*args, **(kwargs or {}))


class _AsksInPython(TorchFunctionMode):
    """Notes the ways to read a tensor that no operator stands for."""

    asked = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.asked |= func in (torch.Tensor.tolist, torch.Tensor.numpy)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def batch_tensors(owner: nn.Module, known: dict) -> nn.Module:
    """A shallow copy of `owner` whose forward calls `moe_experts` once, on the parameters as they lie.

    known: what was found for modules of the same class, shapes and settings; added to. Raises Refused.
    """
    call, layout, width = layout_of(owner, known)
    parameters = list(owner.parameters())
    batched = copy.copy(owner)
    vars(batched).update(dsopt_stacks=AsTheyLie(), dsopt_weights=parameters)
    batched.forward = types.MethodType(inference_only(_run(call, layout), 3), batched)
    num_ids = layout.num_experts + layout.num_identity
    compare(owner, batched, partial(inputs, call, parameters[0], width, num_ids))
    return batched


@torch.no_grad()
def layout_of(owner: nn.Module, known: dict) -> tuple[Given, Layout, int]:
    """How a module is called, how its parameters are read, and the width of x; known and Refused as above.

    What its experts compute is tried on random weights that they share, not which of them an id stands for.
    """
    if owner.training:
        raise Refused("it is in training mode; call eval() first")
    if "forward" in vars(owner):
        raise Refused("its forward was replaced on the instance")
    parameters = list(owner.parameters())
    if len(parameters) > sum(p is not None for p in owner._parameters.values()):
        raise Refused("it has weights besides its experts'")
    if any(type(p) is not nn.Parameter or p.is_meta for p in parameters):
        raise Refused("its weights are not plain parameters")
    key = (settings(owner), *((name, tuple(p.shape)) for name, p in owner.named_parameters()))
    key += tuple(type(m) for m in owner.modules())
    if key not in known:
        known[key] = _try_all(owner)
    return known[key]


class AsTheyLie:
    """Stands for stacks where the parameters are read as they are: never stale."""

    def stale(self) -> bool:
        return False


def _run(call: Given, layout: Layout):
    names = [name for name, role in call.items() if isinstance(role, Role)]
    x, ids, weights = (next(name for name in names if call[name] == role) for role in ("x", "ids", "weights"))

    def run(self, *args, **kwargs):
        given = dict(zip(names, args, strict=False)) | kwargs
        return layout.experts(self, given[x], given[ids], given[weights])

    return run


def _calls(owner: nn.Module) -> Iterator[Given]:
    """Ways to call a module with its first three arguments."""
    known = defaults(owner)
    names = [name for name, default in known.items() if not isinstance(default, (tuple, dict))]
    if len(names) >= 3 and all(known[name] is not inspect.Parameter.empty for name in names[3:]):
        for order in (("ids", "weights"), ("weights", "ids")):
            yield known | dict(zip(names[:3], map(Role, ("x", *order)), strict=True))


def _layouts(owner: nn.Module) -> Iterator[tuple[Layout, int]]:
    """Ways to read a module's parameters, each with the width of x; activation and limit are left open."""
    own = {name: p for name, p in owner._parameters.items() if p is not None}
    matrices = [name for name, p in own.items() if p.ndim == 3]
    vectors = [name for name, p in own.items() if p.ndim == 2]
    if len(matrices) not in (2, 3) or len(vectors) not in (0, len(matrices)) or len(own) > 6:
        return
    for transposed, (w13, w2, *w3) in itertools.product((False, True), itertools.permutations(matrices)):
        shapes = {n: own[n].mT.shape if transposed else own[n].shape for n in matrices}
        (total, rows, width), (num_experts, out, inner) = shapes[w13], shapes[w2]
        fits = width == out and total >= num_experts and all(shapes[n] == shapes[w13] for n in w3)
        ways = {2 * inner: [(True, False), (True, True)], inner: [(bool(w3), False)]}
        if not fits or (w3 and rows != inner):
            continue
        for b13, b2, *b3 in itertools.permutations(vectors) if vectors else [(None, None)]:
            wanted = [(b13, rows), (b2, out), *((b, rows) for b in b3)]
            if all(b is None or own[b].shape[1] == size for b, size in wanted):
                names = (w13, w2, *(w3 or [None]), b13, b2, *(b3 or [None]))
                for gated, interleaved in ways.get(rows, ()):
                    sizes = (transposed, num_experts, total - num_experts, gated, interleaved)
                    yield Layout(*names, *sizes), width


def _try_all(owner: nn.Module) -> tuple[Given, Layout, int]:
    """How a module is called and how its parameters are read. Raises Refused where no way gives what it computes."""
    numbers = {
        float(v)
        for v in vars(owner).values()
        if isinstance(v, (int, float)) and not isinstance(v, bool) and v > 0
    }
    probe = copy.copy(owner)
    vars(probe)["_parameters"] = {
        name: p if p is None else nn.Parameter(_alike(p, seed).expand(p.shape), requires_grad=False)
        for seed, (name, p) in enumerate(owner._parameters.items())
    }
    like = next(probe.parameters())
    layouts = list(_layouts(owner))
    for call, width in itertools.product(_calls(owner), sorted({width for _, width in layouts})):
        for layout in [layout for layout, w in layouts if w == width]:
            given = tensors_of(inputs(call, like, width, layout.num_experts + layout.num_identity, 4, 0))
            x = next(iter(given.values()))
            # beyond what activations are usually limited to
            x *= torch.tensor([0.3, 1.0, 10.0, 100.0], device=x.device).unsqueeze(-1)
            try:
                want = type(probe).forward(probe, **given)
            except Exception:  # not the width or the order it is called with
                break
            for activation, limit in itertools.product(ACTIVATIONS, [None, *sorted(numbers)]):
                way = replace(layout, activation=activation, limit=limit if layout.gated else None)
                got = _run(call, way)(probe, **given)
                if got.shape == want.shape and all(map(_same, got, want)):
                    return call, way, width
    raise Refused("no reading of its weights gives what it computes")


def _alike(p: torch.Tensor, seed: int) -> torch.Tensor:
    """Random float32 weights of one expert."""
    return rand(p.device, torch.float32, seed)(1, *p.shape[1:]) * p.shape[-1] ** -0.5


def _same(got: torch.Tensor, want: torch.Tensor) -> bool:
    return relative_l2(got, want) <= 1e-5

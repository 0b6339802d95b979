"""Ops and kernels: what an op means, the ways to compute it, and how one is chosen.

An `Op` is a meaning: a schema and a float64-capable reference. A `Kernel` is one way to compute an op
on some device; it lives in `kernels/<backend>/<op>.py` as an entry of that module's `KERNELS`. `select`
takes the first kernel that accepts the arguments and keeps the reason of each one that does not.
"""

from __future__ import annotations

import functools
import importlib
import os
import pkgutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

import torch

import dsopt.kernels
from dsopt import autograd
from dsopt.numerics import relative_l2

LIBRARY = torch.library.Library("dsopt", "DEF")
ENTRY_POINT_GROUP = "dsopt.kernels"
REFERENCE = "reference"


def largest_error(args: tuple, got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> float:
    """The largest relative L2 error among some results."""
    return max((relative_l2(a, b) for a, b in zip(got, want, strict=True)), default=0.0)


@dataclass(frozen=True, eq=False)
class Op:
    """The meaning of one `dsopt::` operator.

    name: the operator's name in `torch.ops.dsopt`.
    schema: argument list and returns in torch's schema language, without the name.
    reference: plain PyTorch, one formula, right in every float dtype; never returns a view of an input.
    samples: `samples(device, dtype)` yields tuples of arguments that cover the op's corners.
    tolerance: dtype of the first argument -> largest `error` of a kernel against the reference in float64.
    fake: shapes and dtypes of the results for fake tensors; the reference by default, if it can be traced.
    error: `error(args, got, want)` is the distance of two lists of results; by default the largest relative L2
        error of one of them. An op whose results may rightly differ (ties of a choice) says which may.
    family: the family of sites (`norm`, `mla`, ...) it stands for in reports; None if it is no site of its own.
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    samples: Callable[[torch.device, torch.dtype], Iterator[tuple]]
    tolerance: Mapping[torch.dtype, float] = field(
        default_factory=lambda: {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
    )
    fake: Callable[..., Any] | None = None
    error: Callable[[tuple, Sequence[torch.Tensor], Sequence[torch.Tensor]], float] = largest_error
    family: str | None = None

    def __post_init__(self):
        qualname = f"dsopt::{self.name}"
        LIBRARY.define(self.name + self.schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(self.name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(qualname, self.fake or self.reference, lib=LIBRARY)
        autograd.register(qualname, lambda *args: self.reference(*self.bind(args)), LIBRARY)

    @property
    def overload(self) -> Callable[..., Any]:
        """The callable that stands in graphs: `torch.ops.dsopt.<name>.default`."""
        return getattr(torch.ops.dsopt, self.name).default

    def bind(self, args: tuple, kwargs: Mapping[str, Any] | None = None) -> tuple:
        """All arguments in the schema's order, defaults filled in. Raises TypeError as a Python call does."""
        kwargs = dict(kwargs or {})
        bound = list(args)
        arguments = self.overload._schema.arguments
        if len(bound) > len(arguments):
            raise TypeError(f"dsopt::{self.name} takes {len(arguments)} arguments, got {len(bound)}")
        for argument in arguments[len(bound) :]:
            if argument.name not in kwargs and not argument.has_default_value():
                raise TypeError(f"dsopt::{self.name} needs {argument.name!r}")
            bound.append(kwargs.pop(argument.name, argument.default_value))
        if kwargs:
            raise TypeError(f"dsopt::{self.name} has no argument {', '.join(map(repr, kwargs))}")
        return tuple(bound)

    def _run(self, *args, **kwargs):
        bound = self.bind(args, kwargs)
        return select(self, bound).fn(*bound)


def _accept(*args) -> None:
    return None


@dataclass(frozen=True, eq=False)
class Kernel:
    """One way to compute an op.

    op: name of the op.
    backend: who computes it: `cpu`, `torch`, `numba`, `triton`, `cuda`, or a third party's word.
    plan: `plan(*args)` is called once per graph with the op's arguments (fake tensors in a compiled graph)
        and returns the callable `fn(*args)` that computes the op. It looks at static facts only: device,
        dtype, static sizes. `fn` may pick among variants by the number of tokens of each call. If `fn` has a
        method `refresh()`, `dsopt.refresh` calls it after weights were changed behind autograd's back.
    check: `check(*args)` returns None, or the reason the kernel refuses. Static facts only, as for `plan`.
    device: the device type it runs on; None for any.
    dtypes: dtypes of the first argument it accepts; empty for any.
    priority: kernels are tried from the highest to the lowest.
    name: what the report calls it.
    records: whether all it computes is computed by ATen and by functions of `dsopt._cpu`, whose calls a
        `_cpu.Program` can keep.
    """

    op: str
    backend: str
    plan: Callable[..., Callable]
    check: Callable[..., str | None] = _accept
    device: str | None = None
    dtypes: frozenset[torch.dtype] = frozenset()
    priority: int = 0
    name: str = ""
    records: bool = False

    @property
    def label(self) -> str:
        return f"{self.backend}.{self.name or self.op}"

    def refuses(self, args: tuple) -> str | None:
        """None when the kernel takes these arguments, else why not."""
        first = next(x for x in args if isinstance(x, torch.Tensor))
        if self.device is not None and first.device.type != self.device:
            return f"needs device {self.device}, got {first.device.type}"
        if self.dtypes and first.dtype not in self.dtypes:
            known = ", ".join(sorted(str(d).removeprefix("torch.") for d in self.dtypes))
            return f"needs dtype {known}, got {str(first.dtype).removeprefix('torch.')}"
        if any(
            x.is_neg() or x.is_conj()
            for x in torch.utils._pytree.tree_leaves(args)
            if isinstance(x, torch.Tensor)
        ):
            return "needs tensors without a negation or conjugation that was put off"
        return self.check(*args)


@dataclass(frozen=True)
class Refusal:
    """Why one kernel was not taken."""

    kernel: str
    reason: str


Choice = tuple[str, tuple[Refusal, ...]]  # a kernel's label, and those refused before it


@dataclass(frozen=True)
class Selection:
    """The kernel taken for a set of arguments, its planned callable, and every kernel refused before it."""

    kernel: Kernel
    fn: Callable
    refused: tuple[Refusal, ...]


def backends() -> tuple[str, ...]:
    """Names of the backends in this tree and of installed third-party ones, `reference` last."""
    own = [m.name for m in pkgutil.iter_modules(dsopt.kernels.__path__) if m.ispkg]
    return (*sorted({*own, *(e.name for e in entry_points(group=ENTRY_POINT_GROUP))}), REFERENCE)


@functools.cache
def kernels(op_name: str) -> tuple[tuple[Kernel, ...], tuple[Refusal, ...]]:
    """All kernels of an op, highest priority first, and the modules that failed to import with the reason.

    Kernels are the `KERNELS` of `dsopt.kernels.<backend>.<op>` and of each module that an entry point of group
    `dsopt.kernels` names; the entry point's name is the backend's. Raises ValueError for two of one label.
    """
    found: list[Kernel] = []
    broken: list[Refusal] = []
    known = backends()

    def take(backend: str, load: Callable[[], ModuleType]) -> None:
        try:
            offered = [k for k in load().KERNELS if k.op == op_name]
        except Exception as error:  # an optional dependency that is absent or broken is a reason, not a crash
            broken.append(Refusal(f"{backend}.{op_name}", f"import failed: {type(error).__name__}: {error}"))
            return
        found.extend(k for k in offered if k.backend == backend)
        for k in offered:
            if k.backend not in known:  # no option could name it
                broken.append(Refusal(k.label, f"backend {k.backend} is registered under the name {backend}"))

    for backend in pkgutil.iter_modules(dsopt.kernels.__path__):
        path = [os.path.join(root, backend.name) for root in dsopt.kernels.__path__]
        if any(m.name == op_name for m in pkgutil.iter_modules(path)):
            module = f"dsopt.kernels.{backend.name}.{op_name}"
            take(backend.name, functools.partial(importlib.import_module, module))
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        take(entry.name, entry.load)

    labels = [k.label for k in found]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"two kernels of op {op_name} are called {label}; give one of them another name")
    return tuple(sorted(found, key=lambda k: -k.priority)), tuple(broken)


def disabled_backends() -> frozenset[str]:
    """Backends named in the environment variable `DSOPT_DISABLE`, separated by commas.

    Raises ValueError for a name that is no backend.
    """
    names = frozenset(filter(None, os.environ.get("DSOPT_DISABLE", "").split(",")))
    if not names:
        return names
    known = set(backends()) - {REFERENCE}
    if unknown := names - known:
        raise ValueError(f"DSOPT_DISABLE names {sorted(unknown)}; known backends: {sorted(known)}")
    return names


def select(
    op: Op, args: tuple, prefer: str | None = None, disabled: Collection[str] | None = None
) -> Selection:
    """The kernel for these arguments: the preferred backend first, then by priority, the reference last.

    args: the op's arguments as `Op.bind` orders them, real or fake.
    prefer: a backend to try first.
    disabled: backends not to use; by default those of `DSOPT_DISABLE`.
    """
    disabled = disabled_backends() if disabled is None else disabled
    candidates, broken = kernels(op.name)
    if prefer is not None:
        candidates = tuple(sorted(candidates, key=lambda k: k.backend != prefer))
    refused = list(broken)
    if prefer != REFERENCE:
        for kernel in candidates:
            reason = "disabled by DSOPT_DISABLE" if kernel.backend in disabled else kernel.refuses(args)
            if reason is None:
                passed = [k for k in candidates if k.priority > kernel.priority and k.backend != prefer]
                refused += [
                    Refusal(k.label, f"passed over: options ask for {prefer}") for k in passed if prefer
                ]
                return Selection(kernel, kernel.plan(*args), _once_each(refused))
            refused.append(Refusal(kernel.label, reason))
    elif candidates:
        refused += [Refusal(k.label, f"passed over: options ask for {prefer}") for k in candidates]
    return Selection(_reference(op), op.reference, tuple(refused))


def recall(op: Op, args: tuple, label: str, refused: tuple[Refusal, ...]) -> Selection | None:
    """The selection that `select` made of such arguments in another process, without loading other kernels' modules.

    None where that kernel is not there, or refuses the arguments: then `select` has to choose anew.
    """
    kernel = _reference(op) if label.startswith(f"{REFERENCE}.") else _kernel(op.name, label)
    if kernel is None or kernel.refuses(args) is not None:
        return None
    return Selection(kernel, kernel.plan(*args), refused)


@functools.cache
def _kernel(op_name: str, label: str) -> Kernel | None:
    """One of `kernels` by its label, without loading the others' modules; None if it is not there."""
    backend, _, _ = label.partition(".")
    for load in _places(backend, op_name):
        try:
            found = [k for k in load().KERNELS if k.op == op_name and k.label == label]
        except Exception:  # `select` tells why
            continue
        if found:
            return found[0]
    return None


def _places(backend: str, op_name: str) -> Iterator[Callable[[], ModuleType]]:
    """How to import the modules that a backend's kernels of an op may be in."""
    yield functools.partial(importlib.import_module, f"dsopt.kernels.{backend}.{op_name}")
    yield from (e.load for e in entry_points(group=ENTRY_POINT_GROUP) if e.name == backend)


def _reference(op: Op) -> Kernel:
    return Kernel(op.name, REFERENCE, plan=lambda *_: op.reference)


def _once_each(refused: list[Refusal]) -> tuple[Refusal, ...]:
    """The first refusal of each kernel."""
    return tuple({r.kernel: r for r in reversed(refused)}.values())[::-1]


def explain(op: Op, *args) -> list[tuple[str, str]]:
    """One (kernel, verdict) pair per kernel for these arguments; the verdict is "accepts" or the refusal."""
    bound = op.bind(args)
    candidates, broken = kernels(op.name)
    rows = [(r.kernel, r.reason) for r in broken]
    rows += [(k.label, k.refuses(bound) or "accepts") for k in candidates]
    return [*rows, (f"{REFERENCE}.{op.name}", "accepts")]

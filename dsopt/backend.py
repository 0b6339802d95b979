"""The `dsopt` backend of torch.compile, and its options."""

from __future__ import annotations

import dataclasses
import os
import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule

from dsopt.capture import capture, eager, guard_count, inductor, unsupported
from dsopt.census import census_sites
from dsopt.explain import ran
from dsopt.fp8 import FP8Block
from dsopt.graphcache import Entry
from dsopt.lower import fuses, lower
from dsopt.op import backends, disabled_backends
from dsopt.ops import OPS
from dsopt.pipeline import available_passes, dump, fuel, run_pipeline
from dsopt.replay import Replay, cannot_replay
from dsopt.report import GRAPHS, GraphReport
from dsopt.rewrite import site
from dsopt.spell import spell


@dataclass(frozen=True)
class Options:
    """What `torch.compile(options={...})` and `dsopt.compile(**options)` take.

    kernels: op name -> backend to try first, such as {"mla_attention": "torch"}; {"*": "torch"} for all ops.
    passes: names of the passes to run, in order, instead of the whole pipeline.
    fallback: what compiles a graph that dsopt leaves alone: "inductor" (default) or "eager".
    strict: raise when dsopt fails on a graph, instead of falling back or leaving out the pass that failed.
    replay: make the native calls of a graph of fixed shapes again by address, see `dsopt.replay`.
    prepare: let `dsopt.compile` batch Python loops over experts, see there. torch.compile alone cannot: it has
        traced the loop by the time a backend is called.
    fp8: let `dsopt.compile` quantize the copy that it makes, True for FP8Block(), see there. For torch.compile, which
        sees weights only once they are traced, this is an error; call `dsopt.quantize_` on the model first.
    """

    kernels: Mapping[str, str] = field(default_factory=dict)
    passes: Sequence[str] | None = None
    fallback: str = "inductor"
    strict: bool = False
    replay: bool = True
    prepare: bool = True
    fp8: bool | FP8Block = False

    def __post_init__(self):
        _typed("kernels", self.kernels, Mapping, "a mapping of op names to backends")
        for name in ("strict", "replay", "prepare"):
            _typed(name, getattr(self, name), bool, "True or False")
        _typed("fp8", self.fp8, (bool, FP8Block), "True, False or an FP8Block")
        if self.passes is not None:
            wanted = "a sequence of pass names or None"
            _typed("passes", self.passes, Sequence, wanted)
            if isinstance(self.passes, (str, bytes)):
                raise TypeError(f"passes must be {wanted}, got the string {self.passes!r}")
        for op, backend in self.kernels.items():
            _among("op", op, [*OPS, "*"])
            _among("backend", backend, backends())
        for name in self.passes or ():
            _among("pass", name, available_passes())
        _among("fallback", self.fallback, ("inductor", "eager"))

    @classmethod
    def of(cls, options: Mapping[str, Any] | None) -> Options:
        """Options from a plain mapping.

        Raises ValueError naming what is known in place of what is not, TypeError for a value of another type.
        """
        if options is not None:
            _typed("options", options, Mapping, "a mapping of option names to values")
        known = [f.name for f in dataclasses.fields(cls)]
        for name in options or {}:
            _among("option", name, known)
        return cls(**(options or {}))

    def prefer(self) -> dict[str, str]:
        """op name -> backend to try first, for every op that has one."""
        default = self.kernels.get("*")
        return {op: self.kernels.get(op, default) for op in OPS if self.kernels.get(op, default) is not None}


def _typed(name: str, given: object, accepted: type | tuple[type, ...], wanted: str) -> None:
    if not isinstance(given, accepted):
        raise TypeError(f"{name} must be {wanted}, got {given!r}")


def _among(kind: str, given: str, known: Sequence[str]) -> None:
    if given not in known:
        plural = f"{kind}es" if kind.endswith("s") else f"{kind}s"
        raise ValueError(f"unknown {kind} {given!r}; known {plural}: {', '.join(known)}")


MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def check_environment() -> None:
    """Raises ValueError for a DSOPT_DISABLE, DSOPT_FUEL or DSOPT_ISA that names nothing known."""
    disabled_backends()
    fuel()
    try:
        from dsopt import _cpu
    except ImportError:  # not built here, so that nothing reads DSOPT_ISA
        return
    if "DSOPT_ISA" in os.environ:
        _cpu.set_isa("")  # reads the variable again: it may have changed since the first kernel ran


def dsopt_backend(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable:
    """Compiles one Dynamo graph: capture, count, passes, lower, spell. The entry point named `dsopt`.

    mode: torch.compile's, one of MODES; it goes to Inductor where that compiles a graph dsopt leaves alone.
    options: see `Options`; ValueError for what it does not know, as for an unknown mode or environment variable.
    A graph that dsopt cannot take gives the right answer all the same, through `Options.fallback`, and the
    report says why.
    """
    choices = Options.of(options)
    if choices.fp8:
        raise ValueError(
            "fp8 is an option of dsopt.compile; for torch.compile call dsopt.quantize_(model) first"
        )
    if mode is not None:
        _among("mode", mode, MODES)
    check_environment()  # a misspelt DSOPT_DISABLE is the user's to know, not a reason to fall back
    report = GRAPHS.new()
    start = time.perf_counter()
    if (reason := _not_ours(gm, example_inputs)) is not None:
        fn = _fall_back(gm, example_inputs, choices, mode, report, reason)
    else:
        try:
            fn = _optimize(gm, example_inputs, choices, report)
        except Exception as error:
            if choices.strict:
                raise
            fn, report.passes, report.kernels = None, [], []
            report.fallback = f"{type(error).__name__}: {error}"
        if fn is None:
            fn = _fall_back(gm, example_inputs, choices, mode, report, report.fallback)
    report.compile_s = time.perf_counter() - start
    return _Compiled(fn, report, example_inputs)


class _Compiled:
    """The callable Dynamo keeps; it keeps the report, and tells the index whose weights it is called with.

    Dynamo gives the code of one instance to others of its class, so those weights may change from call to call.
    """

    def __init__(self, fn: Callable, report: GraphReport, example_inputs: Sequence[Any]):
        self.fn = fn
        self.report = report
        parameters = [i for i, x in enumerate(example_inputs) if isinstance(x, torch.nn.Parameter)]
        self.first = parameters[0] if parameters else None
        self.seen: dict[int, weakref.ref] = {}
        self._index(example_inputs)

    def __call__(self, *args):
        if self.first is not None and id(args[self.first]) not in self.seen:
            self._index(args)
        return self.fn(*args)

    def _index(self, args: Sequence[Any]) -> None:
        GRAPHS.reads(self.report, [x for x in args if isinstance(x, torch.Tensor)])
        if self.first is not None:
            key, seen = id(args[self.first]), self.seen
            # what comes to lie at the same address later is not the same parameter
            seen[key] = weakref.ref(args[self.first], lambda _: seen.pop(key, None))


def _optimize(
    gm: GraphModule, example_inputs: Sequence[Any], choices: Options, report: GraphReport
) -> Callable | None:
    entry = Entry(gm, example_inputs, report, choices.passes, choices.prefer())
    graph = entry.load()
    if graph is None:
        graph = capture(gm, example_inputs)
        _rewrite(graph, choices, report)
        entry.keep(graph)
    report.nodes_after = len(graph.graph.nodes)
    if not fuses(graph):
        entry.save(graph)
        report.fallback = "nothing to fuse"
        return None
    report.kernels = lower(graph, choices.prefer(), entry.kernels)
    entry.save(graph)
    dump(graph, f"{report.name}.lowered")
    report.ran = ran(graph)
    spell(graph)
    report.not_replayed = cannot_replay(graph) if choices.replay else "options say so"
    return Replay(graph, report) if report.not_replayed is None else graph.forward


def _rewrite(graph: GraphModule, choices: Options, report: GraphReport) -> None:
    """Counts the sites of a captured graph and runs the passes on it."""
    report.nodes_before = len(graph.graph.nodes)
    guards = guard_count(graph)
    report.counted = {family: [site(n) for n in nodes] for family, nodes in census_sites(graph).items()}
    report.passes = run_pipeline(graph, choices.passes, report.name, choices.strict)
    if guard_count(graph) != guards:
        raise RuntimeError(
            "the census or a pass added a shape guard; sizes are compared through `known` only"
        )


def _not_ours(gm: GraphModule, example_inputs: Sequence[Any]) -> str | None:
    """Why a graph goes to the fallback untouched, or None."""
    tensors = [x for x in example_inputs if isinstance(x, torch.Tensor)]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        if all(graph.fallback != _NEEDS_GRADIENTS for graph in GRAPHS.reading(tensors)):
            _warn_gradients()
        return _NEEDS_GRADIENTS
    if any(x.is_neg() or x.is_conj() for x in tensors):
        return "an input has a negation or conjugation that was put off"  # its fake value would not
    return unsupported(gm)


_NEEDS_GRADIENTS = "gradients are enabled: dsopt's kernels compute forward only; use torch.inference_mode()"


def _warn_gradients() -> None:
    """Called for a model's first graph only."""
    warnings.warn(
        "dsopt: gradients are enabled, so its kernels are off and Inductor compiles this model. "
        "For inference call it under torch.inference_mode() or torch.no_grad().",
        stacklevel=2,
    )


def _fall_back(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    choices: Options,
    mode: str | None,
    report: GraphReport,
    reason: str | None,
) -> Callable:
    report.fallback = reason
    if choices.fallback == "inductor":
        try:
            return inductor(gm, example_inputs, mode)
        except Exception as error:  # say, no C++ compiler on this machine: the graph itself still runs
            if choices.strict:
                raise
            report.fallback = (
                f"{reason}; Inductor failed: {type(error).__name__}: {str(error).splitlines()[0]}"
            )
    return eager(gm)

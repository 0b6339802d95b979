"""Runs cases: every kernel and baseline of an op is checked against its reference, then timed in turns with the rest.

Rows and problems are plain data, which the tables, the plot, JSON and comparisons read. A row is one way to compute
one case; a problem is a way that was refused, wrong, failed or absent, with the reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch

from dsopt.bench.baselines import Absent, baselines
from dsopt.bench.cases import Case, Sizes
from dsopt.bench.ceilings import Ceilings
from dsopt.bench.clock import medians
from dsopt.bench.counts import count
from dsopt.bench.data import Rotation, cache_bytes, tensors
from dsopt.capture import flat, map_tensors
from dsopt.op import REFERENCE, backends, disabled_backends, kernels
from dsopt.testing import poisoned

# a baseline that takes longer than this a call is left out where no size is smaller
SLOW = 1.0
# the truth is computed in float64 where the arguments have fewer elements, else in float32
_WIDE_ELEMENTS = 1 << 27
# sets of arguments whose bytes and FLOPs are counted, for the mean
_COUNTED = 32


@dataclass(frozen=True)
class Choice:
    """Which ways to compute are measured. backends, baselines: names, None for all of them. seconds: of one case.
    cold: every call finds its arguments in memory, not in a cache.

    Raises ValueError naming what there is for an unknown name.
    """

    backends: Sequence[str] | None = None
    baselines: Sequence[str] | None = None
    seconds: float = 3.0
    cold: bool = True

    def __post_init__(self):
        disabled_backends()
        _known("backend", self.backends, [name for name in backends() if name != REFERENCE])
        _known("baseline", self.baselines, [*dict.fromkeys(b.column for b in baselines()[0])])


def _known(kind: str, given: Sequence[str] | None, known: Sequence[str]) -> None:
    for name in given or ():
        if name not in known:
            raise ValueError(f"unknown {kind} {name!r}; known {kind}s: {', '.join(known)}")


@dataclass(frozen=True)
class Way:
    """One callable that computes a case. column: the baseline column it belongs to, "" for a kernel of dsopt."""

    name: str
    fn: Callable
    column: str = ""


class Runner:
    """Measures cases one by one; a baseline that turned out slow is left out of later cases that are no smaller."""

    def __init__(self, choice: Choice, ceilings: Ceilings, step: Callable[[str, str], None]):
        self.choice, self.ceilings, self.step = choice, ceilings, step
        self.slow: dict[tuple[str, str, str], tuple[Sizes, str]] = {}

    @torch.inference_mode()
    def measure(self, case: Case, where: Mapping[str, Any]) -> tuple[list[dict], list[dict]]:
        """(rows, problems) of one case. where: preset, dtype, device and threads, which go into each of them."""
        here = {"op": case.op.name, "case": case.name, **vars(case.sizes), **where, "note": case.note}
        problems: list[dict] = []

        def problem(name: str, what: str, reason: str) -> None:
            problems.append({**here, "name": name, "what": what, "reason": reason})

        args = case.make(0)
        truth = _Truth(case, args)
        good: dict[Way, float] = {}
        for way in [*self._kernels(case, args, problem), *self._baselines(case, args, problem)]:
            self.step(case.title, f"{way.name}, first call")
            try:
                error = truth.error(way)
            except Exception as failure:  # one way's failure is a finding, not the end of the run
                problem(way.name, "failed", _line(failure))
                continue
            if not error <= truth.allowed:
                problem(way.name, "wrong", f"off by {error:.1e}, allowed {truth.allowed:.0e}: not timed")
                continue
            good[way] = error
            self._look_at_pace(case, way, args)
        if not good:
            return [], problems
        self.step(case.title, f"{len(good)} ways in turns")
        rows = self._timed(case, args, good, truth.results, where)
        return [{**here, **row} for row in rows], problems

    def _kernels(self, case: Case, args: tuple, problem: Callable) -> Iterator[Way]:
        found, broken = kernels(case.op.name)
        asked = self.choice.backends
        for refusal in broken:
            if asked is None or refusal.kernel.partition(".")[0] in asked:
                problem(refusal.kernel, "refused", refusal.reason)
        disabled = disabled_backends()
        for kernel in found:
            if asked is not None and kernel.backend not in asked:
                continue
            try:
                reason = "disabled by DSOPT_DISABLE" if kernel.backend in disabled else kernel.refuses(args)
                planned = None if reason is not None else kernel.plan(*args)
            except Exception as error:
                problem(kernel.label, "failed", _line(error))
                continue
            if planned is None:
                problem(kernel.label, "refused", reason)
            else:
                yield Way(kernel.label, planned)

    def _baselines(self, case: Case, args: tuple, problem: Callable) -> Iterator[Way]:
        found, broken = baselines()
        for name, reason in broken:
            problem(name, "absent", reason)
        for baseline in found:
            if baseline.ops is not None and case.op.name not in baseline.ops:
                continue
            if self.choice.baselines is not None and baseline.column not in self.choice.baselines:
                continue
            if reason := self._too_slow(case, baseline.name):
                problem(baseline.name, "absent", reason)
                continue
            try:
                yield Way(baseline.name, baseline.build(case, args), baseline.column)
            except Absent as absent:
                problem(baseline.name, "absent", str(absent))

    def _look_at_pace(self, case: Case, way: Way, args: tuple) -> None:
        if not way.column:
            return
        start = time.perf_counter()
        way.fn(*args)
        if (seconds := time.perf_counter() - start) > SLOW:
            self.slow[case.op.name, case.name, way.name] = (
                case.sizes,
                f"left out: it took {seconds:.1f} s for {case.title}",
            )

    def _too_slow(self, case: Case, name: str) -> str | None:
        sizes, reason = self.slow.get((case.op.name, case.name, name), (None, None))
        if sizes is None or any(vars(case.sizes)[key] < size for key, size in vars(sizes).items()):
            return None
        return reason

    def _timed(
        self,
        case: Case,
        args: tuple,
        good: Mapping[Way, float],
        results: Sequence[torch.Tensor],
        where: Mapping[str, Any],
    ) -> Iterator[dict]:
        device = where["device"]
        touched, _ = count(case.op, args, results)
        cache = cache_bytes(device) if self.choice.cold else 0
        sets = Rotation(case.make, args, touched, cache, len(good))
        counted = [count(case.op, other, results) for other in sets.sets[:_COUNTED]]
        moved, flops = (mean(column) for column in zip(*counted))
        times = medians({way.name: way.fn for way in good}, sets, self.choice.seconds, device)
        for way, error in good.items():
            timing = times[way.name]
            share = self.ceilings.share(timing.seconds, moved, flops, where["dtype"], where["threads"])
            yield {
                "name": way.name,
                "column": way.column,
                **vars(timing),
                "bytes": moved,
                "flops": flops,
                "bound": share and share[0],
                "share": share and share[1],
                "error": error,
            }


class _Truth:
    """What a case's first arguments should give, as far as its witness looks."""

    def __init__(self, case: Case, args: tuple):
        self.op, self.args = case.op, args
        self.small, self.pick = case.witness(args)
        given = tensors(self.small)
        wide = torch.float64 if sum(x.numel() for x in given) < _WIDE_ELEMENTS else torch.float32
        widened = map_tensors(lambda x: x.to(wide) if x.is_floating_point() else x, self.small)
        self.want = flat(self.op.reference(*widened))
        self.allowed = self.op.tolerance[given[0].dtype]
        self.results: list[torch.Tensor] = []

    def error(self, way: Way) -> float:
        """How far a way's results are from the truth; a kernel's are written over memory that held NaN."""
        if way.column:  # poison is a global state that compiled code would be compiled again for
            self.results = flat(way.fn(*self.args))
        else:
            with poisoned():
                self.results = flat(way.fn(*self.args))
        return self.op.error(self.small, self.pick(self.results), self.want)


def _line(error: BaseException) -> str:
    """The first line of an error, short enough for a table."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:160]

"""Each rewritten site of a model against eager, on the user's own inputs."""

from __future__ import annotations

import contextvars
import copy
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.fx import GraphModule, Interpreter, Node

from dsopt.backend import Options, _not_ours
from dsopt.capture import capture, module_path
from dsopt.effects import bases, written
from dsopt.lower import lower
from dsopt.numerics import relative_l2
from dsopt.pipeline import run_pipeline

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
TOLERANCE |= {torch.complex128: 1e-6, torch.complex64: 1e-4}


@dataclass(frozen=True)
class SiteError:
    """One rewritten site, or an output or a write of a graph (its kernel is then "graph").

    error: |dsopt - eager| / |eager|; tolerance: what is allowed for its dtype.
    """

    site: str
    kernel: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance


class VerifyError(AssertionError):
    """A site is farther from eager than its tolerance; `result` has all of them."""

    def __init__(self, result: Verification):
        bad = [s for s in result.sites if not s.ok]
        lines = [f"  {s.site} ({s.kernel}): error {s.error:.2e} > {s.tolerance:.0e}" for s in bad]
        super().__init__("\n".join([f"{len(bad)} of {len(result.sites)} sites differ from eager:", *lines]))
        self.result = result


@dataclass
class Verification:
    """The sites of one `verify` call in the order they run."""

    sites: list[SiteError] = field(default_factory=list)

    @property
    def worst(self) -> float:
        return max((s.error for s in self.sites), default=0.0)

    def to_dict(self) -> dict:
        rows = [
            {"site": s.site, "kernel": s.kernel, "error": s.error, "tolerance": s.tolerance, "ok": s.ok}
            for s in self.sites
        ]
        return {"sites": rows, "worst": self.worst}

    def __rich__(self) -> Table:
        table = Table(title="Relative error against eager, site by site", title_justify="left")
        for column in ("site", "kernel", "error", "tolerance"):
            table.add_column(column, overflow="fold")
        for s in self.sites:
            error = f"{s.error:.2e}" if s.ok else f"[bold red]{s.error:.2e}[/]"
            table.add_row(s.site, s.kernel, error, f"{s.tolerance:.0e}")
        return table

    def __str__(self) -> str:
        out = io.StringIO()
        Console(file=out, width=110).print(self)
        return out.getvalue().rstrip()


@dataclass(frozen=True)
class _Comparison:
    """One `verify` call, as the graphs that run in it see it. own: where the model's own tensors lie."""

    result: Verification
    tolerance: float | None
    own: frozenset[int]

    def add(self, site: str, kernel: str, got: Any, want: Any) -> None:
        allowed = 0.0
        if isinstance(want, torch.Tensor) and (want.is_floating_point() or want.is_complex()):
            allowed = TOLERANCE.get(want.dtype, 0.0) if self.tolerance is None else self.tolerance
        self.result.sites.append(SiteError(site, kernel, _error(got, want), allowed))


_CURRENT: contextvars.ContextVar[_Comparison] = contextvars.ContextVar("verification")


def verify(
    model: torch.nn.Module,
    inputs: Any,
    *,
    tolerance: float | None = None,
    options: Mapping[str, Any] | None = None,
) -> Verification:
    """Runs a model once through dsopt and through eager, and compares at every rewritten site.

    inputs: a mapping of keyword arguments, a sequence of positional ones, or one tensor. They are deep-copied
        first, so caches among them do not advance; nor do the model's own buffers.
    tolerance: largest relative L2 error of a site; by default 1e-4 in float32 and 3e-2 in bfloat16.
    options: as for torch.compile's dsopt backend.
    Each site is given eager's values, so what is compared is the site's own error, not what piled up before
    it, and a router that turns on a last bit does not turn the rest. Then "output i" of each fused graph and
    "write of input i" compare what the rest of the graph makes of them; integers and masks exactly, NaN and
    inf by their places. Raises VerifyError if a site fails, ValueError if dsopt rewrote nothing or cannot
    take a graph of the model.
    """
    choices = Options.of(options)
    args, kwargs = _call_arguments(copy.deepcopy(inputs))
    comparison = _Comparison(Verification(), tolerance, _storages(model))
    token = _CURRENT.set(comparison)
    try:
        with torch.no_grad():
            torch.compile(model.forward, backend=_Comparing(choices))(*args, **kwargs)
    finally:
        _CURRENT.reset(token)
    result = comparison.result
    if not result.sites:
        raise ValueError(
            "dsopt rewrote nothing in this model, so there is nothing to verify; see dsopt.report"
        )
    if not all(s.ok for s in result.sites):
        raise VerifyError(result)
    return result


def _storages(model: torch.nn.Module) -> frozenset[int]:
    """Where the tensors of a model lie: parameters, buffers and plain attributes."""
    attributes = [v for m in model.modules() for v in vars(m).values() if isinstance(v, torch.Tensor)]
    tensors = [*model.parameters(), *model.buffers(), *attributes]
    return frozenset(t.untyped_storage().data_ptr() for t in tensors)


def _error(got: Any, want: Any) -> float:
    """Distance of two values: relative L2 between floats, the part that differs of whatever else; inf if unlike."""
    if not isinstance(want, torch.Tensor):
        return 0.0 if got == want else float("inf")
    if not isinstance(got, torch.Tensor) or (got.shape, got.dtype) != (want.shape, want.dtype):
        return float("inf")
    if want.is_complex():
        got, want = torch.view_as_real(got.resolve_conj()), torch.view_as_real(want.resolve_conj())
    if not want.is_floating_point():
        return (got != want).double().mean().item() if want.numel() else 0.0
    finite = want.isfinite()
    if not finite.all():
        special = torch.where(finite, 0, want).nan_to_num(1, 2, 3)
        if not torch.equal(torch.where(got.isfinite(), 0, got).nan_to_num(1, 2, 3), special):
            return float("inf")
        got, want = got[finite], want[finite]
    return relative_l2(got, want)


def _call_arguments(inputs: Any) -> tuple[Sequence, Mapping]:
    if isinstance(inputs, torch.Tensor):
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, (list, tuple)):
        return inputs, {}
    raise TypeError(f"inputs must be a mapping, a sequence or a tensor, got {type(inputs).__name__}")


class _Comparing:
    """The backend behind `verify`. Equal for equal options, so that a second verify finds the first one's graphs."""

    def __init__(self, choices: Options):
        self.choices = choices
        self.__name__ = "dsopt_verify"

    def __eq__(self, other):
        return isinstance(other, _Comparing) and self.choices == other.choices

    def __hash__(self):
        return hash((_Comparing, str(self.choices)))

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]):
        reason = _not_ours(gm, example_inputs)
        if reason is None:
            try:
                return self._comparison(gm, example_inputs)
            except (
                Exception
            ) as error:  # Dynamo would bury it; raised when the graph runs, it arrives as it is
                reason = f"{type(error).__name__}: {error}"

        def refuse(*args):
            raise ValueError(
                f"dsopt cannot take a graph of this model, so there is nothing to verify: {reason}"
            )

        return refuse

    def _comparison(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable:
        fused = capture(gm, example_inputs)
        eager = GraphModule(fused, copy.deepcopy(fused.graph))
        mutated = _mutated(eager)
        run_pipeline(fused, self.choices.passes, "verify", self.choices.strict)
        is_rewritten = bool(lower(fused, self.choices.prefer()))
        wanted = {n.meta["origin"] for n in fused.graph.nodes if "origin" in n.meta and _kernel_of(n)}

        def copies(args):
            return [x.clone() if i in mutated else x for i, x in enumerate(args)]

        def run(*args):
            comparison = _CURRENT.get()
            written_by_eager = copies(args)
            with torch.random.fork_rng():
                outputs = gm(*written_by_eager)
            if is_rewritten:
                keep = _Keep(eager, wanted)
                with torch.random.fork_rng():
                    keep.run(*copies(args))
                written_by_dsopt = copies(args)
                with torch.random.fork_rng():
                    ours = _Compare(fused, keep.values, comparison).run(*written_by_dsopt)
                for i, (got, want) in enumerate(zip(ours, outputs, strict=True)):
                    comparison.add(f"output {i}", "graph", got, want)
                for i in sorted(mutated):
                    before, got, want = args[i], written_by_dsopt[i], written_by_eager[i]
                    if not (torch.equal(before, got) and torch.equal(before, want)):
                        comparison.add(f"write of input {i}", "graph", got, want)
            for i in mutated:  # later graphs of this call go on from there
                if args[i].untyped_storage().data_ptr() not in comparison.own:
                    args[i].copy_(written_by_eager[i])
            return outputs

        return run


def _mutated(gm: GraphModule) -> set[int]:
    """Indices of the inputs that a graph may write to.

    Any write may reach any tensor through views that nothing declares; parameters are too large to copy for that.
    """
    targets = [t for n in gm.graph.nodes for t in written(n)]
    base_of = bases(gm)
    surely = {base for t in targets for base in base_of[t]}
    return {
        i
        for i, p in enumerate(gm.graph.find_nodes(op="placeholder"))
        if targets
        and isinstance(val := p.meta.get("val"), torch.Tensor)
        and (p in surely or not isinstance(val, torch.nn.Parameter))
    }


def _kernel_of(node: Node) -> str | None:
    """Label of the kernel a node's value comes from: its own call, or one whose result it picks or permutes."""
    while node.op == "call_function" and getattr(node.target, "__module__", "") != "dsopt.kernels":
        if not node.args or not isinstance(node.args[0], Node) or len(node.all_input_nodes) != 1:
            return None
        node = node.args[0]
    return node.target.__name__ if node.op == "call_function" else None


class _Keep(Interpreter):
    """Runs a graph and keeps copies of the values of some nodes."""

    def __init__(self, gm: GraphModule, names: set[str]):
        super().__init__(gm)
        self.names, self.values = names, {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.name in self.names and isinstance(value, torch.Tensor):
            self.values[n.name] = value.clone()
        return value


class _Compare(Interpreter):
    """Runs a rewritten graph; where a kernel's value has an eager counterpart, compares and goes on with eager's."""

    def __init__(self, gm: GraphModule, expected: Mapping[str, torch.Tensor], comparison: _Comparison):
        super().__init__(gm)
        self.expected, self.comparison = expected, comparison

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        want, kernel = self.expected.get(n.meta.get("origin")), _kernel_of(n)
        if want is None or kernel is None or not isinstance(value, torch.Tensor):
            return value
        self.comparison.add(module_path(n) or n.name, kernel, value, want)
        return want

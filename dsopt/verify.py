"""Each rewritten site of a model against eager, on the user's own inputs."""

from __future__ import annotations

import contextvars
import copy
import io
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.fx import GraphModule, Interpreter, Node

from dsopt.backend import Options, _not_ours
from dsopt.capture import capture, flat, module_path
from dsopt.effects import bases, written
from dsopt.lower import fuses, lower
from dsopt.numerics import relative_l2
from dsopt.op import Op, largest_error
from dsopt.pipeline import run_pipeline
from dsopt.rewrite import is_float_cast

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

    def __str__(self) -> str:
        sign = "<=" if self.ok else ">"
        return f"{self.site} ({self.kernel}): error {self.error:.2e} {sign} {self.tolerance:.0e}"


class VerifyError(AssertionError):
    """A site is farther from eager than its tolerance; `result` has all of them."""

    def __init__(self, result: Verification):
        bad = [s for s in result.sites if not s.ok]
        count = f"{len(bad)} of {len(result.sites)} sites differ from eager:"
        super().__init__("\n".join([f"first departs at {bad[0]}", count, *(f"  {s}" for s in bad)]))
        self.result = result


@dataclass
class Verification:
    """The sites of one `verify` call in the order they run."""

    sites: list[SiteError] = field(default_factory=list)

    @property
    def worst(self) -> float:
        return max((s.error for s in self.sites), default=0.0)

    @property
    def first(self) -> SiteError | None:
        """The first site that departs from eager; None if none does."""
        return next((s for s in self.sites if not s.ok), None)

    def to_dict(self) -> dict:
        """{"sites": [...], "worst": error, "first": the first site that departs or None}."""
        rows = [
            {"site": s.site, "kernel": s.kernel, "error": s.error, "tolerance": s.tolerance, "ok": s.ok}
            for s in self.sites
        ]
        return {"sites": rows, "worst": self.worst, "first": self.first.site if self.first else None}

    def __rich__(self) -> Table:
        table = Table(title="Relative error against eager, site by site", title_justify="left")
        for column in ("site", "kernel", "error", "tolerance"):
            table.add_column(column, overflow="fold")
        for s in self.sites:
            error = f"{s.error:.2e}" if s.ok else f"[bold red]{s.error:.2e}[/]"
            table.add_row(s.site, s.kernel, error, f"{s.tolerance:.0e}")
        if self.first is not None:
            table.caption, table.caption_justify = f"first departs at {self.first}", "left"
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

    def add(self, site: str, kernel: str, error: float, *want: Any) -> None:
        """Keeps the error of some values; the dtypes of what eager has say how large it may be."""
        numbers = [
            x.dtype for x in want if isinstance(x, torch.Tensor) and (x.is_floating_point() or x.is_complex())
        ]
        allowed = max((TOLERANCE.get(dtype, 0.0) for dtype in numbers), default=0.0)
        if numbers and self.tolerance is not None:
            allowed = self.tolerance
        self.result.sites.append(SiteError(site, kernel, error, allowed))


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
    inf by their places. The results of an op with its own `Op.error` are compared by it, all of a call at once.
    Raises VerifyError if a site fails, ValueError if dsopt rewrote nothing or cannot
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
        is_rewritten = fuses(fused)
        lower(fused, self.choices.prefer())
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
                    comparison.add(f"output {i}", "graph", _error(got, want), want)
                for i in sorted(mutated):
                    before, got, want = args[i], written_by_dsopt[i], written_by_eager[i]
                    if not (torch.equal(before, got) and torch.equal(before, want)):
                        comparison.add(f"write of input {i}", "graph", _error(got, want), want)
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
    while node.op == "call_function" and "op" not in node.meta:
        if not node.args or not isinstance(node.args[0], Node) or len(node.all_input_nodes) != 1:
            return None
        node = node.args[0]
    return _label(node) if node.op == "call_function" else None


def _label(node: Node) -> str:
    """The kernel's name in the table."""
    return node.meta["kernel"].replace(".", "_")


def _results(node: Node) -> list[list[Node]]:
    """For each result of an op's call, the nodes that stand for it: the call itself, or what reads it out of a tuple.

    Casts belong to it: a node that is only read by its cast gives way to that one.
    """
    if not isinstance(node.meta["val"], (tuple, list)):
        return [[_cast(node)]]
    readers = [u for u in node.users if u.target is operator.getitem]
    return [[_cast(u) for u in readers if u.args[1] == i] for i in range(len(node.meta["val"]))]


def _cast(node: Node) -> Node:
    while (
        "origin" not in node.meta and len(node.users) == 1 and is_float_cast(user := next(iter(node.users)))
    ):
        node = user
    return node


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
    """Runs a rewritten graph; where a kernel's value has an eager counterpart, compares and goes on with eager's.

    An op that says itself how far its results are apart (`Op.error`) is asked, with its arguments, about all of
    them at once: experts may come in another order, which no result tells alone.
    """

    def __init__(self, gm: GraphModule, expected: Mapping[str, torch.Tensor], comparison: _Comparison):
        super().__init__(gm)
        self.expected, self.comparison = expected, comparison
        # nodes that stand for a result compared along with its op's others -> eager's value, None to keep their own
        self.settled: dict[Node, torch.Tensor | None] = {}

    def run_node(self, n: Node) -> Any:
        value, op = super().run_node(n), n.meta.get("op")
        if n in self.settled:
            return value if self.settled[n] is None else self.settled[n]
        if op is not None and op.error is not largest_error:
            return self._together(n, op, value)
        want, kernel = self._eager(n), _kernel_of(n)
        if want is None or kernel is None or not isinstance(value, torch.Tensor):
            return value
        self.comparison.add(module_path(n) or n.name, kernel, _error(value, want), want)
        return want

    def _eager(self, node: Node) -> torch.Tensor | None:
        return self.expected.get(node.meta.get("origin"))

    def _together(self, n: Node, op: Op, value: Any) -> Any:
        """Compares all results of a call with eager's; with those of the op's reference where eager has only some.

        Results that the graph reads and eager has no counterpart of keep the others' values from being eager's:
        one of another order would not fit them.
        """
        args, _ = self.fetch_args_kwargs_from_env(n)
        got = flat(value)
        ends = _results(n)
        self.settled |= {end: self._eager(end) for nodes in ends for end in nodes}
        want = [self._eager(nodes[0]) if nodes else None for nodes in ends]
        site, kernel = module_path(n) or n.name, _label(n)
        if all(x is not None for x in want):
            rounded = [x.to(nodes[0].meta["val"].dtype) for x, nodes in zip(got, ends, strict=True)]
            alike = all((a.shape, a.dtype) == (b.shape, b.dtype) for a, b in zip(rounded, want, strict=True))
            error = op.error(args, rounded, want) if alike else float("inf")
            self.comparison.add(site, kernel, error, *want)
        else:
            true = flat(op.reference(*args))
            self.comparison.add(site, f"{kernel} against its reference", op.error(args, got, true), *true)
        if any(self.settled[end] is None for nodes in ends for end in nodes):
            self.settled |= dict.fromkeys((end for nodes in ends for end in nodes), None)
            return value
        given = [x if y is None else y.to(x.dtype) for x, y in zip(got, want, strict=True)]
        return given if isinstance(value, (tuple, list)) else given[0]

"""Each rewritten site of a model against eager, on the user's own inputs."""

from __future__ import annotations

import contextvars
import copy
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.fx import GraphModule, Interpreter, Node

from dsopt.backend import Options
from dsopt.capture import capture, module_path
from dsopt.effects import written
from dsopt.lower import lower
from dsopt.pipeline import run_pipeline
from dsopt.testing import relative_l2

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class SiteError:
    """One rewritten site. error: |dsopt - eager| / |eager|; tolerance: what is allowed for its dtype."""

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


_CURRENT: contextvars.ContextVar[tuple[Verification, float | None]] = contextvars.ContextVar("verification")


def verify(
    model: torch.nn.Module,
    inputs: Any,
    *,
    tolerance: float | None = None,
    options: Mapping[str, Any] | None = None,
) -> Verification:
    """Runs a model once through dsopt and through eager, and compares at every rewritten site.

    inputs: a mapping of keyword arguments, a sequence of positional ones, or one tensor. They are deep-copied
        first, so caches among them do not advance.
    tolerance: largest relative L2 error of a site; by default 1e-4 in float32 and 3e-2 in bfloat16.
    options: as for torch.compile's dsopt backend.
    Each site is given eager's values, so what is compared is the site's own error, not what piled up before
    it, and a router that turns on a last bit does not turn the rest. Raises VerifyError if a site fails,
    ValueError if dsopt rewrote nothing.
    """
    choices = Options.of(options)
    args, kwargs = _call_arguments(copy.deepcopy(inputs))
    result = Verification()
    token = _CURRENT.set((result, tolerance))
    try:
        with torch.no_grad():
            torch.compile(model.forward, backend=_Comparing(choices))(*args, **kwargs)
    finally:
        _CURRENT.reset(token)
    if not result.sites:
        raise ValueError(
            "dsopt rewrote nothing in this model, so there is nothing to verify; see dsopt.report"
        )
    if not all(s.ok for s in result.sites):
        raise VerifyError(result)
    return result


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
        fused = capture(gm, example_inputs)
        eager = GraphModule(fused, copy.deepcopy(fused.graph))
        run_pipeline(fused, self.choices.passes, "verify")
        lower(fused, self.choices.prefer())
        mutated = {i for i, p in enumerate(fused.graph.find_nodes(op="placeholder")) if _is_written(fused, p)}
        wanted = {n.meta["origin"] for n in fused.graph.nodes if "origin" in n.meta and _kernel_of(n)}

        def run(*args):
            result, tolerance = _CURRENT.get()
            keep = _Keep(eager, wanted)
            keep.run(*(x.clone() if i in mutated else x for i, x in enumerate(args)))
            return _Compare(fused, keep.values, result, tolerance).run(*args)

        return run


def _is_written(gm: GraphModule, placeholder: Node) -> bool:
    """Conservative: any write in the graph may reach it through views."""
    return (
        any(written(n) for n in gm.graph.nodes)
        and isinstance(placeholder.meta.get("val"), torch.Tensor)
        and (not isinstance(placeholder.meta["val"], torch.nn.Parameter))
    )


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

    def __init__(
        self, gm: GraphModule, expected: Mapping[str, torch.Tensor], result: Verification, tolerance
    ):
        super().__init__(gm)
        self.expected, self.result, self.tolerance = expected, result, tolerance

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        want, kernel = self.expected.get(n.meta.get("origin")), _kernel_of(n)
        if want is None or kernel is None or not isinstance(value, torch.Tensor):
            return value
        allowed = TOLERANCE.get(want.dtype, 0.0) if self.tolerance is None else self.tolerance
        site = module_path(n) or n.name
        self.result.sites.append(SiteError(site, kernel, relative_l2(value, want), allowed))
        return want

"""What dsopt did to a model: which sites were fused, which kernel each got, and why the rest was not.

A compiled graph keeps its `GraphReport` alive; `report(model)` finds the graphs through the parameters and
buffers they were called with, so it works for `model.compile`, `torch.compile(model)` and shallow copies alike.
"""

from __future__ import annotations

import io
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field

import torch
from rich.console import Console, Group
from rich.table import Table

from dsopt.capture import WeakIdKeyDictionary, over_recompile_limit
from dsopt.census import FAMILIES
from dsopt.explain import Explanation, Ran
from dsopt.op import Refusal
from dsopt.rewrite import Log


class Runs:
    """How often a graph ran; its first call is `add`."""

    def __init__(self):
        self.total = 0

    def add(self) -> None:
        self.total += 1


@dataclass
class KernelUse:
    """One kernel's work in one graph. sites: how often it stands there; runs: how often the graph ran."""

    op: str
    backend: str
    kernel: str
    refused: tuple[Refusal, ...] = ()
    sites: int = 0
    refreshers: list[Callable[[], object]] = field(default_factory=list)
    runs: Runs = field(default_factory=Runs)

    @property
    def calls(self) -> int:
        return self.sites * self.runs.total


@dataclass(frozen=True)
class Prepared:
    """What `dsopt.compile` found before tracing: where, what, and why it was left as it is, or None if it was not."""

    site: str
    what: str
    refused: str | None = None


@dataclass(eq=False)
class GraphReport:
    """One compiled graph.

    counted: places of the sites by family, counted independently of the passes; ran: what runs where instead.
    cached: whether it came from the cache of an earlier process; uncached: why it could not be kept there.
    not_replayed: why its runs are not made again by address (`dsopt.replay`).
    """

    name: str
    nodes_before: int = 0
    nodes_after: int = 0
    passes: list[Log] = field(default_factory=list)
    kernels: list[KernelUse] = field(default_factory=list)
    counted: dict[str, list[str]] = field(default_factory=dict)
    ran: list[Ran] = field(default_factory=list)
    compile_s: float = 0.0
    cached: bool = False
    uncached: str | None = None
    not_replayed: str | None = None
    fallback: str | None = None

    def matched(self) -> dict[str, tuple[int, int]]:
        """(matched, total) by family. What a pass matched is a site even where the census saw none."""
        hits = Counter(hit["family"] for log in self.passes for hit in log.hits)
        return {f: (hits[f], max(hits[f], len(self.counted.get(f, ())))) for f in FAMILIES}

    def to_dict(self) -> dict:
        return {
            "name": self.name,
            "nodes_before": self.nodes_before,
            "nodes_after": self.nodes_after,
            "passes": [{"name": p.name, "rewrites": p.rewrites, "misses": p.misses} for p in self.passes],
            "kernels": [
                {
                    "op": k.op,
                    "sites": k.sites,
                    "calls": k.calls,
                    "backend": k.backend,
                    "kernel": k.kernel,
                    "refused": [{"kernel": r.kernel, "reason": r.reason} for r in k.refused],
                }
                for k in self.kernels
            ],
            "compile_s": round(self.compile_s, 3),
            "cached": self.cached,
            "uncached": self.uncached,
            "not_replayed": self.not_replayed,
        }


class Report:
    """The graphs of a model, or of all models. `print(report)` shows tables; `to_dict()` is for programs."""

    def __init__(
        self,
        graphs: Iterable[GraphReport],
        recompile_limit: int | None = None,
        prepared: Iterable[Prepared] = (),
    ):
        self.graphs = sorted(graphs, key=lambda g: (len(g.name), g.name))  # graph9 before graph10
        self.prepared = list(prepared)
        self._limit = recompile_limit

    @property
    def matched(self) -> dict[str, list[int]]:
        """Family -> [matched, total], summed over graphs: a site in two graphs counts twice."""
        sums = {f: [0, 0] for f in FAMILIES}
        for graph in self.graphs:
            for family, counts in graph.matched().items():
                sums[family] = [a + b for a, b in zip(sums[family], counts, strict=True)]
        return sums

    @property
    def cached(self) -> int:
        """How many graphs came from the cache of an earlier process."""
        return sum(graph.cached for graph in self.graphs)

    @property
    def fallbacks(self) -> list[str]:
        """Why graphs, or calls that no graph fits, run as PyTorch spelled them."""
        reasons = [f"{g.name}: {g.fallback}" for g in self.graphs if g.fallback is not None]
        if self._limit is not None:
            reasons.append(
                f"recompile limit reached: Dynamo compiled one function {self._limit} times and runs eager what "
                "fits none of these graphs; raise torch._dynamo.config.recompile_limit"
            )
        return reasons

    def to_dict(self) -> dict:
        """{"graphs": [...], "prepared": [...], "matched": {family: [matched, total]}, "fallbacks": [reason]}."""
        return {
            "graphs": [g.to_dict() for g in self.graphs],
            "prepared": [asdict(p) for p in self.prepared],
            "matched": self.matched,
            "fallbacks": self.fallbacks,
        }

    def explain(self) -> Explanation:
        """Module by module what was fused, which kernel runs it, and what was not and why."""
        return Explanation(self.graphs)

    def __rich__(self) -> Group:
        parts: list[Table | str] = []
        if self.prepared:
            parts.append(
                Table("site", "found", "result", title="Prepared before tracing", title_justify="left")
            )
            for p in self.prepared:
                parts[0].add_row(
                    p.site, p.what, "batched" if p.refused is None else f"left alone: {p.refused}"
                )
        if not self.graphs:
            none = "No graph was compiled by dsopt. A model compiles on its first call, not before."
            return Group(*parts, none)
        sites = Table(title="Sites matched", title_justify="left")
        for column in ("graph", "nodes", "compile", *FAMILIES):
            sites.add_column(column)
        for g in self.graphs:
            counts = (f"{a}/{b}" if b else "-" for a, b in g.matched().values())
            seconds = f"{g.compile_s:.2f} s" + ", cached" * g.cached
            sites.add_row(g.name, f"{g.nodes_before} → {g.nodes_after}", seconds, *counts)
        kernels = Table(title="Kernels", title_justify="left")
        for column in ("graph", "op", "kernel", "sites", "calls", "refused before it"):
            kernels.add_column(column, overflow="fold")
        for g in self.graphs:
            for k in g.kernels:
                refused = "\n".join(f"{r.kernel}: {r.reason}" for r in k.refused)
                kernels.add_row(g.name, k.op, k.kernel, str(k.sites), str(k.calls), refused)
        parts += [sites, kernels]
        misses = [(g.name, p.name, m) for g in self.graphs for p in g.passes for m in p.misses]
        if misses:
            missed = Table(title="Near misses", title_justify="left")
            for column in ("graph", "pass", "site", "reason"):
                missed.add_column(column, overflow="fold")
            for graph, name, m in misses:
                missed.add_row(graph, name, m["site"], m["reason"])
            parts.append(missed)
        return Group(*parts, *(f"[yellow]fallback[/] {reason}" for reason in self.fallbacks))

    def __str__(self) -> str:
        out = io.StringIO()
        Console(file=out, width=110).print(self)
        return out.getvalue().rstrip()


class GraphIndex:
    """Which graphs read which tensors. Holds neither: a graph goes when Dynamo drops its compiled code."""

    def __init__(self):
        self._graphs: weakref.WeakSet[GraphReport] = weakref.WeakSet()
        self._by_tensor = WeakIdKeyDictionary()
        self._count = 0

    def new(self) -> GraphReport:
        """An empty report with the next name, known to the index while someone holds it."""
        graph = GraphReport(f"graph{self._count}")
        self._count += 1
        self._graphs.add(graph)
        return graph

    def reads(self, graph: GraphReport, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            readers = self._by_tensor.get(tensor)
            if readers is None:
                readers = self._by_tensor[tensor] = weakref.WeakSet()
            readers.add(graph)

    def find(self, model: torch.nn.Module | None) -> set[GraphReport]:
        if model is None:
            return set(self._graphs)
        return self.reading([*model.parameters(), *model.buffers()])

    def reading(self, tensors: Iterable[torch.Tensor]) -> set[GraphReport]:
        return {g for t in tensors if (readers := self._by_tensor.get(t)) is not None for g in readers}


GRAPHS = GraphIndex()


def report(model: torch.nn.Module | None = None) -> Report:
    """What dsopt did to a model so far, or to every model of this process.

    A graph is listed once it was compiled, which the first call with new shapes does; `calls` counts up as
    the model runs. Instances of one class share graphs where Dynamo finds that they fit, and then each one's
    report lists the graph with the calls of all. A graph that reads none of the model's tensors (after a graph
    break, say) is listed by `report()` alone. Graphs that were dropped (`torch.compiler.reset()`) are gone.
    """
    forwards = None if model is None else [m.forward for m in model.modules()]
    prepared = getattr(model, "dsopt_prepared", ())
    return Report(GRAPHS.find(model), over_recompile_limit(forwards), prepared)

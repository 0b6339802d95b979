"""Module by module: what was fused, which kernel runs it, what was not, and why.

The places come from three sources that know nothing of each other: the lowered graph says what runs where, the
census what there was to fuse, and the passes' logs what they made of it.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby, takewhile
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.table import Table
from torch.fx import GraphModule

from dsopt.capture import module_path

if TYPE_CHECKING:
    from dsopt.report import GraphReport

PYTORCH = "PyTorch"
_HEAVY = frozenset(
    "linear matmul mm bmm addmm baddbmm einsum _grouped_mm grouped_mm grouped_mm_fallback "
    "scaled_dot_product_attention".split()
)


@dataclass(frozen=True)
class Ran:
    """One call of a lowered graph: an op's, or a matrix product's or attention's that is PyTorch's own.

    path: the module it stands in; family: of the site it is, or ""; kernel: its label, or "PyTorch".
    """

    path: str
    family: str
    op: str
    kernel: str


def ran(gm: GraphModule) -> list[Ran]:
    """The calls of a lowered graph that take the time, in order."""
    found = []
    for node in gm.graph.nodes:
        packet = getattr(node.target, "overloadpacket", None)
        if (op := node.meta.get("op")) is not None:
            found.append(Ran(module_path(node), op.family or "", op.name, node.meta["kernel"]))
        elif packet is not None and packet.__name__ in _HEAVY:
            found.append(Ran(module_path(node), "", str(packet), PYTORCH))
    return found


@dataclass(frozen=True)
class Line:
    """Some alike things of one module, or of alike modules such as "layers.1-26".

    times: how many in each module; reason: why it was not fused, "" if it was.
    """

    path: str
    family: str
    op: str
    kernel: str
    reason: str = ""
    times: int = 1


class Explanation:
    """Tables of `Line`s, one for each graph; graphs that are alike share one."""

    def __init__(self, graphs: Iterable[GraphReport]):
        self.graphs = list(graphs)

    def to_dict(self) -> list[dict]:
        """[{"name": graph, "fallback": reason or None, "counted": {family: [site]}, "hits": [...], "lines": [...]}]."""
        return [
            {
                "name": g.name,
                "fallback": g.fallback,
                "counted": g.counted,
                "hits": [hit for log in g.passes for hit in log.hits],
                "lines": [asdict(line) for line in explained(g)],
            }
            for g in self.graphs
        ]

    def __rich__(self) -> Group:
        tables = []
        for (lines, fallback), graphs in groupby(self.graphs, lambda g: (explained(g), g.fallback)):
            names = ", ".join(g.name for g in graphs)
            tables.append(
                _table(names, lines) if fallback is None else f"{names}: [yellow]fallback[/] {fallback}"
            )
        return Group(*tables)

    def __str__(self) -> str:
        out = io.StringIO()
        Console(file=out, width=130).print(self)
        return out.getvalue().rstrip()


def _table(title: str, lines: Sequence[Line]) -> Table:
    table = Table(title=f"{title}: what runs in each module", title_justify="left")
    for column in ("module", "site", "op", "kernel", "times", "not fused because"):
        table.add_column(column, overflow="fold")
    for _, layer in groupby(lines, lambda line: layer_of(line.path)):
        *above, last = [(x.path, x.family, x.op, x.kernel, str(x.times), x.reason) for x in layer]
        for row in above:
            table.add_row(*row)
        table.add_row(*last, end_section=True)
    return table


def explained(graph: GraphReport) -> list[Line]:
    """The lines of one graph, alike modules whose names are numbers in a row put together."""
    root = _Module()
    for line in [*(Line(r.path, r.family, r.op, r.kernel) for r in graph.ran), *_unfused(graph)]:
        root.at(line.path).lines.append(line)
    root.gather()
    return list(root.walk(()))


def layer_of(path: str) -> str:
    """The path up to its first number, which is the layer's: "model.layers.3"; "" if there is none."""
    parts = path.split(".")
    numbers = [i for i, part in enumerate(parts) if part[:1].isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else ""


def _path(site: str) -> str:
    return site.rpartition(":")[0]


def _unfused(graph: GraphReport) -> Iterator[Line]:
    """Sites that were counted but not matched, each with the near miss that tells why, then other near misses."""
    hits = [hit for log in graph.passes for hit in log.hits]
    misses = [(log, miss) for log in graph.passes for miss in log.misses]
    for family, sites in graph.counted.items():
        paths = [_path(site) for site in sites]
        for hit in hits:
            if hit["family"] == family and (i := _nearest(_path(hit["site"]), paths)) is not None:
                del paths[i]
        ours = [(log, miss) for log, miss in misses if miss.get("family", log.family) == family]
        for path in paths:
            reason = "no pass recognised it"
            if (i := _nearest(path, [_path(miss["site"]) for _, miss in ours])) is not None:
                log, miss = ours[i]
                reason = f"{log.name}: {miss['reason']}"
                if miss["site"]:  # else it is about the whole graph, and tells of the next site too
                    misses.remove(ours.pop(i))
            yield Line(path, family, "", "", reason)
    for log, miss in misses:
        family = miss.get("family", log.family) or ""
        yield Line(_path(miss["site"]), family, "", "", f"{log.name}: {miss['reason']}")


def _nearest(path: str, candidates: Sequence[str]) -> int | None:
    """Which candidate of the same layer has the most of the path in common; one without a path fits any."""
    alike = [
        (_common(path, other), -i)
        for i, other in enumerate(candidates)
        if layer_of(other) == layer_of(path) or not path or not other
    ]
    return -max(alike)[1] if alike else None


def _common(path: str, other: str) -> int:
    """How many leading names two paths share."""
    pairs = zip(path.split("."), other.split("."), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


@dataclass
class _Module:
    """A module's lines and its children's."""

    lines: list[Line] = field(default_factory=list)
    children: dict[str, _Module] = field(default_factory=dict)

    def at(self, path: str) -> _Module:
        module = self
        for name in filter(None, path.split(".")):
            module = module.children.setdefault(name, _Module())
        return module

    def gather(self) -> None:
        """Puts children together whose names are consecutive numbers and whose lines are the same."""
        for child in self.children.values():
            child.gather()
        numbers = sorted(int(name) for name in self.children if name.isdigit())
        runs: list[list[int]] = []
        for n in numbers:
            before = self.children[str(n - 1)] if runs and runs[-1][-1] == n - 1 else None
            if before is not None and before.key() == self.children[str(n)].key():
                runs[-1].append(n)
            else:
                runs.append([n])
        for run in runs:
            first, *others = [self.children.pop(str(n)) for n in run]
            self.children[f"{run[0]}-{run[-1]}" if others else str(run[0])] = first

    def key(self) -> tuple:
        """What two modules that are alike have in common; names of nodes in a reason may differ by their number."""
        lines = [(x.family, x.op, x.kernel, re.sub(r"\d+", "", x.reason)) for x in self.lines]
        return sorted(lines), [(name, child.key()) for name, child in sorted(self.children.items())]

    def walk(self, above: tuple[str, ...]) -> Iterator[Line]:
        path = ".".join(above)
        merged = Counter((x.family, x.op, x.kernel, x.reason) for x in self.lines)
        for (family, op, kernel, reason), times in merged.items():
            yield Line(path, family, op, kernel, reason, times)
        for name, child in self.children.items():
            yield from child.walk((*above, name))

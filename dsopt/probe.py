"""Small parts of a graph, run on numbers to see what they compute.

Which experts a router takes, or which token a row of a grouped GEMM is, can be spelled in endless ways. A pass
proposes a meaning from a few landmarks, then runs the part of the graph in question on random inputs of its
real shape and compares: what was spelled otherwise than expected shows as another result, not as a wrong match.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from dsopt.capture import hint
from dsopt.effects import Order


class Unknowable(Exception):
    """A part of a graph that cannot be run: it needs an input nobody gave, or a size nobody knows."""


class Probe:
    """Runs parts of one graph; see the module."""

    def __init__(self, gm: GraphModule):
        self._order = Order(gm)

    def part(self, targets: Sequence[Node], leaves: Sequence[Node], at: Node | None = None) -> list[Node]:
        """What computes `targets` from `leaves`, in the graph's order: the nodes above and the writes to them.

        at: where the targets are read, the last of them by default; later writes are left out.
        """
        last, stops = at or max(targets), set(leaves)
        found: set[Node] = set()
        stack = [n for n in targets if n not in stops]
        while stack:
            node = stack.pop()
            if node in found:
                continue
            found.add(node)
            if _is_size(node):
                continue
            if node.op != "call_function":
                raise Unknowable(f"{node.name} is an input of the graph")
            base = self._order.base(node)
            writes = [w for w, memory in self._order.writes if memory & base and (w < last or w is last)]
            stack += [n for n in (*node.all_input_nodes, *writes) if n not in stops]
        return sorted(found)

    def run(
        self, targets: Sequence[Node], leaves: Mapping[Node, torch.Tensor], at: Node | None = None
    ) -> list[torch.Tensor]:
        """The values that `targets` have at `at` when `leaves` are the given CPU tensors.

        Raises Unknowable if the targets also depend on something else, or if a call fails on these values.
        """
        values: dict[Node, Any] = {n: x.clone() for n, x in leaves.items()}
        for node in self.part(targets, list(leaves), at):
            values[node] = size(node.meta["val"]) if _is_size(node) else _call(node, values)
        return [values[n] for n in targets]

    def fingerprint(self, targets: Sequence[Node], leaves: Sequence[Node], at: Node | None = None) -> str:
        """A text that two parts of a graph have in common only if they compute the same, sizes included."""
        names = {n: f"leaf{i}{tuple(map(size, n.meta['val'].shape))}" for i, n in enumerate(leaves)}
        lines = []
        for i, node in enumerate(self.part(targets, leaves, at)):
            if _is_size(node):
                names[node] = str(size(node.meta["val"]))
                continue
            lines.append(f"{node.target}{map_arg((node.args, dict(node.kwargs)), names.__getitem__)}")
            names[node] = f"n{i}"
        return "\n".join([*lines, *(names[n] for n in targets)])


def size(value: Any) -> int:
    """A size as a number: its own, or for a symbol the one of the inputs that the graph was traced with."""
    found = value if isinstance(value, int) else hint(value)
    if found is None:
        raise Unknowable(f"nothing is known of the size {value}")
    return found


def random_like(
    node: Node, generator: torch.Generator, dtype: torch.dtype = torch.float32, spread: float = 1.0
) -> torch.Tensor:
    """Normal random numbers in the shape of a node's value."""
    shape = [size(s) for s in node.meta["val"].shape]
    return torch.randn(shape, generator=generator, dtype=dtype, device="cpu") * spread


def _is_size(node: Node) -> bool:
    return isinstance(node.meta.get("val"), (int, torch.SymInt))


def _call(node: Node, values: Mapping[Node, Any]) -> Any:
    def here(value: Any) -> Any:
        return torch.device("cpu") if isinstance(value, torch.device) else value

    args = tuple(here(a) for a in map_arg(node.args, values.__getitem__))
    kwargs = {k: here(a) for k, a in map_arg(node.kwargs, values.__getitem__).items()}
    try:
        with torch.no_grad():
            return node.target(*args, **kwargs)
    except Exception as error:
        raise Unknowable(f"{node.target} failed: {error}") from error

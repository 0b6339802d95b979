"""The order of reads and writes of the caller's tensors, which no pass may change.

A cache update is a write in the middle of the graph: reads before it and after it see different data. For
each thing the graph leaves behind (its outputs and its writes), `effects` tells which versions of which
written tensors it was computed from, and `check_effects` compares that before and after each pass. It cannot
tell a read from another one that the same result also makes, so every pass asks `Order.moved` before a rewrite.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from dsopt.capture import storage_key

aten = torch.ops.aten

# calls that look at a tensor's size, dtype or device, never at its values
METADATA_ONLY = {
    aten.new_empty.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.empty_like.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.sym_size.int,
    aten.sym_numel.default,
    aten.sym_stride.int,
}
# (tensor, how many times it had been written) pairs
Versions = frozenset[tuple[str, int]]


class EffectError(RuntimeError):
    """A pass moved a read across a write of the same tensor, or lost, added or reordered a write."""


@dataclass(frozen=True)
class Effects:
    """writes: names of the inputs written, in order. sinks: what each write and each output read of them."""

    writes: tuple[str, ...]
    sinks: tuple[Versions, ...]


def overload(node: Node) -> Any:
    """The ATen operator that a call stands for, also where lowering spelled it otherwise."""
    return node.meta.get("aten", node.target)


def written(node: Node) -> list[Node]:
    """The arguments a call writes to."""
    if node.op != "call_function" or not hasattr(overload(node), "_schema"):
        return []
    found = []
    for i, arg in enumerate(overload(node)._schema.arguments):
        if arg.alias_info is None or not arg.alias_info.is_write:
            continue
        value = node.args[i] if i < len(node.args) and not arg.kwarg_only else node.kwargs.get(arg.name)
        found += [x for x in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(x, Node)]
    return found


def is_impure(node: Node) -> bool:
    """True for what dead-code removal must keep: inputs, outputs, writes, and calls of unknown effect."""
    if node.op in ("placeholder", "output") or written(node):
        return True
    if node.op != "call_function":
        return node.op != "get_attr"
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return getattr(node.target, "__module__", "") not in ("_operator", "operator", "math")
    return not schema.returns or draws(node)


def draws(node: Node) -> bool:
    """True for calls that advance the random generator; an attention without dropout may but does not."""
    if torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    dropout = [i for i, arg in enumerate(node.target._schema.arguments) if arg.name == "dropout_p"]
    return not any(
        (node.args[i] if i < len(node.args) else node.kwargs.get("dropout_p", 0.0)) == 0 for i in dropout
    )


def bases(gm: GraphModule) -> dict[Node, frozenset[Node]]:
    """For each node, the inputs or fresh tensors its storage may be part of."""
    found: dict[Node, frozenset[Node]] = {}
    for node in gm.graph.nodes:
        found[node] = frozenset().union(*(found[a] for a in _aliased(node))) or frozenset({node})
    return found


def _aliased(node: Node) -> Iterator[Node]:
    if node.op != "call_function":
        return
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        yield from _picked_from(node)
        return
    if node.target in MAYBE_VIEWS and _dtype(node) != _dtype(node.args[0]):
        return  # another dtype takes memory of its own
    for i, arg in enumerate(schema.arguments):
        if arg.alias_info is None:
            continue
        value = node.args[i] if i < len(node.args) and not arg.kwarg_only else node.kwargs.get(arg.name)
        yield from (
            x for x in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(x, Node)
        )
    # composite ops whose schema promises nothing but which return their input when there is nothing to do
    if node.target in MAYBE_VIEWS and _dtype(node) == _dtype(node.args[0]):
        yield node.args[0]
    # and whatever the trace has seen to share memory with an input
    memory = _memory(node)
    yield from (source for source in node.all_input_nodes if memory & _memory(source))


def _picked_from(node: Node) -> Iterator[Node]:
    """What getitem (or arithmetic on sizes) shares memory with.

    The results of one call do not share memory with each other, unless they are views of its input.
    """
    source = node.args[0] if node.args else None
    if (
        node.target is not operator.getitem
        or not isinstance(source, Node)
        or any(True for _ in _aliased(source))
    ):
        yield from node.all_input_nodes
        return
    same = [user for user in source.users if user.target is operator.getitem and user.args[1] == node.args[1]]
    yield from (first for first in [min(same)] if first is not node)


def _memory(node: Node) -> set[int]:
    value = node.meta.get("val")
    flat = value if isinstance(value, (list, tuple)) else [value]
    return {storage_key(x) for x in flat if isinstance(x, torch.Tensor)}


def _dtype(node: Node) -> torch.dtype | None:
    return getattr(node.meta.get("val"), "dtype", None)


MAYBE_VIEWS = {
    overload
    for packet in (
        aten.reshape,
        aten.contiguous,
        aten.to,
        aten.flatten,
        aten.type_as,
        aten.dropout,
        aten.expand_as,
    )
    for overload in (getattr(packet, name) for name in packet.overloads())
}


class Order:
    """Whether reads may be gathered at one place of a graph: the writes, and what memory each touches.

    Made once per pass; nodes that the pass adds later are understood too: one that took another's place holds
    the memory that the other's views still name.
    """

    def __init__(self, gm: GraphModule):
        self._bases = bases(gm)
        self._origins = {n.meta.get("origin", n.name): n for n in gm.graph.nodes}
        self.writes = [
            (n, frozenset().union(*(self._bases[t] for t in targets)))
            for n in gm.graph.nodes
            if (targets := written(n))
        ]

    def base(self, node: Node) -> frozenset[Node]:
        """As `bases` says of the node."""
        if node not in self._bases:
            stood_for = self._origins.get(node.meta.get("origin"), node)
            fresh = frozenset({node}) if stood_for is node else self.base(stood_for)
            self._bases[node] = frozenset().union(*map(self.base, _aliased(node))) or fresh
        return self._bases[node]

    def is_written(self, node: Node) -> bool:
        """True when the graph writes to the node's memory, whenever."""
        return any(targets & self.base(node) for _, targets in self.writes)

    def is_written_before(self, node: Node, at: Node) -> bool:
        """True when something before `at` writes to the node's memory."""
        base = self.base(node)
        return any(write < at and targets & base for write, targets in self.writes)

    def moved(self, nodes: Iterable[Node], at: Node) -> Node | None:
        """A write that would change what `nodes` read if they all read at `at` instead; None if there is none."""
        for node in nodes if self.writes else ():
            first, last = (node, at) if node < at else (at, node)
            read = frozenset().union(*map(self.base, node.all_input_nodes))
            for write, targets in self.writes:
                if first < write < last and targets & read:
                    return write
        return None


def between(root: Node, leaves: Iterable[Node]) -> list[Node]:
    """The nodes that `root` is computed with from `leaves`, root included and leaves left out."""
    stops, found, stack = set(leaves), [], [root]
    while stack:
        node = stack.pop()
        if node not in stops and node.op == "call_function":
            stops.add(node)
            found.append(node)
            stack.extend(node.all_input_nodes)
    return found


def effects(gm: GraphModule) -> Effects:
    """The reads and writes of whatever a graph writes to, in the order they happen."""
    base_of = bases(gm)
    inputs = dict.fromkeys(n for n in gm.graph.nodes if n.op in ("placeholder", "get_attr"))
    names = {n: n.name for n in gm.graph.nodes} | {n: f"input {i}" for i, n in enumerate(inputs)}
    version: dict[Node, int] = {}
    for node in gm.graph.nodes:
        for target in written(node):
            version.update(dict.fromkeys(base_of[target], 0))

    content: dict[Node, Versions] = {}  # what the data in a fresh tensor was computed from
    writes: list[str] = []
    sinks: list[Versions] = []

    def seen(node: Node) -> Versions:
        """What is read by reading a node's data now."""
        read = frozenset().union(*(content.get(b, frozenset()) for b in base_of[node]))
        return read | {(names[b], version[b]) for b in base_of[node] if b in version}

    for node in gm.graph.nodes:
        if node.op == "output":
            outputs = node.args[0] if isinstance(node.args[0], (list, tuple)) else [node.args[0]]
            sinks += [seen(x) if isinstance(x, Node) else frozenset() for x in outputs]
            continue
        targets = written(node)
        is_view = not targets and any(True for _ in _aliased(node))
        if is_view or node.target in METADATA_ONLY or node in inputs:
            continue
        read = frozenset().union(*(seen(x) for x in node.all_input_nodes))
        for base in frozenset().union(*(base_of[t] for t in targets)):
            version[base] += 1
            if base in inputs:
                writes.append(names[base])
                sinks.append(read)
            else:
                content[base] = content.get(base, frozenset()) | read
        if not targets:
            content[node] = read
    return Effects(tuple(writes), tuple(sinks))


def check_effects(before: Effects, after: Effects, name: str) -> Effects:
    """Returns `after`. Raises EffectError if pass `name` changed writes or let a sink see other versions."""
    if before.writes != after.writes:
        raise EffectError(f"pass {name} changed the writes from {before.writes} to {after.writes}")
    # a fresh tensor that the pass made itself has no versions to compare with
    tensors = {tensor for sink in before.sinks for tensor, _ in sink} | set(before.writes)
    for i, (old, new) in enumerate(zip(before.sinks, after.sinks, strict=True)):
        if other := sorted(v for v in new - old if v[0] in tensors):
            raise EffectError(f"pass {name} lets sink {i} read {other}, which it did not read before")
    return after

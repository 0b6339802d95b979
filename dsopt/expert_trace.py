"""A module's forward as an fx graph, traced along with the values of one call.

Symbolic tracing stops where Python asks for a value: `if counts[i] == 0`, `for e in hit`. Here every node is
computed as it is made, so such a question gets the answer of the call that is traced, and is noted.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node, Proxy, Tracer
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

# facts about a tensor that do not follow from how many tokens it holds
_STATIC = ("dtype", "device", "ndim")


@dataclass
class Trace:
    """A traced call.

    values: what each node computed, as it is after the call. writes: the storages that a node wrote to.
    decided: nodes whose value Python asked for. snapshots: (after, node, copy): what the tensor of `node` held
    once the node `after` had run.
    """

    graph: Graph
    values: dict[Node, Any] = field(default_factory=dict)
    writes: dict[Node, set[int]] = field(default_factory=dict)
    decided: list[Node] = field(default_factory=list)
    snapshots: list[tuple[Node, Node, torch.Tensor]] = field(default_factory=list)

    def dependencies(self) -> dict[Node, set[Node]]:
        """What each node needs before it: its arguments, and who last wrote to what it reads."""
        needs: dict[Node, set[Node]] = {}
        writer: dict[int, Node] = {}
        for node in self.graph.nodes:
            read = storages([self.values.get(n) for n in node.all_input_nodes])
            needs[node] = {*node.all_input_nodes, *(writer[s] for s in read if s in writer)}
            writer.update(dict.fromkeys(self.writes.get(node, ()), node))
        return needs


def storages(values: Any) -> set[int]:
    """Where the tensors among some values lie."""
    return {x.untyped_storage()._cdata for x in tree_leaves(values) if isinstance(x, torch.Tensor)}


def reachable(start: Sequence[Node], needs: Mapping[Node, set[Node]], static: bool = True) -> set[Node]:
    """The nodes that `start` needs, itself included. static: also through a tensor's dtype or device."""
    found, todo = set(), list(start)
    while todo:
        node = todo.pop()
        is_static = node.target is getattr and node.args[1] in _STATIC
        if node not in found and (static or not is_static):
            found.add(node)
            todo.extend(needs[node])
    return found


def trace(module: torch.nn.Module, inputs: Mapping[str, Any], num_values: int) -> Trace:
    """Traces `type(module).forward` on inputs given by the names of its parameters.

    Submodules are not traced into: each call of one is a node. Tensors of num_values floating numbers get
    snapshots. Whatever the forward keeps in the module stays there. Raises TypeError, or whatever the forward
    raises, where it cannot be traced.
    """
    tracer = _Tracer(inputs, num_values)
    tracer.trace(module)
    return tracer.made


class _Tracer(Tracer):
    proxy_buffer_attributes = True

    def __init__(self, inputs: Mapping[str, Any], num_values: int):
        super().__init__()
        self.inputs, self.num_values = inputs, num_values
        self.computing = False
        self.made: Trace

    def trace(self, root, concrete_args=None):
        self.made = Trace(Graph())
        self.made.graph = super().trace(root, concrete_args)
        return self.made.graph

    def is_leaf_module(self, m, module_qualified_name):
        return True

    def call_module(self, m, forward, args, kwargs):
        if self.computing:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr, attr_val, parameter_proxy_cache):
        if self.computing:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node):
        return _Value(node, self)

    def create_proxy(self, kind, target, args, kwargs, *rest, **options):
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **options)
        value = self.value_of(proxy.node)
        return value if value is None or isinstance(value, str) else proxy

    def decide(self, proxy: Proxy) -> Any:
        self.made.decided.append(proxy.node)
        return self.made.values[proxy.node]

    def to_bool(self, obj):
        return bool(self.decide(obj))

    def value_of(self, node: Node) -> Any:
        """Computes a node that was just made."""
        made = self.made
        args, kwargs = map_arg((node.args, node.kwargs), made.values.__getitem__)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        versions = [x._version for x in given]
        self.computing = True
        try:
            made.values[node] = value = self._compute(node, args, kwargs)
        finally:
            self.computing = False
        written = storages([x for x, v in zip(given, versions, strict=True) if x._version != v])
        if written:
            made.writes[node] = written
        for other in (node, *(n for n in made.values if written and storages(made.values[n]) & written)):
            x = made.values[other]
            if isinstance(x, torch.Tensor) and x.is_floating_point() and x.numel() == self.num_values:
                made.snapshots.append((node, other, x.detach().clone()))
        return value

    def _compute(self, node: Node, args: tuple, kwargs: dict) -> Any:
        if node.op == "placeholder":
            name = node.target.lstrip("*")
            if name not in self.inputs:
                raise TypeError(f"its forward takes {name!r}, which is not understood")
            return self.inputs[name]
        if node.op == "get_attr":
            return operator.attrgetter(node.target)(self.root)
        if node.op == "call_module":
            return self.root.get_submodule(node.target)(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], node.target)(*args[1:], **kwargs)
        return node.target(*args, **kwargs)


class _Value(Proxy):
    """A proxy whose value is known: Python's questions are answered and noted, in-place operators stay in place."""

    def __getattr__(self, name):
        if callable(getattr(self.tracer.made.values[self.node], name)):
            return super().__getattr__(name)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __iter__(self):
        return iter([self[i] for i in range(len(self))])

    def __len__(self):
        value = self.tracer.made.values[self.node]
        # how many dimensions or results there are is static, how many rows a tensor has is not
        return len(value) if isinstance(value, (tuple, list)) else len(self.tracer.decide(self))

    def __index__(self):
        # a size is no question: where torch is given one, it stays a node
        if not _from_data(self.node):
            raise TypeError(f"{self.node.name} is a size, used as a number")
        return operator.index(self.tracer.decide(self))

    def __int__(self):
        return int(self.tracer.decide(self))

    def __float__(self):
        return float(self.tracer.decide(self))

    def __setitem__(self, index, value):
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


def _from_data(node: Node) -> bool:
    """True for a number that was read from a tensor, False for a size."""
    if node.op == "call_method" and node.target in ("item", "tolist", "numpy"):
        return True
    if node.target is getattr or (node.op == "call_method" and node.target in ("size", "numel", "dim")):
        return False
    return node.op in ("placeholder", "call_module") or any(map(_from_data, node.all_input_nodes))


def _in_place(function):
    def method(self, other):
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name in ("iadd", "isub", "imul", "itruediv", "iand", "ior"):
    setattr(_Value, f"__{_name}__", _in_place(getattr(operator, _name)))

"""Graphs as JSON and back: nodes by name, targets by their public names, nothing that could run code of its own.

Plain values stand for themselves; what JSON cannot tell apart is an object of one key, its type.
"""

from __future__ import annotations

import functools
import importlib
import math
import operator
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import sympy
import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import _get_qualified_name
from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod

from dsopt.capture import expression, module_path

_OPS = frozenset({"aten", "prims", "dsopt"})
_MODULES = {"operator": operator, "math": math, "torch": torch}
_ROOTS = frozenset({"torch", "_operator", "operator", "math", "builtins"})
_TORCH_TYPES = {
    "dtype": torch.dtype,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
}


MAX_CONSTANT = 1024
_RELATIONS = (sympy.Eq, sympy.Ne, sympy.Lt, sympy.Le, sympy.Gt, sympy.Ge)
_TERMS = {
    term.__name__: term for term in (*_RELATIONS, sympy.Add, sympy.Mul, sympy.Pow, FloorDiv, Mod, PythonMod)
}


class Refused(Exception):
    """Why a graph cannot be written down."""


def encode(value: Any, index: Mapping[Node, int]) -> Any:
    """An argument of a node as JSON. Raises Refused for what has no spelling here."""
    if value is None or isinstance(value, (bool, str)) or type(value) in (int, float):
        return value
    if isinstance(value, Node):
        return {"node": index[value]}
    if isinstance(value, tuple):
        return {"tuple": [encode(v, index) for v in value]}
    if isinstance(value, list):
        return [encode(v, index) for v in value]
    if isinstance(value, dict):
        return {"dict": [[encode(k, index), encode(v, index)] for k, v in value.items()]}
    if isinstance(value, slice):
        return {"slice": [encode(v, index) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if value is Ellipsis:
        return {"ellipsis": None}
    for name, kind in _TORCH_TYPES.items():
        if isinstance(value, kind):
            return {name: str(value).removeprefix("torch.")}
    raise Refused(f"an argument of type {type(value).__name__}")


def decode(value: Any, nodes: list[Node]) -> Any:
    """What `encode` was given. Raises ValueError for what it never gives."""
    if isinstance(value, list):
        return [decode(v, nodes) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, given),) = value.items()
    if kind == "node":
        return nodes[given]
    if kind == "tuple":
        return tuple(decode(v, nodes) for v in given)
    if kind == "dict":
        return {decode(k, nodes): decode(v, nodes) for k, v in given}
    if kind == "slice":
        return slice(*(decode(v, nodes) for v in given))
    if kind == "device":
        return torch.device(given)
    if kind == "complex":
        return complex(*given)
    if kind == "ellipsis":
        return Ellipsis
    if isinstance(found := getattr(torch, given, None), _TORCH_TYPES[kind]):
        return found
    raise ValueError(f"{given!r} is no {kind}")


@functools.cache
def target_name(target: Callable) -> str:
    """The public name of an operator or function; Refused for one whose meaning its name does not pin down.

    Operators of other namespaces bear the version of the package that has the namespace's name.
    """
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        namespace = str(target).replace("::", ".").partition(".")[0]
        return f"torch.ops.{target}{_release(namespace)}"
    try:
        name = _get_qualified_name(target)
    except (AttributeError, RuntimeError):
        raise Refused(f"a call of {target!r}, which has no public name") from None
    root, _, _ = name.partition(".")
    if "." not in name:
        return f"builtins.{name}"
    if root not in _ROOTS or _look_up(name) is not target:
        raise Refused(f"a call of {name}, whose code is not PyTorch's")
    return name


def _release(namespace: str) -> str:
    if namespace in _OPS:
        return ""
    try:
        return f" of {namespace} {version(namespace)}"
    except PackageNotFoundError:
        raise Refused(f"an operator of the namespace {namespace}, whose version is unknown") from None


def _look_up(name: str) -> Any:
    """What a dotted name stands for, or None."""
    root, *attributes = name.split(".")
    found = importlib.import_module(root)
    for attribute in attributes:
        found = getattr(found, attribute, None)
    return found


@functools.cache
def _spelling(target: Callable) -> str:
    """The name of a rewritten graph's target, from which `_target` finds it; Refused if it would not."""
    if isinstance(target, torch._ops.OpOverload):
        name = str(target)
    else:
        module = getattr(target, "__module__", "").removeprefix("_")
        name = f"{module}:{getattr(target, '__name__', '')}"
    try:
        found = _target(name)
    except (ValueError, AttributeError):
        found = None
    if found is not target:
        raise Refused(f"a call of {target} in the rewritten graph")
    return name


@functools.cache
def _target(name: str) -> Callable:
    """The operator "aten.add.Tensor" or function "operator:mul"; ValueError or AttributeError if there is none."""
    if ":" in name:
        module, _, function = name.partition(":")
        if module not in _MODULES or function.startswith("_"):
            raise ValueError(f"unknown function {name!r}")
        return getattr(_MODULES[module], function)
    namespace, packet, overload = name.split(".")
    if namespace not in _OPS:
        raise ValueError(f"unknown operator {name!r}")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload)


def described(graph: Graph) -> list:
    """All that a traced graph says, for a key: targets with their versions, arguments, names, modules."""
    index = {node: i for i, node in enumerate(graph.nodes)}
    found = []
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module"):
            raise Refused(f"the graph holds {node.target}, whose contents are not in the key")
        target = target_name(node.target) if node.op == "call_function" else str(node.target)
        arguments = encode(node.args, index), encode(node.kwargs, index)
        found.append([node.op, node.name, target, *arguments, module_path(node)])
    return found


def dumped(gm: GraphModule) -> dict[str, list]:
    """A rewritten graph as JSON; `values` says of each node what kind of value it has. Raises Refused."""
    index = {node: i for i, node in enumerate(gm.graph.nodes)}
    nodes, values = [], []
    for node in gm.graph.nodes:
        is_view = torch.Tag.inplace_view in getattr(node.target, "tags", ())
        if is_view and node.target is not torch.ops.aten.detach_.default:
            raise Refused(f"{node.name} changes a tensor's sizes in place")
        if node.op == "call_function":
            target = _spelling(node.target)
        elif node.op == "get_attr":
            target = _constant(getattr(gm, node.target, None), node.target)
        else:
            target = str(node.target)
        arguments = encode(node.args, index), encode(node.kwargs, index)
        nodes.append([node.op, node.name, target, *arguments, module_path(node)])
        values.append(None if node.op == "get_attr" else _kind(node.meta.get("val")))
    return {"nodes": nodes, "values": values}


def _constant(value: Any, name: str) -> list:
    """A small tensor that the traced code itself made, as JSON: name, dtype, sizes, numbers."""
    if type(value) is not torch.Tensor or value.device.type != "cpu" or value.numel() > MAX_CONSTANT:
        raise Refused(f"the rewritten graph holds {name}, which is no small tensor on the CPU")
    if value.layout is not torch.strided or value.is_complex() or value.is_quantized:
        raise Refused(f"the rewritten graph holds {name} of {value.dtype}")
    numbers = value.flatten().tolist()
    return [name, encode(value.dtype, {}), list(value.shape), numbers]


def loaded(stored: Mapping[str, list], inputs: list[Any], mode: Any) -> GraphModule:
    """The graph of `dumped`, each node's value made anew by running it on the inputs' values.

    mode: the fake mode that the inputs are of. Equal calls share one value, so values do not tell which tensors share
    memory. Raises ValueError where the values are of another kind than they were.
    """
    graph, nodes, root = Graph(), [], torch.nn.Module()
    for op, name, target, args, kwargs, path in stored["nodes"]:
        if op == "get_attr":
            target, dtype, sizes, numbers = target
            constant = torch.tensor(numbers, dtype=decode(dtype, [])).reshape(sizes)
            setattr(root, target, constant)
        called = _target(target) if op == "call_function" else target
        node = graph.create_node(op, called, decode(args, nodes), decode(kwargs, nodes), name)
        if node.name != name:
            raise ValueError(f"two nodes are called {name}")
        if op == "get_attr":
            node.meta["val"] = mode.from_tensor(constant, static_shapes=True)
        if path:
            node.meta["nn_module_stack"] = {"": (path, None)}
        nodes.append(node)
    places = graph.find_nodes(op="placeholder")
    for node, value in zip(places, inputs, strict=True):
        node.meta["val"] = value
    with mode:
        _run(nodes)
    for node, kind in zip(nodes, stored["values"], strict=True):
        if kind is not None and _kind(node.meta.get("val")) != kind:
            raise ValueError(f"{node.name} has another value than it had: {_kind(node.meta.get('val'))}")
    graph.lint()
    return GraphModule(root, graph)


def _run(nodes: list[Node]) -> None:
    """Gives each call its value from the values of its arguments."""
    made: dict[tuple, Any] = {}  # most layers are alike
    for node in nodes:
        if node.op == "call_function":
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            call = node.target, _facts(args), _facts(kwargs)
            if call not in made:
                made[call] = node.target(*args, **kwargs)
            node.meta["val"] = made[call]


def encode_condition(condition: Any) -> Any:
    """A condition on symbolic sizes as JSON: symbols by name, terms as lists. Raises Refused for other terms."""
    if condition.is_Symbol:
        return condition.name
    if condition.is_Integer:
        return int(condition)
    if (name := type(condition).__name__) not in _TERMS:
        raise Refused(f"a shape guard holds {name}")
    return [name, *map(encode_condition, condition.args)]


def decode_condition(given: Any, symbols: Mapping[str, Any]) -> Any:
    """The condition that `encode_condition` was given, in these symbols."""
    if isinstance(given, list):
        return _TERMS[given[0]](*(decode_condition(term, symbols) for term in given[1:]))
    return symbols[given] if isinstance(given, str) else sympy.Integer(given)


def _kind(value: Any) -> Any:
    """dtype, device and static sizes of a tensor; the type of another value; lists item by item."""
    if isinstance(value, torch.Tensor):
        sizes = [size if isinstance(size, int) else "?" for size in value.shape]
        return [str(value.dtype), str(value.device), *sizes]
    if isinstance(value, (list, tuple)):
        return [_kind(v) for v in value]
    return type(value).__name__.removeprefix("Sym").lower()


def _facts(value: Any) -> Any:
    """What a call's results depend on as far as their sizes, dtypes and strides go, to look it up by."""
    if isinstance(value, torch.Tensor):
        numbers = [*value.shape, *value.stride(), value.storage_offset()]
        kind = type(value), value.dtype, value.device, value.requires_grad, value.is_conj(), value.is_neg()
        return *kind, *(x if isinstance(x, int) else expression(x) for x in numbers)
    if isinstance(value, (list, tuple)):
        return tuple(_facts(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _facts(v)) for k, v in value.items())
    if isinstance(value, slice):
        return _facts((slice, value.start, value.stop, value.step))
    is_symbolic = isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))
    return type(value), expression(value) if is_symbolic else value

"""f(x) ... f(x) -> one call, where nothing writes in between to what it reads or to what it gives."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from dsopt.effects import MAYBE_VIEWS, is_impure
from dsopt.rewrite import Log, replace, val


def run(gm: GraphModule, log: Log) -> None:
    order, first = log.order, {}
    (output,) = gm.graph.find_nodes(op="output")
    # two results of the caller's may not become one, not even two views of one memory
    results = set(output.all_input_nodes)
    theirs = frozenset().union(*map(order.base, results))
    for node in list(gm.graph.nodes):
        if not _is_known(node) or is_impure(node) or node in results or isinstance(val(node), (tuple, list)):
            continue
        key = _key(node)
        earlier = first.get(key)
        if earlier is None or not _is_same(earlier, node, log, theirs):
            first[key] = node
            continue
        log.hit()
        replace(node, earlier)
        gm.graph.erase_node(node)


def _is_known(node: Node) -> bool:
    """Whether the call is of PyTorch or dsopt: what others' operators do besides computing nobody knows."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace in ("aten", "dsopt")


def _is_same(earlier: Node, node: Node, log: Log, theirs: frozenset[Node]) -> bool:
    """Whether the later of two equal calls gives what the earlier one gave, for as long as either is read."""
    if _is_view(node):
        return True
    memory = log.order.base(earlier) | log.order.base(node)
    if memory & theirs or any(log.order.is_written(n) for n in (earlier, node)):
        return False
    return log.moved([earlier, node], earlier) is None and log.moved([earlier, node], node) is None


def _is_view(node: Node) -> bool:
    """Whether the result is memory of an argument, always."""
    returns = node.target._schema.returns
    return len(returns) == 1 and returns[0].alias_info is not None and node.target not in MAYBE_VIEWS


def _key(node: Node) -> tuple:
    return node.target, _frozen(node.args), _frozen(node.kwargs)


def _frozen(value: Any) -> Any:
    """A hashable stand-in for an argument, which tells 1 from 1.0 and True, and 0.0 from -0.0."""
    if isinstance(value, float):
        return float, value.hex()
    if isinstance(value, (list, tuple)):
        return tuple(map(_frozen, value))
    if isinstance(value, dict):
        return tuple((key, _frozen(v)) for key, v in sorted(value.items()))
    return type(value), value

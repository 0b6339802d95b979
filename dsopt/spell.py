"""The rest of a lowered graph, spelled by the shortest way into ATen.

A call of an `OpOverload` goes through Python and then through the parser of schemas: about twice the time of the
same operator as a function of `torch`, whose arguments are parsed natively. At one token that is most of what a view
costs, and half of a graph's calls are views.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from dsopt.rewrite import aten

Tensor = torch.Tensor

# overload -> function that takes up to four of the same arguments in the same order
_SAME: Mapping[Any, Callable] = {
    aten.add.Tensor: operator.add,
    aten.sub.Tensor: operator.sub,
    aten.mul.Tensor: operator.mul,
    aten.div.Tensor: operator.truediv,
    aten.neg.default: operator.neg,
    aten.eq.Tensor: operator.eq,
    aten.ge.Tensor: operator.ge,
    aten.gt.Tensor: operator.gt,
    aten.le.Tensor: operator.le,
    aten.lt.Tensor: operator.lt,
    aten.embedding.default: torch.embedding,
    aten.polar.default: torch.polar,
    aten.cos.default: torch.cos,
    aten.sin.default: torch.sin,
    aten.select.int: torch.select,
    aten.unsqueeze.default: torch.unsqueeze,
    aten.squeeze.dim: torch.squeeze,
    aten.transpose.int: torch.transpose,
    aten.permute.default: torch.permute,
    aten.view_as_real.default: torch.view_as_real,
    aten.view_as_complex.default: torch.view_as_complex,
    aten.reshape.default: torch.reshape,
    aten.type_as.default: Tensor.type_as,
    aten.index_copy_.default: Tensor.index_copy_,
    aten.add_.Tensor: Tensor.add_,
    aten.to.dtype: Tensor.to,
}
# overload -> function that takes the elements of its second argument, a list of sizes, one by one
_SIZES: Mapping[Any, Callable] = {aten.view.default: Tensor.view, aten.expand.default: Tensor.expand}


def spell(gm: GraphModule) -> None:
    """Gives every call a shorter spelling that means the same, where there is one; `meta["aten"]` keeps the old."""
    for node in gm.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        new = _spelling(node)
        if new is not None:
            node.meta["aten"] = node.target
            node.target, node.args = new
    gm.recompile()


def _spelling(node: Node) -> tuple[Callable, tuple] | None:
    if node.kwargs:
        return None
    if (same := _SAME.get(node.target)) is not None and len(node.args) <= 4:
        return same, node.args
    if (sizes := _SIZES.get(node.target)) is not None and len(node.args) == 2 and node.args[1]:
        return sizes, (node.args[0], *node.args[1])
    if node.target is aten.slice.Tensor:
        return _narrow(node)
    return None


def _narrow(node: Node) -> tuple[Callable, tuple] | None:
    """A slice of step 1 that starts at a known index and has a known length."""
    x, dim, start, _, step = (*node.args, *(0, None, None, 1)[len(node.args) - 1 :])
    length = node.meta["val"].shape[dim]
    first = 0 if start is None else start
    if step != 1 or not isinstance(length, int) or not isinstance(first, int) or first < 0 or length == 0:
        return None
    return torch.narrow, (x, dim, first, length)

"""The last step: each `dsopt::` op in the graph becomes a call of the kernel chosen for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import FunctionType

import torch
from torch.fx import GraphModule, Node

from dsopt.capture import guard_count
from dsopt.op import REFERENCE, Choice, disabled_backends, recall, select
from dsopt.ops import OPS
from dsopt.ops.attention import attention
from dsopt.ops.linear import multi_linear
from dsopt.report import KernelUse, Runs


def fuses(gm: GraphModule) -> bool:
    """Whether a graph has an op of ours that does more than one of ATen's.

    A lone linear layer does not unless its weight is in FP8, nor does attention that ATen's is to compute.
    """
    return any(_does_more(node) for node in gm.graph.nodes if node.op == "call_function")


def _does_more(node: Node) -> bool:
    if node.target is multi_linear.overload:
        _, weights, _, _, scales, _ = multi_linear.bind(node.args, node.kwargs)
        return len(weights) > 1 or scales is not None
    if node.target is attention.overload:
        fakes = torch.fx.node.map_arg(attention.bind(node.args, node.kwargs), lambda n: n.meta["val"])
        return select(attention, fakes).kernel.backend not in ("torch", REFERENCE)
    return any(node.target is op.overload for op in OPS.values())


def lower(
    gm: GraphModule, prefer: Mapping[str, str], chosen: Mapping[str, Choice] | None = None
) -> list[KernelUse]:
    """Chooses a kernel for every op of the graph, once, and puts its planned callable in the op's place.

    prefer: op name -> backend to try first. chosen: name of a node -> what was chosen for it in another process.
    Returns one record per op and kernel, which share a count of the graph's runs. Each node keeps its op, its kernel's
    label and its `Choice` in `meta`. Raises RuntimeError if a check or plan looked at a size that is not static.
    """
    guards = guard_count(gm)
    by_overload = {op.overload: op for op in OPS.values()}
    disabled = disabled_backends()
    runs = Runs()
    uses: dict[tuple, KernelUse] = {}
    for node in gm.graph.nodes:
        op = by_overload.get(node.target) if node.op == "call_function" else None
        if op is None:
            continue
        args = op.bind(node.args, node.kwargs)
        fakes = torch.fx.node.map_arg(args, lambda n: n.meta["val"])
        earlier = (chosen or {}).get(node.name)
        choice = earlier and recall(op, fakes, *earlier)
        choice = choice or select(op, fakes, prefer.get(op.name), disabled)
        key = (op.name, choice.kernel.label, choice.refused)
        use = uses.setdefault(
            key, KernelUse(op.name, choice.kernel.backend, choice.kernel.label, choice.refused, runs=runs)
        )
        use.sites += 1
        if hasattr(choice.fn, "refresh"):
            use.refreshers.append(choice.fn.refresh)
        node.target, node.meta["op"], node.meta["kernel"] = _named(choice.fn, use.kernel), op, use.kernel
        node.meta["records"] = choice.kernel.records
        node.meta["choice"] = choice.kernel.label, choice.refused
        node.args, node.kwargs = args, {}
    if guard_count(gm) != guards:
        raise RuntimeError("a kernel's check or plan added a shape guard; it may look at static sizes only")
    if uses:
        first = next(n for n in gm.graph.nodes if n.op != "placeholder")
        with gm.graph.inserting_before(first):
            gm.graph.call_function(runs.add)
    gm.recompile()
    return list(uses.values())


def _named(fn: Callable, kernel: str) -> Callable:
    """fn itself if the graph's code can name it, which functions can be; else in a function of its kernel's name."""
    if isinstance(fn, FunctionType) and fn.__name__.isidentifier():
        return fn

    def call(*args):
        return fn(*args)

    call.__name__ = kernel.replace(".", "_")
    call.__module__ = "dsopt.kernels"
    return call

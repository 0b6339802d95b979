"""The last step: each `dsopt::` op in the graph becomes a call of the kernel chosen for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.fx import GraphModule

from dsopt.capture import guard_count
from dsopt.op import disabled_backends, select
from dsopt.ops import OPS
from dsopt.report import KernelUse


def lower(gm: GraphModule, prefer: Mapping[str, str]) -> list[KernelUse]:
    """Chooses a kernel for every op of the graph, once, and puts its planned callable in the op's place.

    prefer: op name -> backend to try first. Returns one record per op and kernel, whose `calls` counts as the
    graph runs. Each node keeps its op and its kernel's label in `meta`. Raises RuntimeError if a check or plan
    looked at a size that is not static.
    """
    guards = guard_count(gm)
    by_overload = {op.overload: op for op in OPS.values()}
    disabled = disabled_backends()
    uses: dict[tuple, KernelUse] = {}
    for node in gm.graph.nodes:
        op = by_overload.get(node.target) if node.op == "call_function" else None
        if op is None:
            continue
        args = op.bind(node.args, node.kwargs)
        fakes = torch.fx.node.map_arg(args, lambda n: n.meta["val"])
        choice = select(op, fakes, prefer.get(op.name), disabled)
        key = (op.name, choice.kernel.label, choice.refused)
        use = uses.setdefault(
            key, KernelUse(op.name, choice.kernel.backend, choice.kernel.label, choice.refused)
        )
        node.target, node.meta["op"], node.meta["kernel"] = _counted(choice.fn, use), op, use.kernel
        node.args, node.kwargs = args, {}
    if guard_count(gm) != guards:
        raise RuntimeError("a kernel's check or plan added a shape guard; it may look at static sizes only")
    gm.recompile()
    return list(uses.values())


def _counted(fn: Callable, use: KernelUse) -> Callable:
    """fn, counting its calls in `use`."""
    use.sites += 1
    if hasattr(fn, "refresh"):
        use.refreshers.append(fn.refresh)

    def call(*args):
        use.calls += 1
        return fn(*args)

    call.__name__ = use.kernel.replace(".", "_")
    call.__module__ = "dsopt.kernels"
    return call

"""What tests share: seeded inputs, error measures, and functions compiled through some passes only."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule

from dsopt.capture import capture, flat, from_export, unflat
from dsopt.numerics import rand, relative_l2
from dsopt.pipeline import run_pipeline
from dsopt.rewrite import Log

__all__ = ["Rewritten", "exported", "poisoned", "rand", "relative_l2", "rewritten"]


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory that `torch.empty` and its kin hand out holds NaN, so that an element never written shows."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@dataclass
class Rewritten:
    """A function as some passes left it. graphs and logs gain an entry at each (re)compilation."""

    graphs: list[GraphModule] = field(default_factory=list)
    logs: list[list[Log]] = field(default_factory=list)
    run: Callable[..., Any] = None

    def log(self, name: str) -> Log:
        """What the pass of that name did to the newest graph."""
        return next(log for log in self.logs[-1] if log.name == name)

    def ops(self) -> list[str]:
        """The calls of the newest graph in order, such as `aten.linear`; arithmetic on sizes is left out."""
        targets = [n.target for n in self.graphs[-1].graph.nodes if n.op == "call_function"]
        return [str(t.overloadpacket) for t in targets if hasattr(t, "overloadpacket")]

    def count(self, op: str) -> int:
        return self.ops().count(op)


def rewritten(
    fn: Callable, *args: Any, passes: Sequence[str] | None = None, dynamic: bool | None = None
) -> Rewritten:
    """`fn` as one Dynamo graph that goes through `passes` (all by default) and then runs as it is."""
    result = Rewritten()

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable:
        graph = capture(gm, example_inputs)
        result.logs.append(run_pipeline(graph, passes))
        result.graphs.append(graph)
        return graph.forward

    result.run = torch.no_grad()(torch.compile(fn, backend=backend, dynamic=dynamic, fullgraph=True))
    result.run(*args)
    return result


def exported(model: torch.nn.Module, *args: Any, passes: Sequence[str] | None = None) -> Rewritten:
    """`model` through torch.export and `passes`; its `run` takes the same arguments."""
    with torch.no_grad():
        program = torch.export.export(model, args)
    graph = from_export(program)
    result = Rewritten([graph], [run_pipeline(graph, passes)])
    signature = program.graph_signature
    lifted = (*signature.parameters, *signature.buffers, *signature.lifted_tensor_constants)
    state = [program.state_dict.get(name, program.constants.get(name)) for name in lifted]

    def run(*args: Any) -> Any:
        with torch.no_grad():
            out = graph(*state, *flat(args))
        return unflat(program, out)

    result.run = run
    return result

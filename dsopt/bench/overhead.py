"""What a compiled decode step costs besides its kernels, by taking parts of it away.

    whole       the compiled model, as a user calls it
    inner       the callable that dsopt gave Dynamo for its graph, called with the arguments of the last step
    allocating  the same graph, every computing call replaced by one that only allocates its results
    empty       the same graph, every computing call replaced by one that hands out a result made before

    guards     = whole - inner        Dynamo's guards and bytecode, and the Python of transformers around the graph
    python     = empty                dispatch of the generated code: views, sizes, calls and their arguments
    allocation = allocating - empty   an empty tensor for each result, and giving its memory back
    kernels    = inner - allocating   what is left: ATen's and dsopt's kernels, their own Python and scratch memory too

A graph whose runs are made again by address (`dsopt.replay`) has no such variants. Its native calls can be made alone:

    kernels    = native               what dsopt's kernels compute
    python     = inner - native       the check of addresses, and all that ATen computes
    allocation = 0                    results keep their memory

The four sum up to the whole. Views stay in the graph in every variant, for they compute nothing. The variants take
turns, and each figure is the fastest of many calls: what other processes add would not cancel in a difference. At
tiny widths the kernels have next to nothing to do, so there the whole is an upper bound of what a step of that many
layers costs besides them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Interpreter, Node

from dsopt.backend import dsopt_backend
from dsopt.bench.clock import medians
from dsopt.capture import flat
from dsopt.replay import Replay

PARTS = ("guards", "python", "allocation", "kernels")


class Recorder:
    """A torch.compile backend: dsopt's, keeping the callable and the arguments of the last graph that ran."""

    def __init__(self, options: Mapping[str, Any] | None = None):
        self.options = options
        self.fn: Callable | None = None
        self.args: tuple = ()

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable:
        fn = dsopt_backend(gm, example_inputs, options=self.options)

        def call(*args):
            self.fn, self.args = fn, args
            return fn(*args)

        return call


@dataclass(frozen=True)
class Breakdown:
    """Seconds of one step: `whole`, and by part what it is made of; computing: replaced calls; views: those kept."""

    whole: float
    parts: Mapping[str, float]
    computing: int
    views: int

    def to_dict(self) -> dict[str, Any]:
        return {"whole": self.whole, **self.parts, "computing": self.computing, "views": self.views}


@torch.inference_mode()
def breakdown(
    step: Callable[[], Any], recorder: Recorder, rewind: Callable[[], Any], budget: float = 5.0
) -> Breakdown:
    """The parts of one decode step.

    step: one step of a model compiled with `recorder` as its backend. rewind: undoes what a step left behind, such
    as the token it appended to the cache; called before each step, outside the time taken.
    Raises RuntimeError if the step is not one graph that dsopt compiled.
    """
    for _ in range(3):
        rewind()
        step()
    fn, args = recorder.fn, recorder.args
    graph = lowered_graph(fn)
    rewind()
    results = _results(graph, args)

    def arguments() -> tuple:
        rewind()
        return args

    fns: dict[str, Callable] = {"whole": lambda *_: step(), "inner": fn}
    if replayed := isinstance(fn.fn, Replay) and bool(fn.fn.programs):
        fns["native"] = lambda *_: [program() for program in fn.fn.programs]
    else:
        fns["allocating"] = _variant(graph, results, _allocating).forward
        fns["empty"] = _variant(graph, results, _handing_out).forward
    for variant in fns.values():
        variant(*arguments())
    seconds = {
        name: timing.fastest for name, timing in medians(fns, arguments, budget, max_rounds=1000).items()
    }
    parts = {"guards": seconds["whole"] - seconds["inner"]}
    if replayed:
        parts |= {
            "python": seconds["inner"] - seconds["native"],
            "allocation": 0.0,
            "kernels": seconds["native"],
        }
    else:
        parts["python"] = seconds["empty"]
        parts["allocation"] = seconds["allocating"] - seconds["empty"]
        parts["kernels"] = seconds["inner"] - seconds["allocating"]
    calls = sum(n.op == "call_function" and n.target is not operator.getitem for n in graph.graph.nodes)
    return Breakdown(seconds["whole"], parts, len(results), calls - len(results))


def lowered_graph(fn: Callable | None) -> GraphModule:
    """The graph behind what dsopt's backend returned. Raises RuntimeError if that is a fallback or no graph ran."""
    if fn is None:
        raise RuntimeError("no graph ran: the model was not compiled with the recorder, or ran eager")
    if not fn.report.kernels:
        raise RuntimeError(f"dsopt left the graph alone: {fn.report.fallback}")
    graph = fn.fn.graph if isinstance(fn.fn, Replay) else getattr(fn.fn, "__self__", None)
    if not isinstance(graph, GraphModule):
        raise RuntimeError(f"what dsopt compiled to is {type(fn.fn).__name__}, not a method of an FX graph")
    return graph


class _Recording(Interpreter):
    """Runs a graph and keeps what each call returned that computed something."""

    def __init__(self, graph: GraphModule):
        super().__init__(graph)
        self.results: dict[str, Any] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_function" and n.target is not operator.getitem:
            inputs = {_storage(x) for x in flat(self.map_nodes_to_values(n.args, n)) if _is_tensor(x)}
            outputs = [x for x in flat(result) if _is_tensor(x)]
            if _writes(n) or any(_storage(x) not in inputs for x in outputs):
                self.results[n.name] = result
        return result


def _results(graph: GraphModule, args: tuple) -> dict[str, Any]:
    recording = _Recording(graph)
    recording.run(*args)
    return recording.results


def _writes(node: Node) -> bool:
    """Whether a call writes into an argument: by its schema, else by the underscore that PyTorch's names end with.

    What lowering spelled otherwise keeps its ATen operator in `meta`.
    """
    schema = getattr(node.meta.get("aten", node.target), "_schema", None)
    if schema is not None:
        return schema.is_mutable
    name = getattr(node.target, "__name__", "")
    return name == "setitem" or (name.endswith("_") and not name.endswith("__"))


def _is_tensor(x: Any) -> bool:
    return isinstance(x, torch.Tensor)


def _storage(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _variant(graph: GraphModule, results: Mapping[str, Any], stand_in: Callable) -> GraphModule:
    """The graph with `stand_in(node, result)` called in place of each node that computes."""
    copied: dict[Node, Node] = {}
    new = Graph()
    for node in graph.graph.nodes:
        copied[node] = new.node_copy(node, copied.__getitem__)
        if node.name in results:
            copied[node].target = stand_in(node, results[node.name])
    return GraphModule(graph, new)


def _named(fn: Callable, node: Node) -> Callable:
    """fn with the name and module that a graph's code needs to refer to it."""
    fn.__name__ = f"stand_in_{node.name}"
    fn.__module__ = __name__
    return fn


def _handing_out(node: Node, result: Any) -> Callable:
    return _named(lambda *args, **kwargs: result, node)


def _allocating(node: Node, result: Any) -> Callable:
    """A call that allocates results like these; what writes into an argument returns it and allocates nothing."""
    if _writes(node):
        return _handing_out(node, result)
    if _is_tensor(result):
        return _named(lambda *args, **kwargs: torch.empty_like(result), node)
    results = [x for x in flat(result) if _is_tensor(x)]
    return _named(lambda *args, **kwargs: [torch.empty_like(x) for x in results], node)

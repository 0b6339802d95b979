"""One run of a graph of fixed shapes, turned into straight code that makes the same kernel calls again.

A native kernel is given addresses, sizes and strides. Where shapes are fixed and intermediate results keep their
memory from run to run, these are the same in every run: the calls of one run are kept (`_cpu.Program`) and made again
without any Python between them. What ATen computes is called as before, and put where the kernels expect it. Results
that leave the graph are made anew in every run, and so is all that is computed from them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._python_dispatch import TorchDispatchMode

from dsopt.capture import flat, map_tensors
from dsopt.effects import METADATA_ONLY, overload, written

aten = torch.ops.aten

# Intermediate results are kept between runs; those of more than a few tokens take longer than what calling costs.
MAX_BYTES = 16 << 20

_ALLOCATES = {aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default}
# functions that take the memory for their result
_OUT = {
    operator.add: torch.add,
    operator.sub: torch.sub,
    operator.mul: torch.mul,
    operator.truediv: torch.div,
    operator.eq: torch.eq,
    operator.ge: torch.ge,
    operator.gt: torch.gt,
    operator.le: torch.le,
    operator.lt: torch.lt,
}


@dataclass(frozen=True)
class Recording:
    """run: a graph's inputs -> its outputs, all of them new. checked: the inputs whose addresses it is bound to.

    written, returned: inputs whose memory the graph writes to, and returns. programs: the native calls of `run`.
    """

    run: Callable[..., Any]
    checked: frozenset[int]
    written: frozenset[int]
    returned: frozenset[int]
    programs: tuple[Callable[[], None], ...]


@dataclass
class _Step:
    """What became of a node in the recorded run."""

    value: Any
    calls: Any = None  # the native calls that were all it did, a `_cpu.Program`
    is_view: bool = False  # each of its tensors lies in the memory of an argument
    kept: list[torch.Tensor] = field(default_factory=list)  # what its calls use besides arguments and results


def record(
    graph: GraphModule, args: Sequence[torch.Tensor], copied: Collection[int]
) -> tuple[Any, Recording | str]:
    """The outputs of one run of a lowered graph, and how to run it again with inputs of the same layout, or why not.

    copied: inputs that are taken from a copy, as they lie elsewhere in each run; none that it writes or returns.
    """
    steps = _run(graph, args, copied)
    (output,) = graph.graph.find_nodes(op="output")
    for node, step in steps.items():
        reads = node.op == "call_function" and any(_tensors(steps[a].value) for a in node.all_input_nodes)
        if reads and any(not isinstance(x, torch.Tensor) and x is not None for x in flat(step.value)):
            return steps[output].value, f"{node.name} computes a number from tensors"
    return steps[output].value, _Writer(graph, copied, steps).recording()


def storages(value: Any) -> set[int]:
    """Addresses of the memory behind all tensors of nested values."""
    return {x.untyped_storage().data_ptr() for x in _tensors(value)}


def _is_view(value: Any, args: Any) -> bool:
    """Whether there are tensors in a value and all of them lie in the memory of arguments."""
    return bool(_tensors(value)) and storages(value) <= storages(args)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [x for x in flat(value) if isinstance(x, torch.Tensor)]


def _nbytes(tensors: Sequence[torch.Tensor]) -> int:
    """Bytes of the memory behind some tensors, each counted once."""
    memory = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(memory.values())


class _Watch(TorchDispatchMode):
    """Notes whether ATen computes anything, and keeps what is allocated."""

    def __init__(self):
        super().__init__()
        self.computes = False
        self.allocated: list[torch.Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATES:
            self.allocated.append(result)
        elif func._schema.is_mutable or not _is_view(result, args):
            self.computes = True
        return result


def _run(graph: GraphModule, args: Sequence[torch.Tensor], copied: Collection[int]) -> dict[Node, _Step]:
    from dsopt import _cpu  # a graph with kernels that record has it

    steps: dict[Node, _Step] = {}
    inputs = enumerate(args)
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            i, value = next(inputs)
            steps[node] = _Step(_own(value.clone()) if i in copied else value)
        elif node.op == "get_attr":
            steps[node] = _Step(getattr(graph, node.target))
        elif node.op == "output":
            steps[node] = _Step(map_arg(node.args[0], lambda n: steps[n].value))
        else:
            given, kwargs = map_arg((node.args, node.kwargs), lambda n: steps[n].value)
            memory = storages((given, kwargs))
            if node.meta.get("records"):
                program = _cpu.Program()
                with _Watch() as watch, program:
                    value = node.target(*given, **kwargs)
                if not watch.computes and not storages(value) & memory:
                    steps[node] = _Step(value, program, kept=watch.allocated)
                    continue
            else:
                value = node.target(*given, **kwargs)
            is_view = _is_view(value, (given, kwargs)) and not written(node)
            if not is_view:  # later runs write to it, whatever their mode
                value = map_tensors(lambda x, memory=memory: x if storages(x) <= memory else _own(x), value)
            steps[node] = _Step(value, is_view=is_view)
    return steps


def _own(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy of it that can be written to outside of inference mode."""
    if not x.is_inference():
        return x
    with torch.inference_mode(False):
        return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=x.device).copy_(x)


class _Writer:
    """Writes the code of the runs to come."""

    def __init__(self, graph: GraphModule, copied: Collection[int], steps: dict[Node, _Step]):
        self.graph, self.steps = graph, steps
        self.placeholders = graph.graph.find_nodes(op="placeholder")
        self.copied = {self.placeholders[i] for i in copied}
        self.attributes = storages([s.value for n, s in steps.items() if n.op == "get_attr"])
        # memory of the caller's, which may not be held, and of copies
        self.outside = storages([steps[n].value for n in self.placeholders])
        (output,) = graph.graph.find_nodes(op="output")
        self.returned = storages(steps[output].value)
        self.leaving = self.returned - self.outside - self.attributes
        self.written = storages([steps[a].value for n in graph.graph.nodes for a in written(n)])
        self.fresh = self._fresh()
        self.used = self._used()
        self.scope: dict[str, Any] = {}
        self.lines: list[str] = []
        self.segment: Any = None
        self.programs: list[Any] = []

    def recording(self) -> Recording | str:
        checked: set[int] = set()
        kept: list[Any] = []
        for node, step in self.steps.items():
            if node.op != "call_function":
                continue
            if node not in self.fresh:
                kept += [x for x in (*_tensors(step.value), *step.kept) if not storages(x) & self.outside]
                if step.calls is not None:
                    self._append(step.calls)
                    checked |= storages([self.steps[a].value for a in node.all_input_nodes])
                    continue
                if step.is_view and node not in self.used:
                    continue
                if not step.is_view and self._is_constant(node):
                    continue
            self._call(node)
        if (size := _nbytes(kept)) > MAX_BYTES:
            return f"intermediate results of {size >> 20} MiB are too much to keep between runs"
        (output,) = self.graph.graph.find_nodes(op="output")
        self._flush()
        self.lines.append(f"return {self._expression(output.args[0])}")
        self.scope["kept"] = kept
        return Recording(
            self._compiled(),
            *map(self._inputs_in, (checked, self.written, self.returned)),
            tuple(self.programs),
        )

    def _fresh(self) -> set[Node]:
        """Calls whose results differ in address from run to run: what leaves the graph, and what is made of it."""
        fresh: set[Node] = set()
        for node, step in self.steps.items():
            leaves = node.op == "call_function" and bool(storages(step.value) & self.leaving)
            if leaves or (node.op == "call_function" and any(a in fresh for a in node.all_input_nodes)):
                fresh.add(node)
        return fresh

    def _used(self) -> set[Node]:
        """Calls whose results lie in the caller's memory and are needed as tensors: by ATen, or as outputs."""
        used: set[Node] = set()
        for node in reversed(self.steps):
            step = self.steps[node]
            runs = node.op == "output" or node in self.fresh or node in used
            runs = runs or (node.op == "call_function" and step.calls is None and not step.is_view)
            if runs:
                used |= {a for a in node.all_input_nodes if storages(self.steps[a].value) & self.outside}
        return used

    def _is_constant(self, node: Node) -> bool:
        """Whether a call gives the same values in every run, and nothing writes to them."""
        target = overload(node)
        tags = getattr(target, "tags", ())
        if not hasattr(target, "_schema") or written(node) or torch.Tag.nondeterministic_seeded in tags:
            return False
        no_tensors = not any(_tensors(self.steps[a].value) for a in node.all_input_nodes)
        return (no_tensors or target in METADATA_ONLY) and not storages(self.steps[node].value) & self.written

    def _inputs_in(self, memory: set[int]) -> frozenset[int]:
        return frozenset(
            i
            for i, n in enumerate(self.placeholders)
            if n not in self.copied and storages(self.steps[n].value) & memory
        )

    def _append(self, calls: Any) -> None:
        if self.segment is None:
            self.segment = type(calls)()
        self.segment.extend(calls)

    def _flush(self) -> None:
        if self.segment is not None:
            self.lines.append(f"{self._constant(self.segment)}()")
            self.programs.append(self.segment)
            self.segment = None

    def _call(self, node: Node) -> None:
        self._flush()
        value = self.steps[node].value
        memory = storages([self.steps[a].value for a in node.all_input_nodes])
        to_fill = [] if node in self.fresh else [x for x in _tensors(value) if not storages(x) <= memory]
        arguments = [self._expression(a) for a in node.args]
        arguments += [f"{name}={self._expression(a)}" for name, a in node.kwargs.items()]
        whole = to_fill and to_fill[0] is value
        if whole and node.target in _OUT and isinstance(node.args[0], Node):
            out = f"out={self._constant(value)}"
            self.lines.append(f"{self._constant(_OUT[node.target])}({', '.join([*arguments, out])})")
            return
        call = f"{self._constant(node.target)}({', '.join(arguments)})"
        if whole:
            self.lines.append(f"{self._constant(value)}.copy_({call})")
            return
        self.lines.append(f"{node.name} = {call}" if to_fill or node in self.fresh | self.used else call)
        for i, x in enumerate(value if to_fill else ()):
            if any(x is t for t in to_fill):
                self.lines.append(f"{self._constant(x)}.copy_({node.name}[{i}])")

    def _expression(self, arg: Any) -> str:
        """An argument as code: the name of what this run was given or made, or of what all runs share."""
        if isinstance(arg, Node):
            value = self.steps[arg].value
            if arg.op == "placeholder" or arg in self.fresh or arg in self.used:
                return arg.name
            return self._constant(value)
        if isinstance(arg, (list, tuple)):
            inside = "".join(f"{self._expression(a)}, " for a in arg)
            return f"[{inside}]" if isinstance(arg, list) else f"({inside})"
        if isinstance(arg, slice):
            return f"slice({self._expression(arg.start)}, {self._expression(arg.stop)}, {self._expression(arg.step)})"
        return self._constant(arg)

    def _constant(self, value: Any) -> str:
        name = f"constant_{len(self.scope)}"
        self.scope[name] = value
        return name

    def _compiled(self) -> Callable[..., Any]:
        names = ", ".join(n.name for n in self.placeholders)
        copies = [f"{self._constant(self.steps[n].value)}.copy_({n.name})" for n in self.copied]
        body = "\n    ".join([*copies, *self.lines])
        exec(compile(f"def run({names}):\n    {body}\n", "<recorded run>", "exec"), self.scope)
        return self.scope["run"]

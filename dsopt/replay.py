"""Runs a lowered graph again and again by the addresses of its first runs, where nothing speaks against it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import compress
from typing import Any

import torch
from torch.fx import GraphModule

from dsopt.capture import flat
from dsopt.recording import MAX_BYTES, Recording, record, storages
from dsopt.report import GraphReport

# An input of at most this many bytes that lies elsewhere in each run is copied to where the kernels expect it.
MAX_COPY = 64 << 10
# Caches that take turns, each with addresses of its own.
MAX_RECORDINGS = 4
# Recordings after which a graph whose inputs move all the time is left to its code.
MAX_RECORDED = 16


def cannot_replay(graph: GraphModule) -> str | None:
    """Why the runs of a lowered graph cannot be made again by address, or None."""
    if not any(n.meta.get("records") for n in graph.graph.nodes):
        return "no kernel records its calls"
    kept = 0
    for node in graph.graph.nodes:
        for x in flat(node.meta.get("val")):
            if not isinstance(x, torch.Tensor):
                if node.op == "placeholder":
                    return "a size is an input"
                continue
            if x.device.type != "cpu" or x.layout is not torch.strided:
                return f"{node.name} is no dense tensor on the CPU"
            if not all(isinstance(size, int) for size in (*x.shape, *x.stride())):
                return "sizes differ from run to run"
            if x.numel() == 0:
                return f"{node.name} is empty"
            if "op" in node.meta:
                kept += x.numel() * x.element_size()
    if kept > MAX_BYTES:
        return f"results of {kept >> 20} MiB are too much to keep between runs"
    return None


class Replay:
    """A graph's callable: runs its code at first, then records a run, and from then on makes the recorded calls again.

    Results that the graph returns are new in each run. What it keeps are intermediate results, of at most MAX_BYTES
    for each of MAX_RECORDINGS sets of addresses, and no input. A thread that calls it while another one does runs the
    code instead.
    """

    def __init__(self, graph: GraphModule, report: GraphReport):
        self.graph = graph
        self.report = report  # is told why, where nothing is recorded any more
        self._code = graph.forward
        self._lock = threading.Lock()
        self._called = False
        self._recorded = 0
        self._copied: frozenset[int] = frozenset()
        self._written: frozenset[int] = frozenset()
        self._returned: frozenset[int] = frozenset()
        self._checked: list[bool] = []
        self._last: tuple[int, ...] = ()
        self._runs: dict[tuple[int, ...], Callable[..., Any]] = {}
        self.programs: Sequence[Callable[[], None]] = ()  # the native calls of the last run recorded

    def __call__(self, *args):
        if not self._called or self.report.not_replayed or not self._lock.acquire(blocking=False):
            self._called = True
            return self._code(*args)
        try:
            addresses = tuple(map(torch.Tensor.data_ptr, compress(args, self._checked)))
            run = self._runs.get(addresses)
            if run is None:
                return self._record(args, addresses)
            if self._copied and self._overlap(args):
                return self._code(*args)
            return run(*args)
        finally:
            self._lock.release()

    def _overlap(self, args: Sequence[torch.Tensor]) -> bool:
        """Whether a graph that reads a copy would miss what it writes to the original."""
        return bool(storages([args[i] for i in self._copied]) & storages([args[i] for i in self._written]))

    def _record(self, args: Sequence[torch.Tensor], addresses: tuple[int, ...]) -> Any:
        """Records this run, with copies of inputs that are small and moved since the last one."""
        places = [i for i, checked in enumerate(self._checked) if checked]
        moved = {i for i, now, before in zip(places, addresses, self._last, strict=False) if now != before}
        if copied := {i for i in moved if self._can_copy(i, args[i])}:
            self._copied |= copied
            self._runs.clear()
        if self._overlap(args):
            return self._code(*args)
        outputs, recording = record(self.graph, args, self._copied)
        self._recorded += 1
        if isinstance(recording, Recording) and self._recorded > MAX_RECORDED:
            recording = f"inputs lay elsewhere in {MAX_RECORDED} runs"
        if isinstance(recording, str):
            self.report.not_replayed = recording
            self._runs.clear()
            return outputs
        self._checked = [i in recording.checked for i in range(len(args))]
        self._written, self._returned = recording.written, recording.returned
        self._last = tuple(x.data_ptr() for x in compress(args, self._checked))
        if len(self._runs) == MAX_RECORDINGS:
            del self._runs[next(iter(self._runs))]
        self._runs[self._last] = recording.run
        self.programs = recording.programs
        return outputs

    def _can_copy(self, i: int, x: torch.Tensor) -> bool:
        small = x.numel() * x.element_size() <= MAX_COPY
        return small and i not in self._written | self._returned and not isinstance(x, torch.nn.Parameter)

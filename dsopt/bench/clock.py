"""Medians of calls that take turns, so that a slow moment of the machine falls on all of them.

On a GPU each call lies between two events of its stream, and the stream is kept busy while the host queues a
round: what is measured is the device's time, not how fast Python launches.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

MIN_ROUNDS = 3
MAX_ROUNDS = 300
_CYCLES_PER_SECOND = 2e9  # no GPU's clock is much faster


@dataclass(frozen=True)
class Timing:
    """seconds: the median of `rounds` calls; fastest: the best of them."""

    seconds: float
    fastest: float
    rounds: int


def medians(
    fns: Mapping[str, Callable],
    arguments: Callable[[], tuple] = tuple,
    budget: float = 1.0,
    device: str = "cpu",
    min_rounds: int = MIN_ROUNDS,
    max_rounds: int = MAX_ROUNDS,
    tell: Callable[[str, int], None] = lambda name, round: None,
) -> dict[str, Timing]:
    """The time of each function; they take turns, one call of each a round.

    arguments: called before each call, outside the time taken: what the function is called with.
    budget: seconds after which no further round begins, once there were `min_rounds`.
    tell: called before each call on the host, outside the time taken, with its name and the number of the round.
    Every function should have been called before: the first calls compile, allocate and load.
    """
    if not fns:
        return {}
    taken: dict[str, list[float]] = {name: [] for name in fns}
    start = time.perf_counter()
    queued = _host_seconds(fns, arguments) if device == "cuda" else 0.0
    rounds = 0
    while rounds < min_rounds or (rounds < max_rounds and time.perf_counter() - start < budget):
        if device == "cuda":
            results = _cuda_round(fns, arguments, queued)
        else:
            results = _host_round(fns, arguments, lambda name, count=rounds: tell(name, count))
        for name, seconds in results.items():
            taken[name].append(seconds)
        rounds += 1
    return {name: Timing(statistics.median(times), min(times), rounds) for name, times in taken.items()}


def _host_round(
    fns: Mapping[str, Callable], arguments: Callable[[], tuple], tell: Callable[[str], None]
) -> dict[str, float]:
    seconds = {}
    for name, fn in fns.items():
        tell(name)
        args = arguments()
        start = time.perf_counter()
        result = fn(*args)
        seconds[name] = time.perf_counter() - start
        del result  # its memory is given back outside the time taken
    return seconds


def _host_seconds(fns: Mapping[str, Callable], arguments: Callable[[], tuple]) -> float:
    """How long the host takes to queue a round."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for fn in fns.values():
        fn(*arguments())
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return seconds


def _cuda_round(
    fns: Mapping[str, Callable], arguments: Callable[[], tuple], queued: float
) -> dict[str, float]:
    """queued: seconds for which the device spins, until the host has queued the whole round behind it."""
    torch.cuda._sleep(int(queued * 1.5 * _CYCLES_PER_SECOND))
    events = {}
    for name, fn in fns.items():
        args = arguments()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        fn(*args)
        end.record()
        events[name] = begin, end
    torch.cuda.synchronize()
    return {name: begin.elapsed_time(end) / 1e3 for name, (begin, end) in events.items()}

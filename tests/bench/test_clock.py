"""Medians of calls in turns, on a clock that the calls themselves move."""

import pytest
import torch

from dsopt.bench import clock
from dsopt.bench.ceilings import BANDWIDTH, Ceiling, Ceilings, measure


class Ticks:
    """A clock that stands still, and calls that take what they are told."""

    def __init__(self):
        self.now = 0.0
        self.order = []

    def taking(self, name, *seconds):
        left = list(seconds)

        def call(*args):
            self.order.append((name, *args))
            self.now += left.pop(0)

        return call


@pytest.fixture
def ticks(monkeypatch):
    ticks = Ticks()
    monkeypatch.setattr(clock.time, "perf_counter", lambda: ticks.now)
    return ticks


def test_medians_of_calls_that_take_turns(ticks):
    fns = {"a": ticks.taking("a", 9, 1, 2), "b": ticks.taking("b", 5, 5, 4)}
    numbers = iter(range(6))

    def arguments():
        ticks.now += 100  # is not part of the time taken
        return (next(numbers),)

    found = clock.medians(fns, arguments, budget=0, min_rounds=3)
    assert found == {"a": clock.Timing(2, 1, 3), "b": clock.Timing(5, 4, 3)}
    assert ticks.order == [("a", 0), ("b", 1), ("a", 2), ("b", 3), ("a", 4), ("b", 5)]


def test_rounds_end_with_the_budget_or_the_limit(ticks):
    assert clock.medians({"a": ticks.taking("a", *[1] * 10)}, budget=5)["a"].rounds == 5
    assert clock.medians({"a": ticks.taking("a", *[1] * 10)}, budget=50, max_rounds=7)["a"].rounds == 7
    assert clock.medians({}) == {}


def test_what_runs_next_is_told(ticks):
    said = []
    fns = {"a": ticks.taking("a", 1, 1), "b": ticks.taking("b", 1, 1)}
    clock.medians(fns, budget=0, min_rounds=2, tell=lambda name, done: said.append((name, done)))
    assert said == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]


LIMITS = Ceilings([Ceiling(BANDWIDTH, 2, 10.0), Ceiling("float32", 2, 100.0), Ceiling("bfloat16", 2, 50.0)])


@pytest.mark.parametrize(
    ("moved", "flops", "dtype", "share"),
    [
        (40, 100, "float32", ("memory", 0.5)),  # 4 s of memory, 1 s of arithmetic, taken 8 s
        (10, 200, "float32", ("compute", 0.25)),
        (10, 200, "bfloat16", ("compute", 0.25)),  # widened to float32, which is faster here
        (16, 0, "float16", ("memory", 0.2)),
    ],
)
def test_the_share_of_the_ceiling_that_binds(moved, flops, dtype, share):
    assert LIMITS.share(8.0, moved, flops, dtype, 2) == share


def test_no_share_without_a_ceiling_for_as_many_threads():
    assert LIMITS.share(8.0, 40, 100, "float32", 1) is None
    assert LIMITS.rate(BANDWIDTH, 1) is None


def test_ceilings_are_measured_for_each_number_of_threads():
    before = torch.get_num_threads()
    found = measure("cpu", (2,), quick=True)
    assert [(c.what, c.threads) for c in found.found] == [
        (BANDWIDTH, 1),
        (BANDWIDTH, 2),
        ("float32", 2),
        ("bfloat16", 2),
    ]
    assert all(c.rate > 0 for c in found.found) and torch.get_num_threads() == before
    assert Ceilings.of_list(found.to_list()).found == found.found

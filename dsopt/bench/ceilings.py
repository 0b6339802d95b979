"""What this machine can do at most: bytes and FLOPs a second, measured, not read from a data sheet.

CPU    read bandwidth, by number of threads: the fastest of several reductions over memory far beyond any cache
       matrix rate by dtype: the fastest of several square matrix products, which is where the multiply-add units
       of float32 and the dot products of bfloat16 are busiest
CUDA   copy bandwidth, and the matrix rates of float32, bfloat16 and FP8, on random data: zeros draw less power

Each is the best of a few calls: a ceiling that a neighbour's work had lowered would flatter the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from dsopt.bench.clock import medians

BANDWIDTH = "bandwidth"


@dataclass(frozen=True)
class Ceiling:
    """what: `bandwidth` in bytes a second, or a dtype's name in FLOPs a second. threads: 0 on a GPU."""

    what: str
    threads: int
    rate: float


class Ceilings:
    """Ceilings of one device."""

    def __init__(self, found: list[Ceiling]):
        self.found = found

    def rate(self, what: str, threads: int) -> float | None:
        """The measured rate, None if it was not measured."""
        return next((c.rate for c in self.found if (c.what, c.threads) == (what, threads)), None)

    def compute(self, dtype: str, threads: int) -> float | None:
        """FLOPs a second that a kernel of a dtype may reach: in its own units, or widened to float32 ones."""
        rates = [r for what in {dtype, "float32"} if (r := self.rate(what, threads)) is not None]
        return max(rates, default=None)

    def share(
        self, seconds: float, moved: int, flops: int, dtype: str, threads: int
    ) -> tuple[str, float] | None:
        """(what binds, share of it reached) of a call; None where nothing was measured to compare with.

        The call cannot be faster than its bytes at full bandwidth, nor than its FLOPs at the full matrix rate;
        the slower of the two binds.
        """
        limits = {
            "memory": (moved, self.rate(BANDWIDTH, threads)),
            "compute": (flops, self.compute(dtype, threads)),
        }
        least = {what: amount / rate for what, (amount, rate) in limits.items() if rate}
        if not least:
            return None
        what = max(least, key=least.get)
        return what, least[what] / seconds

    def to_list(self) -> list[dict[str, Any]]:
        return [vars(c) for c in self.found]

    @classmethod
    def of_list(cls, rows: list[dict[str, Any]]) -> Ceilings:
        return cls([Ceiling(**row) for row in rows])


def measure(
    device: str,
    threads: tuple[int, ...],
    quick: bool = False,
    step: Callable[[str, str], None] = lambda what, detail: None,
) -> Ceilings:
    """Ceilings of the CPU with 1 to max(threads) threads, or of the GPU. quick: on little data, worth nothing."""
    step("ceilings", device)
    if device == "cuda":
        return Ceilings(list(_cuda(quick)))
    before = torch.get_num_threads()
    try:
        return Ceilings(list(_cpu(threads, quick, step)))
    finally:
        torch.set_num_threads(before)


def _best(fns: list[Callable], budget: float) -> float:
    """Seconds of the fastest call among some functions."""
    for fn in fns:
        fn()
    by_name = {str(i): fn for i, fn in enumerate(fns)}
    return min(t.fastest for t in medians(by_name, budget=budget, min_rounds=3).values())


def _cpu(threads: tuple[int, ...], quick: bool, step: Callable[[str, str], None]) -> Iterator[Ceiling]:
    budget = 0.0 if quick else 1.5
    reads = _reads(1 << (16 if quick else 27))
    for count in range(1, max(threads) + 1):
        step("ceilings", f"read bandwidth, threads: {count}")
        torch.set_num_threads(count)
        yield Ceiling(BANDWIDTH, count, reads[0] / _best(reads[1], budget))
    del reads
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for count in sorted(set(threads)):
            step("ceilings", f"{name} products, threads: {count}")
            torch.set_num_threads(count)
            rates = [
                2 * n**3 / _best([_product(n, dtype)], budget) for n in ((64,) if quick else (1024, 2048))
            ]
            yield Ceiling(name, count, max(rates))


def _reads(count: int) -> tuple[int, list[Callable]]:
    """Bytes of so many floats, and ways to read them all once."""
    data, vector = torch.randn(count), torch.randn(4096)
    rows = data.view(-1, 4096)
    return data.nbytes, [data.sum, lambda: torch.dot(data, data), lambda: torch.mv(rows, vector)]


def _product(n: int, dtype: torch.dtype, device: str = "cpu") -> Callable:
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b.T


def _cuda(quick: bool) -> Iterator[Ceiling]:
    moved, copy = _copy(1 << (20 if quick else 30))
    yield Ceiling(BANDWIDTH, 0, moved / _fastest_cuda(copy))
    del copy
    n = 1024 if quick else 8192
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        yield Ceiling(name, 0, 2 * n**3 / _fastest_cuda(_product(n, dtype, "cuda")))
    if torch.cuda.get_device_capability() >= (8, 9):
        yield Ceiling("float8_e4m3fn", 0, 2 * n**3 / _fastest_cuda(_scaled_product(n)))


def _copy(count: int) -> tuple[int, Callable]:
    source = torch.randn(count, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes, lambda: target.copy_(source)


def _scaled_product(n: int) -> Callable:
    a, b = (torch.randn(n, n, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
    one, out = torch.ones((), device="cuda"), torch.bfloat16
    return lambda: torch._scaled_mm(a, b.T, scale_a=one, scale_b=one, out_dtype=out, use_fast_accum=True)


def _fastest_cuda(fn: Callable) -> float:
    fn()
    return medians({"": fn}, device="cuda", min_rounds=10, max_rounds=50)[""].fastest

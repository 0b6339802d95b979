"""A matrix product of PyTorch's and a native kernel in turns; see --help."""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch

from dsopt.kernels.cpu.multi_linear import native

HELP = """
Calls a matrix product of PyTorch's and a linear layer of dsopt's alone and in turns. They share one pool of OpenMP
threads: the turns should take as long as both alone, and the process should have no more threads at the end.
"""


def seconds(calls: int, *jobs: Callable[[], object]) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        for job in jobs:
            job()
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=HELP)
    parser.add_argument("--calls", type=int, default=1000, help="of each, in turns")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    square, x, w = torch.randn(384, 384), torch.randn(1, 2048), torch.randn(2048, 2048)
    jobs = (lambda: square @ square, lambda: native(x, [w], [None]))
    seconds(3, *jobs)
    before = len(os.listdir("/proc/self/task"))
    # in ten parts, so that a slow moment of the machine falls on one of them
    part = max(1, args.calls // 10)
    parts = [[seconds(part, jobs[0]), seconds(part, jobs[1]), seconds(part, *jobs)] for _ in range(10)]
    product, kernel, turns = (statistics.median(times) / part * 1e3 for times in zip(*parts))
    ratio = statistics.median(both / (a + b) for a, b, both in parts)
    print(f"{args.threads} threads, {10 * part} calls of each, milliseconds a call:")
    print(f"product {product:.3f}, kernel {kernel:.3f}, in turns {turns:.3f}: {ratio:.3f} of the sum")
    print(f"threads of the process: {before} before, {len(os.listdir('/proc/self/task'))} after")
    return 0


if __name__ == "__main__":
    sys.exit(main())

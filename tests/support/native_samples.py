"""Every native kernel on small samples of its op, with the instruction set that it chooses by itself.

A program, `native_samples.py ISA`, for processors and tools that are slow: it prints what the instruction set is, which
must be ISA, and each kernel that was right.
"""

import sys

import torch

from dsopt import _cpu
from dsopt.op import Kernel, kernels
from dsopt.ops import OPS
from dsopt.testing import check_samples

LARGEST = 3000  # elements of a sample


def native_kernels() -> list[Kernel]:
    return [kernel for name in OPS for kernel in kernels(name)[0] if kernel.backend == "cpu"]


def main(isa: str) -> None:
    if _cpu.isa() != isa:
        sys.exit(f"{_cpu.isa()} was chosen of {', '.join(_cpu.isas())}, not {isa}")
    print(isa)
    for kernel in native_kernels():
        for dtype in sorted(kernel.dtypes, key=str):
            if not check_samples(kernel, torch.device("cpu"), dtype, LARGEST):
                sys.exit(f"{kernel.label} took no sample of {dtype}")
        print(kernel.label, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])

"""The native kernels on processors that this machine is not, by emulation: no illegal instruction, right results."""

import os
import shutil
import subprocess
import sys

import native_samples
import pytest

from dsopt import _cpu

QEMU = shutil.which("qemu-x86_64")
TIMEOUT = 3600


@pytest.mark.slow
@pytest.mark.skipif(QEMU is None, reason="qemu-x86_64 (Debian's package qemu-user) is not installed")
@pytest.mark.skipif("avx2" not in _cpu.isas(), reason="the variants are for x86-64")
@pytest.mark.parametrize(("processor", "isa"), [("Haswell", "avx2"), ("Nehalem", "portable")])
def test_emulated(processor, isa):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("DSOPT_ISA", None)
    command = [QEMU, "-cpu", processor, sys.executable, native_samples.__file__, isa]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\nended with status {done.returncode}"
    assert done.stdout.split() == [isa, *(kernel.label for kernel in native_samples.native_kernels())]

"""The native CPU kernels: every instruction set of this machine, threads, masks."""

import os
import re
import subprocess
import sys

import pytest
import torch

from dsopt import _cpu, testing
from dsopt.capture import flat
from dsopt.kernels.cpu import add_rms_norm as add_rms_norm_kernel
from dsopt.kernels.cpu import rms_norm as rms_norm_kernel
from dsopt.op import explain, kernels, select
from dsopt.ops import OPS
from dsopt.ops.norm import add_rms_norm, rms_norm
from dsopt.testing import rand, truth

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RUN = {op: kernel for op in OPS.values() for kernel in kernels(op.name)[0] if kernel.backend == "cpu"}


@pytest.fixture(params=_cpu.isas())
def isa(request):
    _cpu.set_isa(request.param)
    yield request.param
    _cpu.set_isa()


@pytest.fixture
def poisoned():
    """Results start as NaN, so that an element nobody wrote is seen."""
    with testing.poisoned():
        yield


def assert_right(op, fn, args, tolerance=None):
    args = op.bind(args)
    with torch.no_grad():
        got, want = flat(fn(*args)), truth(op, args)
    for mine, like in zip(got, flat(op.reference(*args)), strict=True):
        assert mine.shape == like.shape and mine.dtype == like.dtype and mine.is_contiguous()
    assert op.error(args, got, want) <= (tolerance or op.tolerance[args[0].dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", RUN, ids=lambda op: op.name)
def test_samples(op, dtype, isa, poisoned):
    taken = 0
    for args in op.samples(CPU, dtype):
        kernel, args = RUN[op], op.bind(args)
        # weights whose rows are not dense are for another kernel
        if (reason := kernel.refuses(args)) is None:
            assert_right(op, kernel.plan(*args), args)
            taken += 1
        else:
            assert "dense" in reason or "FP8" in reason, reason
    assert taken


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_sizes(dtype, isa, poisoned):
    r = rand(CPU, dtype)
    for hidden in (1, 3, 15, 16, 17, 63, 64, 65, 255, 1029):
        x, residual, weight = r(3, hidden), r(3, hidden), r(hidden)
        assert_right(rms_norm, rms_norm_kernel.KERNELS[0].plan(x, weight, 1e-6), (x, weight, 1e-6))
        kernel = add_rms_norm_kernel.KERNELS[0].plan(x, residual, weight, 1e-6)
        assert_right(add_rms_norm, kernel, (x, residual, weight, 1e-6))


def test_unaligned_data(isa):
    """Storage that starts anywhere, as a slice of a checkpoint's bytes does."""
    storage = torch.empty(5 * 64 + 1)
    x = storage[1:].view(5, 64).copy_(rand(CPU, torch.float32)(5, 64))
    assert x.data_ptr() % 16 == 4
    assert_right(rms_norm, rms_norm_kernel.KERNELS[0].plan(x, None, 1e-6), (x, None, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_of_rows_in_any_batch(dtype, isa):
    """A row's answer depends on nothing but the row."""
    x = rand(CPU, dtype)(40, 4097)
    norm = rms_norm_kernel.KERNELS[0].plan(x, None, 1e-6)
    assert torch.equal(norm(x, None, 1e-6), torch.cat([norm(row[None], None, 1e-6) for row in x]))


def test_refusals():
    weight = torch.ones(4)
    assert "needs dtype" in rms_norm_kernel.KERNELS[0].refuses((weight.double(), weight.double(), 1e-6))
    assert "x's dtype" in rms_norm_kernel.KERNELS[0].refuses((weight.bfloat16(), weight, 1e-6))
    assert select(rms_norm, (weight, weight, 1e-6)).kernel is rms_norm_kernel.KERNELS[0]
    assert ("cpu.rms_norm", "accepts") in explain(rms_norm, weight, weight, 1e-6)


def test_norms_of_operands_that_do_not_belong_together():
    """Refused before, and a ValueError at the call: native code would read past the end."""
    x, w = torch.randn(4, 64), torch.ones(64)
    norm, add_norm = (k.KERNELS[0] for k in (rms_norm_kernel, add_rms_norm_kernel))
    cases = [
        (norm, (x, w[:1], 1e-6), "weight"),
        (norm, (x, w[None], 1e-6), "weight"),
        (norm, (x, w.bfloat16(), 1e-6), "weight"),
        (add_norm, (x, x[0], w, 1e-6), "residual"),
        (add_norm, (x, x[:1], w, 1e-6), "residual"),
        (add_norm, (x, x.bfloat16(), w, 1e-6), "residual"),
        (add_norm, (x, x, w[:32], 1e-6), "weight"),
    ]
    for kernel, args, name in cases:
        assert f"needs a {name}" in kernel.refuses(args)
        with pytest.raises(ValueError, match=name):
            kernel.plan(*args)(*args)
    with pytest.raises(ValueError, match="float64"):
        norm.plan(x, w, 1e-6)(x.double(), None, 1e-6)


@pytest.mark.parametrize("name", ["avx1024", "AVX2", "neon"])
def test_bad_isa_names_the_accepted_ones(name, monkeypatch):
    monkeypatch.setenv("DSOPT_ISA", name)
    with pytest.raises(ValueError, match=rf"DSOPT_ISA={name} .*{', '.join(_cpu.isas())}"):
        _cpu.set_isa()
    with pytest.raises(ValueError, match=name):
        rms_norm_kernel.KERNELS[0].plan(torch.ones(2), None, 1e-6)
    monkeypatch.delenv("DSOPT_ISA")
    _cpu.set_isa()
    assert _cpu.isa() == _cpu.isas()[-1]


@pytest.mark.parametrize("name", _cpu.isas())
def test_isa_from_the_environment(name, monkeypatch):
    monkeypatch.setenv("DSOPT_ISA", name)
    _cpu.set_isa()
    assert _cpu.isa() == name
    monkeypatch.delenv("DSOPT_ISA")
    _cpu.set_isa()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_one_openmp_runtime():
    """Two pools of threads would fight for the cores. In a process of its own: what else runs here may load another."""
    code = """
import torch, dsopt
torch.ops.dsopt.rms_norm(torch.randn(2, 8), None, 1e-6)
torch.ops.dsopt.moe_route(torch.randn(2, 8), 2)
print(open("/proc/self/maps").read())
"""
    maps = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    runtimes = {line.split()[-1] for line in maps.splitlines() if re.search(r"lib[gi]?omp", line)}
    assert len({os.path.realpath(path) for path in runtimes}) == 1, runtimes

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
from dsopt.kernels.cpu import mla_attention as mla_kernel
from dsopt.kernels.cpu import rms_norm as rms_norm_kernel
from dsopt.op import explain, kernels, select
from dsopt.ops import OPS
from dsopt.ops.attention import mla_attention
from dsopt.ops.norm import add_rms_norm, rms_norm
from dsopt.testing import rand, truth

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)
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


def attention_case(dtype, batch=1, heads=4, new=1, cached=40, nope=16, rope=8, rank=32, value=24, seed=0):
    r = rand(CPU, dtype, seed)
    q = r(batch, heads, new, nope + rope)
    kv_b = r(heads, nope + value, rank) * rank**-0.5
    keys = r(batch, cached, rank), r(batch, cached, rope)
    return (q[..., :nope], q[..., nope:], *keys, kv_b[:, :nope], kv_b[:, nope:])


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
            assert "dense" in reason, reason
    assert taken


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_sizes(dtype, isa, poisoned):
    """Heads, tokens, keys and widths around the kernel's own block sizes."""
    sizes = [
        {"heads": 1, "cached": 1, "nope": 1, "rope": 2, "rank": 1, "value": 1},
        {"batch": 2, "new": 2, "cached": 0},
        {"heads": 3, "new": 2, "cached": 63, "nope": 9, "rope": 6, "rank": 19, "value": 5},
        {"heads": 5, "new": 16, "cached": 65, "rank": 17},
        {"heads": 33, "new": 1, "cached": 513, "rank": 16, "rope": 16},
        {"batch": 3, "heads": 16, "new": 5, "cached": 1030, "rank": 48, "rope": 4},
        {"batch": 9, "heads": 6, "new": 1, "cached": 130, "rank": 33},
        {"heads": 16, "new": 3, "cached": 70, "nope": 128, "rope": 64, "rank": 512, "value": 128},
    ]
    for i, size in enumerate(sizes):
        args = attention_case(dtype, **size, seed=i)
        assert_right(mla_attention, mla_kernel.absorbed, (*args, None, 0.2))
        assert_right(mla_attention, mla_kernel.absorbed, (*args, None, 0.2, True))


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


@pytest.mark.parametrize("mask_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_additive_mask(mask_dtype, isa):
    """The lowest finite value hides a key, unless a query has nothing else; -inf always hides."""
    args = attention_case(torch.float32, batch=2, new=4, cached=700)
    low = torch.finfo(mask_dtype).min
    mask = rand(CPU, torch.float32)(2, 1, 4, 700).to(mask_dtype)
    mask[0, 0, 0, 100:] = low
    mask[0, 0, 1, :650] = float("-inf")
    mask[0, 0, 2] = low
    mask[0, 0, 3] = float("-inf")
    mask[1, 0, :, :600] = low
    mask[1, 0, 2, 600:] = float("-inf")
    # float32 holds a score beside float16's lowest value to 8 bits behind the point
    tolerance = 1e-2 if mask_dtype == torch.float16 else None
    assert_right(mla_attention, mla_kernel.absorbed, (*args, mask, 0.2), tolerance)
    assert mla_kernel.absorbed(*args, mask, 0.2)[0, 3].eq(0).all()


def test_broadcast_masks(isa):
    args = attention_case(torch.float32, batch=2, new=3, cached=150)
    every_key = torch.tensor([True, False, True]).view(1, 1, 3, 1)
    one_query = torch.rand(150, generator=torch.Generator().manual_seed(0)) > 0.5
    for mask in (
        every_key,
        one_query,
        one_query[None, None, None],
        one_query.expand(2, 1, 3, 150),
        ~every_key[:, 0],
    ):
        assert_right(mla_attention, mla_kernel.absorbed, (*args, mask, 0.2))
        assert_right(mla_attention, mla_kernel.absorbed, (*args, mask, 0.2, True))


def test_hidden_keys_are_not_read(isa):
    """Chunks without a visible key may hold anything: what a static cache was allocated with, even NaN."""
    args = attention_case(torch.float32, cached=2000)
    valid = torch.arange(2000) < 128
    want = mla_kernel.absorbed(*args, valid, 0.2)
    args[2][:, 128:] = float("nan")
    assert torch.equal(mla_kernel.absorbed(*args, valid, 0.2), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_any_threads_batch_and_buffer(dtype, isa, threads):
    """A row's answer depends on nothing but the row."""
    for heads, new, cached in ((16, 1, 1500), (5, 3, 700), (40, 2, 1100)):
        args = attention_case(dtype, batch=7, heads=heads, new=new, cached=cached, rank=64)
        threads(1)
        one = mla_kernel.absorbed(*args, None, 0.2)
        alone = [
            mla_kernel.absorbed(*[x[i : i + 1] for x in args[:4]], *args[4:], None, 0.2) for i in range(7)
        ]
        threads(2)
        assert torch.equal(one, mla_kernel.absorbed(*args, None, 0.2))
        assert torch.equal(one[2:3], mla_kernel.absorbed(*[x[2:3] for x in args[:4]], *args[4:], None, 0.2))
        assert torch.equal(one, torch.cat(alone))
        # the same keys at the start of a longer buffer
        longer = [torch.cat((x, x), 1) for x in args[2:4]]
        valid = torch.arange(2 * cached) < cached
        assert torch.equal(one, mla_kernel.absorbed(*args[:2], *longer, *args[4:], valid, 0.2))
    x = rand(CPU, dtype)(40, 4097)
    norm = rms_norm_kernel.KERNELS[0].plan(x, None, 1e-6)
    assert torch.equal(norm(x, None, 1e-6), torch.cat([norm(row[None], None, 1e-6) for row in x]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_tokens_are_expanded(dtype, monkeypatch):
    from dsopt.kernels.torch import mla_attention as torch_kernel

    calls = []
    expanded = torch_kernel.expanded
    monkeypatch.setattr(torch_kernel, "expanded", lambda *args: calls.append(1) or expanded(*args))
    sizes = {"heads": 2, "nope": 32, "rope": 8, "rank": 64, "value": 32}
    for new, expected in ((1, 0), (16, 0), (600, 1)):
        args = (*attention_case(dtype, new=new, cached=600, **sizes), None, 0.2, True)
        assert_right(mla_attention, mla_kernel.KERNELS[0].plan(*args), args)
        assert len(calls) == expected


def test_refusals():
    args = attention_case(torch.float32)
    weight = torch.ones(4)
    assert "one dtype" in mla_kernel.KERNELS[0].refuses((*args[:5], args[5].bfloat16(), None, 1.0))
    assert "one mask for all heads" in mla_kernel.KERNELS[0].refuses((*args, torch.zeros(1, 4, 1, 40), 1.0))
    assert "bool or float" in mla_kernel.KERNELS[0].refuses((*args, torch.zeros(40, dtype=torch.int64), 1.0))
    assert "needs dtype" in rms_norm_kernel.KERNELS[0].refuses((weight.half(), weight.half(), 1e-6))
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


def test_attention_of_operands_that_do_not_belong_together():
    args, kernel = attention_case(torch.float32, batch=2, new=3), mla_kernel.KERNELS[0]
    for i, name in enumerate(("q_nope", "q_rope", "latent", "k_rope", "w_uk", "w_uv")):
        bad = [args[i][0], args[i].bfloat16(), args[i][:1]]
        bad += [args[i][:, :1]] if name != "w_uv" else []  # values may be of any width
        for x in bad:
            changed = (*args[:i], x, *args[i + 1 :], None, 0.2)
            assert kernel.refuses(mla_attention.bind(changed)) is not None, (name, x.shape, x.dtype)
            with pytest.raises(ValueError, match=r"^(q_nope|q_rope|latent|k_rope|w_uk|w_uv) must "):
                mla_kernel.absorbed(*changed)
    for mask in (torch.zeros(41), torch.zeros(2, 4, 3, 40), torch.zeros(40, dtype=torch.int64)):
        with pytest.raises(ValueError, match="mask"):
            mla_kernel.absorbed(*args, mask, 0.2)


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

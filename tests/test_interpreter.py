"""The repaired interpreter of Triton computes what NumPy with ml_dtypes does; unrepaired, each check fails."""

import numpy as np
import pytest
import torch
from packaging.version import Version

from dsopt import gpu, interpreter
from dsopt.op import Kernel
from dsopt.ops.norm import rms_norm
from dsopt.testing import check_kernel, interpreted, rand, triton_interpreter

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
ml_dtypes = pytest.importorskip("ml_dtypes")

NUMPY = {
    torch.bfloat16: ml_dtypes.bfloat16,
    torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn,
    torch.float8_e5m2: ml_dtypes.float8_e5m2,
    torch.float16: np.float16,
    torch.float32: np.float32,
}
BITS = {1: (torch.uint8, np.uint8), 2: (torch.int16, np.int16), 4: (torch.int32, np.int32)}
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
BFLOAT16 = torch.bfloat16
# infinities and NaN among the operands are meant
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def numpy(x: torch.Tensor) -> np.ndarray:
    """The same bits as NumPy with ml_dtypes has them."""
    bits, _ = BITS[x.element_size()]
    return x.contiguous().view(bits).numpy().view(NUMPY[x.dtype])


def every_code(dtype: torch.dtype) -> torch.Tensor:
    bits, like = BITS[dtype.itemsize]
    count = 256**dtype.itemsize
    codes = np.arange(count, dtype=np.uint32).astype(f"uint{8 * dtype.itemsize}").view(like)
    return torch.from_numpy(codes).view(bits).view(dtype)


def floats(count: int) -> torch.Tensor:
    """Random bits, which hold infinities, NaN and subnormals, then numbers about 1 and about float8's limits."""
    bits = torch.randint(-(2**31), 2**31, (count,), dtype=torch.int64).to(torch.int32).view(torch.float32)
    return torch.cat((bits, torch.randn(count), torch.randn(count) * 300, torch.randn(count) * 5e4))


def middles(dtype: torch.dtype) -> torch.Tensor:
    """What lies halfway between neighbours of a type, where the even one is to be taken."""
    x = every_code(dtype).float()
    x = x[x.isfinite()].sort().values
    return ((x[:-1].double() + x[1:].double()) / 2).float()


def assert_same(got: torch.Tensor, want: np.ndarray) -> None:
    """Bit for bit, but for which NaN it is."""
    got = numpy(got)
    assert got.dtype == want.dtype and got.shape == want.shape
    nan = np.isnan(want.astype(np.float32))
    assert np.array_equal(np.isnan(got.astype(np.float32)), nan)
    like = BITS[want.dtype.itemsize][1]
    assert np.array_equal(got.view(like)[~nan], np.ascontiguousarray(want).view(like)[~nan])


@triton.jit
def cast(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n).to(out.dtype.element_ty), mask=i < n)


def run_cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=dtype)
    cast[(triton.cdiv(x.numel(), 65536),)](x, out, x.numel(), BLOCK=65536)
    return out


def check_widening(dtype):
    x = every_code(dtype)
    assert_same(run_cast(x, torch.float32), numpy(x).astype(np.float32))


def check_rounding(dtype):
    x = torch.cat((floats(40_000), middles(dtype)))
    want = numpy(x)
    if dtype in FLOAT8:
        limit = np.float32(torch.finfo(dtype).max)
        want = np.clip(want, -limit, limit)
    assert_same(run_cast(x, dtype), want.astype(NUMPY[dtype]))


def check_casts_between(dtypes):
    source, target = dtypes
    x = every_code(source)
    limit = np.float32(torch.finfo(target).max)
    want = numpy(x).astype(np.float32)
    if target in FLOAT8:
        want = np.clip(want, -limit, limit)
    assert_same(run_cast(x, target), want.astype(NUMPY[target]))


def check_integers(_):
    x = torch.arange(-300, 300, dtype=torch.int32)
    assert_same(run_cast(x, BFLOAT16), x.numpy().astype(ml_dtypes.bfloat16))
    assert torch.equal(run_cast(run_cast(x, BFLOAT16), torch.int32), x.bfloat16().int())


@triton.jit
def combine(x, y, out, OP: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b = tl.load(x + i), tl.load(y + i)
    if OP == "+":
        c = a + b
    elif OP == "-":
        c = a - b
    elif OP == "*":
        c = a * b
    elif OP == "/":
        c = (a / b).to(x.dtype.element_ty)
    elif OP == "neg":
        c = -a
    elif OP == "half":
        c = a * 0.5 + b
    elif OP == "max":
        c = tl.maximum(a, b)
    elif OP == "clamp":
        c = tl.clamp(a, b * 0 - 1, b * 0 + 1)
    else:
        c = tl.where((a < b) & (b >= a) & (a != b), a, b)
    tl.store(out + i, c)


ARITHMETIC = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "neg": lambda a, b: -a,
    "half": lambda a, b: (a * np.float32(0.5)).astype(ml_dtypes.bfloat16).astype(np.float32) + b,
    "max": np.fmax,
    "clamp": lambda a, b: np.clip(a, -1, 1),
    "where": lambda a, b: np.where(a < b, a, b),
}


def check_arithmetic(op):
    codes = every_code(BFLOAT16)
    x, y = codes[torch.randperm(65536)], codes[torch.randperm(65536)]
    finite = x.isfinite() & y.isfinite()
    if op != "max":  # only there a number is preferred to NaN
        x, y = torch.where(finite, x, 1.5), torch.where(finite, y, -3.0)
    if op == "neg":  # some versions subtract from zero
        x = torch.where(x == 0, 1.5, x)
    out = torch.empty_like(x)
    combine[(1,)](x, y, out, OP=op, BLOCK=65536)
    with np.errstate(all="ignore"):
        want = ARITHMETIC[op](numpy(x).astype(np.float32), numpy(y).astype(np.float32))
    assert_same(out, want.astype(np.float32).astype(ml_dtypes.bfloat16))


@triton.jit
def product(x, y, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    p = i[:, None] * BLOCK + i[None, :]
    tl.store(out + p, tl.dot(tl.load(x + p), tl.load(y + p)))


def check_dot(dtype):
    r = rand("cpu", torch.float32)
    x, y, out = r(32, 32).to(dtype), r(32, 32).to(dtype), torch.empty(32, 32)
    product[(1,)](x, y, out, BLOCK=32)
    want = x.double() @ y.double()
    assert (out - want).norm() <= 1e-6 * want.norm()


@triton.jit
def reductions(x, sums, member_sums, most, least, where, scan, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row, i = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    a = tl.load(x + row[:, None] * BLOCK + i[None, :])
    tl.store(sums + row, tl.sum(a, 1))
    tl.store(member_sums + row, a.sum(1))
    tl.store(most + row, tl.max(a, 1))
    tl.store(least + row, tl.reduce(a, 1, smaller))
    tl.store(where + row, tl.argmax(a, 1))
    tl.store(scan + row[:, None] * BLOCK + i[None, :], tl.cumsum(a, 1))


@triton.jit
def smaller(a, b):
    return tl.where(a < b, a, b)


def check_reductions(dtype):
    x = rand("cpu", dtype)(4, 64)
    outs = [torch.empty(4, dtype=dtype) for _ in range(4)]
    where, scan = torch.empty(4, dtype=torch.int32), torch.empty(4, 64, dtype=dtype)
    reductions[(1,)](x, *outs, where, scan, ROWS=4, BLOCK=64)
    unit = torch.finfo(dtype).eps
    for total in outs[:2]:
        assert ((total - x.double().sum(1)).abs() <= unit * x.double().abs().sum(1)).all()
    assert torch.equal(outs[2], x.amax(1)) and torch.equal(outs[3], x.amin(1))
    assert torch.equal(where.long(), x.argmax(1))
    assert ((scan - x.double().cumsum(1)).abs() <= unit * x.double().abs().cumsum(1)).all()


@triton.jit
def count(out, start, stop):
    total = 0
    for i in range(start, stop):
        total += i
    tl.store(out, total)


def check_ranges(_):
    out = torch.empty(1, dtype=torch.int32)
    count[(1,)](out, 3, 9)
    assert out.item() == sum(range(3, 9))


CHECKS = [
    *[(check_widening, d) for d in (BFLOAT16, *FLOAT8)],
    *[(check_rounding, d) for d in (BFLOAT16, *FLOAT8)],
    *[(check_casts_between, (BFLOAT16, d)) for d in (*FLOAT8, torch.float16)],
    *[(check_casts_between, (d, BFLOAT16)) for d in FLOAT8],
    (check_integers, None),
    *[(check_arithmetic, op) for op in ARITHMETIC],
    *[(check_dot, d) for d in (BFLOAT16, torch.float16, *FLOAT8)],
    *[(check_reductions, d) for d in (BFLOAT16, torch.float32)],
    (check_ranges, None),
]
# what Triton's own interpreter gets right, so that only a broken repair can fail there
RIGHT = [
    (check_casts_between, (BFLOAT16, torch.float16)),
    *[(check_dot, d) for d in (torch.float16, *FLOAT8)],
    (check_reductions, torch.float32),
]
if np.lib.NumpyVersion(np.__version__) < "2.4.0" or Version(triton.__version__) >= Version("3.9"):
    RIGHT.append((check_ranges, None))
ids = [f"{check.__name__[6:]}-{what}" for check, what in CHECKS]


@pytest.mark.parametrize(("check", "what"), CHECKS, ids=ids)
def test_repaired(check, what):
    with triton_interpreter():
        check(what)


@pytest.mark.parametrize(("check", "what"), CHECKS, ids=ids)
def test_without_the_repair_the_checks_fail(check, what, monkeypatch):
    for part in ("_repair_scalars", "_repair_builder", "_repair_reductions"):
        monkeypatch.setattr(interpreter, part, lambda *_: None)
    with triton_interpreter():
        if (check, what) in RIGHT:
            check(what)
        else:
            with pytest.raises((AssertionError, triton.runtime.errors.InterpreterError)):
                check(what)


@triton.jit
def add_atomically(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.atomic_add(out + i, tl.load(x + i))


def test_atomics_on_bfloat16_are_refused():
    x = torch.ones(4, dtype=BFLOAT16)
    with triton_interpreter(), pytest.raises(triton.runtime.errors.InterpreterError, match="float32"):
        add_atomically[(1,)](x, x, BLOCK=4)
    wide, out = torch.ones(4), torch.ones(4)
    with triton_interpreter():
        add_atomically[(1,)](wide, out, BLOCK=4)
    assert out.tolist() == [2.0] * 4


def test_everything_is_put_back():
    from triton.runtime.interpreter import InterpreterBuilder, ReduceScanOpInterface

    owners = (
        InterpreterBuilder,
        ReduceScanOpInterface,
        triton.runtime.jit.JITFunction,
        tl,
        tl.core,
        tl.tensor,
    )
    before = [dict(vars(owner)) for owner in owners]
    with pytest.raises(ZeroDivisionError), triton_interpreter():
        check_reductions(BFLOAT16)
        assert dict(vars(InterpreterBuilder)) != before[0]
        raise ZeroDivisionError
    assert [dict(vars(owner)) for owner in owners] == before


def test_a_kernel_for_gpus_is_tried_on_the_cpu():
    seen = []

    def plan(x, weight, eps):
        seen.append(gpu.capability(x.device))
        return rms_norm.reference

    kernel = Kernel("rms_norm", "triton", plan, device="cuda", dtypes=frozenset({torch.float32}))
    assert kernel.refuses((torch.ones(2, 4), None, 1e-6)) == "needs device cuda, got cpu"
    assert check_kernel(interpreted(kernel, (8, 0)))
    assert set(seen) == {(8, 0)}
    with pytest.raises(ValueError, match="needs a GPU"):
        gpu.capability(torch.device("cpu"))

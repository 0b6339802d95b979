"""What `make aot` counts and when it fails: kernels that spill, refuse, or name no calls."""

import itertools
import json

import pytest
import torch
from typer.testing import CliRunner

from dsopt.op import Kernel

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
aot = pytest.importorskip("dsopt.aot")


@triton.jit
def square_kernel(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    at = i[:, None] * BLOCK + i[None, :]
    a = tl.load(x + at)
    tl.store(out + at, tl.dot(a, a).to(out.dtype.element_ty))


def plan(x, weight, eps):
    """Not a norm, but a call with its arguments: one warp holds as much as fits in registers, or more."""

    def launch(x, weight, eps):
        out = torch.empty_like(x)
        square_kernel[(1,)](x, out, BLOCK=x.shape[-1], num_warps=1)
        return out

    return launch


def ahead_of_time(tensor):
    yield tensor(16, 16), None, 1e-6
    yield tensor(16, 16), None, 1e-6  # the same variant again
    yield tensor(128, 128), None, 1e-6


KERNEL = Kernel("rms_norm", "triton", plan, device="cuda")
REFUSES = Kernel("rms_norm", "triton", plan, lambda *_: "never", device="cuda")
ELSEWHERE = Kernel("rms_norm", "triton", itertools.count, device="cuda")


def test_each_variant_is_counted_once():
    few, many = aot.compile_kernel(KERNEL, (9, 0))
    assert (few.op, few.kernel, few.constants) == ("rms_norm", "square_kernel", "BLOCK=16")
    assert (few.arch, few.num_warps, few.spills, few.stack) == ("sm_90", 1, 0, 0)
    assert 8 < few.registers < many.registers <= 255
    assert many.spills > 0 and many.stack > 0 and many.shared > few.shared
    assert len(aot.compile_kernel(KERNEL, (8, 0), most=1)) == 1


def test_what_cannot_be_compiled_is_named():
    with pytest.raises(ValueError, match=r"triton\.rms_norm refuses a call .*: never"):
        aot.compile_kernel(REFUSES, (9, 0))
    with pytest.raises(ValueError, match=r"itertools needs ahead_of_time\(tensor\)"):
        aot.compile_kernel(ELSEWHERE, (9, 0))
    with pytest.raises(ValueError, match="capability must be of major version"):
        aot.compile_kernel(KERNEL, (3, 0))


@pytest.mark.parametrize(
    ("version", "code", "says"),
    [
        (f"{aot.GATE}.0", 1, "2 kernels under Triton 3.6.0, 1 spill registers"),
        ("3.9.0", 0, "Spills fail under Triton 3.6 only."),
    ],
)
def test_spills_fail_under_one_version(version, code, says, monkeypatch, tmp_path):
    monkeypatch.setattr(aot, "triton_kernels", lambda ops: [KERNEL])
    monkeypatch.setattr(triton, "__version__", version)
    file = tmp_path / "aot.json"
    done = CliRunner().invoke(aot.app, ["--arch", "90", "--json", str(file)])
    assert done.exit_code == code, done.output
    assert says in done.output
    written = json.loads(file.read_text())
    assert written["triton"] == version
    assert [bool(row["spills"]) for row in written["kernels"]] == [False, True]


def test_an_unknown_op_lists_the_known():
    done = CliRunner().invoke(aot.app, ["--op", "rmsnorm"])
    assert done.exit_code == 1
    assert "unknown op rmsnorm; known ops: rms_norm" in done.output


def test_compiling_leaves_triton_as_it_was():
    before = vars(triton.runtime.jit.JITFunction)["run"], triton.runtime.driver._active
    with pytest.raises(ZeroDivisionError), aot.compiling((9, 0)):
        raise ZeroDivisionError
    assert (vars(triton.runtime.jit.JITFunction)["run"], triton.runtime.driver._active) == before

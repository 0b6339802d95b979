"""Every Triton kernel of the tree: in the interpreter against float64, and compiled for GPUs. Nothing names one."""

import pytest
import torch

from dsopt import aot
from dsopt.op import explain, kernels
from dsopt.ops import OPS
from dsopt.testing import LAYOUTS, check_layout, check_repeats, check_samples, interpreted, rand

pytest.importorskip("triton")

KERNELS = {k.label: k for name in OPS for k in kernels(name)[0] if k.backend == "triton"}
CASES = [
    pytest.param(interpreted(kernel), dtype, id=f"{label}-{str(dtype)[6:]}")
    for label, kernel in KERNELS.items()
    for dtype in sorted(kernel.dtypes, key=str)
]
each_kernel = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
each_case = pytest.mark.parametrize(("kernel", "dtype"), CASES)
# how memory is laid out does not depend on the type of what is in it
each_bfloat16 = pytest.mark.parametrize(
    ("kernel", "dtype"), [case for case in CASES if case.values[1] == torch.bfloat16]
)
# the interpreter takes a tenth of a millisecond for each operation of each program
LARGEST = 20_000
# infinities and NaN inside are meant
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def test_they_are_found():
    broken = [refusal for name in OPS for refusal in kernels(name)[1] if "triton." in refusal.kernel]
    assert not broken
    assert {"triton.rms_norm", "triton.add_rms_norm", "triton.moe_route"} <= KERNELS.keys()


@each_case
def test_samples(kernel, dtype):
    assert check_samples(kernel, "cpu", dtype, LARGEST), "every sample was refused"


@pytest.mark.parametrize("change", LAYOUTS)
@each_bfloat16
def test_memory_layouts(kernel, dtype, change):
    assert check_layout(kernel, "cpu", dtype, change), "every sample was refused"


@each_bfloat16
def test_results_do_not_depend_on_the_call_before(kernel, dtype):
    check_repeats(kernel, "cpu", dtype)


@each_kernel
def test_on_the_cpu_they_say_what_they_need(kernel):
    args = next(OPS[kernel.op].samples(torch.device("cpu"), torch.bfloat16))
    assert (kernel.label, "needs device cuda, got cpu") in explain(OPS[kernel.op], *args)


@each_kernel
def test_they_are_tried_before_others_on_a_gpu(kernel):
    assert kernels(kernel.op)[0][0].priority == kernel.priority


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=("sm_80", "sm_90"))
@each_kernel
def test_the_first_call_compiles_without_spilling(kernel, capability):
    rows = aot.compile_kernel(kernel, capability, most=1)
    assert rows and all(row.spills == 0 and row.registers > 8 for row in rows)


def test_equal_scores_go_to_the_lower_index():
    """Exactly as the reference has it, also among groups and in a group's best two; NaN and inf included."""
    route = OPS["moe_route"]
    kernel = interpreted(KERNELS["triton.moe_route"])
    r = rand("cpu", torch.float32)
    logits = (r(12, 24) * 2).round()
    logits[3, 5], logits[4, 7], logits[5, :] = float("nan"), float("inf"), 1.0
    for scoring in ("sigmoid", "sqrtsoftplus"):
        for groups in ((1, 1, "max"), (6, 2, "top2"), (3, 1, "max"), (24, 5, "top2")):
            args = route.bind((logits, 4, scoring, None, *groups))
            weights, ids = kernel.plan(*args)(*args)
            want_weights, want_ids = route.reference(*args)
            assert torch.equal(ids, want_ids)
            torch.testing.assert_close(weights, want_weights, rtol=1e-5, atol=0, equal_nan=True)


def test_another_number_of_tokens_compiles_nothing_new():
    """Norms and routing: one variant serves 1, 7 and 64 tokens."""
    for label, operands in {
        "triton.rms_norm": lambda tokens: (tokens(64), aot.tensor(64), 1e-6),
        "triton.add_rms_norm": lambda tokens: (tokens(64), tokens(64), aot.tensor(64), 1e-6),
        "triton.moe_route": lambda tokens: (tokens(16), 4),
    }.items():
        kernel = KERNELS[label]
        with aot.compiling((9, 0)) as found:
            for count in (1, 7, 64):
                args = OPS[kernel.op].bind(operands(lambda width, count=count: aot.tensor(count, width)))
                kernel.plan(*args)(*args)
        assert len(found) == 3 and len({compiled.hash for compiled in found}) == 1

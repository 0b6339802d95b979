"""Every kernel of every op on this machine against the op's reference in float64; nothing here names one."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsopt.op import Kernel, kernels
from dsopt.ops import OPS
from dsopt.testing import (
    LAYOUTS,
    check_call,
    check_layout,
    check_repeats,
    check_samples,
    rand,
    relative_l2,
    run_kernel,
    truth,
)

DEVICES = [torch.device(d) for d in ("cpu", "cuda") if d == "cpu" or torch.cuda.is_available()]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# a first argument in FP8 is widened to the dtype of the sample
TAKEN = frozenset((*DTYPES[:2], torch.float8_e4m3fn))
REFERENCES = [
    Kernel(op.name, "reference", lambda *_, op=op: op.reference, dtypes=TAKEN) for op in OPS.values()
]
CASES = [
    pytest.param(OPS[kernel.op], kernel, device, dtype, id=f"{kernel.label}-{device}-{str(dtype)[6:]}")
    for kernel in [*REFERENCES, *(k for name in OPS for k in kernels(name)[0])]
    for device in DEVICES
    if kernel.device in (None, device.type)
    for dtype in DTYPES
    if not kernel.dtypes or dtype in kernel.dtypes
]
each_case = pytest.mark.parametrize(("op", "kernel", "device", "dtype"), CASES)
# layouts do not depend on whether an element is float16 or bfloat16, and the references are plain formulas
each_layout = pytest.mark.parametrize(
    ("op", "kernel", "device", "dtype"),
    [c for c in CASES if c.values[1] not in REFERENCES and c.values[3] != torch.float16],
)


@each_case
def test_samples(op, kernel, device, dtype):
    assert check_samples(kernel, device, dtype), "every sample was refused"


@pytest.mark.parametrize("change", LAYOUTS)
@each_layout
def test_memory_layouts(op, kernel, device, dtype, change):
    assert check_layout(kernel, device, dtype, change), "every sample was refused"


@each_layout
def test_results_do_not_depend_on_the_call_before(op, kernel, device, dtype):
    """Bit for bit the same from scratch memory that another call left behind."""
    check_repeats(kernel, device, dtype)


def accepting(name: str, args: tuple) -> list[Kernel]:
    """The kernels of an op that take these arguments, the reference among them."""
    found = [k for k in REFERENCES if k.op == name] + list(kernels(name)[0])
    return [k for k in found if k.refuses(OPS[name].bind(args)) is None]


def extreme_norms(dtype: torch.dtype) -> Iterator[tuple]:
    largest = 200.0 if dtype == torch.float16 else 1e15
    for value in (largest, 1e-3 if dtype == torch.float16 else 1e-12):
        yield torch.full((2, 64), value, dtype=dtype), None, 1e-6
    spike = torch.zeros(3, 100, dtype=dtype)
    spike[:, 7] = largest
    yield spike, torch.ones(100, dtype=dtype), 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_values_of_norms(dtype):
    for x, weight, eps in extreme_norms(dtype):
        for kernel in accepting("rms_norm", (x, weight, eps)):
            assert check_call(kernel, (x, weight, eps))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_scores(dtype):
    """Scores far beyond what exp can hold, in both directions, and queries that see one key or none."""
    r = rand("cpu", dtype)
    large = 30.0 if dtype == torch.float16 else 300.0
    for factor in (large, -large, 0.0):
        q = torch.full((1, 3, 2, 16), factor, dtype=dtype)
        latent, k_rope = r(1, 70, 16).abs(), r(1, 70, 4).abs()
        w = torch.ones(3, 12, 16, dtype=dtype), r(3, 10, 16)
        for seen in (1, 65, 70):
            mask = (torch.arange(70) < seen).expand(1, 1, 2, 70).clone()
            mask[:, :, 1] = False
            args = (q[..., :12], q[..., 12:], latent, k_rope, *w, mask, 1.0)
            for kernel in accepting("mla_attention", args):
                assert check_call(kernel, args)
                assert not run_kernel(kernel, OPS["mla_attention"].bind(args))[0][:, 1].any()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_nothing_finite_is_lost_to_nan_in_masked_keys(dtype):
    """What a static cache holds beyond its valid length is zeros at first, but may be anything finite."""
    r = rand("cpu", dtype)
    latent, k_rope = r(2, 130, 16), r(2, 130, 4)
    latent[:, 40:], k_rope[:, 40:] = 1e30, -1e30
    mask = (torch.arange(130) < 40)[None, None, None]
    for tokens in (1, 40):
        args = (
            r(2, 3, tokens, 12),
            r(2, 3, tokens, 4),
            latent,
            k_rope,
            r(3, 12, 16),
            r(3, 10, 16),
            mask,
            0.25,
        )
        for kernel in accepting("mla_attention", args):
            got = run_kernel(kernel, OPS["mla_attention"].bind(args))[0]
            short = truth(
                OPS["mla_attention"], (*args[:2], latent[:, :40], k_rope[:, :40], *args[4:6], None, 0.25)
            )
            assert relative_l2(got, short[0]) <= OPS["mla_attention"].tolerance[dtype], kernel.label


few = settings(max_examples=15, deadline=None, derandomize=True, database=None)
dtypes = st.sampled_from([torch.float32, torch.bfloat16])


def check_all(name: str, args: tuple) -> None:
    for kernel in accepting(name, args):
        assert check_call(kernel, args)


@few
@given(
    shape=st.lists(st.integers(1, 9), max_size=3),
    width=st.integers(1, 700),
    dtype=dtypes,
    weighted=st.booleans(),
)
def test_norms_of_any_shape(shape, width, dtype, weighted):
    r = rand("cpu", dtype)
    weight = r(width) if weighted else None
    check_all("rms_norm", (r(*shape, width), weight, 1e-6))
    check_all("add_rms_norm", (r(*shape, width), r(*shape, width), weight, 1e-6))


@few
@given(
    sizes=st.tuples(*[st.integers(1, 5)] * 3),
    half=st.integers(1, 40),
    layout=st.sampled_from([(False, False), (True, False), (True, True), (False, True)]),
    full=st.booleans(),
    dtype=dtypes,
)
def test_rotations_of_any_shape(sizes, half, layout, full, dtype):
    batch, heads, tokens = sizes
    r = rand("cpu", dtype)
    angle = r(batch, 1, tokens, 2 * half if full else half).double() * 10
    x = r(batch, tokens, heads, 2 * half).transpose(1, 2)
    check_all("rope", (x, angle.cos().float(), angle.sin().float(), *layout))


@few
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 7),
    new=st.integers(1, 9),
    more=st.integers(0, 140),
    widths=st.tuples(*[st.integers(1, 40)] * 4),
    mask=st.sampled_from(["none", "causal", "bool", "float"]),
    dtype=dtypes,
)
def test_attention_of_any_shape(batch, heads, new, more, widths, mask, dtype):
    nope, rope, rank, value = widths
    cached = new if mask == "causal" else new + more
    r = rand("cpu", dtype)
    tensors = (
        r(batch, heads, new, nope),
        r(batch, heads, new, rope),
        r(batch, cached, rank),
        r(batch, cached, rope),
    )
    weights = (r(heads, nope, rank) * rank**-0.5, r(heads, value, rank) * rank**-0.5)
    seen = torch.arange(cached) <= cached - new + torch.arange(new)[:, None]
    added = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, float("-inf"))
    masks = {"none": None, "causal": None, "bool": seen[None, None], "float": added[None, None]}
    args = (*tensors, *weights, masks[mask], (nope + rope) ** -0.5, mask == "causal")
    check_all("mla_attention", args)

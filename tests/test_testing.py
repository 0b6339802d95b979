"""dsopt.testing.check_kernel: what it takes, and that each kind of wrong kernel is named."""

import pytest
import torch

from dsopt.op import Kernel
from dsopt.ops.norm import rms_norm
from dsopt.testing import check_kernel, check_samples


def kernel(fn, **more):
    return Kernel("rms_norm", "mine", lambda *_: fn, **more)


def test_a_right_kernel_is_counted():
    right = kernel(rms_norm.reference, dtypes=frozenset({torch.float32}))
    samples = list(rms_norm.samples(torch.device("cpu"), torch.float32))
    assert check_samples(right, "cpu", torch.float32) == len(samples)
    assert check_kernel(right) > len(samples), "other layouts count too"
    even = kernel(
        rms_norm.reference,
        check=lambda x, *_: None if x.shape[-1] % 2 == 0 else "odd",
        dtypes=frozenset({torch.float32}),
    )
    assert 0 < check_kernel(even) < check_kernel(right)


def changes_its_input(x, weight, eps):
    result = rms_norm.reference(x, weight, eps)
    x.zero_()
    return result


def forgets_the_last_element(x, weight, eps):
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    out.view(-1)[:-1] = rms_norm.reference(x, weight, eps).view(-1)[:-1]
    return out


def of_a_view(x, weight, eps):
    return x.contiguous().mul_(0) if not x.is_contiguous() else x


class Counts:
    """Right but for a number that grows with each call, by less than the tolerance."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x, weight, eps):
        self.calls += 1
        return rms_norm.reference(x, weight, eps) * (1 + 1e-7 * self.calls)


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda x, w, eps: rms_norm.reference(x, w, eps) * 1.001, r"is off by 1\.00e-03 > 1e-05"),
        (lambda x, w, eps: rms_norm.reference(x, w, eps).double(), r"gives float64\[.* not float32\["),
        (lambda x, w, eps: rms_norm.reference(x, w, eps)[..., :1], "gives float32"),
        (lambda x, w, eps: (rms_norm.reference(x, w, eps),) * 2, "gives 2 results, not 1"),
        (
            lambda x, w, eps: rms_norm.reference(x, w, eps).repeat(2, *[1] * (x.ndim - 1))[::2],
            "contiguous|off",
        ),
        (forgets_the_last_element, "is off by inf"),
        (changes_its_input, "changes an argument"),
        (of_a_view, "a view of an argument"),
        (Counts(), "another result after other calls"),
    ],
)
def test_a_wrong_kernel_is_named_with_its_arguments(fn, message):
    wrong = kernel(fn, dtypes=frozenset({torch.float32}))
    with pytest.raises(AssertionError, match=rf"mine\.rms_norm .*({message}).*, for arguments float32\["):
        check_kernel(wrong)


def test_a_layout_that_goes_wrong_is_found():
    def aligned_only(x, weight, eps):
        is_unaligned = x.is_contiguous() and x.storage_offset() == 1
        return rms_norm.reference(x.flip(-1) if is_unaligned else x, weight, eps)

    wrong = kernel(aligned_only, dtypes=frozenset({torch.float32}))
    assert check_samples(wrong, "cpu", torch.float32)
    with pytest.raises(AssertionError, match="is off by"):
        check_kernel(wrong)


def test_refusing_everything_is_no_success():
    refuses = kernel(rms_norm.reference, check=lambda *_: "never")
    with pytest.raises(AssertionError, match=r"mine\.rms_norm refused every sample: never"):
        check_kernel(refuses)


def test_an_unknown_op_lists_the_known():
    with pytest.raises(ValueError, match=r"mine\.rmsnorm is of unknown op 'rmsnorm'; known ops: rms_norm, "):
        check_kernel(Kernel("rmsnorm", "mine", lambda *_: None))

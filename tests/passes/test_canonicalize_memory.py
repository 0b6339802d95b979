"""What canonicalize leaves alone because somebody would see it in memory: copies, writes, results of the caller."""

import pytest
import torch
from torch.nn import functional as F

from dsopt.testing import relative_l2, rewritten

X, Y = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
W = torch.randn(5, 8)


def test_a_copy_is_a_copy():
    def copied(x):
        y = x.to(torch.float32, copy=True)
        y.add_(1)
        return y

    before = X.clone()
    result = rewritten(copied, X, passes=("canonicalize",))
    assert torch.equal(result.run(X), before + 1) and torch.equal(X, before)


def test_clone_stays():
    def cloned(x):
        y = x.clone()
        y.mul_(2)
        return y + x

    before = X.clone()
    result = rewritten(cloned, X, passes=("canonicalize",))
    assert torch.equal(result.run(X), before * 3) and torch.equal(X, before)


@pytest.mark.parametrize("copy", [lambda x: x * 1, lambda x: x / 1, lambda x: x + 0])
def test_arithmetic_that_copies_stays_where_either_is_written(copy):
    def copy_written(x):
        y = copy(h := x * 3)
        y.add_(1)
        return h, y

    def source_written(x):
        y = copy(h := x * 3)
        h.add_(1)
        return h, y

    def input_copy_written(x):
        y = copy(x)
        y.view(-1).add_(1)
        return x, y

    for fn in (copy_written, source_written, input_copy_written):
        result = rewritten(fn, X, passes=("canonicalize",))
        assert all(torch.equal(a, b) for a, b in zip(result.run(X), fn(X), strict=True))


@pytest.mark.parametrize(
    "change",
    [
        lambda h, y: h.add_(y),
        lambda h, y: h.mul_(y).sub_(1),
        lambda h, y: F.silu(h, inplace=True),
        lambda h, y: h.masked_fill_(y > 0, 2.0),
        lambda h, y: h.view(-1, 8).div_(3),
    ],
)
def test_writes_of_a_fresh_tensor_become_pure(change):
    def fn(x, y):
        h = x @ y.mT @ y
        early = h * 2
        change(h, y)
        return early, h + 1

    result = rewritten(fn, X, Y, passes=("canonicalize",))
    assert all(relative_l2(a, b) < 1e-6 for a, b in zip(result.run(X, Y), fn(X, Y), strict=True))
    written_through_a_view = "aten.view" in result.ops()
    assert any(op.endswith("_") for op in result.ops()) == written_through_a_view


def test_writes_that_others_see_stay():
    def caller_sees(x, y):
        x.add_(y)
        return x * 2

    def view_sees(x, y):
        h = x + y
        rows = h.view(-1, 8)
        h.mul_(3)
        return rows + 1

    def narrower_result(x, y):
        h = x.bfloat16()
        h.mul_(y)
        return h

    for fn in (caller_sees, view_sees, narrower_result):
        result = rewritten(fn, X.clone(), Y, passes=("canonicalize",))
        assert any(op.endswith("_") for op in result.ops())
        got, want = X.clone(), X.clone()
        assert torch.equal(result.run(got, Y), fn(want, Y)) and torch.equal(got, want)


def through_square(x):
    square = x * x
    copy, row = square * 1, square[0]
    square.mul_(2)
    return copy, row


def through_linear(x):
    y = x @ W.T
    copy = y + 0
    y[..., :2].zero_()
    return copy, y


@pytest.mark.parametrize("fn", [through_square, through_linear])
def test_copy_of_what_was_rewritten_stays_a_copy(fn):
    result = rewritten(fn, X, passes=("canonicalize",))
    for a, b in zip(result.run(X), fn(X), strict=True):
        assert relative_l2(a, b) < 1e-6


def written_reshape(x):
    half = x.sigmoid()[..., :4].mul_(2)
    flat = half.reshape(-1)
    flat.zero_()
    return half, flat


def strided_half(x):
    half = x.sigmoid()[..., :4].mul_(2)
    return torch.as_strided(half, (2, 2), (8, 1))


@pytest.mark.parametrize("fn", [written_reshape, strided_half])
def test_written_view_whose_layout_is_seen_stays_a_view(fn):
    result = rewritten(fn, X, passes=("canonicalize",))
    for a, b in zip(
        torch.utils._pytree.tree_leaves(result.run(X)), torch.utils._pytree.tree_leaves(fn(X)), strict=True
    ):
        assert relative_l2(a, b) < 1e-6


def test_a_result_is_a_tensor_of_its_own():
    """Even if it is all of an input's memory: the caller may change its shape."""
    result = rewritten(lambda x: (x.view(x.shape), x * 2), torch.randn(2, 3), passes=["canonicalize"])
    x = torch.randn(2, 3)
    result.run(x)[0].unsqueeze_(0)
    assert x.shape == (2, 3)


def test_a_cast_to_the_dtype_of_another_before_a_write():
    def fn(x, y):
        c = x.type_as(y.double())
        x.fill_(2.0)
        return c, x * 1.5

    result = rewritten(fn, torch.randn(3), torch.randn(3), passes=["canonicalize"])
    x, y = torch.randn(3), torch.randn(3)
    want = fn(x.clone(), y)
    assert all(torch.equal(a, b) for a, b in zip(result.run(x, y), want, strict=True))

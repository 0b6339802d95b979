"""Equal calls become one, unless a write or the caller could tell them apart."""

import torch

from dsopt.testing import rewritten


def check(fn, *args, shared):
    inputs = [x.clone() for x in args]
    result = rewritten(fn, *inputs, passes=["share_repeats"])
    assert result.log("share_repeats").rewrites == shared
    fresh, mine = [x.clone() for x in args], [x.clone() for x in args]
    want, got = fn(*fresh), result.run(*mine)
    for a, b in zip((*want, *fresh), (*got, *mine), strict=True):
        assert torch.equal(a, b)
    return got


def test_equal_calls():
    def fn(x):
        return ((x * 2).sum(0) + (x * 2).sum(1)).view(-1, 1) + torch.arange(4) * torch.arange(4), x[:, 1:] @ x[:, 1:].T

    check(fn, torch.randn(4, 4), shared=3)


def test_other_arguments_stay_apart():
    check(lambda x: (x.sum(0) + x.sum(1), x + 1, x + 1.0), torch.ones(4, 4), shared=0)


def test_a_write_in_between():
    def fn(x):
        before = x.sum(0)
        x[0] = 3.0
        return before, x.sum(0) + x.sum(0)

    check(fn, torch.randn(4, 4), shared=1)


def test_views_of_what_is_written_are_still_one_memory():
    def fn(x):
        before = x[1].clone()
        x[1].add_(1.0)
        return before, x[1] * 1.5

    check(fn, torch.randn(4, 4), shared=2)


def test_a_fresh_result_that_is_written():
    def fn(x):
        a, b = x + 1, x + 1
        a.add_(5.0)
        return a * 2, b * 2

    check(fn, torch.randn(4), shared=0)


def test_results_of_the_caller_stay_two():
    a, b = check(lambda x: (x + 1, x + 1), torch.randn(4), shared=0)
    assert a.data_ptr() != b.data_ptr()


def test_reshape_of_what_is_written_may_be_a_copy():
    def fn(x):
        a = x.T.reshape(-1)
        x.add_(1.0)
        return a + x.T.reshape(-1), x * 1

    check(fn, torch.randn(3, 4), shared=0)


def test_random_numbers_are_drawn_each_time():
    result = rewritten(lambda x: torch.rand_like(x) - torch.rand_like(x), torch.zeros(64), passes=["share_repeats"])
    assert result.log("share_repeats").rewrites == 0
    assert result.run(torch.zeros(64)).abs().sum() > 0

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
        return ((x * 2).sum(0) + (x * 2).sum(1)).view(-1, 1) + torch.arange(4) * torch.arange(4), x[
            :, 1:
        ] @ x[:, 1:].T

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
    result = rewritten(
        lambda x: torch.rand_like(x) - torch.rand_like(x), torch.zeros(64), passes=["share_repeats"]
    )
    assert result.log("share_repeats").rewrites == 0
    assert result.run(torch.zeros(64)).abs().sum() > 0


def test_results_of_several_tensors_stay_apart():
    values = check(lambda x: (x.topk(2).values, x.topk(2).values), torch.randn(5), shared=0)
    assert values[0].data_ptr() != values[1].data_ptr()


def test_views_that_the_caller_gets_are_tensors_of_their_own():
    def fn(x):
        y = x + 1
        return y[:2], y[:2]

    a, b = check(fn, torch.randn(3, 4), shared=0)
    a.unsqueeze_(0)
    assert b.shape == (2, 4)


def test_zeros_of_either_sign():
    check(lambda x: (1 / (x * 0.0), 1 / (x * -0.0)), torch.ones(3), shared=0)


def test_operators_of_others_are_called_each_time():
    calls = []

    @torch.library.custom_op("dsopt_test::tick", mutates_args=())
    def tick(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return x + len(calls)

    tick.register_fake(lambda x: torch.empty_like(x))
    result = rewritten(lambda x: tick(x) - tick(x), torch.zeros(2), passes=["share_repeats"])
    calls.clear()
    assert result.run(torch.zeros(2)).tolist() == [-1, -1]

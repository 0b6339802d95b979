"""No pass gathers reads across a write: each of these matches but for a write in the middle, and stays right.

The result of each also reads what was there before or after the write, so that only a check at the rewrite
itself can tell.
"""

import pytest
import torch
from torch.nn import functional as F

from dsopt.testing import rand, rewritten

R = rand("cpu", torch.float32)
X, W = R(2, 3, 8), R(8)
W1, W2, W3 = R(8, 8), R(8, 8), R(8, 8)
Q, K, V = R(2, 2, 3, 8), R(2, 2, 3, 8), R(2, 2, 3, 8)


def norm(x, w):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w


def residual_written(a, w):
    x = a + a
    x[:, 0] = 0
    return norm(x, w)


def siblings(x, w):
    first = F.linear(x, W1)
    x[:, 0] = 0
    return norm(first + F.linear(x, W2), w)


def gate_and_up(x, w):
    gate = F.linear(x, W1)
    x[:, 0] = 1
    return F.linear(F.silu(gate) * F.linear(x, W2), W3)


def rotation(x, w):
    y = x * w
    x[:, 0] = 1
    return y + torch.cat((-x[..., 4:], x[..., :4]), -1) * w.cos()


def statistics_first(x, w):
    s = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    x[:, 0] = 1
    return x * s * w


def scores_first(x, w):
    q, k, v = Q + x.sum(), K * 1.5, V + 0.5
    s = q @ k.mT
    k[:, :, 0] = 1
    return norm((s * 0.3).softmax(-1) @ v + k, w)


def buffer_filled_in_two_steps(x, w):
    t = x[0] * 2
    buffer = x.new_empty(6, 8)
    buffer[:3] = t
    t[0].zero_()
    buffer[3:] = t
    return norm(buffer, w)


def einsum_is_a_view(x, w):
    y = torch.einsum("bsd->sbd", x)
    y.mul_(2)
    return norm(y, w)


def copy_of_a_view(x, w):
    y = x.transpose(0, 1) * 1
    x.add_(1)
    return norm(y, w) + x.transpose(0, 1)


def silu_by_hand(x, w):
    s = torch.sigmoid(x)
    x.add_(1)
    return norm(x * s + x, w)


@pytest.mark.parametrize(
    "fn",
    [
        residual_written,
        siblings,
        gate_and_up,
        rotation,
        statistics_first,
        scores_first,
        buffer_filled_in_two_steps,
        einsum_is_a_view,
        copy_of_a_view,
        silu_by_hand,
    ],
)
def test_writes_in_the_middle(fn):
    result = rewritten(fn, X.clone(), W.clone())
    for seed in range(2):
        x = rand("cpu", torch.float32, seed)(*X.shape)
        ours, theirs = x.clone(), x.clone()
        torch.testing.assert_close(result.run(ours, W.clone()), fn(theirs, W.clone()))
        assert torch.equal(ours, theirs), "the caller's tensor holds other values"


@pytest.mark.parametrize("copy", [lambda x: x * 1, lambda x: x + 0, lambda x: x / 1])
def test_returned_copies_stay_copies(copy):
    def fn(x, w):
        h = copy(x)
        return h, norm(h, w)

    x = X.clone()
    h, _ = rewritten(fn, X.clone(), W).run(x, W)
    h.zero_()
    assert torch.equal(x, X), "writing to the result wrote to the input"


def test_views_of_fused_results_may_be_laid_out_otherwise():
    """Eager's result of a transposed input is transposed too, so that its own transpose is contiguous."""

    def fn(x, cos, w):
        x = x.view(2, 3, 2, 4).transpose(1, 2)
        y = x * cos + torch.cat((-x[..., 2:], x[..., :2]), -1) * cos.sin()
        return norm(y.transpose(1, 2).contiguous().view(2, 3, 8), w).view(6, 8)

    x, cos = R(2, 3, 8), R(3, 4)
    result = rewritten(fn, x, cos, W)
    torch.testing.assert_close(result.run(x, cos, W), fn(x, cos, W))
    assert result.count("dsopt.rope") == result.count("dsopt.rms_norm") == 1

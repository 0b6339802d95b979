import pytest
import torch
from torch.nn import functional as F

from dsopt.ops.experts import moe_experts
from dsopt.testing import rand, relative_l2, rewritten

PASSES = ("canonicalize", "fuse_gated_mlp", "batch_experts", "fold_shared_experts", "canonicalize")
R = rand("cpu", torch.float32)
W13, W2 = R(4, 24, 16) * 0.2, R(4, 16, 12) * 0.2
GATE, UP, DOWN = R(20, 16) * 0.2, R(20, 16) * 0.2, R(16, 20) * 0.2


def routed(x):
    flat = x.reshape(-1, 16)
    ids = torch.arange(flat.shape[0]).unsqueeze(-1) * torch.tensor([1, 3]) % 4
    return torch.ops.dsopt.moe_experts(flat, ids, torch.full(ids.shape, 0.4), W13, W2).view(x.shape)


def mlp(x, bias=None):
    return F.linear(F.silu(F.linear(x, GATE)) * F.linear(x, UP), DOWN, bias)


def shared_last(x):
    return routed(x) + mlp(x)


def shared_first(x):
    return mlp(x.reshape(-1, 16)).view(x.shape) + routed(x)


def with_residual(x):
    return x + (mlp(x) + routed(x))


@pytest.mark.parametrize("fn", [shared_last, shared_first, with_residual], ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", [(2, 3, 16), (5, 16), (1, 1, 16)])
def test_folded(fn, shape):
    x = R(*shape)
    result = rewritten(fn, x, passes=PASSES)
    assert result.log("fold_shared_experts").rewrites == 1 and result.count("dsopt.gated_mlp") == 0
    (node,) = [n for n in result.graphs[-1].graph.nodes if n.target is moe_experts.overload]
    assert None not in moe_experts.bind(node.args, node.kwargs)[13:16]
    assert relative_l2(result.run(x), fn(x)) < 1e-6


def test_dynamic_number_of_tokens():
    result = rewritten(shared_last, R(2, 3, 16), passes=PASSES, dynamic=True)
    assert result.log("fold_shared_experts").rewrites == 1
    for shape in ((2, 3, 16), (4, 7, 16)):
        x = R(*shape)
        assert relative_l2(result.run(x), shared_last(x)) < 1e-6


def of_another_x(x):
    return routed(x) + mlp(x * 2)


def of_tokens_in_another_order(x):
    return routed(x) + mlp(x.flip(0))


def gated_by_token(x):
    return routed(x) + mlp(x) * x.mean(-1, keepdim=True).sigmoid()


def read_twice(x):
    y = routed(x)
    return y + mlp(x), y


def mlp_read_twice(x):
    y = mlp(x)
    return routed(x) + y, y


def biased(x):
    return routed(x) + mlp(x, x.new_ones(16))


def limited(x):
    hidden = F.silu(F.linear(x, GATE).clamp(max=0.1)) * F.linear(x, UP).clamp(-0.1, 0.1)
    return routed(x) + F.linear(hidden, DOWN)


def with_gelu(x):
    return routed(x) + F.linear(F.gelu(F.linear(x, GATE)) * F.linear(x, UP), DOWN)


def difference(x):
    return routed(x) - mlp(x)


def scaled_sum(x):
    return torch.add(routed(x), mlp(x), alpha=2.0)


NEAR_MISSES = [
    of_another_x,
    of_tokens_in_another_order,
    gated_by_token,
    read_twice,
    mlp_read_twice,
    biased,
    limited,
    with_gelu,
    difference,
    scaled_sum,
]


@pytest.mark.parametrize("fn", NEAR_MISSES, ids=lambda f: f.__name__)
def test_near_misses_stay(fn):
    x = R(3, 2, 16)
    result = rewritten(fn, x, passes=PASSES)
    assert result.log("fold_shared_experts").rewrites == 0
    got, want = result.run(x), fn(x)
    for a, b in zip(*((y if isinstance(y, tuple) else (y,)) for y in (got, want)), strict=True):
        assert relative_l2(a, b) < 1e-6

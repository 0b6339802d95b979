"""The native linear layers, MLPs and experts: sizes around their blocks, bits that only a row's own operands decide."""

import pytest
import torch

from dsopt import _cpu
from dsopt.kernels.cpu import add_rms_norm as add_norm_kernel
from dsopt.kernels.cpu import gated_mlp as mlp_kernel
from dsopt.kernels.cpu import moe_experts as experts_kernel
from dsopt.kernels.cpu import moe_route as route_kernel
from dsopt.kernels.cpu import multi_linear as linear_kernel
from dsopt.ops import OPS
from dsopt.ops.experts import moe_experts
from dsopt.ops.linear import multi_linear
from dsopt.testing import poisoned, rand, relative_l2, truth

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(params=_cpu.isas())
def isa(request):
    _cpu.set_isa(request.param)
    yield request.param
    _cpu.set_isa()


def experts_case(dtype, tokens, experts=9, topk=3, hidden=70, inner=50, seed=0):
    r = rand(CPU, dtype, seed)
    ids = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed)).argsort(-1)[:, :topk]
    w13, w2 = r(experts, 2 * inner, hidden) * hidden**-0.5, r(experts, hidden, inner) * inner**-0.5
    return r(tokens, hidden), ids, r(tokens, topk).float().softmax(-1), w13, w2


@each_dtype
def test_linear_sizes(dtype, isa):
    """Every number of tokens of a tile, rows around a tile and a block, depths around a step and a pass."""
    r = rand(CPU, dtype)
    for tokens in (1, 2, 3, 4, 5, 6, 7, 13):
        for widths, depth in (
            ((1, 9), 1),
            ((8, 63), 31),
            ((64, 65, 3), 33),
            ((130,), 64),
            ((5, 4), 1030),
            ((4,), 2049),
        ):
            args = (
                r(tokens, depth),
                [r(n, depth) * depth**-0.5 for n in widths],
                [None if n % 2 else r(n) for n in widths],
            )
            with poisoned():
                got = linear_kernel.native(*args)
            for mine, want in zip(got, truth(multi_linear, args), strict=True):
                assert mine.shape == want.shape and mine.is_contiguous()
                assert relative_l2(mine, want) <= multi_linear.tolerance[dtype], (tokens, widths, depth)


def test_every_float16_is_read_and_rounded_exactly(isa):
    """Subnormals, infinities, NaN; products that are halfway between two numbers, too small and too large for one."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    x = torch.tensor(
        [1.0, -1.0, 0.75, 3.0, 1000.0, 2.0**-10, 1.5 * 2.0**-10, 1.001 * 2.0**-14, 2.0**-24]
    ).half()
    want = x.float()[:, None] * every.float()
    for dtype in (torch.float32, torch.float16):
        with poisoned():
            (got,) = linear_kernel.native(x[:, None], [every[:, None]], [None], dtype)
        assert torch.equal(got.nan_to_num(7, 8, 9), want.to(dtype).nan_to_num(7, 8, 9))
    x, residual = every.view(16, -1), (every.flip(0) * 0.37).view(16, -1)
    got = add_norm_kernel.KERNELS[0].plan(x, residual, None, 1e-6)(x, residual, None, 1e-6)[1]
    assert torch.equal(got.nan_to_num(7, 8, 9), (x.float() + residual.float()).half().nan_to_num(7, 8, 9))


@each_dtype
def test_a_row_of_a_linear_layer_has_the_same_bits_in_any_company(dtype, isa, threads):
    r = rand(CPU, dtype)
    x, weights = r(17, 2080), [r(70, 2080), r(131, 2080)]
    threads(1)
    want = linear_kernel.native(x, weights, [None, None])
    for rows in (slice(0, 1), slice(3, 5), slice(4, 8), slice(9, 17)):
        for y, whole in zip(linear_kernel.native(x[rows], weights, [None, None]), want, strict=True):
            assert torch.equal(y, whole[rows])
    threads(2)
    for y, whole in zip(linear_kernel.native(x, weights, [None, None]), want, strict=True):
        assert torch.equal(y, whole)
    alone = linear_kernel.native(x, [weights[1][5:6]], [None])[0]
    assert torch.equal(alone, want[1][:, 5:6])


@each_dtype
def test_a_token_has_the_same_bits_in_any_company(dtype, isa, threads):
    """Through experts and a dense MLP, whoever else chose the same experts, up to 64 tokens."""
    x, ids, weights, w13, w2 = experts_case(dtype, 64)
    r = rand(CPU, dtype, 5)
    shared = [r(40, 70) * 0.1, r(40, 70) * 0.1, r(70, 40) * 0.1]

    def run(rows):
        plain = (x[rows], ids[rows], weights[rows], w13, w2)
        routed = experts_kernel.moe_experts(*plain)
        both = experts_kernel.moe_experts(*moe_experts.bind(plain)[:-3], *shared)
        return routed, both, mlp_kernel.gated_mlp(x[rows][:16], *shared)

    threads(1)
    want = run(slice(0, 64))
    for rows in (slice(0, 1), slice(0, 3), slice(0, 16), slice(0, 40)):
        for y, whole in zip(run(rows), want, strict=True):
            assert torch.equal(y, whole[: len(y)])
    threads(2)
    for _ in range(3):
        for y, whole in zip(run(slice(0, 64)), want, strict=True):
            assert torch.equal(y, whole)


@each_dtype
def test_expert_sizes(dtype, isa):
    for tokens, size in (
        (1, {"hidden": 1, "inner": 1}),
        (3, {"hidden": 31, "inner": 33}),
        (8, {"hidden": 64, "inner": 64, "experts": 2, "topk": 2}),
        (14, {"hidden": 129, "inner": 127, "experts": 1, "topk": 1}),
        (200, {"hidden": 40, "inner": 20, "experts": 300, "topk": 8}),
        (5, {"hidden": 2056, "inner": 1100, "experts": 3, "topk": 2}),
    ):
        args = moe_experts.bind(experts_case(dtype, tokens, **size))
        with poisoned():
            got = experts_kernel.moe_experts(*args)
        assert relative_l2(got, truth(moe_experts, args)[0]) <= moe_experts.tolerance[dtype], (tokens, size)


def test_experts_nobody_chose_are_not_read(isa):
    x, ids, weights, w13, w2 = experts_case(torch.float32, 6)
    ids = ids.clamp(max=4)
    want = experts_kernel.moe_experts(x, ids, weights, w13, w2)
    w13[5:], w2[5:] = float("nan"), float("nan")
    assert torch.equal(experts_kernel.moe_experts(x, ids, weights, w13, w2), want)


def test_one_spoilt_token_spoils_no_other(isa):
    x, ids, weights, w13, w2 = experts_case(torch.float32, 12)
    want = experts_kernel.moe_experts(x, ids, weights, w13, w2)
    x[4] = float("nan")
    got = experts_kernel.moe_experts(x, ids, weights, w13, w2)
    assert got[4].isnan().all() and torch.equal(got[torch.arange(12) != 4], want[torch.arange(12) != 4])


@each_dtype
def test_many_tokens_of_a_linear_layer(dtype, isa):
    """Around the numbers of tokens where weights are turned, where ATen may take over, where a call is parted."""
    r = rand(CPU, dtype)
    for tokens, k in ((64, 40), (65, 40), (71, 33), (72, 40), (100, 2), (260, 4101), (513, 40), (1030, 16)):
        w = [r(24, k) * k**-0.5, r(7, k) * k**-0.5, r(131, 2 * k)[:, ::2].contiguous() * k**-0.5, r(1, k)]
        args = r(tokens, 2, k)[:, 1], w, [r(24), None, None, r(1)]
        want = truth(multi_linear, args)
        for fn in (linear_kernel.multi_linear, linear_kernel.native):
            with poisoned():
                got = fn(*args)
            for mine, true in zip(got, want, strict=True):
                assert relative_l2(mine, true) <= multi_linear.tolerance[dtype], (tokens, k)


@each_dtype
def test_many_tokens_of_experts(dtype, isa):
    """Experts that many, some and few of many tokens chose, beside a shared one; widths that are no whole panels."""
    for tokens, size in (
        (70, {"hidden": 70, "inner": 50, "experts": 3, "topk": 2}),
        (65, {"hidden": 33, "inner": 47, "experts": 2, "topk": 1}),
        (90, {"hidden": 2056, "inner": 49, "experts": 5, "topk": 2}),
        (520, {"hidden": 40, "inner": 97, "experts": 4, "topk": 2}),
    ):
        x, ids, weights, w13, w2 = experts_case(dtype, tokens, **size)
        ids[: tokens // 2] = 0
        r = rand(CPU, dtype, seed=3)
        shared = [r(51, size["hidden"]) * 0.1, r(51, size["hidden"]) * 0.1, r(w2.shape[1], 51) * 0.1]
        args = moe_experts.bind(
            (
                x,
                ids,
                weights,
                w13,
                w2,
                None,
                None,
                r(w2.shape[0], w2.shape[1]),
                None,
                "silu",
                True,
                False,
                None,
                *shared,
            )
        )
        with poisoned():
            got = experts_kernel.moe_experts(*args)
        assert relative_l2(got, truth(moe_experts, args)[0]) <= moe_experts.tolerance[dtype], (tokens, size)


def test_refusals():
    x, ids, weights, w13, w2 = experts_case(torch.float32, 2)
    experts, linear, mlp, route = (
        k.KERNELS[0] for k in (experts_kernel, linear_kernel, mlp_kernel, route_kernel)
    )

    def reason(kernel, *args):
        return kernel.refuses(OPS[kernel.op].bind(args))

    assert "w2 of x's dtype" in reason(experts, x, ids, weights, w13, w2.bfloat16())
    assert "w13 of shape" in reason(experts, x, ids, weights, w13[:, :-1], w2)
    assert "dense rows of w13" in reason(experts, x, ids, weights, w13.mT.contiguous().mT, w2)
    assert "activation" in reason(experts, x, ids, weights, w13, w2, None, None, None, None, "mish")
    assert "weight 1 of" in reason(linear, x, [w13[0], w2[0]], [None, None])
    assert "bias 0 of shape" in reason(linear, x, [w13[0]], [torch.ones(3)])
    assert "w_gate of shape" in reason(mlp, x, w13[0], w13[0], w2[0].mT)
    assert "needs a bias of shape [9]" in reason(route, torch.zeros(2, 9), 2, "sigmoid", torch.zeros(8))
    gate, bias = w13[:, :50], torch.ones(9, 50)
    assert "b3 beside w3" in reason(experts, x, ids, weights, w13, w2, None, None, None, bias)
    assert "for gated experts" in reason(
        experts, x, ids, weights, gate, w2, gate, None, None, None, "silu", False
    )
    shared = (gate[0], None, w2[0])
    some = ("silu", True, False, None, *shared)
    assert "all three" in reason(experts, x, ids, weights, w13, w2, None, None, None, None, *some)
    assert "int32 or int64" in reason(experts, x, ids.float(), weights, w13, w2)
    assert "limit" in reason(
        experts, x, ids, weights, w13, w2, None, None, None, None, "silu", True, False, -1.0
    )
    assert "activation relu" in reason(mlp, x, gate[0], gate[0], w2[0], None, None, None, "relu")
    assert "top3" in reason(route, torch.zeros(2, 9), 2, "sigmoid", None, 3, 2, "top3")
    with pytest.raises(ValueError, match="ids and weights"):
        experts_kernel.moe_experts(x, ids[:1], weights, w13, w2)


@each_dtype
def test_split_experts_with_one_bias(dtype):
    x, ids, weights, w13, w2 = experts_case(dtype, 5)
    gate, up = w13.chunk(2, 1)
    for biases in (
        (torch.ones(9, 50, dtype=dtype), None, None),
        (None, None, torch.ones(9, 50, dtype=dtype)),
    ):
        args = moe_experts.bind((x, ids, weights, gate, w2, up, *biases))
        got = experts_kernel.moe_experts(*args)
        assert relative_l2(got, truth(moe_experts, args)[0]) <= moe_experts.tolerance[dtype]


def test_results_lie_on_the_cpu_whatever_the_default_device_is():
    x, ids, weights, w13, w2 = experts_case(torch.float32, 3)
    with torch.device("meta"):
        results = [
            experts_kernel.moe_experts(x, ids, weights, w13, w2),
            *linear_kernel.native(x, [w13[0]], [None]),
            mlp_kernel.gated_mlp(x, w13[0, :50], w13[0, 50:], w2[0]),
            *route_kernel.moe_route(x, 2),
        ]
    assert all(y.is_cpu for y in results)


def test_tiny_scores_still_order_the_experts(isa):
    logits = torch.tensor([[-100.0, -95.0, -90.0, -88.0]])
    weights, ids = route_kernel.moe_route(logits, 2, "sigmoid", renormalize=True)
    want = logits.double().sigmoid()[0, [3, 2]]
    assert ids.tolist() == [[3, 2]] and relative_l2(weights[0], want / want.sum()) < 1e-3

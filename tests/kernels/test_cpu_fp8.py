"""The native kernels beside weights in FP8: every code, widths around their steps, rows around the blocks of scales."""

import pytest
import torch

from dsopt import _cpu
from dsopt.fp8 import FP8Block, FP8Row, dequantize, quantize
from dsopt.kernels.cpu import moe_experts as experts_kernel
from dsopt.kernels.cpu import multi_linear as linear_kernel
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


@pytest.mark.parametrize("tokens", [1, 2, 70])
def test_every_code_is_widened_exactly(isa, tokens):
    """One code beside zeros gives the code's value, wherever in a row it lies: subnormals and NaN included."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    want = codes.float()
    weight = torch.zeros(256, 256, dtype=torch.uint8)
    weight.fill_diagonal_(0)
    weight[torch.arange(256), torch.arange(256)] = codes.view(torch.uint8)
    scale = torch.full((2, 2), 2.0)
    x = torch.ones(tokens, 256)
    (got,) = linear_kernel.native(x, [weight.view(torch.float8_e4m3fn)], [None], None, [scale])
    assert torch.equal(got.nan_to_num(12345.0), (2 * want).nan_to_num(12345.0).expand(tokens, 256))


@each_dtype
@pytest.mark.parametrize(
    "format", [FP8Block(), FP8Block("ue8m0"), FP8Block(rows=48, columns=32), FP8Row()], ids=str
)
def test_linear_sizes(dtype, isa, format):
    """Every number of tokens of a tile, rows around a tile and a block, depths around a step, both ways with many."""
    r = rand(CPU, dtype)
    for tokens in (1, 2, 3, 4, 5, 6, 7, 13, 70):
        for widths, depth in (((1, 9), 1), ((8, 63), 31), ((130,), 64), ((5, 4), 257), ((3,), 2113)):
            pairs = [quantize(r(n, depth) * depth**-0.5, format) for n in widths]
            biases = [None if n % 2 else r(n) for n in widths]
            block = list(format.block_of((max(widths), depth)))
            args = r(tokens, depth), [w for w, _ in pairs], biases, None, [s for _, s in pairs], block
            with poisoned():
                got = linear_kernel.native(*args)
            for mine, want in zip(got, truth(multi_linear, args), strict=True):
                assert relative_l2(mine, want) <= multi_linear.tolerance[dtype], (tokens, widths, depth)


@each_dtype
def test_experts_beside_few_and_many_tokens(dtype, isa):
    """Stacks whose gate and up share a tensor, and those apart; experts nobody chose are not read."""
    r = rand(CPU, dtype)
    for tokens, hidden, inner, block in ((1, 256, 128, 128), (7, 130, 32, 16), (90, 70, 48, 16)):
        format = FP8Block(rows=block, columns=block)
        w13, scale13 = quantize(r(5, 2 * inner, hidden) * hidden**-0.5, format)
        w2, scale2 = quantize(r(5, hidden, inner) * inner**-0.5, format)
        scale13[4], scale2[4] = float("nan"), float("nan")
        ids = torch.randint(0, 4, (tokens, 1), generator=torch.Generator().manual_seed(0))
        weights, x = r(tokens, 1).float().abs(), r(tokens, hidden)
        blocks = [block, block]
        together = moe_experts.bind(
            (x, ids, weights, w13, w2), {"scale13": scale13, "scale2": scale2, "block": blocks}
        )
        rows = -(-inner // block)
        apart = moe_experts.bind(
            (x, ids, weights, w13[:, :inner], w2, w13[:, inner:]),
            {"scale13": scale13[:, :rows], "scale2": scale2, "scale3": scale13[:, rows:], "block": blocks},
        )
        wide = [
            dequantize(w[:4], s[:4], torch.float64, tuple(blocks)) for w, s in ((w13, scale13), (w2, scale2))
        ]
        want = moe_experts.reference(x.double(), ids, weights.double(), *wide)
        for args in (together, apart):
            assert experts_kernel.KERNELS[0].refuses(args) is None
            with poisoned():
                got = experts_kernel.moe_experts(*args)
            assert relative_l2(got, want) <= moe_experts.tolerance[dtype], (tokens, hidden)


@each_dtype
def test_a_row_has_the_same_bits_in_any_company(dtype, isa, threads):
    r = rand(CPU, dtype)
    x = r(64, 2080)
    weights, scales = zip(*(quantize(r(n, 2080), FP8Block()) for n in (70, 131)), strict=True)

    def run(rows):
        return linear_kernel.native(x[rows], weights, [None, None], None, scales)

    threads(1)
    want = run(slice(0, 64))
    for rows in (slice(0, 1), slice(3, 5), slice(4, 9), slice(9, 64)):
        for y, whole in zip(run(rows), want, strict=True):
            assert torch.equal(y, whole[rows])
    threads(2)
    for y, whole in zip(run(slice(0, 64)), want, strict=True):
        assert torch.equal(y, whole)

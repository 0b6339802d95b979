"""Weights that are dequantized by hand become one op, whatever the spelling; near misses do not."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsopt.fp8 import FP8Block, FP8Group, FP8Row, quantize
from dsopt.ops.quant import dequantize
from dsopt.strided import Strided
from dsopt.testing import rand, relative_l2, rewritten

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
PASSES = ("canonicalize", "fuse_dequantize")
ROWS, COLUMNS = 16, 8
BF16 = torch.bfloat16


def quantized(n=48, k=24, format=None, leading=()):
    return quantize(
        rand("cpu", torch.float32)(*leading, n, k), format or FP8Block(rows=ROWS, columns=COLUMNS)
    )


def repeated(w, s):
    n, k = w.shape
    return (w.to(torch.float32) * s.repeat_interleave(ROWS, 0).repeat_interleave(COLUMNS, 1)[:n, :k]).to(BF16)


def cast_first(w, s):
    n, k = w.shape
    by_row = s.repeat_interleave(ROWS, 0)[:n].to(BF16)
    return by_row.repeat_interleave(COLUMNS, 1)[:, :k] * w.to(BF16)


def expanded(w, s):
    (nb, kb), (n, k) = s.shape, w.shape
    return (
        w.float() * s[:, None, :, None].expand(nb, ROWS, kb, COLUMNS).reshape(nb * ROWS, kb * COLUMNS)[:n, :k]
    )


def transposed_scales(w, s):
    n, k = w.shape
    return w.float() * s.t().repeat_interleave(COLUMNS, 0).t().repeat_interleave(ROWS, 0)[:n, :k]


def blocks_as_axes(w, s):
    n, k = w.shape
    return (w.float().view(n // ROWS, ROWS, k // COLUMNS, COLUMNS) * s[:, None, :, None]).view(n, k)


def one_block_a_row(w, s):
    """As in DeepSeek's conversion script: blocks side by side, one scale each."""
    n, k = w.shape
    x = w.view(n // ROWS, ROWS, k // COLUMNS, COLUMNS).transpose(1, 2).contiguous().view(-1, ROWS * COLUMNS)
    x = (x.float() * s.view(-1, 1).float()).to(BF16).view(n // ROWS, k // COLUMNS, ROWS, COLUMNS)
    return x.transpose(1, 2).contiguous().view(n, k)


def grid_of_scales(w, s):
    """As transformers does where it loads a checkpoint dequantized."""
    (n, k), (nb, kb) = w.shape[-2:], s.shape[-2:]
    wide = w.to(torch.float32).reshape(-1, nb, n // nb, kb, k // kb)
    scale = s.to(torch.float32).reshape(-1, nb, kb).unsqueeze(-1).unsqueeze(2)
    return (wide * scale).to(BF16).reshape(w.shape)


def check(fn, w, s, block=(ROWS, COLUMNS)):
    result = rewritten(fn, w, s, passes=PASSES)
    log = result.log("fuse_dequantize")
    assert log.rewrites == 1 and not log.misses
    assert [o for o in result.ops() if o not in ("aten.reshape", "aten.abs", "aten.mul")] == [
        "dsopt.dequantize"
    ]
    (node,) = [n for n in result.graphs[-1].graph.nodes if n.target is dequantize.overload]
    assert tuple(node.args[3]) == block
    got, want = result.run(w, s), fn(w, s)
    assert got.dtype == want.dtype and got.shape == want.shape
    assert relative_l2(got, want) < (4e-3 if got.dtype == BF16 else 1e-7)


@pytest.mark.parametrize("fn", [repeated, cast_first, expanded, transposed_scales], ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", [(48, 24), (40, 21), (16, 24)])
def test_scales_repeated_for_each_element(fn, shape):
    check(fn, *quantized(*shape), (ROWS, COLUMNS))


@pytest.mark.parametrize("fn", [blocks_as_axes, one_block_a_row, grid_of_scales], ids=lambda f: f.__name__)
def test_weights_viewed_block_by_block(fn):
    check(fn, *quantized())


def test_stacks_of_weights():
    check(grid_of_scales, *quantized(leading=(3,)))


def test_exponents_as_scales():
    w, s = quantized(format=FP8Block("ue8m0", ROWS, COLUMNS))
    check(lambda w, s: repeated(w, s.float()), w, s)
    check(grid_of_scales, w, s)


def test_one_scale_a_row_a_group_or_a_tensor():
    w, s = quantized(format=FP8Row())
    check(lambda w, s: w.float() * s, w, s, (1, 24))
    check(lambda w, s: (w.float() * s[:, None]).to(BF16), w, s[:, 0].clone(), (1, 24))
    w, s = quantized(format=FP8Group(columns=8))
    check(lambda w, s: (w.float().unflatten(1, (-1, 8)) * s[..., None]).flatten(1), w, s, (1, 8))
    check(lambda w, s: w.to(BF16) * s.to(BF16), w, torch.tensor([[0.5]]), (48, 24))


def test_scales_may_be_computed():
    check(lambda w, s: repeated(w, s.abs() * 2), *quantized())


def test_a_linear_layer_reads_the_op():
    w, s = quantized()
    x = rand("cpu", BF16)(3, 24)

    def fn(x, w, s):
        return torch.nn.functional.linear(x, repeated(w, s))

    result = rewritten(fn, x, w, s, passes=PASSES)
    assert result.ops() == ["dsopt.dequantize", "aten.linear"]
    assert torch.equal(result.run(x, w, s), fn(x, w, s))


def test_dequantizations_of_inputs_go_to_the_front():
    w, s = quantized()
    x = rand("cpu", BF16)(3, 24)

    def fn(x, w, s):
        y = x.exp()
        return torch.nn.functional.linear(y, dequantize.overload(w, s, BF16, [ROWS, COLUMNS]))

    assert rewritten(fn, x, w, s, passes=PASSES).ops() == ["dsopt.dequantize", "aten.exp", "aten.linear"]


def other_float8(w, s):
    return repeated(w.float().to(torch.float8_e5m2), s)


def divided(w, s):
    return w.float() / s.repeat_interleave(ROWS, 0).repeat_interleave(COLUMNS, 1)


@pytest.mark.parametrize("fn", [other_float8, divided, repeated], ids=lambda f: f.__name__)
def test_no_product_of_float8_with_scales(fn):
    w, s = quantized()
    w = w.float() if fn is repeated else w
    result = rewritten(fn, w, s, passes=PASSES)
    assert result.log("fuse_dequantize").rewrites == 0 and result.count("dsopt.dequantize") == 0


def tiled(w, s):
    return w.float() * s.unsqueeze(0).expand(ROWS, -1, -1).reshape(48, 3).repeat_interleave(COLUMNS, 1)


def swapped(w, s):
    return w.float() * s.t().repeat_interleave(ROWS, 0).repeat_interleave(COLUMNS, 1)


def shifted(w, s):
    return w.float() * s.repeat_interleave(ROWS, 0).repeat_interleave(COLUMNS + 8, 1)[:, 4:28]


def rounded_scale(w, s):
    return w.float() * s.to(BF16).float().repeat_interleave(ROWS, 0).repeat_interleave(COLUMNS, 1)


def transposed_weight(w, s):
    return w.float().t() * s.repeat_interleave(COLUMNS, 0)[:24].repeat_interleave(ROWS, 1)


def read_twice(w, s):
    blocks = w.float().view(3, ROWS, 3, COLUMNS) * s[:, None, :, None]
    return blocks.view(48, 24), blocks.sum()


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (tiled, "not repeated over blocks"),
        (swapped, "not repeated over blocks"),
        (shifted, "no repeated scale"),
        (rounded_scale, "rounded to torch.bfloat16"),
        (transposed_weight, "not put in the weight's order"),
        (read_twice, "not put in the weight's order"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_near_misses_stay(fn, reason):
    w, s = quantized()
    result = rewritten(fn, w, s, passes=PASSES)
    log = result.log("fuse_dequantize")
    assert log.rewrites == 0 and result.count("dsopt.dequantize") == 0
    (miss,) = log.misses
    assert reason in miss["reason"]
    torch.testing.assert_close(result.run(w, s), fn(w, s))


def test_a_write_in_between_keeps_the_order():
    w, s = quantized()

    def fn(w, s):
        wide = s.repeat_interleave(ROWS, 0)
        s.mul_(2)
        return w.float() * wide.repeat_interleave(COLUMNS, 1)

    result = rewritten(fn, w, s.clone(), passes=PASSES)
    assert result.log("fuse_dequantize").rewrites == 0 and len(result.log("fuse_dequantize").misses) == 1
    assert torch.equal(result.run(w, s.clone()), fn(w, s.clone()))

    def written_before(w, s):
        s.mul_(2)
        return dequantize.overload(w, s, BF16, [ROWS, COLUMNS])

    result = rewritten(written_before, w, s.clone(), passes=PASSES)
    assert torch.equal(result.run(w, s.clone()), written_before(w, s.clone()))


def position(strided: Strided) -> torch.Tensor:
    """The source's element at each place, from the digits."""
    total = torch.zeros(strided.sizes, dtype=torch.int64)
    for dim, (axis, size) in enumerate(zip(strided.axes, strided.sizes, strict=True)):
        places, found = torch.arange(size), torch.zeros(size, dtype=torch.int64)
        for count, stride in reversed(axis):
            found += places % count * stride
            places = places // count
        total += found.view([size if d == dim else 1 for d in range(len(strided.sizes))])
    return total


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_digits_say_where_each_element_comes_from(data):
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    x, strided = torch.arange(torch.Size(sizes).numel()).view(sizes), Strided.of(sizes)
    for move in data.draw(st.lists(st.sampled_from("repeat cut permute expand reshape".split()), max_size=5)):
        dim = data.draw(st.integers(0, x.ndim - 1))
        if move == "repeat":
            x, new = x.repeat_interleave(3, dim), strided.repeated(3, dim)
        elif move == "cut":
            end = data.draw(st.integers(1, x.shape[dim]))
            x, new = x.narrow(dim, 0, end), strided.cut(dim, end)
        elif move == "permute":
            dims = data.draw(st.permutations(range(x.ndim)))
            x, new = x.permute(dims), strided.permuted(dims)
        elif move == "expand":
            x, new = x.expand(2, *x.shape), strided.expanded((2, *x.shape))
        else:
            factor = data.draw(
                st.sampled_from([d for d in range(1, x.shape[dim] + 1) if x.shape[dim] % d == 0])
            )
            split = [*x.shape[:dim], factor, x.shape[dim] // factor, *x.shape[dim + 1 :]]
            x, new = x.reshape(split), strided.reshaped(split)
            if new is None:
                return
        strided = new
    assert torch.equal(position(strided), x)

"""FP8 arithmetic against ml_dtypes, bit by bit, and against its formula."""

import itertools

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsopt.fp8 import FP8Block, FP8Group, FP8Row, dequantize, quantize, scale_shape
from dsopt.fp8.arithmetic import power_of_two
from dsopt.testing import rand

FORMATS = (
    FP8Block(),
    FP8Block("ue8m0"),
    FP8Group(),
    FP8Group("ue8m0"),
    FP8Row(),
    FP8Block(rows=5, columns=3),
)
each_format = pytest.mark.parametrize("format", FORMATS, ids=str)
ONE = FP8Block()


def bits(x) -> np.ndarray:
    return x.view(torch.uint8).numpy() if isinstance(x, torch.Tensor) else x.view(np.uint8)


def rounded(x: np.ndarray) -> np.ndarray:
    """float32 as ml_dtypes rounds it to e4m3, in bytes."""
    return x.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


def filled(x: torch.Tensor) -> torch.Tensor:
    """The numbers as one row whose scale is 1, for one of them is 448."""
    return torch.cat((torch.tensor([448.0]), x.flatten())).view(1, -1)


def test_all_256_codes():
    codes = torch.arange(256).to(torch.uint8)
    want = codes.numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    got = dequantize(codes.view(torch.float8_e4m3fn).view(2, 128), torch.ones(1, 1), torch.float32)
    got = got.flatten().numpy()
    assert np.array_equal(np.isnan(got), np.isnan(want)) and np.isnan(want).sum() == 2
    assert np.array_equal(got[~np.isnan(want)].view(np.uint32), want[~np.isnan(want)].view(np.uint32))
    # and back: each finite number is its own code, minus zero included
    finite = codes[torch.from_numpy(~np.isnan(want))]
    weight, scale = quantize(filled(torch.from_numpy(want[~np.isnan(want)])), FP8Row())
    assert scale.item() == 1 and np.array_equal(bits(weight)[0, 1:], finite.numpy())


def test_halfway_subnormal_and_huge_numbers_round_as_in_ml_dtypes():
    codes = torch.arange(0x7F).to(torch.uint8).view(torch.float8_e4m3fn).float()
    halves = (codes[1:] + codes[:-1]) / 2  # exact in float32
    near = [torch.nextafter(halves, torch.full_like(halves, way)) for way in (-1e9, 1e9)]
    tiny = torch.tensor([2.0**-9, 2.0**-10, 2.0**-11, 2.0**-149, 1e-38, 3 * 2.0**-11])
    x = torch.cat((codes, halves, *near, tiny))
    x = torch.cat((x, -x))
    weight, scale = quantize(filled(x), FP8Row())
    assert scale.item() == 1
    assert np.array_equal(bits(weight)[0, 1:], rounded(x.numpy()))


@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-30, 1e-6, 1e-3, 1.0, 1e4, 1e30]))
@settings(max_examples=20, deadline=None)
def test_random_numbers_round_as_in_ml_dtypes(seed, size):
    x = torch.randn(4, 300, generator=torch.Generator().manual_seed(seed)) * size
    weight, scale = quantize(x, FP8Group())
    for group in range(3):
        part = x[:, group * 128 : (group + 1) * 128].numpy()
        amax = np.maximum(np.abs(part).max(1, keepdims=True), np.float32(1e-4))
        want = amax / np.float32(448)
        assert np.array_equal(scale[:, group : group + 1].numpy(), want)
        clamped = np.clip(part / want, np.float32(-448), np.float32(448))
        assert np.array_equal(bits(weight)[:, group * 128 : (group + 1) * 128], rounded(clamped))


def test_what_a_rounded_scale_lets_past_448_is_saturated():
    for amax in torch.linspace(1, 2, 997).tolist():
        weight, _ = quantize(torch.tensor([[amax, -amax]]), FP8Row())
        assert weight.float().tolist() == [[448.0, -448.0]]


@each_format
@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (130, 257), (7, 3), (2, 33, 40), (2, 2, 3, 129)])
def test_error_is_that_of_three_bits(format, shape):
    x = rand("cpu", torch.float32, 3)(*shape)
    weight, scale = quantize(x, format)
    block = format.block_of(shape)
    assert weight.shape == x.shape and weight.is_contiguous() and weight.dtype == torch.float8_e4m3fn
    assert tuple(scale.shape) == scale_shape(shape, block) and scale.dtype == format.scale_dtype
    back = dequantize(weight, scale, torch.float32, block)
    # half a unit in the last of four bits, or half the smallest number of the largest block
    allowed = torch.maximum(x.abs() * 2**-4, scale.float().max() * 2**-10) * 1.0001
    assert bool(((back - x).abs() <= allowed).all())


@each_format
def test_each_element_is_scaled_by_its_blocks_scale(format):
    shape = (2, 131, 140)
    weight, _ = quantize(rand("cpu", torch.float32)(*shape), format)
    rows, columns = format.block_of(shape)
    scale = rand("cpu", torch.float32, 5)(*scale_shape(shape, (rows, columns)))
    got = dequantize(weight, scale, torch.float32, (rows, columns))
    for e, i, j in itertools.product((0, 1), (0, 4, 127, 128, 130), (0, 2, 127, 128, 139)):
        assert got[e, i, j] == weight[e, i, j].float() * scale[e, i // rows, j // columns]


def test_rounding_to_the_result_happens_once():
    weight, scale = quantize(rand("cpu", torch.float32)(40, 60), ONE)
    product = weight.float().double() * scale.double()
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(dequantize(weight, scale, dtype), product.float().to(dtype))
    assert torch.equal(dequantize(weight, scale.double(), torch.float64), product)


def test_ue8m0_scales_are_the_next_power_of_two_by_their_bits():
    x = torch.cat((torch.logspace(-37, 37, 2001), 2.0 ** torch.arange(-120.0, 120.0)))
    x = torch.cat((x, torch.nextafter(x, torch.zeros(())), torch.nextafter(x, torch.tensor(1e38))))
    mantissa, exponent = torch.frexp(x)  # mantissa in [0.5, 1)
    want = torch.ldexp(torch.ones_like(x), torch.where(mantissa == 0.5, exponent - 1, exponent))
    assert torch.equal(power_of_two(x), want)
    scale = quantize(torch.logspace(-3, 30, 500)[:, None], FP8Row("ue8m0"))[1]
    assert np.array_equal(
        bits(scale).view(ml_dtypes.float8_e8m0fnu).astype(np.float32), scale.float().numpy()
    )


def test_ue8m0_products_are_exact():
    x = rand("cpu", torch.float32)(130, 140)
    weight, scale = quantize(x, FP8Block("ue8m0"))
    back = dequantize(weight, scale, torch.bfloat16)
    assert torch.equal(back.double(), dequantize(weight, scale.float().double(), torch.float64))
    assert back.abs().max() <= x.abs().max() * 1.07


def test_zero_blocks_and_tiny_ones_have_the_floors_scale():
    weight, scale = quantize(torch.zeros(2, 300), FP8Group())
    assert torch.equal(scale, torch.full((2, 3), 1e-4) / 448) and not weight.float().any()
    assert quantize(torch.full((1, 4), 1e-9), FP8Row())[1].item() == scale[0, 0]
    assert quantize(torch.zeros(1, 4), FP8Row("ue8m0"))[1].float().item() == 2.0**-22


@each_format
def test_empty_tensors(format):
    for shape in ((0, 16), (16, 0), (3, 0, 5), (0, 4, 4)):
        weight, scale = quantize(torch.empty(shape), format)
        assert tuple(weight.shape) == shape
        back = dequantize(weight, scale, torch.bfloat16, format.block_of(shape))
        assert tuple(back.shape) == shape and back.dtype == torch.bfloat16


def test_large_weights_are_quantized_strip_by_strip(monkeypatch):
    x = rand("cpu", torch.bfloat16)(2, 300, 70)
    whole = quantize(x, FP8Block(rows=16, columns=32))
    monkeypatch.setattr("dsopt.fp8.arithmetic._STRIP", 16 * 70 * 3)
    strips = quantize(x, FP8Block(rows=16, columns=32))
    assert all(np.array_equal(bits(a), bits(b)) for a, b in zip(whole, strips, strict=True))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(wrong):
    x = torch.ones(3, 4)
    x[1, 2] = wrong
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize(x, ONE)


def test_other_input_is_refused():
    with pytest.raises(TypeError, match="format must be FP8Block"):
        quantize(torch.ones(2, 2), "fp8")
    with pytest.raises(TypeError, match=r"got torch\.int32"):
        quantize(torch.ones(2, 2, dtype=torch.int32), ONE)
    with pytest.raises(ValueError, match="two dimensions"):
        quantize(torch.ones(2), ONE)
    with pytest.raises(ValueError, match="float32, ue8m0, got 'mx'"):
        FP8Block("mx")
    for size in (0, 1.5, True):
        with pytest.raises(ValueError, match="columns must be a whole number"):
            FP8Group(columns=size)
    weight, scale = quantize(torch.ones(130, 4), ONE)
    with pytest.raises(ValueError, match=r"scale must have shape \[2, 1\] .* got \[1, 1\]"):
        dequantize(weight, scale[:1], torch.float32)
    with pytest.raises(ValueError, match="block must be two numbers"):
        dequantize(weight, scale, torch.float32, (0, 128))

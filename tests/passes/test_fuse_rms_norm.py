import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dsopt.testing import exported, relative_l2, rewritten

PASSES = ("canonicalize", "fuse_rms_norm", "canonicalize")
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
EPS = 1e-5


def pow_rsqrt(x, w):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * w


def square_weight_left(x, w):
    return w * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS))


def product_of_itself(x, w):
    return torch.rsqrt(EPS + (x * x).mean(dim=x.ndim - 1, keepdim=True)) * x * w


def divided_by_sqrt(x, w):
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + EPS) * w


def negative_power(x, w):
    return w * (x * (x.pow(2).mean(-1, keepdim=True) + EPS) ** -0.5)


def reciprocal_root(x, w):
    return x * (1 / torch.sqrt(x.pow(2).mean([-1], keepdim=True) + EPS)) * w


def reciprocal_call(x, w):
    return x * torch.reciprocal(torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS)) * w


def llama(x, w):
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return w * wide.to(x.dtype)


def weight_in_float32(x, w):
    wide = x.float()
    return (w.float() * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS))).to(x.dtype)


def root_cast_back(x, w):
    return x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS).to(x.dtype) * w


def cast_by_type_as(x, w):
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).type_as(x) * w


def native(x, w):
    return F.rms_norm(x, (x.shape[-1],), w, EPS)


SPELLINGS = [
    pow_rsqrt,
    square_weight_left,
    product_of_itself,
    divided_by_sqrt,
    negative_power,
    reciprocal_root,
    reciprocal_call,
    llama,
    weight_in_float32,
    root_cast_back,
    cast_by_type_as,
    native,
]


class Norm(nn.Module):
    def __init__(self, formula, dtype, size=24):
        super().__init__()
        self.formula = formula
        self.weight = nn.Parameter(torch.randn(size, dtype=dtype))

    def forward(self, x):
        return self.formula(x, self.weight)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("formula", SPELLINGS, ids=lambda f: f.__name__)
def test_spellings(formula, dtype):
    model, x = Norm(formula, dtype), torch.randn(2, 3, 24, dtype=dtype)
    for result in (rewritten(model, x, passes=PASSES), exported(model, x, passes=PASSES)):
        assert result.ops() == ["dsopt.rms_norm"]
        assert result.log("fuse_rms_norm").rewrites == 1
        assert result.log("fuse_rms_norm").families == {"norm": 1}
        assert relative_l2(result.run(x), model(x)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_without_weight(dtype):
    def norm(x):
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)

    def native_norm(x):
        return F.rms_norm(x, (24,), eps=EPS)

    x = torch.randn(2, 3, 24, dtype=dtype)
    for formula in (norm, native_norm):
        result = rewritten(formula, x, passes=PASSES)
        assert result.ops() == ["dsopt.rms_norm"]
        assert relative_l2(result.run(x), formula(x)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("formula", [pow_rsqrt, llama, weight_in_float32, native], ids=lambda f: f.__name__)
def test_residual_sum_is_fused(formula, dtype):
    model = Norm(formula, dtype)

    def block(x, residual):
        total = x + residual
        return model(total), total

    x, residual = torch.randn(2, 3, 24, dtype=dtype), torch.randn(2, 3, 24, dtype=dtype)
    result = rewritten(block, x, residual, passes=PASSES)
    assert result.ops() == ["dsopt.add_rms_norm"]
    for got, want in zip(result.run(x, residual), block(x, residual), strict=True):
        assert relative_l2(got, want) < TOLERANCE[dtype]


def test_residual_added_in_place():
    model, layer = Norm(llama, torch.float32), nn.Linear(24, 24)

    def block(x):
        hidden = layer(x)
        hidden += x
        return model(hidden), hidden

    x = torch.randn(2, 24)
    result = rewritten(block, x, passes=PASSES)
    assert result.ops() == ["aten.linear", "dsopt.add_rms_norm"]
    assert all(relative_l2(a, b) < 1e-6 for a, b in zip(result.run(x), block(x), strict=True))


def test_residual_that_broadcasts_is_added_before():
    model, x = Norm(llama, torch.float32), torch.randn(2, 3, 24)
    for other in (torch.randn(24), torch.tensor(2.0)):
        result = rewritten(lambda x, other: model(x + other), x, other, passes=PASSES)
        assert result.ops() == ["aten.add", "dsopt.rms_norm"]
        assert relative_l2(result.run(x, other), model(x + other)) < 1e-6


def test_scaled_residual_is_added_before():
    model, x, y = Norm(llama, torch.float32), torch.randn(2, 3, 24), torch.randn(2, 3, 24)
    result = rewritten(lambda x, y: model(torch.add(x, y, alpha=2)), x, y, passes=PASSES)
    assert result.count("dsopt.add_rms_norm") == 0
    assert relative_l2(result.run(x, y), model(x + 2 * y)) < 1e-6


def test_weight_made_after_the_sum_stays_right():
    def block(x, y, w):
        total = x + y
        return llama(total, w * 2), total

    args = torch.randn(2, 24), torch.randn(2, 24), torch.randn(24)
    result = rewritten(block, *args, passes=PASSES)
    assert result.log("fuse_rms_norm").rewrites == 1
    assert all(relative_l2(a, b) < 1e-6 for a, b in zip(result.run(*args), block(*args), strict=True))


def test_two_norms_of_one_sum():
    first, second = Norm(llama, torch.float32), Norm(pow_rsqrt, torch.float32)

    def block(x, y):
        total = x + y
        return first(total), second(total), total

    args = torch.randn(2, 24), torch.randn(2, 24)
    result = rewritten(block, *args, passes=PASSES)
    assert result.log("fuse_rms_norm").families == {"norm": 2}
    assert all(relative_l2(a, b) < 1e-6 for a, b in zip(result.run(*args), block(*args), strict=True))


def test_float32_norm_of_a_cast_input_keeps_its_dtype():
    # the result is float32 although x is bfloat16: another function than the op's
    def norm(x, w):
        wide = x.float()
        return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * w

    x, w = torch.randn(2, 24, dtype=torch.bfloat16), torch.randn(24)
    result = rewritten(norm, x, w, passes=PASSES)
    assert result.run(x, w).dtype == torch.float32
    assert relative_l2(result.run(x, w), norm(x, w)) < 1e-6


def test_dynamic_shapes():
    model = Norm(llama, torch.float32)
    result = rewritten(model, torch.randn(2, 3, 24), passes=PASSES, dynamic=True)
    assert result.ops() == ["dsopt.rms_norm"]
    for shape in ((4, 7, 24), (5, 2, 24)):
        x = torch.randn(shape)
        assert relative_l2(result.run(x), model(x)) < 1e-6
    assert len(result.graphs) == 1


def eps_outside_the_root(x, w):
    return x * (torch.rsqrt(x.pow(2).mean(-1, keepdim=True)) + EPS) * w


def eps_added_to_the_root(x, w):
    return x / (torch.sqrt(x.pow(2).mean(-1, keepdim=True)) + EPS) * w


def eps_inside_the_mean(x, w):
    return x * torch.rsqrt((x.pow(2) + EPS).mean(-1, keepdim=True)) * w


def no_eps(x, w):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)) * w


def tensor_eps(x, w):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + w[0].abs()) * w


def sum_of_squares(x, w):
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + EPS) * w


def mean_over_another_dim(x, w):
    return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + EPS) * w


def mean_over_two_dims(x, w):
    return x * torch.rsqrt(x.pow(2).mean((-2, -1), keepdim=True) + EPS) * w


def root_of_another_tensor(x, w):
    return x * torch.rsqrt((x + 1).pow(2).mean(-1, keepdim=True) + EPS) * w


def centred(x, w):
    return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * w


NEAR_MISSES = [
    eps_outside_the_root,
    eps_added_to_the_root,
    eps_inside_the_mean,
    no_eps,
    tensor_eps,
    mean_over_another_dim,
    mean_over_two_dims,
    root_of_another_tensor,
    centred,
]


@pytest.mark.parametrize("formula", NEAR_MISSES, ids=lambda f: f.__name__)
def test_near_misses_stay_and_say_why(formula):
    model, x = Norm(formula, torch.float32), torch.randn(2, 3, 24)
    result = rewritten(model, x, passes=PASSES)
    assert result.log("fuse_rms_norm").rewrites == 0
    assert [m["reason"] for m in result.log("fuse_rms_norm").misses]
    assert relative_l2(result.run(x), model(x)) < 1e-6


def test_sum_instead_of_mean_is_no_norm():
    model, x = Norm(sum_of_squares, torch.float32), torch.randn(2, 3, 24)
    result = rewritten(model, x, passes=PASSES)
    assert result.log("fuse_rms_norm").rewrites == 0
    assert relative_l2(result.run(x), model(x)) < 1e-6


@pytest.mark.parametrize("read", ["root", "mean"])
def test_another_reader_keeps_the_norm_apart(read):
    def norm(x, w):
        mean = x.pow(2).mean(-1, keepdim=True)
        root = torch.rsqrt(mean + EPS)
        return x * root * w, {"root": root, "mean": mean}[read] * 1.5

    x, w = torch.randn(2, 24), torch.randn(24)
    result = rewritten(norm, x, w, passes=PASSES)
    assert result.log("fuse_rms_norm").rewrites == 0
    (miss,) = result.log("fuse_rms_norm").misses
    assert "read by another node" in miss["reason"]
    assert all(relative_l2(a, b) < 1e-6 for a, b in zip(result.run(x, w), norm(x, w), strict=True))


def test_a_normalized_value_with_two_weights_is_one_norm():
    def norm(x, w):
        normalized = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
        return normalized * w, normalized * (1 + w)

    x, w = torch.randn(2, 24), torch.randn(24)
    result = rewritten(norm, x, w, passes=PASSES)
    assert result.log("fuse_rms_norm").families == {"norm": 1} and not result.log("fuse_rms_norm").misses
    assert result.count("dsopt.rms_norm") == 1 and "aten.rsqrt" not in result.ops()
    assert all(relative_l2(a, b) < 1e-6 for a, b in zip(result.run(x, w), norm(x, w), strict=True))


def test_a_weight_in_float32_stays_behind_the_norm():
    """Rounded to bfloat16 and then weighted in float32, as some models keep the weights of their norms."""

    def norm(x, w):
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype) * w

    x, w = torch.randn(2, 24, dtype=torch.bfloat16), torch.randn(24)
    result = rewritten(norm, x, w, passes=PASSES)
    assert result.log("fuse_rms_norm").families == {"norm": 1}
    assert result.ops() == ["dsopt.rms_norm", "aten.mul"]
    assert relative_l2(result.run(x, w), norm(x, w)) < 1e-2


def test_input_read_elsewhere_is_no_obstacle():
    def norm(x, w):
        wide = x.float()
        return llama(x, w), wide * 3

    x, w = torch.randn(2, 24, dtype=torch.bfloat16), torch.randn(24, dtype=torch.bfloat16)
    result = rewritten(norm, x, w, passes=PASSES)
    assert result.count("dsopt.rms_norm") == 1
    assert all(relative_l2(a, b) < 1e-2 for a, b in zip(result.run(x, w), norm(x, w), strict=True))


def test_weight_of_another_size_stays():
    def norm(x, w):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * w

    x, w = torch.randn(2, 1), torch.randn(5)
    result = rewritten(norm, x, w, passes=PASSES)
    assert relative_l2(result.run(x, w), norm(x, w)) < 1e-6


def test_native_norm_that_the_op_does_not_cover():
    def two_dims(x, w):
        return F.rms_norm(x, (3, 24), w, EPS)

    def default_eps(x, w):
        return F.rms_norm(x, (24,), w[0])

    x, w = torch.randn(2, 3, 24), torch.randn(3, 24)
    for formula in (two_dims, default_eps):
        result = rewritten(formula, x, w, passes=PASSES)
        assert result.log("fuse_rms_norm").rewrites == 0
        assert result.log("fuse_rms_norm").misses
        assert relative_l2(result.run(x, w), formula(x, w)) < 1e-6


def stays_as_eager(fn, *args, rewrites):
    result = rewritten(fn, *args, passes=PASSES)
    assert result.log("fuse_rms_norm").rewrites == rewrites
    assert relative_l2(result.run(*args), fn(*args)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int32, torch.float8_e4m3fn], ids=str)
def test_rounding_of_the_input_is_kept(dtype):
    stays_as_eager(
        lambda x, w: pow_rsqrt(x.to(dtype).float(), w), torch.randn(4, 24) * 3, torch.rand(24), rewrites=1
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.float8_e4m3fn], ids=str)
def test_rounding_in_between_is_kept(dtype):
    """Norm without weight, rounded, weighted: only what stands before the rounding may be one op."""

    def fn(x, w):
        return pow_rsqrt(x, 1.0).to(dtype).float() * w

    stays_as_eager(fn, torch.randn(4, 24) * 3, torch.rand(24), rewrites=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_rounding_of_the_weight_is_kept(dtype):
    stays_as_eager(
        lambda x, w: pow_rsqrt(x, w.to(dtype).float()), torch.randn(4, 24), torch.rand(24) * 5, rewrites=1
    )

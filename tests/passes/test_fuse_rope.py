import pytest
import torch
from torch import nn

from dsopt.testing import exported, relative_l2, rewritten

PASSES = ("canonicalize", "fuse_rope", "canonicalize")
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
BATCH, HEADS, TOKENS, DIM = 2, 3, 5, 8


def rotate_half(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def half_split(x, cos, sin):
    return x * cos + rotate_half(x) * sin


def half_split_chunked(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return sin * torch.cat([-b, a], -1) + cos * x


def tables_first(x, cos, sin):
    return cos * x + sin * rotate_half(x)


def half_split_in_float32(x, cos, sin):
    wide = x.float()
    return (wide * cos.float() + rotate_half(wide) * sin.float()).to(x.dtype)


def halves(x, cos, sin):
    a, b = torch.split(x, DIM // 2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def halves_other_order(x, cos, sin):
    a, b = x[..., : DIM // 2], x[..., DIM // 2 :]
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def halves_tables_first(x, cos, sin):
    a, b = x[..., : DIM // 2], x[..., DIM // 2 :]
    return torch.cat((cos * a - sin * b, sin * a + cos * b), dim=-1)


def interleaved_to_halves(x, cos, sin):
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat((even * cos - odd * sin, odd * cos + even * sin), dim=-1)


def interleaved_stacked(x, cos, sin):
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def interleaved_stacked_in_float32(x, cos, sin):
    wide = x.float()
    even, odd = wide[..., ::2], wide[..., 1::2]
    out = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return out.reshape(x.shape).to(x.dtype)


def unpaired_then_half_split(x, cos, sin):
    """DeepSeek-V3 in transformers: pairs are brought to halves by a view and a transpose first."""
    b, h, s, d = x.shape
    x = x.view(b, h, s, d // 2, 2).transpose(4, 3).reshape(b, h, s, d)
    return x * cos + rotate_half(x) * sin


HALF_WIDTH = [
    halves,
    halves_other_order,
    halves_tables_first,
    interleaved_to_halves,
    interleaved_stacked,
    interleaved_stacked_in_float32,
]
FULL_WIDTH = [half_split, half_split_chunked, tables_first, half_split_in_float32, unpaired_then_half_split]


def tables(width, dtype=torch.float32, tokens=TOKENS):
    angle = torch.arange(tokens)[:, None] * 10.0 ** -(torch.arange(width) % (DIM // 2))
    return angle.cos()[None, None].to(dtype), angle.sin()[None, None].to(dtype)


def heads(dtype=torch.float32, tokens=TOKENS):
    return torch.randn(BATCH, tokens, HEADS, DIM, dtype=dtype).transpose(1, 2)


class Rotation(nn.Module):
    def __init__(self, formula, width, dtype):
        super().__init__()
        self.formula = formula
        cos, sin = tables(width, dtype)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)

    def forward(self, x):
        return self.formula(x, self.cos, self.sin)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("formula", HALF_WIDTH + FULL_WIDTH, ids=lambda f: f.__name__)
def test_spellings(formula, dtype):
    width = DIM if formula in FULL_WIDTH else DIM // 2
    model, x = Rotation(formula, width, dtype), heads(dtype)
    for result in (rewritten(model, x, passes=PASSES), exported(model, x, passes=PASSES)):
        assert result.log("fuse_rope").families == {"rope": 1}
        assert result.count("dsopt.rope") == 1
        assert "aten.cat" not in result.ops() and "aten.mul" not in result.ops()
        assert relative_l2(result.run(x), model(x)) < TOLERANCE[dtype]


def turn_pairs(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def interleaved(x, cos, sin):
    return x * cos + turn_pairs(x) * sin


def interleaved_in_float32(x, cos, sin):
    return (x.float() * cos + turn_pairs(x).float() * sin).to(x.dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("formula", [interleaved, interleaved_in_float32], ids=lambda f: f.__name__)
def test_interleaved_with_tables_as_wide_as_the_input(formula, dtype):
    # entries of a pair differ here, so that each must find its own
    args = heads(dtype), *(torch.randn(1, 1, TOKENS, DIM).to(dtype) for _ in range(2))
    result = rewritten(formula, *args, passes=PASSES)
    assert result.log("fuse_rope").families == {"rope": 1}
    assert {"dsopt.rope", "aten.slice", "aten.cat"} == set(result.ops())
    assert relative_l2(result.run(*args), formula(*args)) < TOLERANCE[dtype]


@pytest.mark.parametrize("formula", [interleaved, interleaved_in_float32], ids=lambda f: f.__name__)
def test_interleaved_with_repeated_tables(formula):
    def rotate(x, cos, sin):
        return formula(x, *(t.repeat_interleave(2, dim=-1).unsqueeze(1) for t in (cos, sin)))

    args = heads(), *(t[0] for t in tables(DIM // 2))
    result = rewritten(rotate, *args, passes=PASSES)
    assert set(result.ops()) == {"aten.unsqueeze", "dsopt.rope"}, "the tables need not be repeated"
    assert relative_l2(result.run(*args), rotate(*args)) < 1e-6


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_tables_in_float32(dtype):
    cos, sin = tables(DIM)
    x = heads(dtype)
    result = rewritten(half_split_in_float32, x, cos, sin, passes=PASSES)
    assert result.ops() == ["dsopt.rope"]
    assert relative_l2(result.run(x, cos, sin), half_split_in_float32(x, cos, sin)) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    "formula", [half_split, interleaved_to_halves, interleaved], ids=lambda f: f.__name__
)
def test_tables_that_widen_the_result(formula):
    width = DIM // 2 if formula is interleaved_to_halves else DIM
    args = heads(torch.bfloat16), *tables(width)
    result = rewritten(formula, *args, passes=PASSES)
    assert result.log("fuse_rope").families == {"rope": 1}
    assert formula(*args).dtype == result.run(*args).dtype == torch.float32
    assert relative_l2(result.run(*args), formula(*args)) < 1e-6


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_complex(dtype):
    def rotate(x, table):
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * table).flatten(3).type_as(x)

    cos, sin = tables(DIM // 2)
    x, table = heads(dtype), torch.complex(cos, sin)
    result = rewritten(rotate, x, table, passes=PASSES)
    assert result.count("dsopt.rope") == 1
    assert "aten.view_as_complex" not in result.ops()
    assert relative_l2(result.run(x, table), rotate(x, table)) < TOLERANCE[dtype]


def test_complex_with_heads_behind_tokens():
    """DeepSeek's own code: (batch, tokens, heads, dim), the table unsqueezed over heads."""

    def rotate(x, table):
        dtype = x.dtype
        x = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
        table = table.view(1, x.size(1), 1, x.size(-1))
        return torch.view_as_real(x * table).flatten(3).to(dtype)

    angle = torch.randn(TOKENS, DIM // 2)
    x, table = torch.randn(BATCH, TOKENS, HEADS, DIM), torch.polar(torch.ones_like(angle), angle)
    result = rewritten(rotate, x, table, passes=PASSES)
    assert result.count("dsopt.rope") == 1
    assert relative_l2(result.run(x, table), rotate(x, table)) < 1e-6


@pytest.mark.parametrize("formula", [half_split, unpaired_then_half_split], ids=lambda f: f.__name__)
def test_query_and_shared_key(formula):
    def both(q, k, cos, sin):
        return formula(q, cos, sin), formula(k, cos, sin)

    args = heads(), torch.randn(BATCH, 1, TOKENS, DIM), *tables(DIM)
    result = rewritten(both, *args, passes=PASSES)
    assert result.log("fuse_rope").families == {"rope": 2}
    assert result.count("dsopt.rope") == 2
    for got, want in zip(result.run(*args), both(*args), strict=True):
        assert relative_l2(got, want) < 1e-6


def test_tables_made_in_the_graph_and_read_elsewhere():
    def rotate(x, angle):
        both = torch.cat((angle, angle), -1)
        cos, sin = both.cos()[:, None] * 1.25, both.sin()[:, None] * 1.25
        return half_split(x, cos, sin), cos * 2

    args = heads(), torch.randn(BATCH, TOKENS, DIM // 2)
    result = rewritten(rotate, *args, passes=PASSES)
    assert result.count("dsopt.rope") == 1
    assert all(relative_l2(a, b) < 1e-6 for a, b in zip(result.run(*args), rotate(*args), strict=True))


def test_part_of_a_head_is_rotated():
    def rotate(x, cos, sin):
        kept, turned = x.split([4, DIM], dim=-1)
        return torch.cat((kept, half_split(turned, cos, sin)), -1)

    args = torch.randn(BATCH, HEADS, TOKENS, DIM + 4), *tables(DIM)
    result = rewritten(rotate, *args, passes=PASSES)
    assert result.count("dsopt.rope") == 1
    assert relative_l2(result.run(*args), rotate(*args)) < 1e-6


@pytest.mark.parametrize("formula", [half_split, interleaved_to_halves, unpaired_then_half_split])
def test_dynamic_shapes(formula):
    width = DIM // 2 if formula is interleaved_to_halves else DIM
    args = heads(), *tables(width)
    for tensor in args:
        torch._dynamo.mark_dynamic(tensor, 2)
    result = rewritten(formula, *args, passes=PASSES)
    assert result.count("dsopt.rope") == 1
    for tokens in (7, 2):
        args = heads(tokens=tokens), *tables(width, tokens=tokens)
        assert relative_l2(result.run(*args), formula(*args)) < 1e-6
    assert len(result.graphs) == 1


def test_heads_of_unknown_width_stay():
    args = heads(), *tables(DIM)
    result = rewritten(half_split, *args, passes=PASSES, dynamic=True)
    assert result.log("fuse_rope").rewrites == 0
    assert relative_l2(result.run(*args), half_split(*args)) < 1e-6


@pytest.mark.parametrize("read", ["rotated", "product"])
def test_another_reader_keeps_the_rotation(read):
    def rotate(x, cos, sin):
        rotated = rotate_half(x)
        product = rotated * sin
        return x * cos + product, {"rotated": rotated, "product": product}[read] + 1

    args = heads(), *tables(DIM)
    result = rewritten(rotate, *args, passes=PASSES)
    assert result.log("fuse_rope").rewrites == 0
    assert [m["reason"] for m in result.log("fuse_rope").misses] == [
        "part of the rotation is read by another node"
    ]
    assert all(relative_l2(a, b) < 1e-6 for a, b in zip(result.run(*args), rotate(*args), strict=True))


def other_sign(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat((x[..., half:], -x[..., :half]), -1) * sin


def unequal_parts(x, cos, sin):
    return x * cos + torch.cat((-x[..., 2:], x[..., :2]), -1) * sin


def halves_of_another(x, cos, sin):
    return x * cos + rotate_half(x + 1) * sin


def another_axis(x, cos, sin):
    return x * cos + torch.cat((-x[:, 2:], x[:, :2]), 1) * sin


def unmixed(x, cos, sin):
    a, b = x.chunk(2, -1)
    cos, sin = cos[..., : DIM // 2], sin[..., : DIM // 2]
    return torch.cat((a * cos - b * sin, b * cos - a * sin), -1)


def two_tables(x, cos, sin):
    a, b = x.chunk(2, -1)
    c1, c2, s1, s2 = *cos.chunk(2, -1), *sin.chunk(2, -1)
    return torch.cat((a * c1 - b * s1, b * c2 * 2 + a * s2), -1)


def pairs_turned_the_other_way(x, cos, sin):
    return x * cos + torch.stack((x[..., 1::2], -x[..., ::2]), -1).flatten(-2) * sin


def pairs_of_another(x, cos, sin):
    return x * cos + turn_pairs(x + 1) * sin


def pairs_to_halves(x, cos, sin):
    return x * cos + torch.cat((-x[..., 1::2], x[..., ::2]), -1) * sin


def halves_to_pairs(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos + torch.stack((-b, a), -1).flatten(-2) * sin


def pairs_behind_one_another(x, cos, sin):
    return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), -2).flatten(-2) * sin


@pytest.mark.parametrize(
    "formula",
    [
        other_sign,
        unequal_parts,
        halves_of_another,
        another_axis,
        unmixed,
        two_tables,
        pairs_turned_the_other_way,
        pairs_of_another,
        pairs_to_halves,
        halves_to_pairs,
        pairs_behind_one_another,
    ],
    ids=lambda f: f.__name__,
)
def test_what_is_no_rotation_stays(formula):
    args = torch.randn(BATCH, 4, TOKENS, DIM), *tables(DIM)
    result = rewritten(formula, *args, passes=PASSES)
    assert result.log("fuse_rope").rewrites == 0
    assert relative_l2(result.run(*args), formula(*args)) < 1e-6


def test_table_that_widens_the_input_is_a_near_miss():
    args = torch.randn(1, 1, TOKENS, DIM), *(t.expand(BATCH, HEADS, TOKENS, DIM) for t in tables(DIM))
    result = rewritten(half_split, *args, passes=PASSES)
    assert result.log("fuse_rope").rewrites == 0
    assert [m["reason"] for m in result.log("fuse_rope").misses] == [
        "the table broadcasts the input to another shape"
    ]
    assert relative_l2(result.run(*args), half_split(*args)) < 1e-6


def test_interleaved_with_half_a_table_is_a_near_miss():
    args = torch.randn(1, 1, TOKENS, DIM), *(t[..., :1] for t in tables(DIM))
    result = rewritten(interleaved, *args, passes=PASSES)
    assert result.log("fuse_rope").rewrites == 0
    assert [m["reason"] for m in result.log("fuse_rope").misses] == [
        "the tables are not as wide as the input"
    ]
    assert relative_l2(result.run(*args), interleaved(*args)) < 1e-6


def complex_table(*lead):
    angle = torch.randn(*lead, DIM // 2)
    return torch.polar(torch.ones_like(angle), angle)


def complex_rotation_that_stays(fn, *args, reason):
    result = rewritten(fn, *args, passes=PASSES)
    assert result.count("dsopt.rope") == 0
    assert [reason in m["reason"] for m in result.log("fuse_rope").misses] == [True]
    assert relative_l2(result.run(*args), fn(*args)) < 1e-6


def test_complex_rotation_of_flattened_tokens():
    def rotate(x, table):
        pairs = torch.view_as_complex(x.reshape(BATCH * TOKENS, HEADS, DIM // 2, 2))
        return torch.view_as_real(pairs * table).reshape(x.shape)

    x = torch.randn(BATCH, TOKENS, HEADS, DIM)
    complex_rotation_that_stays(rotate, x, complex_table(BATCH * TOKENS, 1), reason="cut into other pairs")


def test_complex_rotation_back():
    def rotate(x, table):
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * table.conj()).flatten(3)

    x = torch.randn(BATCH, HEADS, TOKENS, DIM)
    complex_rotation_that_stays(rotate, x, complex_table(TOKENS), reason="conjugated")


def test_complex_table_that_broadcasts_the_input():
    def rotate(x, table):
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * table).flatten(3)

    x = torch.randn(1, HEADS, TOKENS, DIM)
    complex_rotation_that_stays(rotate, x, complex_table(2, 1, TOKENS), reason="broadcasts the input")


def test_rounding_inside_a_rotation_is_kept():
    def rotate(x, cos, sin):
        a, b = x[..., : DIM // 2], x[..., DIM // 2 :]
        return torch.cat(((a * cos - b * sin).bfloat16(), (b * cos + a * sin).bfloat16()), -1).float()

    args = torch.randn(BATCH, HEADS, TOKENS, DIM), *tables(DIM // 2)
    result = rewritten(rotate, *args, passes=PASSES)
    assert relative_l2(result.run(*args), rotate(*args)) < 1e-6

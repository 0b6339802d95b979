import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dsopt.testing import exported, relative_l2, rewritten

PASSES = ("canonicalize", "fuse_gated_mlp", "canonicalize")
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2}


class MLP(nn.Module):
    def __init__(self, formula, dtype=torch.float32, bias=False, hidden=16, inner=24):
        super().__init__()
        self.formula = formula
        self.gate = nn.Linear(hidden, inner, bias, dtype=dtype)
        self.up = nn.Linear(hidden, inner, bias, dtype=dtype)
        self.down = nn.Linear(inner, hidden, bias, dtype=dtype)
        self.merged = nn.Linear(hidden, 2 * inner, bias, dtype=dtype)

    def forward(self, x):
        return self.formula(self, x)


def separate(m, x):
    return m.down(F.silu(m.gate(x)) * m.up(x))


def up_first(m, x):
    up = m.up(x)
    return m.down(up * F.silu(m.gate(x)))


def sigmoid(m, x):
    gate = m.gate(x)
    return m.down(gate * torch.sigmoid(gate) * m.up(x))


def sigmoid_first(m, x):
    gate = m.gate(x)
    return m.down(m.up(x) * (gate.sigmoid() * gate))


def merged_chunk(m, x):
    gate, up = m.merged(x).chunk(2, dim=-1)
    return m.down(up * F.silu(gate))


def merged_slices(m, x):
    both = m.merged(x)
    return m.down(F.silu(both[..., 24:]) * both[..., :24])


def merged_split(m, x):
    gate, up = torch.split(m.merged(x), [24, 24], -1)
    return m.down(F.silu(gate) * up)


def by_matmul(m, x):
    def add(y, bias):
        return y if bias is None else y + bias

    hidden = F.silu(add(x @ m.gate.weight.T, m.gate.bias)) * add(x @ m.up.weight.t(), m.up.bias)
    return add(hidden @ m.down.weight.mT, m.down.bias)


def in_float32(m, x):
    return m.down((F.silu(m.gate(x).float()) * m.up(x).float()).to(x.dtype))


def gelu(m, x):
    return m.down(F.gelu(m.gate(x)) * m.up(x))


def gelu_tanh(m, x):
    return m.down(m.up(x) * F.gelu(m.gate(x), approximate="tanh"))


LIMIT = 0.25


def limited(m, x):
    return m.down(F.silu(m.gate(x).clamp(max=LIMIT)) * m.up(x).clamp(min=-LIMIT, max=LIMIT))


def limited_by_name(m, x):
    gate, up = m.merged(x).chunk(2, -1)
    return m.down(F.silu(torch.clamp_max(gate, LIMIT)) * torch.clamp(up, -LIMIT, LIMIT))


def not_limited(m, x):
    return m.down(F.silu(m.gate(x)).clamp(max=float("inf")) * m.up(x).clamp(-float("inf"), float("inf")))


SPELLINGS = [separate, up_first, sigmoid, sigmoid_first, merged_chunk, merged_slices, merged_split]
SPELLINGS += [in_float32, gelu, gelu_tanh, limited, limited_by_name, not_limited]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("formula", SPELLINGS, ids=lambda f: f.__name__)
def test_spellings(formula, bias, dtype):
    model, x = MLP(formula, dtype, bias), torch.randn(2, 3, 16, dtype=dtype)
    results = [rewritten(model, x, passes=PASSES)]
    if dtype == torch.float32:
        results.append(exported(model, x, passes=PASSES))
    for result in results:
        assert result.log("fuse_gated_mlp").families == {"mlp": 1}
        assert [op for op in result.ops() if op != "aten.slice"] == ["dsopt.gated_mlp"]
        assert relative_l2(result.run(x), model(x)) < TOLERANCE[dtype]


def test_products_with_transposed_weights():
    model, x = MLP(by_matmul), torch.randn(2, 3, 16)
    result = rewritten(model, x, passes=PASSES)
    assert result.ops() == ["dsopt.gated_mlp"]
    assert relative_l2(result.run(x), model(x)) < 1e-6


def test_inner_width_written_in_place():
    def in_place(m, x):
        return m.down(F.silu(m.gate(x), inplace=True).mul_(m.up(x)))

    model, x = MLP(in_place), torch.randn(2, 3, 16)
    result = rewritten(model, x, passes=PASSES)
    assert result.ops() == ["dsopt.gated_mlp"]
    assert relative_l2(result.run(x), model(x)) < 1e-6


def test_dynamic_shapes():
    model = MLP(merged_chunk)
    result = rewritten(model, torch.randn(2, 3, 16), passes=PASSES, dynamic=True)
    assert result.count("dsopt.gated_mlp") == 1
    for shape in ((4, 7, 16), (3, 2, 16)):
        x = torch.randn(shape)
        assert relative_l2(result.run(x), model(x)) < 1e-6
    assert len(result.graphs) == 1


@pytest.mark.parametrize("read", ["gate", "up", "active", "hidden"])
def test_another_reader_keeps_the_mlp_apart(read):
    def formula(m, x):
        gate, up = m.gate(x), m.up(x)
        active = F.silu(gate)
        hidden = active * up
        return m.down(hidden), {"gate": gate, "up": up, "active": active, "hidden": hidden}[read] * 2

    model, x = MLP(formula), torch.randn(2, 3, 16)
    result = rewritten(model, x, passes=PASSES)
    log = result.log("fuse_gated_mlp")
    assert log.rewrites == 0
    assert ["is read by another node" in m["reason"] for m in log.misses] == [True]
    assert all(relative_l2(a, b) < 1e-6 for a, b in zip(result.run(x), model(x), strict=True))


def test_merged_projection_read_elsewhere():
    def formula(m, x):
        both = m.merged(x)
        gate, up = both.chunk(2, -1)
        return m.down(F.silu(gate) * up), both.sum(-1)

    model, x = MLP(formula), torch.randn(2, 3, 16)
    result = rewritten(model, x, passes=PASSES)
    assert result.log("fuse_gated_mlp").rewrites == 0
    assert result.log("fuse_gated_mlp").misses
    assert all(relative_l2(a, b) < 1e-6 for a, b in zip(result.run(x), model(x), strict=True))


def different_inputs(m, x):
    return m.down(F.silu(m.gate(x)) * m.up(x + 1))


def not_linear(m, x):
    return m.down(F.silu(m.gate(x)) * (m.up(x) + 1))


def from_different_merged(m, x):
    return m.down(F.silu(m.merged(x)[..., :24]) * m.merged(x + 1)[..., 24:])


def limited_on_one_side(m, x):
    return m.down(F.silu(m.gate(x).clamp(max=LIMIT)) * m.up(x).clamp(max=LIMIT))


def limited_from_both_sides(m, x):
    return m.down(F.silu(m.gate(x).clamp(-LIMIT, LIMIT)) * m.up(x).clamp(-LIMIT, LIMIT))


def limited_unequally(m, x):
    return m.down(F.silu(m.gate(x).clamp(max=LIMIT)) * m.up(x).clamp(-2 * LIMIT, 2 * LIMIT))


def gate_alone_limited(m, x):
    return m.down(F.silu(m.gate(x).clamp(max=LIMIT)) * m.up(x))


def rounded_in_between(m, x):
    return m.down((F.silu(m.gate(x)).bfloat16() * m.up(x)).to(x.dtype))


NEAR_MISSES = [different_inputs, not_linear, from_different_merged, limited_on_one_side, rounded_in_between]
NEAR_MISSES += [limited_from_both_sides, limited_unequally, gate_alone_limited]


@pytest.mark.parametrize("formula", NEAR_MISSES, ids=lambda f: f.__name__)
def test_near_misses(formula):
    model, x = MLP(formula), torch.randn(2, 3, 16)
    result = rewritten(model, x, passes=PASSES)
    log = result.log("fuse_gated_mlp")
    assert log.rewrites == 0 and len(log.misses) == 1
    assert relative_l2(result.run(x), model(x)) < 1e-6


def relu(m, x):
    return m.down(F.relu(m.gate(x)) * m.up(x))


def no_gate(m, x):
    return m.down(F.silu(m.gate(x)))


@pytest.mark.parametrize("formula", [relu, no_gate], ids=lambda f: f.__name__)
def test_other_mlps_stay(formula):
    model, x = MLP(formula), torch.randn(2, 3, 16)
    result = rewritten(model, x, passes=PASSES)
    assert result.log("fuse_gated_mlp").rewrites == 0
    assert relative_l2(result.run(x), model(x)) < 1e-6


@pytest.mark.parametrize("scalar", ["gate", "up"])
def test_a_scalar_gate_stays(scalar):
    def fn(x, gate, up, down):
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    weights = {"gate": torch.randn(6, 8), "up": torch.randn(6, 8)} | {scalar: torch.randn(1, 8)}
    args = torch.randn(2, 3, 8), weights["gate"], weights["up"], torch.randn(5, 6)
    result = rewritten(fn, *args, passes=PASSES)
    assert [m["reason"] for m in result.log("fuse_gated_mlp").misses] == ["gate and up differ in width"]
    assert relative_l2(result.run(*args), fn(*args)) < 1e-5
    vector = (args[0], torch.randn(8), torch.randn(8), torch.randn(5, 3))
    result = rewritten(fn, *vector, passes=PASSES)
    assert result.log("fuse_gated_mlp").rewrites == 0
    assert relative_l2(result.run(*vector), fn(*vector)) < 1e-5

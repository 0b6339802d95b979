import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dsopt.testing import exported, relative_l2, rewritten

PASSES = ("canonicalize", "merge_linears", "canonicalize")
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}


class Siblings(nn.Module):
    def __init__(self, widths, biases, dtype=torch.float32):
        super().__init__()
        pairs = zip(widths, biases, strict=True)
        self.layers = nn.ModuleList([nn.Linear(16, n, bias=b, dtype=dtype) for n, b in pairs])

    def forward(self, x):
        return [layer(x) for layer in self.layers]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("widths", "biases"),
    [
        ((8, 8), (False, False)),
        ((8, 1, 24), (True, True, True)),
        ((3, 5, 7, 9, 11), (True, False) * 2 + (True,)),
    ],
    ids=["two", "three", "five"],
)
def test_siblings(widths, biases, dtype):
    model, x = Siblings(widths, biases, dtype), torch.randn(2, 3, 16, dtype=dtype)
    for result in (rewritten(model, x, passes=PASSES), exported(model, x, passes=PASSES)):
        assert result.ops() == ["dsopt.multi_linear"]
        assert result.log("merge_linears").rewrites == 1
        for got, want in zip(result.run(x), model(x), strict=True):
            assert relative_l2(got, want) < TOLERANCE[dtype]


def test_only_layers_that_share_an_input():
    model, x = Siblings((8, 8, 8, 8), (False,) * 4), torch.randn(2, 16)

    def two_groups(x):
        y = x + 1
        return [layer(z) for layer, z in zip(model.layers, (x, y, x, y), strict=True)]

    result = rewritten(two_groups, x, passes=PASSES)
    assert result.log("merge_linears").rewrites == 2
    assert result.ops().count("dsopt.multi_linear") == 2
    assert all(relative_l2(a, b) < 1e-6 for a, b in zip(result.run(x), two_groups(x), strict=True))


def test_one_layer_alone():
    model, x = Siblings((8,), (True,)), torch.randn(2, 16)
    result = rewritten(model, x, passes=PASSES)
    assert result.ops() == ["dsopt.multi_linear"]
    assert relative_l2(result.run(x)[0], model(x)[0]) < 1e-6


def test_weight_made_later_is_left_out():
    model, x, scale = Siblings((8, 8, 8), (False,) * 3), torch.randn(2, 16), torch.randn(())

    def run(x, scale):
        a, b, c = model.layers
        first = a(x)
        return first, F.linear(x, b.weight * scale), c(x), F.linear(x, b.weight, first[0])

    result = rewritten(run, x, scale, passes=PASSES)
    (merged,) = [n for n in result.graphs[-1].graph.nodes if "multi_linear" in str(n.target)]
    assert len(merged.args[1]) == 2
    assert result.ops().count("aten.linear") == 2
    assert all(relative_l2(p, q) < 1e-6 for p, q in zip(result.run(x, scale), run(x, scale), strict=True))


def test_spellings_of_a_linear_layer():
    model, x = Siblings((8, 8, 8), (False, True, False)), torch.randn(2, 3, 16)

    def run(x):
        a, b, c = model.layers
        return x @ a.weight.T, b(x), torch.einsum("bsk,nk->bsn", x, c.weight)

    result = rewritten(run, x, passes=PASSES)
    assert result.ops() == ["dsopt.multi_linear"]
    assert all(relative_l2(p, q) < 1e-6 for p, q in zip(result.run(x), run(x), strict=True))


def test_dynamic_shapes():
    model = Siblings((8, 24), (False, True))
    result = rewritten(model, torch.randn(2, 3, 16), passes=PASSES, dynamic=True)
    assert result.ops() == ["dsopt.multi_linear"]
    x = torch.randn(5, 4, 16)
    assert all(relative_l2(a, b) < 1e-6 for a, b in zip(result.run(x), model(x), strict=True))
    assert len(result.graphs) == 1


def test_input_changed_between_siblings():
    model = Siblings((8, 8), (False, False))

    def run(x):
        y = x * 2
        first = model.layers[0](y)
        y.add_(1)
        return first, model.layers[1](y)

    x = torch.randn(2, 16)
    result = rewritten(run, x, passes=PASSES)
    assert all(relative_l2(a, b) < 1e-6 for a, b in zip(result.run(x), run(x), strict=True))


def test_widened_operands():
    """A router in float32 over a bfloat16 model: nothing widened is stored."""

    def fn(x, w, v):
        y, w, v = x.float(), w.float(), v.float()
        return F.linear(y, w), F.linear(y, v)

    args = [torch.randn(3, 16).bfloat16(), torch.randn(5, 16).bfloat16(), torch.randn(4, 16).bfloat16()]
    result = rewritten(fn, *args, passes=PASSES)
    assert result.ops() == ["dsopt.multi_linear"]
    for got, want in zip(result.run(*args), fn(*args), strict=True):
        assert got.dtype == torch.float32 and relative_l2(got, want) < 1e-6


def test_casts_that_stay():
    """A weight that is not widened, a bias, a cast that rounds, a weight written before the layer reads it."""
    x, w, b = torch.randn(3, 16).bfloat16(), torch.randn(5, 16), torch.randn(5).bfloat16()

    def written(x, w):
        y, v = x.float(), w.float()
        w.zero_()
        return F.linear(y, v)

    cases = [
        (lambda x, w: F.linear(x.float(), w), (x, w)),
        (lambda x, w, b: F.linear(x.float(), w.float(), b.float()), (x, w.bfloat16(), b)),
        (lambda x, w: F.linear(x.bfloat16(), w.bfloat16()), (x.float(), w)),
        (written, (x, w.bfloat16())),
    ]
    for fn, args in cases:
        result = rewritten(fn, *[a.clone() for a in args], passes=PASSES)
        assert "aten.to" in result.ops() and result.count("dsopt.multi_linear") == 1
        want = fn(*[a.clone() for a in args])
        assert relative_l2(result.run(*[a.clone() for a in args]), want) < 1e-2

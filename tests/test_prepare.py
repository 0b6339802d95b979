"""dsopt.compile on models that loop over their experts: one graph, the same results, the weights shared."""

import copy

import pytest
import torch
from loops import HIDDEN, Called, Clamped, Gated, Inline, Masked, Merged, Plain, Pool, Sorted
from torch import nn

import dsopt
from dsopt.testing import relative_l2

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Model(nn.Module):
    """Residual blocks with a norm before each."""

    def __init__(self, *blocks):
        super().__init__()
        self.norm = nn.RMSNorm(HIDDEN)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks:
            y = block(self.norm(x))
            x = x + (y[0] if isinstance(y, tuple) else y)
        return x


def model_of(*blocks, dtype=torch.float32) -> Model:
    torch.manual_seed(0)
    model = Model(*(make() for make in blocks)).eval()
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    return model.to(dtype)


def tokens(*shape, dtype=torch.float32):
    return torch.randn(*shape, HIDDEN, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def compiled(model, **options):
    return dsopt.compile(model, **{"fallback": "eager", "strict": True, **options})


def refusals(model) -> list[str]:
    return [p.refused for p in dsopt.report(model).prepared]


LAYOUTS = {
    "masked": Masked,
    "biased": lambda: Masked(lambda: Gated(bias=True, names=("w1", "w3", "w2"), act=nn.GELU())),
    "identity": lambda: Masked(num_identity=3),
    "inline": Inline,
    "merged": lambda: Inline(Merged),
    "plain": lambda: Masked(Plain),
    "clamped": lambda: Masked(Clamped),
    "sorted": Sorted,
    "sorted-alone": lambda: Sorted(extra=(), shared=False),
    "pool": lambda: Called(Pool()),
}


@pytest.mark.parametrize(
    ("layout", "dtype", "shapes"),
    [
        *((layout, torch.float32, [(1, 5)]) for layout in LAYOUTS),
        ("inline", torch.float32, [(1, 1), (16, 1), (2, 3), (2, 0)]),
        ("sorted", torch.bfloat16, [(1, 5), (16, 1), (1, 0)]),
        ("masked", torch.bfloat16, [(1, 1)]),
        ("biased", torch.bfloat16, [(3, 1)]),
    ],
)
def test_every_layout_is_one_graph(layout, dtype, shapes):
    model = model_of(LAYOUTS[layout], dtype=dtype)
    reference = copy.deepcopy(model).double()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    fast = compiled(model)
    assert refusals(fast) == [None]
    with torch.inference_mode():
        for shape in shapes:
            x = tokens(*shape, dtype=dtype)
            got = fast(x)
            assert len(dsopt.report(fast).graphs) <= shapes.index(shape) + 1
            assert got.dtype == dtype and got.shape == x.shape
            if x.numel():
                eager, want = model(x), reference(x.double())
                allowed = 1e-5 if dtype == torch.float32 else 1.5 * relative_l2(eager, want) + 1e-3
                assert relative_l2(got, want) <= allowed
    assert all("moe_experts" in {k.op for k in g.kernels} for g in dsopt.report(fast).graphs)
    assert list(model.state_dict()) == list(fast.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())

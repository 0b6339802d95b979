"""What passes are given: Dynamo's own size symbols, and no data that tracing lost."""

import pytest
import torch

import dsopt
from dsopt.backend import dsopt_backend
from dsopt.capture import capture
from dsopt.testing import relative_l2

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def norm(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def test_sizes_keep_dynamos_symbols():
    """Sizes that happen to be equal stay two symbols, each with the source that Dynamo guards."""
    seen = []

    def backend(gm, example_inputs):
        graph = capture(gm, example_inputs)
        for old, new in zip(*(g.graph.find_nodes(op="placeholder") for g in (gm, graph)), strict=True):
            if isinstance(new.meta["val"], torch.Tensor):
                seen.append((str(old.meta["example_value"].shape), str(new.meta["val"].shape)))
        return gm.forward

    a, b = torch.randn(6, 4), torch.randn(6, 4)
    with torch.fx.experimental._config.patch(use_duck_shape=False):
        torch.compile(lambda a, b: (a.sum(0), b.sum(0)), backend=backend, dynamic=True)(a, b)
    assert len(seen) == 2 and all(old == new for old, new in seen), seen
    assert seen[0] != seen[1]


@pytest.mark.parametrize("kind", ["masks", "gradients"])
def test_function_transforms_become_aten(kind):
    """A mask or gradient computed under vmap depends on its inputs at every call, and what is around it is matched."""

    def masked(q, k, x):
        near = torch.vmap(torch.vmap(lambda i, j: (i >= j) & (i - j < 3), (None, 0)), (0, None))(q, k)
        return torch.where(near, norm(x)[:, :1], 0.0)

    def gradients(q, k, x):
        return torch.vmap(torch.func.grad(lambda row: (row * row).sum()))(norm(x)) + q[:, None] - k[:1]

    fn = {"masks": masked, "gradients": gradients}[kind]
    fast = torch.compile(fn, backend=dsopt_backend, options={"strict": True})
    before = dsopt.report().graphs
    with torch.no_grad():
        for n, shift in ((5, 0), (5, 2), (7, 1)):
            args = (torch.arange(n) + shift, torch.arange(n + 1), torch.randn(n, 8))
            assert relative_l2(fast(*args), fn(*args)) < 1e-6
    new = [g for g in dsopt.report().graphs if g not in before]
    assert new and all(g.matched()["norm"] == (1, 1) and g.fallback is None for g in new)

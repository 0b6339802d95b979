"""Every spelling gives what the overload gave, in the same memory."""

import pytest
import torch
from torch.fx import Graph, GraphModule
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from dsopt.spell import _SAME, _SIZES, spell

aten = torch.ops.aten
X, Y = torch.rand(2, 3, 4), torch.rand(2, 3, 4)
INDEX = torch.tensor([1, 0])
CALLS = {
    aten.embedding.default: [(X[0], INDEX), (X[0], INDEX, -1, False, False)],
    aten.polar.default: [(X, Y)],
    aten.select.int: [(X, 1, 2), (X, -1, -1)],
    aten.unsqueeze.default: [(X, -1), (X, 0)],
    aten.squeeze.dim: [(X[:1], 0), (X, 0)],
    aten.transpose.int: [(X, 0, -1)],
    aten.permute.default: [(X, [2, 0, 1])],
    aten.view_as_real.default: [(torch.polar(X, Y),)],
    aten.view_as_complex.default: [(X.view(3, 4, 2),)],
    aten.reshape.default: [(X, [4, -1]), (X.mT, [-1]), (X[0, 0, 0], [])],
    aten.type_as.default: [(X, INDEX), (X, Y)],
    aten.index_copy_.default: [(X, 0, INDEX, Y)],
    aten.add_.Tensor: [(X, 1), (X, Y)],
    aten.to.dtype: [
        (X, torch.bfloat16),
        (X, torch.float32),
        (X, torch.float32, False, True),
        (X, torch.float64, False, False, torch.contiguous_format),
    ],
    aten.view.default: [(X, [6, 4]), (X, [-1]), (X[0, 0, 0], [])],
    aten.expand.default: [(X[:1], [2, 3, 4]), (X[0, 0, 0], [])],
    aten.slice.Tensor: [
        (X, -1, 1, 3),
        (X, 1, 0, 9223372036854775807),
        (X, 1, 2, 50),
        (X, 2, -3, 4),
        (X, 2, 0, 4, 2),
        (X, 2, 3, 2),
        (X, 1),
        (X,),
    ],
}
UNARY = (aten.neg.default, aten.cos.default, aten.sin.default)
CALLS |= {op: [(X,)] if op in UNARY else [(X, Y), (X, Y[0])] for op in _SAME if op not in CALLS}


def test_every_spelling_is_called():
    assert CALLS.keys() >= _SAME.keys() | _SIZES.keys()


def spelled(overload, args, **kwargs):
    """A graph of one call, its tensors as inputs, after `spell`."""
    graph = Graph()
    nodes = [graph.placeholder(f"x{i}") if isinstance(x, torch.Tensor) else x for i, x in enumerate(args)]
    graph.output(graph.call_function(overload, tuple(nodes), kwargs))
    module = GraphModule({}, graph)
    FakeTensorProp(module).propagate(*tensors(args))
    spell(module)
    return module


def tensors(args):
    return [x for x in args if isinstance(x, torch.Tensor)]


def copied(args):
    return [x.clone() if isinstance(x, torch.Tensor) else x for x in args]


@pytest.mark.parametrize("overload", CALLS, ids=str)
def test_same_results_in_the_same_memory(overload):
    for args in CALLS[overload]:
        mine, theirs = copied(args), copied(args)
        got, want = spelled(overload, args)(*tensors(mine)), overload(*theirs)
        assert got.dtype == want.dtype and got.stride() == want.stride() and torch.equal(got, want)
        assert torch.equal(mine[0], theirs[0]), "what it writes"
        memory = [x.untyped_storage().data_ptr() for x in (got, mine[0], want, theirs[0])]
        assert (memory[0] == memory[1]) == (memory[2] == memory[3])


def test_what_is_respelled_remembers_its_overload():
    graph = spelled(aten.unsqueeze.default, (X, 0)).graph
    (node,) = (n for n in graph.nodes if n.op == "call_function")
    assert node.target is torch.unsqueeze and node.meta["aten"] is aten.unsqueeze.default


def test_keyword_arguments_stay():
    assert torch.equal(spelled(aten.add.Tensor, (X, Y), alpha=3)(X, Y), torch.add(X, Y, alpha=3))

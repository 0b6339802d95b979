"""The parts of a step: what takes the place of kernels computes nothing, and the parts sum up to the whole."""

import importlib.util
import operator

import pytest
import torch
from torch.fx import symbolic_trace

from dsopt.bench import overhead
from dsopt.bench.overhead import PARTS, Recorder, breakdown
from dsopt.replay import Replay

aten = torch.ops.aten


def graph():
    """A view, a product of it, a call with two results, writes into an argument."""

    def forward(x, cache):
        a, b = aten.split.Tensor(aten.mm.default(aten.t.default(x), x), 2)
        best = aten.max.dim(a, 0)
        aten.add_.Tensor(cache, 1)
        return aten.mul.Tensor(best[0], 2), b

    traced = symbolic_trace(forward)
    (cache,) = [n for n in traced.graph.nodes if n.name == "cache"]
    with traced.graph.inserting_before(traced.graph.output_node()):
        traced.graph.call_function(torch.Tensor.sub_, (cache, 3))  # which has no schema to ask
    traced.recompile()
    return traced


def test_views_stay_and_what_computes_is_replaced():
    x, cache = torch.randn(4, 4), torch.zeros(3)
    results = overhead._results(graph(), (x, cache))
    assert set(results) == {"mm_default", "max_dim", "add__tensor", "sub_", "mul_tensor"}
    assert cache.tolist() == [-2, -2, -2]


@pytest.mark.parametrize("stand_in", [overhead._handing_out, overhead._allocating])
def test_stand_ins_compute_nothing(stand_in):
    x, cache = torch.randn(4, 4), torch.zeros(3)
    results = overhead._results(graph(), (x, cache))
    variant = overhead._variant(graph(), results, stand_in)
    out, b = variant(torch.full_like(x, torch.nan), cache)
    assert cache.tolist() == [-2, -2, -2], "nothing was written again"
    targets = [
        n.target for n in variant.graph.nodes if n.op == "call_function" and n.target != operator.getitem
    ]
    assert [t for t in targets if isinstance(t, torch._ops.OpOverload)] == [aten.t.default, aten.split.Tensor]
    assert out.shape == (4,) and b.shape == (2, 4)
    same = out.data_ptr() == results["mul_tensor"].data_ptr()
    assert same == (stand_in is overhead._handing_out)


@pytest.fixture
def norms(fresh_dynamo):
    norm = torch.nn.RMSNorm(8, eps=1e-6)
    return torch.nn.Sequential(norm, torch.nn.Linear(8, 8), norm)


@pytest.mark.parametrize("kernels", ["cpu", "torch"])
def test_parts_sum_up_to_the_whole(norms, kernels):
    recorder, rewound = Recorder({"kernels": {"*": kernels}}), []
    fast = torch.compile(norms, backend=recorder)
    with torch.inference_mode():
        x = torch.randn(2, 8)
        found = breakdown(lambda: fast(x), recorder, lambda: rewound.append(0), budget=0)
    assert set(found.parts) == set(PARTS)
    assert sum(found.parts.values()) == pytest.approx(found.whole)
    assert found.computing == 3
    replayed = isinstance(recorder.fn.fn, Replay)
    native = importlib.util.find_spec("dsopt._cpu") is not None
    assert replayed == (native and kernels == "cpu")
    assert (found.parts["allocation"] == 0) == replayed
    variants = 3 if replayed else 4
    assert len(rewound) >= 3 + variants + variants * 3, "before each call"
    assert found.to_dict()["kernels"] == found.parts["kernels"]


def test_a_graph_left_alone_has_no_parts(fresh_dynamo):
    recorder = Recorder({"fallback": "eager"})
    fast = torch.compile(torch.nn.ReLU(), backend=recorder)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="nothing to fuse"):
        breakdown(lambda: fast(torch.ones(2)), recorder, lambda: None)


def test_a_step_that_was_not_compiled_has_no_parts():
    with pytest.raises(RuntimeError, match="no graph ran"):
        breakdown(lambda: None, Recorder(), lambda: None)

"""What dsopt.report tells, and how it finds a model's graphs."""

import copy
import gc
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dsopt
from dsopt.backend import _Compiled, dsopt_backend
from dsopt.census import FAMILIES
from dsopt.report import GRAPHS, GraphIndex, Report

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
OPTIONS = {"fallback": "eager"}


class Model(nn.Module):
    """Two norms and an attention that stays as it is because its scale is a tensor."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.RMSNorm(8, eps=1e-6), nn.RMSNorm(8, eps=1e-6)
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        x = self.first(x).relu()
        q = self.second(x).unsqueeze(1)
        return (q @ q.mT * self.scale).softmax(-1) @ q


X = torch.randn(2, 3, 8)


@pytest.fixture(autouse=True)
def no_gradients():
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        yield


def ways():
    def by_method(model):
        model.compile(backend=dsopt_backend, options=OPTIONS)
        return model

    yield by_method
    yield lambda model: torch.compile(model, backend=dsopt_backend, options=OPTIONS)
    yield lambda model: dsopt.compile(model, **OPTIONS)
    yield lambda model: torch.compile(model.forward, backend=dsopt_backend, options=OPTIONS)


@pytest.mark.parametrize(
    "way", list(ways()), ids=["model.compile", "torch.compile", "dsopt.compile", "forward"]
)
def test_graphs_are_found_through_the_weights(way):
    model, other = Model(), Model()
    fast = way(model)
    assert dsopt.report(model).graphs == []
    fast(X)
    for same in (model, copy.copy(model), *([fast] if isinstance(fast, nn.Module) else [])):
        (graph,) = dsopt.report(same).graphs
        assert [k.op for k in graph.kernels] == ["rms_norm"]
    assert dsopt.report(other).graphs == []
    assert graph in dsopt.report().graphs


def test_instances_that_share_code_each_have_a_report():
    models = [dsopt.compile(Model(), **OPTIONS) for _ in range(3)]
    for _ in range(2):
        for model in models:
            model(X)
    (graph,) = dsopt.report(models[0]).graphs
    for model in models:
        assert dsopt.report(model).graphs == [graph] == dsopt.report(model.second).graphs
    assert graph.kernels[0].calls == 2 * 2 * 3, "calls are the graph's"


def test_replaced_parameters_are_found():
    model = dsopt.compile(Model(), **OPTIONS)
    model(X)
    (graph,) = dsopt.report(model).graphs
    for norm in (model.first, model.second):
        norm.weight = nn.Parameter(torch.ones(8))
    model.scale = nn.Parameter(torch.tensor(0.5))
    assert dsopt.report(model).graphs == []
    model(X)
    assert dsopt.report(model).graphs == [graph]


def test_readers_are_looked_up_once_per_model(monkeypatch):
    """Not at each call: a model has thousands of weights."""
    weights = [*Model().parameters()] * 100
    plain = _Compiled(lambda *args: args[0], GRAPHS.new(), weights)
    looked_up = []
    monkeypatch.setattr(GRAPHS, "reads", lambda graph, tensors: looked_up.append(len(tensors)))
    others = [*Model().parameters()] * 100
    for args in (weights, weights, others, others, weights):
        assert plain(*args) is args[0]
    assert looked_up == [len(others)]


def test_the_recompile_limit_is_a_fallback():
    class Norm(nn.RMSNorm):
        def forward(self, x):
            return super().forward(x)

    norm, other = Norm(8, eps=1e-6), Model()
    fast = torch.compile(norm, backend=dsopt_backend, dynamic=False, options=OPTIONS)
    limit = torch._dynamo.config.recompile_limit
    for tokens in range(1, limit + 1):
        fast(torch.randn(tokens, 8))
    assert dsopt.report(norm).fallbacks == []
    fast(torch.randn(limit + 1, 8))
    (reason,) = dsopt.report(norm).fallbacks
    assert reason.startswith("recompile limit reached") and str(limit) in reason
    assert reason.split(":")[0] in str(dsopt.report(norm))
    dsopt.compile(other, **OPTIONS)(X)
    assert dsopt.report(other).fallbacks == []
    assert reason in dsopt.report().fallbacks


def test_calls_count_at_run_time():
    model = dsopt.compile(Model(), **OPTIONS)
    for times in range(1, 4):
        model(X)
        (use,) = dsopt.report(model).graphs[0].kernels
        assert (use.sites, use.calls) == (2, 2 * times)


def test_one_more_graph_for_new_shapes():
    model = dsopt.compile(Model(), **OPTIONS)
    for tokens in (3, 5, 7, 9):
        model(torch.randn(2, tokens, 8))
    assert len(dsopt.report(model).graphs) == 2
    assert dsopt.report(model).matched["norm"] == [4, 4]


def test_graphs_are_listed_in_the_order_they_were_compiled():
    index = GraphIndex()
    graphs = [index.new() for _ in range(12)]
    assert Report(set(graphs)).graphs == graphs


def test_the_dict_has_the_documented_keys():
    model = dsopt.compile(Model(), kernels={"rms_norm": "torch"}, **OPTIONS)
    model(X)
    result = dsopt.report(model).to_dict()
    assert list(result) == ["graphs", "prepared", "matched", "fallbacks"]
    (graph,) = result["graphs"]
    keys = ["name", "nodes_before", "nodes_after", "passes", "kernels", "compile_s", "cached", "uncached"]
    assert list(graph) == [*keys, "not_replayed"]
    assert graph["nodes_before"] >= graph["nodes_after"] > 0 and graph["compile_s"] > 0
    for one in graph["passes"]:
        assert list(one) == ["name", "rewrites", "misses"]
        assert all(list(miss) == ["site", "reason"] for miss in one["misses"])
    (kernel,) = graph["kernels"]
    refused = {r["kernel"]: r["reason"] for r in kernel.pop("refused")}
    assert "options ask for torch" in refused["cpu.rms_norm"]
    assert kernel == {
        "op": "rms_norm",
        "sites": 2,
        "calls": 2,
        "backend": "torch",
        "kernel": "torch.rms_norm",
    }
    counts = {"norm": [2, 2], "attention": [0, 1]}
    assert result["matched"] == {f: counts.get(f, [0, 0]) for f in FAMILIES}
    assert result["fallbacks"] == []
    assert json.loads(json.dumps(result)) == result


def test_misses_name_their_site():
    model = dsopt.compile(Model(), **OPTIONS)
    model(X)
    passes = dsopt.report(model).to_dict()["graphs"][0]["passes"]
    (miss,) = [m for p in passes for m in p["misses"]]
    assert "tensor" in miss["reason"] and miss["site"]


def test_sites_carry_the_path_of_their_module():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Model(), Model()])

        def forward(self, x):
            return self.layers[1](self.layers[0](x).squeeze(1))

    model = dsopt.compile(Outer(), **OPTIONS)
    model(X)
    passes = dsopt.report(model).to_dict()["graphs"][0]["passes"]
    sites = [m["site"] for p in passes for m in p["misses"]]
    assert [s.partition(":")[0] for s in sites] == ["layers.0", "layers.1"]


def test_refusals_are_listed():
    model = dsopt.compile(Model().double(), **OPTIONS)
    model(X.double())
    (kernel,) = dsopt.report(model).to_dict()["graphs"][0]["kernels"]
    refused = {r["kernel"]: r["reason"] for r in kernel["refused"]}
    assert kernel["backend"] == "torch"
    assert refused["cpu.rms_norm"].startswith(("needs dtype", "import failed"))


def test_the_table_says_it_all():
    model = dsopt.compile(Model(), **OPTIONS)
    assert "compiles on its first call" in str(dsopt.report(model))
    model(X)
    text = str(dsopt.report(model))
    for word in ("Sites matched", "2/2", "rms_norm", "Near misses", "scale"):
        assert word in text
    plain = torch.compile(fn := nn.Linear(2, 2), backend=dsopt_backend, options=OPTIONS)
    plain(torch.ones(1, 2))
    assert "nothing to fuse" in str(dsopt.report(fn))


def test_dropped_graphs_are_gone():
    model = dsopt.compile(Model(), **OPTIONS)
    model(X)
    assert dsopt.report(model).graphs
    torch.compiler.reset()
    gc.collect()
    assert dsopt.report(model).graphs == []


def test_a_model_that_is_gone_takes_its_graphs_along():
    model = dsopt.compile(Model(), **OPTIONS)
    model(X)
    (name,) = [g.name for g in dsopt.report(model).graphs]
    del model
    torch.compiler.reset()
    gc.collect()
    assert name not in [g.name for g in dsopt.report().graphs]


def test_the_copy_shares_and_the_original_stays_eager():
    model = Model()
    fast = dsopt.compile(model, **OPTIONS)
    assert type(fast) is Model and fast is not model
    assert all(a is b for a, b in zip(model.parameters(), fast.parameters(), strict=True))
    assert model._compiled_call_impl is None and fast._compiled_call_impl is not None
    model(X)
    assert dsopt.report(model).graphs == []


def test_refresh_calls_what_kernels_packed(monkeypatch):
    from dsopt.op import Kernel, kernels

    class Packed:
        def __init__(self, weight):
            self.weight, self.times = weight, 0

        def __call__(self, x, weight, eps):
            return F.rms_norm(x, x.shape[-1:], weight, eps)

        def refresh(self):
            self.times += 1

    made = []

    def plan(x, weight, eps):
        made.append(Packed(weight))
        return made[-1]

    packing = Kernel("rms_norm", "packs", plan)
    monkeypatch.setattr("dsopt.op.kernels", lambda op: ((packing,), ()) if op == "rms_norm" else kernels(op))
    model = dsopt.compile(Model(), **OPTIONS)
    assert dsopt.refresh(model) == 0
    model(X)
    assert dsopt.refresh(model) == 2 and [p.times for p in made] == [1, 1]
    torch._dynamo.reset()
    assert dsopt.refresh(Model()) == 0

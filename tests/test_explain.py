"""report.explain(): module by module what was fused, by which kernel, and what was not and why."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dsopt
from dsopt.explain import Line, Ran, explained
from dsopt.report import GraphReport
from dsopt.rewrite import Log

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Norm(nn.Module):
    """A norm; with `odd`, one whose eps stands where no kernel has it."""

    def __init__(self, odd=False):
        super().__init__()
        self.odd, self.weight = odd, nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x):
        mean = x.pow(2).mean(-1, keepdim=True)
        return x * (torch.rsqrt(mean) + 1e-6 if self.odd else torch.rsqrt(mean + 1e-6)) * self.weight


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(8, 8, bias=False) for _ in range(3))

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    def __init__(self, odd=False):
        super().__init__()
        self.norm, self.mlp, self.out = Norm(odd), MLP(), nn.Linear(8, 8)

    def forward(self, x):
        return self.out(self.mlp(self.norm(x)))


class Model(nn.Module):
    def __init__(self, layers=4, odd=()):
        super().__init__()
        self.layers = nn.ModuleList(Layer(i in odd) for i in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


X = torch.randn(3, 8)


def lines(model, x=X, **options):
    fast = dsopt.compile(model, fallback="eager", **options)
    with torch.no_grad():
        fast(x)
    (graph,) = dsopt.report(fast).graphs
    return explained(graph)


REFERENCE = {"kernels": {"*": "reference"}}


def test_alike_layers_share_their_lines():
    assert lines(Model(), **REFERENCE) == [
        Line("layers.0-3.norm", "norm", "rms_norm", "reference.rms_norm"),
        Line("layers.0-3.mlp.down", "mlp", "gated_mlp", "reference.gated_mlp"),
        Line("layers.0-3.out", "", "multi_linear", "reference.multi_linear"),
    ]


def test_a_layer_that_differs_stands_alone_with_its_reason():
    found = lines(Model(odd=(1,)), **REFERENCE)
    assert [line.path for line in found if line.op == "gated_mlp"] == [
        "layers.0.mlp.down",
        "layers.1.mlp.down",
        "layers.2-3.mlp.down",
    ]
    norms = {line.path: line for line in found if line.family == "norm"}
    assert list(norms) == ["layers.0.norm", "layers.1.norm", "layers.2-3.norm"]
    odd = norms["layers.1.norm"]
    assert (odd.op, odd.kernel) == ("", "") and odd.reason.startswith("fuse_rms_norm: not x * rsqrt(")
    assert norms["layers.0.norm"].reason == norms["layers.2-3.norm"].reason == ""


def test_near_misses_that_differ_by_a_node_name_are_alike():
    found = lines(Model(odd=range(4)), **REFERENCE)
    assert {line.path.split(".")[1] for line in found} == {"0-3"}


def test_what_no_pass_looked_at_says_so():
    found = lines(Model(), passes=["canonicalize", "fuse_rms_norm"])
    (mlp,) = [line for line in found if line.family == "mlp"]
    assert (mlp.path, mlp.reason, mlp.times) == ("layers.0-3.mlp.down", "no pass recognised it", 1)
    products = [line for line in found if line.op == "aten.linear"]
    assert [line.path.split(".", 2)[2] for line in products] == ["mlp.gate", "mlp.up", "mlp.down", "out"]


def test_a_pass_that_was_left_out_is_the_reason(monkeypatch):
    def fails(gm, log):
        raise RuntimeError("no such luck")

    monkeypatch.setattr("dsopt.passes.fuse_gated_mlp.run", fails)
    found = lines(Model())
    reason = "fuse_gated_mlp: left out, it failed: RuntimeError: no such luck"
    assert [line.path for line in found if line.reason == reason] == ["", "layers.0-3.mlp.down"]


def graph(counted, hits, misses=(), family="router"):
    log = Log("a_pass", None, family=family)
    log.hits = [{"family": family, "site": site} for site in hits]
    log.misses = [{"site": site, "reason": reason} for site, reason in misses]
    return GraphReport("graph", passes=[log], counted={family: counted})


GATES = [f"layers.{i}.mlp.gate:softmax_{i}" for i in range(3)]


def test_a_hit_counts_for_the_nearest_site_of_its_layer():
    found = explained(graph(GATES, ["layers.2.mlp:topk_2", "layers.0.mlp.gate:topk"]))
    assert [(line.path, line.reason) for line in found] == [("layers.1.mlp.gate", "no pass recognised it")]
    two = ["layers.0.a.x:n1", "layers.0.b.x:n2"]
    assert [line.path for line in explained(graph(two, ["layers.0.b:n3"]))] == ["layers.0.a.x"]
    assert explained(graph(GATES, ["", "", ""])) == [], "hits that name no node"


def test_a_near_miss_is_told_once():
    found = explained(
        graph(GATES[:2], [GATES[0]], [("layers.1.mlp:topk_1", "scored twice"), ("x.5:y", "odd")])
    )
    assert found == [
        Line("layers.1.mlp.gate", "router", "", "", "a_pass: scored twice"),
        Line("x.5", "router", "", "", "a_pass: odd"),
    ]


def test_experts_in_a_list_are_alike_inside_a_layer():
    one = GraphReport("graph")
    one.ran = [
        Ran(f"layers.{i}.experts.{j}.down", "mlp", "gated_mlp", "k") for i in range(3) for j in range(12)
    ]
    assert explained(one) == [Line("layers.0-2.experts.0-11.down", "mlp", "gated_mlp", "k")]
    del one.ran[15]
    assert [line.path.rpartition(".")[0] for line in explained(one)] == [
        "layers.0.experts.0-11",
        "layers.1.experts.0-2",
        "layers.1.experts.4-11",
        "layers.2.experts.0-11",
    ]


def test_the_report_offers_table_and_dict():
    model = Model(2, odd=(1,))
    fast = dsopt.compile(model, fallback="eager")
    with torch.no_grad():
        fast(X)
        fast(torch.randn(5, 8))
    explanation = dsopt.report(model).explain()
    assert len(explanation.graphs) == 2
    text = str(explanation)
    assert text.count("what runs in each module") == 1, "graphs that are alike share a table"
    for word in ("layers.0.norm", "rms_norm", "multi_linear", "fuse_rms_norm: not x *", "not fused because"):
        assert word in text
    found = explanation.to_dict()
    assert json.loads(json.dumps(found)) == found
    assert [list(g) for g in found] == [["name", "fallback", "counted", "hits", "lines"]] * 2
    assert {"family": "norm", "site": found[0]["hits"][0]["site"]} in found[0]["hits"]
    assert [s.partition(":")[0] for s in found[0]["counted"]["norm"]] == ["layers.0.norm", "layers.1.norm"]


def test_a_graph_that_fell_back_says_why():
    class Plain(Layer):
        def forward(self, x):
            return self.out(x)

    fast = dsopt.compile(Plain(), fallback="eager")
    with torch.no_grad():
        fast(X)
    assert "fallback nothing to fuse" in str(dsopt.report(fast).explain())

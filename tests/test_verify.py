"""dsopt.verify: the error of every rewritten site, on the user's own inputs."""

import operator
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dsopt
from dsopt.op import Kernel, kernels
from dsopt.ops.norm import rms_norm
from dsopt.ops.route import moe_route
from dsopt.rewrite import Emitter, replace, val

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Model(nn.Module):
    """A norm, a latent attention over a cache written in place, a residual norm, a gated MLP."""

    def __init__(self, heads=3):
        super().__init__()
        self.heads = heads
        self.norm, self.post = nn.RMSNorm(16, eps=1e-6), nn.RMSNorm(16, eps=1e-6)
        self.q, self.kv_a = nn.Linear(16, heads * 12, bias=False), nn.Linear(16, 16, bias=False)
        self.kv_b, self.out = nn.Linear(12, heads * 14, bias=False), nn.Linear(heads * 6, 16, bias=False)
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x, cache=None, position=None):
        h = self.norm(x)
        q = self.q(h).view(*x.shape[:2], self.heads, 12).transpose(1, 2)
        both = self.kv_a(h)
        if cache is not None:
            both = cache.index_copy_(1, position, both)
        c, k_rope = both.split([12, 4], -1)
        k, v = self.kv_b(c).view(*both.shape[:2], self.heads, 14).transpose(1, 2).split([8, 6], -1)
        k = torch.cat((k, k_rope[:, None].expand(-1, self.heads, -1, -1)), -1)
        h = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        normed = self.post(h)
        return h + self.down(F.silu(self.gate(normed)) * self.up(normed))


X = torch.randn(2, 3, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_site_of_a_good_model(dtype):
    result = dsopt.verify(Model().to(dtype), X.to(dtype))
    ran = [s.kernel.partition("_")[2] for s in result.sites]
    assert {"rms_norm", "mla_attention", "gated_mlp", "add_rms_norm"} <= set(ran)
    assert all(s.ok for s in result.sites) and result.worst == max(s.error for s in result.sites)
    assert result.worst < {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    assert [
        s for s in result.to_dict()["sites"] if list(s) != ["site", "kernel", "error", "tolerance", "ok"]
    ] == []
    assert "site by site" in str(result)
    assert result.first is None and result.to_dict()["first"] is None


def test_inputs_of_every_kind():
    model = Model()
    for inputs in (X, [X], (X,), {"x": X}):
        assert dsopt.verify(model, inputs).sites
    with pytest.raises(TypeError, match="inputs must be a mapping, a sequence or a tensor, got int"):
        dsopt.verify(model, 3)


def test_caches_do_not_advance():
    model, cache, position = Model(), torch.randn(2, 7, 16), torch.tensor([2, 3, 4])
    before = cache.clone()
    result = dsopt.verify(model, {"x": X, "cache": cache, "position": position})
    assert result.worst < 1e-5 and torch.equal(cache, before)
    # the second call meets a graph that is there already
    assert dsopt.verify(model, (X, cache, position)).worst < 1e-5 and torch.equal(cache, before)


@pytest.fixture
def wrong_norm(monkeypatch):
    """A kernel of rms_norm that is off by two percent."""
    kernel = Kernel("rms_norm", "wrong", lambda *_: lambda x, w, eps: rms_norm.reference(x, w, eps) * 1.02)
    monkeypatch.setattr("dsopt.op.kernels", lambda op: ((kernel,), ()) if op == "rms_norm" else kernels(op))


def test_a_wrong_kernel_is_named(wrong_norm):
    with pytest.raises(
        dsopt.VerifyError, match=r"norm \(wrong_rms_norm\): error 2\.00e-02 > 1e-04"
    ) as caught:
        dsopt.verify(Model(), X)
    bad = [s for s in caught.value.result.sites if not s.ok]
    assert [s.site for s in bad] == ["norm"] and caught.value.result.first is bad[0]
    assert str(caught.value).startswith("first departs at norm (wrong_rms_norm): error 2.00e-02")
    assert "first departs at norm" in str(caught.value.result)
    assert len(caught.value.result.sites) > len(bad), "errors before a site are not counted against it"


def test_tolerance_can_be_given(wrong_norm):
    assert dsopt.verify(Model(), X, tolerance=0.1).worst == pytest.approx(0.02, rel=1e-3)
    with pytest.raises(dsopt.VerifyError):
        dsopt.verify(Model(), X, tolerance=0.01)


def test_options_are_the_backends():
    model = Model()
    with pytest.raises(ValueError, match="unknown backend 'gpux'"):
        dsopt.verify(model, X, options={"kernels": {"rms_norm": "gpux"}})
    result = dsopt.verify(model, X, options={"kernels": {"*": "reference"}})
    assert {s.kernel.partition("_")[0] for s in result.sites} == {"reference", "graph"}


def test_nothing_rewritten():
    with pytest.raises(ValueError, match="dsopt rewrote nothing"):
        dsopt.verify(nn.Linear(3, 2), torch.ones(1, 3))


def test_the_model_stays_as_it_is():
    model = Model()
    dsopt.verify(model, X)
    assert model._compiled_call_impl is None and dsopt.report(model).graphs == []


def norm(x, w):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w


class Counting(nn.Module):
    """A norm beside a buffer and an input that are written, a mask and NaN among the outputs."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8) + 0.5)
        self.register_buffer("count", torch.zeros(3))
        self.plain = torch.zeros(2)

    def forward(self, x, cache):
        self.count.add_(1)
        self.plain.add_(1)
        cache.mul_(2)
        return norm(x, self.weight), x > 0, cache.sum()


def test_outputs_and_writes_are_compared_and_nothing_advances():
    model, cache = Counting(), torch.ones(4)
    for _ in range(2):
        result = dsopt.verify(model, (X.view(-1, 8), cache))
        names = [s.site for s in result.sites if s.kernel == "graph"]
        assert names[:3] == ["output 0", "output 1", "output 2"]
        assert len(names) == 6 and all(n.startswith("write of input") for n in names[3:])
        assert model.count.sum() == 0 and model.plain.sum() == 0 and cache.sum() == 4


def broken(monkeypatch, change):
    """Lets a pass make a change to the graph that it should not make."""
    from dsopt.pipeline import run_pipeline

    def run(gm, *args):
        logs = run_pipeline(gm, *args)
        change(gm.graph)
        gm.recompile()
        return logs

    monkeypatch.setattr(sys.modules["dsopt.verify"], "run_pipeline", run)


def test_a_lost_write_is_named(monkeypatch):
    def lose(graph):
        (write,) = graph.find_nodes(op="call_function", target=torch.ops.aten.mul_.Tensor)
        write.replace_all_uses_with(write.args[0])
        graph.erase_node(write)

    broken(monkeypatch, lose)
    with pytest.raises(dsopt.VerifyError) as caught:
        dsopt.verify(Counting(), (X.view(-1, 8), torch.ones(4)))
    bad = [s.site.rpartition(" ")[0] for s in caught.value.result.sites if not s.ok]
    assert bad == ["output", "write of input"]


def test_a_wrong_mask_is_named(monkeypatch):
    def turn(graph):
        (mask,) = graph.find_nodes(op="call_function", target=torch.ops.aten.gt.Scalar)
        mask.target = torch.ops.aten.lt.Scalar

    broken(monkeypatch, turn)
    with pytest.raises(dsopt.VerifyError, match=r"output 1 \(graph\)"):
        dsopt.verify(Counting(), (X.view(-1, 8), torch.ones(4)), tolerance=10.0)


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x):
        return norm(x, self.weight)


def test_where_eager_is_nan_the_rest_is_compared():
    x = torch.randn(4, 8)
    x[0] = float("inf")
    assert dsopt.verify(Norm(), x).worst < 1e-5


def test_nan_in_another_place_is_an_error(monkeypatch):
    off = Kernel("rms_norm", "off", lambda *_: lambda x, w, eps: rms_norm.reference(x, w, eps).roll(1, 0))
    monkeypatch.setattr("dsopt.op.kernels", lambda op: ((off,), ()) if op == "rms_norm" else kernels(op))
    x = torch.randn(4, 8)
    x[0] = float("inf")
    with pytest.raises(dsopt.VerifyError, match="error inf"):
        dsopt.verify(Norm(), x)


def test_later_graphs_see_what_earlier_ones_wrote():
    class Broken(Norm):
        def forward(self, x, cache):
            cache.add_(1)
            x = norm(x, self.weight)
            torch._dynamo.graph_break()
            return norm(x, self.weight) * cache

    class Cache(Broken):
        def forward(self, x, cache):
            out = super().forward(x, cache)
            seen.append(out.abs().sum().item())
            return out

    seen, cache = [], torch.zeros(8)
    dsopt.verify(Cache(), (torch.randn(4, 8), cache))
    assert seen[0] > 0 and cache.sum() == 0


def test_a_graph_dsopt_cannot_take_says_why(monkeypatch):
    def fail(*_):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(sys.modules["dsopt.verify"], "run_pipeline", fail)
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"cannot take a graph of this model.*RuntimeError: no such luck"
        ):
            dsopt.verify(Norm(), torch.randn(4, 8))


class Routed(nn.Module):
    """A layer whose tokens are mixed from two of six rows each, chosen by a linear layer's scores."""

    def __init__(self):
        super().__init__()
        self.norm, self.gate, self.rows = nn.RMSNorm(8, eps=1e-6), nn.Linear(8, 6), nn.Embedding(6, 8)

    def forward(self, x):
        scores = self.gate(self.norm(x)).softmax(-1)
        weights, ids = torch.topk(scores, 2, sorted=False)
        weights = (weights / weights.sum(-1, keepdim=True)).to(torch.bfloat16)
        return (self.rows(ids) * weights.unsqueeze(-1)).sum(-2)


BEFORE = {"passes": ["canonicalize", "fuse_rms_norm"]}  # the routing is still as it was spelled


def routed(monkeypatch, fn, results=(0, 1)):
    """Puts moe_route, run by `fn`, in the place of some results of the routing in `Routed`."""
    kernel = Kernel("moe_route", "mine", lambda *_: fn)
    monkeypatch.setattr("dsopt.op.kernels", lambda op: ((kernel,), ()) if op == "moe_route" else kernels(op))

    def change(graph):
        (softmax,) = graph.find_nodes(op="call_function", target=torch.ops.aten.softmax.int)
        (topk,) = graph.find_nodes(op="call_function", target=torch.ops.aten.topk.default)
        casts = graph.find_nodes(op="call_function", target=torch.ops.aten.to.dtype)
        (cast,) = (n for n in casts if val(n).dtype == torch.bfloat16)
        ids = next(u for u in topk.users if u.args[1] == 1)
        emit = Emitter(graph.owning_module, topk)
        routed = emit(moe_route.overload, softmax.args[0], 2, "softmax", None, 1, 1, "max", None, True)
        if 0 in results:
            weights = emit(operator.getitem, routed, 0)
            replace(cast, emit(torch.ops.aten.to.dtype, weights, torch.bfloat16))
        if 1 in results:
            replace(ids, emit(operator.getitem, routed, 1))
        graph.eliminate_dead_code()

    broken(monkeypatch, change)


def backwards(*args):
    return tuple(x.flip(-1) for x in moe_route.reference(*args))


def test_experts_may_come_in_another_order(monkeypatch):
    routed(monkeypatch, backwards)
    result = dsopt.verify(Routed(), torch.randn(5, 8), options=BEFORE)
    (site,) = [s for s in result.sites if s.kernel.startswith("mine")]
    assert site.kernel == "mine_moe_route" and site.error < 4e-3
    assert site.tolerance == 3e-2, "eager rounds its weights to bfloat16"
    # the order of the routing would show in no other site: they go on with eager's experts
    assert all(s.error < 1e-6 for s in result.sites if s is not site)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (lambda weights, ids: (weights * 1.5, ids), r"error 5\.0\de-01"),
        (lambda weights, ids: (weights.flip(-1), ids), "error"),
        (lambda weights, ids: (weights, (ids + 1) % 6), "error inf"),
        (lambda weights, ids: (weights[..., :1], ids), "error inf"),
    ],
)
def test_wrong_experts_are_named(monkeypatch, wrong, error):
    routed(monkeypatch, lambda *args: wrong(*moe_route.reference(*args)))
    with pytest.raises(dsopt.VerifyError, match=rf"first departs at .*\(mine_moe_route\): {error}") as caught:
        dsopt.verify(Routed(), torch.randn(5, 8), options=BEFORE)
    assert [s.kernel for s in caught.value.result.sites if not s.ok] == ["mine_moe_route"]


@pytest.mark.parametrize("results", [(0,), (1,)])
def test_some_results_of_an_op_alone_are_compared_with_its_reference(monkeypatch, results):
    routed(monkeypatch, moe_route.reference, results)
    named = [s.kernel for s in dsopt.verify(Routed(), torch.randn(5, 8), options=BEFORE).sites]
    assert "mine_moe_route against its reference" in named
    torch._dynamo.reset()
    routed(monkeypatch, lambda *args: tuple(x + 1 for x in moe_route.reference(*args)), results)
    with pytest.raises(dsopt.VerifyError, match="mine_moe_route against its reference"):
        dsopt.verify(Routed(), torch.randn(5, 8), options=BEFORE)

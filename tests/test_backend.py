"""torch.compile(model, backend="dsopt") as a user meets it, bad input included."""

import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dsopt
from dsopt.backend import dsopt_backend
from dsopt.op import REFERENCE, backends
from dsopt.testing import relative_l2

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Tiny(nn.Module):
    """An embedding tied to the head, a norm, a gated MLP."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.weight = nn.Parameter(torch.rand(16) + 0.5)
        self.gate, self.up, self.down = (
            nn.Linear(a, b, bias=False) for a, b in ((16, 24), (16, 24), (24, 16))
        )
        self.head = nn.Linear(16, 11, bias=False)
        self.head.weight = self.embed.weight
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids):
        hidden = self.embed(ids)
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        normed = self.weight * wide.to(hidden.dtype)
        hidden = hidden + self.dropout(self.down(F.silu(self.gate(normed)) * self.up(normed)))
        return self.head(hidden)


IDS = torch.arange(8).view(2, 4)
EAGER = {"fallback": "eager"}


def compiled(model, **options):
    return torch.compile(model, backend=dsopt_backend, options=EAGER | {"strict": True} | options)


def ops(model) -> list[str]:
    return sorted(k.op for graph in dsopt.report(model).graphs for k in graph.kernels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": {}}, "unknown option 'kernel'; known options: kernels, passes, fallback, strict"),
        ({"kernels": {"rms": "torch"}}, "unknown op 'rms'; known ops: rms_norm, add_rms_norm, rope"),
        (
            {"kernels": {"rms_norm": "gpux"}},
            "unknown backend 'gpux'; known backends: cpu, .*torch, .*reference",
        ),
        ({"passes": ["canonicalize", "fuse"]}, "unknown pass 'fuse'; known passes: canonicalize"),
        ({"fallback": "jit"}, "unknown fallback 'jit'; known fallbacks: inductor, eager"),
    ],
)
def test_unknown_names_list_the_known(options, message):
    model = Tiny()
    with pytest.raises(ValueError, match=message):
        dsopt.compile(model, **options)
    assert model._compiled_call_impl is None
    with torch.no_grad(), pytest.raises(Exception, match=message):
        torch.compile(model, backend=dsopt_backend, options=options)(IDS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernels": "torch"}, "kernels must be a mapping of op names to backends, got 'torch'"),
        ({"passes": "canonicalize"}, "passes must be a sequence of pass names or None, got the string"),
        ({"passes": 3}, "passes must be a sequence of pass names or None, got 3"),
        ({"strict": "no"}, "strict must be True or False, got 'no'"),
    ],
)
def test_wrong_types_name_the_accepted(options, message):
    with pytest.raises(TypeError, match=message):
        dsopt.Options.of(options)
    with torch.no_grad(), pytest.raises(Exception, match=message):
        torch.compile(Tiny(), backend=dsopt_backend, options=options)(IDS)


def test_options_must_be_a_mapping():
    with pytest.raises(TypeError, match="options must be a mapping of option names to values, got 3"):
        dsopt.Options.of(3)


def test_an_unknown_mode_lists_the_known():
    with pytest.raises(Exception, match="unknown mode 'fastest'; known modes: default, reduce-overhead"):
        torch.compile(Tiny(), backend=dsopt_backend, mode="fastest")(IDS)


@pytest.mark.parametrize(
    ("name", "value"), [("DSOPT_FUEL", "some"), ("DSOPT_FUEL", "-1"), ("DSOPT_ISA", "avx9")]
)
def test_a_bad_variable_raises(monkeypatch, name, value):
    if name == "DSOPT_ISA":
        pytest.importorskip("dsopt._cpu")
    monkeypatch.setenv(name, value)
    with torch.no_grad(), pytest.raises(Exception, match=rf"ValueError: {name}.*{value}"):
        torch.compile(Tiny(), backend=dsopt_backend)(IDS)


def test_a_shape_guard_of_a_pass_is_an_error(monkeypatch):
    counts = iter((0, 1))
    monkeypatch.setattr("dsopt.backend.guard_count", lambda gm: next(counts))
    with torch.no_grad(), pytest.raises(Exception, match="the census or a pass added a shape guard"):
        compiled(Tiny())(IDS)


def test_hooks_of_the_copy_are_its_own():
    model, calls = Tiny(), []
    model.register_forward_hook(lambda *_: calls.append("before"))
    fast = dsopt.compile(model, **EAGER)
    fast.register_forward_hook(lambda *_: calls.append("copy"), always_call=True)
    fast.register_forward_pre_hook(lambda module, args, kwargs: calls.append("pre"), with_kwargs=True)
    with torch.no_grad():
        model(IDS)
        assert calls == ["before"]
        fast(IDS)
    assert calls == ["before", "pre", "before", "copy"]


def test_disabling_an_unknown_backend_raises(monkeypatch):
    monkeypatch.setenv("DSOPT_DISABLE", "gpux")
    with torch.no_grad(), pytest.raises(Exception, match="known backends"):
        torch.compile(Tiny(), backend=dsopt_backend)(IDS)


def test_compile_refuses_what_is_no_module():
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got function"):
        dsopt.compile(lambda x: x)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_modes_are_accepted(mode):
    model = Tiny()
    with torch.inference_mode():
        assert relative_l2(torch.compile(model, backend=dsopt_backend, mode=mode)(IDS), model(IDS)) < 1e-5
    assert ops(model) == ["gated_mlp", "multi_linear", "rms_norm"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_float_dtype(dtype):
    model = Tiny().to(dtype)
    with torch.no_grad():
        got = compiled(model)(IDS)
        assert got.dtype == dtype
        assert relative_l2(got, model.double()(IDS)) < {torch.float32: 1e-5, torch.float64: 1e-6}.get(
            dtype, 2e-2
        )
    # of a float64 input the norm is that of its float32 rounding, without the weight
    assert ops(model) == ["gated_mlp", "multi_linear", "rms_norm"]


def test_gradients_go_to_inductor_with_one_warning():
    model = Tiny()
    fast = torch.compile(model, backend=dsopt_backend)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fast(IDS).square().sum().backward()
        fast(IDS[:1])
    ours = [str(w.message) for w in caught if "dsopt" in str(w.message)]
    assert len(ours) == 1 and "torch.inference_mode()" in ours[0]
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(IDS).square().sum().backward()
    for name, p in model.named_parameters():
        assert relative_l2(grads[name], p.grad) < 1e-5
    assert all("gradients are enabled" in reason for reason in dsopt.report(model).fallbacks)
    assert dsopt.report(model).fallbacks and ops(model) == []


def test_grad_mode_without_anything_that_needs_gradients():
    model = Tiny().requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = compiled(model)(IDS)
    assert relative_l2(got, model(IDS)) < 1e-5 and ops(model) == ["gated_mlp", "multi_linear", "rms_norm"]


def test_training_mode_under_no_grad():
    model = Tiny(dropout=0.5).train()
    fast = compiled(model)
    with torch.no_grad():
        for seed in range(3):
            torch.manual_seed(seed)
            got = fast(IDS)
            torch.manual_seed(seed)
            assert relative_l2(got, model(IDS)) < 1e-5
        model.eval()
        assert relative_l2(fast(IDS), model(IDS)) < 1e-5


def test_nothing_to_fuse_goes_to_inductor():
    model = nn.Linear(3, 2)
    x = torch.randn(4, 3)
    with torch.no_grad():
        assert relative_l2(torch.compile(model, backend=dsopt_backend)(x), model(x)) < 1e-6
    (reason,) = dsopt.report(model).fallbacks
    assert reason.endswith("nothing to fuse")


def test_attention_alone_is_taken_by_a_kernel_other_than_atens(monkeypatch):
    pytest.importorskip("dsopt._cpu")

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    q, k, v = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    for disabled, reason in ((set(backends()) - {REFERENCE, "torch"}, "nothing to fuse"), (set(), None)):
        monkeypatch.setenv("DSOPT_DISABLE", ",".join(disabled))
        torch._dynamo.reset()
        fast = torch.compile(attend, backend="dsopt", options={"fallback": "eager"})
        with torch.no_grad():
            assert relative_l2(fast(q, k, v), attend(q, k, v)) < 1e-5
        assert dsopt.report().graphs[-1].fallback == reason


def test_integers_only():
    def fn(ids):
        return ids * 2 + ids.cumsum(-1), ids > 3

    got = compiled(fn)(IDS)
    assert all(torch.equal(a, b) for a, b in zip(got, fn(IDS), strict=True))


def test_no_tokens():
    model = Tiny()
    fast = compiled(model)
    with torch.no_grad():
        for shape in ((2, 0), (0, 3), (1, 1), (2, 5), (3, 7)):
            ids = torch.ones(shape, dtype=torch.long)
            got = fast(ids)
            assert got.shape == (*shape, 11)
            assert relative_l2(got, model(ids)) < 1e-5


@pytest.mark.parametrize("change", ["in place", "data", "load_state_dict", "tied", "replaced"])
def test_changed_weights_show(change):
    model, other = Tiny(), Tiny()
    fast = compiled(model)
    with torch.no_grad():
        before = fast(IDS)
        if change == "in place":
            model.gate.weight.mul_(-3)
            model.weight.add_(1)
        elif change == "data":
            model.down.weight.data = torch.randn(16, 24)
            model.weight.data.copy_(torch.rand(16))
        elif change == "load_state_dict":
            model.load_state_dict(other.state_dict())
        elif change == "tied":
            model.embed.weight.mul_(2)
            model.head.weight[0] = 1
        else:
            model.up = other.up
        after = fast(IDS)
        assert relative_l2(after, model(IDS)) < 1e-5 < relative_l2(after, before)


def fails(gm, log):
    """Changes the graph, then fails."""
    log.hit("mlp")
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        node.args = node.args[::-1]
    raise RuntimeError("a pass that fails")


def loses_writes(gm, log):
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.add_.Tensor):
        node.replace_all_uses_with(node.args[0])
        gm.graph.erase_node(node)


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (fails, "RuntimeError: a pass that fails"),
        (loses_writes, "EffectError: pass fuse_gated_mlp changed the writes"),
    ],
)
def test_a_pass_that_fails_is_left_out_unless_strict(monkeypatch, run, reason):
    class Counting(Tiny):
        def forward(self, ids, count):
            count.add_(1)
            return super().forward(ids)

    monkeypatch.setattr("dsopt.passes.fuse_gated_mlp.run", run)
    model, count = Counting(), torch.zeros(1)
    with torch.no_grad():
        with pytest.raises(Exception, match=reason):
            compiled(model)(IDS, count)
        torch._dynamo.reset()
        got = compiled(model, strict=False)(IDS, count)
        assert relative_l2(got, model(IDS, count)) < 1e-6 and count == 2
    report = dsopt.report(model)
    assert ops(model) == ["multi_linear", "rms_norm"], "the passes after it ran"
    assert report.matched["mlp"] == [0, 1]
    (left_out,) = [p for g in report.graphs for p in g.passes if p.misses]
    assert left_out.name == "fuse_gated_mlp" and left_out.rewrites == 0 and left_out.hits == []
    assert reason in left_out.misses[0]["reason"] and reason.partition(":")[0] in str(report)


def test_a_census_that_fails_falls_back_unless_strict(monkeypatch):
    def fails(gm):
        raise RuntimeError("no such luck")

    monkeypatch.setattr("dsopt.backend.census_sites", fails)
    model = Tiny()
    with torch.no_grad():
        with pytest.raises(Exception, match="no such luck"):
            compiled(model)(IDS)
        torch._dynamo.reset()
        assert relative_l2(compiled(model, strict=False)(IDS), model(IDS)) < 1e-6
    assert dsopt.report(model).fallbacks[-1].endswith("RuntimeError: no such luck")
    assert ops(model) == [] and all(hits == 0 for hits, _ in dsopt.report(model).matched.values())


def test_kernels_can_be_chosen():
    model = Tiny()
    with torch.no_grad():
        for choice in ({"rms_norm": "torch"}, {"*": "reference"}, {"*": "reference", "gated_mlp": "torch"}):
            torch._dynamo.reset()
            assert relative_l2(compiled(model, kernels=choice)(IDS), model(IDS)) < 1e-5
            used = {k.op: k.backend for k in dsopt.report(model).graphs[-1].kernels}
            for op in ("rms_norm", "gated_mlp"):
                assert used[op] == choice.get(op, choice.get("*", used[op]))


def test_every_backend_disabled(monkeypatch):
    monkeypatch.setenv("DSOPT_DISABLE", ",".join(set(backends()) - {REFERENCE}))
    model = Tiny()
    with torch.no_grad():
        assert relative_l2(compiled(model)(IDS), model(IDS)) < 1e-5
    (graph,) = dsopt.report(model).graphs
    assert {k.backend for k in graph.kernels} == {"reference"}
    reasons = {r.reason for k in graph.kernels for r in k.refused}
    assert all(reason.startswith(("disabled by DSOPT_DISABLE", "import failed")) for reason in reasons)


def test_fuel_stops_the_rewrites(monkeypatch):
    model = Tiny()
    done = []
    for fuel in (0, 1, 3, 5, 1000):
        monkeypatch.setenv("DSOPT_FUEL", str(fuel))
        torch._dynamo.reset()
        with torch.no_grad():
            assert relative_l2(compiled(model)(IDS), model(IDS)) < 1e-5
        newest = max(dsopt.report(model).graphs, key=lambda g: int(g.name.removeprefix("graph")))
        done.append(sum(p.rewrites for p in newest.passes))
    assert done[:3] == [0, 1, 3] and done == sorted(done) and done[-1] < 1000


def test_dump_writes_the_graph_after_each_pass(monkeypatch, tmp_path):
    monkeypatch.setenv("DSOPT_DUMP", str(tmp_path / "graphs"))
    model = Tiny()
    with torch.no_grad():
        compiled(model, passes=["canonicalize", "fuse_rms_norm"])(IDS)
    (graph,) = dsopt.report(model).graphs
    names = ["0.captured", "1.canonicalize", "2.fuse_rms_norm", "lowered"]
    texts = [(tmp_path / "graphs" / f"{graph.name}.{name}.txt").read_text() for name in names]
    assert len(list((tmp_path / "graphs").iterdir())) == len(names)
    assert "aten.rsqrt" in texts[1] and "dsopt.rms_norm" in texts[2] and "rms_norm(" in texts[3]


def test_chosen_passes_run_alone():
    model = Tiny()
    with torch.no_grad():
        assert relative_l2(compiled(model, passes=["canonicalize", "fuse_rms_norm"])(IDS), model(IDS)) < 1e-5
    (graph,) = dsopt.report(model).graphs
    assert [p.name for p in graph.passes] == ["canonicalize", "fuse_rms_norm"]
    assert ops(model) == ["rms_norm"]


def test_entry_point_in_a_fresh_process(tmp_path):
    code = """
import sys, torch
assert "dsopt" not in sys.modules
model = torch.nn.Linear(3, 2)
fast = torch.compile(model, backend="dsopt", options={"fallback": "eager"})
x = torch.ones(1, 3)
with torch.no_grad():
    assert torch.equal(fast(x), model(x))
assert "dsopt" in sys.modules and "kernels" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_modes_switched_inside_the_graph_go_to_the_fallback():
    w, linear = torch.randn(8), torch.nn.Linear(8, 8)

    def norm(x, w):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w

    def autocast(x):
        with torch.autocast("cpu", torch.bfloat16):
            h = linear(x)
        return norm(h, w.to(h.dtype))

    def gradients(x):
        with torch.enable_grad():
            return norm(x * linear.weight[0], w)

    x = torch.randn(4, 8)
    with torch.no_grad():
        for fn, reason in ((autocast, "autocast"), (gradients, "enables gradients")):
            fast = torch.compile(fn, backend="dsopt", options={"fallback": "eager"})
            got, want = fast(x), fn(x)
            assert got.dtype == want.dtype and got.requires_grad == want.requires_grad
            torch.testing.assert_close(got, want)
            assert any(reason in line for line in dsopt.report().fallbacks)
            torch.compiler.reset()


def test_autocast_switched_off_where_it_is_off_changes_nothing():
    model = Tiny()

    def fn(ids):
        with torch.autocast("cpu", enabled=False):
            hidden = model.embed(ids).float()
        return model.head(model.down(F.silu(model.gate(hidden)) * model.up(hidden)))

    with torch.no_grad():
        assert relative_l2(compiled(fn)(IDS), fn(IDS)) < 1e-5
        assert "gated_mlp" in ops(model)
        with torch.autocast("cpu", torch.bfloat16):
            assert relative_l2(torch.compile(fn, backend=dsopt_backend, options=EAGER)(IDS), fn(IDS)) == 0
    assert any("autocast" in line for line in dsopt.report(model).fallbacks)


def test_a_negation_that_was_put_off():
    """Kernels read memory: a tensor that is the negative of its memory is not for them."""
    x, norm = torch.randn(3, 16), torch.nn.RMSNorm(16)
    with torch.no_grad():
        fn = torch.compile(lambda x: norm(x), backend=dsopt_backend, options={"fallback": "eager"})
        assert relative_l2(fn(x), norm(x)) < 1e-6
        assert relative_l2(fn(torch._neg_view(x)), norm(-x)) < 1e-6
        fn = torch.compile(
            lambda x: norm(torch._neg_view(x)), backend=dsopt_backend, options={"strict": True}
        )
        assert relative_l2(fn(x), norm(-x)) < 1e-6

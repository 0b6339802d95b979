"""What an earlier process made of a graph: found again where all is the same, made anew where anything differs."""

import json
import operator
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dsopt
from dsopt import graphcache, graphkey
from dsopt.backend import dsopt_backend
from dsopt.capture import add_guard, capture, fake_mode_of
from dsopt.graphcodec import Refused, decode, decode_condition, encode, target_name
from dsopt.op import Kernel, kernels

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Block(nn.Module):
    """A norm and a gated MLP, whose result is written to a cache of the caller's and read from there."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(16) + 0.5)
        self.gate, self.up = nn.Linear(16, 24, bias=False), nn.Linear(16, 24, bias=False)
        self.down = nn.Linear(24, 16, bias=False)

    def forward(self, x, cache, at):
        wide = x.float()
        normed = self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        hidden = x + self.down(F.silu(self.gate(normed)) * self.up(normed))
        cache.index_copy_(1, at, hidden)
        return hidden + cache.sum(1, keepdim=True)


def inputs(tokens=3, dtype=torch.float32):
    x = torch.linspace(-1, 1, 2 * tokens * 16, dtype=dtype).view(2, tokens, 16)
    return x, torch.zeros(2, 8, 16, dtype=dtype), torch.arange(tokens) + 2


def block(seed=0):
    torch.manual_seed(seed)
    return Block().eval()


def run(model, *args, dynamic=None, **options):
    """(results, the cache as it was left, report) of one call, compiled as in a process of its own."""
    torch._dynamo.reset()
    options = {"fallback": "eager", "strict": True} | options
    with torch.inference_mode():
        y = torch.compile(model, backend=dsopt_backend, options=options, dynamic=dynamic)(*args)
    return y, args[1], dsopt.report(model)


def only(report):
    (graph,) = report.graphs
    return graph


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """An empty folder for graphs, used as if dsopt's sources did not change."""
    monkeypatch.setenv("DSOPT_CACHE", "1")
    monkeypatch.setenv("DSOPT_CACHE_DIR", str(tmp_path / "graphs"))
    monkeypatch.setattr(graphkey, "_STARTED", float("inf"))
    return tmp_path / "graphs"


def test_a_hit_gives_what_the_miss_gave(folder):
    first, second = run(block(), *inputs()), run(block(), *inputs())
    assert [only(r[2]).cached for r in (first, second)] == [False, True] and second[2].cached == 1
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    a, b = (r[2].to_dict() for r in (first, second))
    for graph in (*a["graphs"], *b["graphs"]):
        del graph["name"], graph["compile_s"], graph["cached"]
    assert a == b and a["graphs"][0]["kernels"] and a["matched"]["mlp"] == [1, 1]
    a, b = (r[2].explain().to_dict() for r in (first, second))
    del a[0]["name"], b[0]["name"]
    assert a == b and a[0]["lines"]
    assert "cached" in str(second[2]) and len(graphcache.files()) == 1


def test_weights_are_not_kept(folder):
    run(block(), *inputs())
    other = block(seed=1)
    y, cache, report = run(other, *inputs())
    assert only(report).cached
    x, want_cache, at = inputs()
    with torch.no_grad():
        torch.testing.assert_close(y, other(x, want_cache, at), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cache, want_cache, rtol=1e-5, atol=1e-5)


def test_every_length_of_a_dynamic_graph(folder):
    def lengths(model):
        torch._dynamo.reset()
        fast = torch.compile(model, backend=dsopt_backend, options={"strict": True, "fallback": "eager"})
        found = []
        with torch.inference_mode():
            for tokens in (3, 5, 6, 1):
                args = inputs(tokens)
                found += [fast(*args), args[1]]
        return found, [g.cached for g in dsopt.report(model).graphs]

    (want, missed), (got, hit) = lengths(block()), lengths(block())
    assert not any(missed) and all(hit) and len(hit) == 3  # of 3 tokens, of some, of one
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize(
    "change", ["dtype", "tokens", "strides", "kernels", "passes", "disabled", "gradients"]
)
def test_what_differs_is_made_anew(folder, monkeypatch, change):
    model = block()
    run(model, *inputs())
    args, options = inputs(), {}
    if change == "dtype":
        model, args = block().bfloat16(), inputs(dtype=torch.bfloat16)
    elif change == "tokens":
        args = inputs(4)
    elif change == "strides":
        args = (args[0].transpose(0, 1).contiguous().transpose(0, 1), *args[1:])
    elif change == "kernels":
        options = {"kernels": {"rms_norm": "torch"}}
    elif change == "passes":
        options = {"passes": ("canonicalize", "fuse_rms_norm")}
    elif change == "disabled":
        monkeypatch.setenv("DSOPT_DISABLE", "numba")
    else:
        model.requires_grad_(False)
    fresh = block().to(args[0].dtype)
    want = fresh(*(a.clone() for a in args))
    y, _, report = run(model, *args, **options)
    assert not any(g.cached for g in report.graphs) and len(graphcache.files()) == 2
    torch.testing.assert_close(y, want, rtol=2e-2, atol=2e-2)


def test_another_instruction_set_is_another_graph(folder, monkeypatch):
    native = pytest.importorskip("dsopt._cpu")
    run(block(), *inputs())
    monkeypatch.setattr(native, "isa", lambda: "another")
    _, _, report = run(block(), *inputs())
    assert not only(report).cached


def test_inputs_that_share_memory_are_another_graph(folder):
    model = block()
    for cached in (False, True):
        assert only(run(block(), *inputs())[2]).cached is cached
    base = torch.zeros(2, 11, 16)
    _, _, report = run(model, base[:, 8:], base[:, :8], torch.arange(3))
    apart = torch.zeros(2, 11, 16), torch.zeros(2, 11, 16)
    _, _, other = run(block(), apart[0][:, 8:], apart[1][:, :8], torch.arange(3))
    assert not only(report).cached and not only(other).cached


def test_edited_sources_are_noticed(folder, monkeypatch, tmp_path):
    source = tmp_path / "a.py"
    source.write_text("1")
    monkeypatch.setattr(graphkey, "_source_files", lambda: iter([source]))
    monkeypatch.setattr(graphkey, "_sources", graphkey._sources.__wrapped__)
    for cached in (False, True):
        assert only(run(block(), *inputs())[2]).cached is cached
    source.write_text("2")
    assert not only(run(block(), *inputs())[2]).cached
    monkeypatch.setattr(graphkey, "_STARTED", source.stat().st_mtime - 1)
    graph = only(run(block(), *inputs())[2])
    assert not graph.cached and graph.uncached == "a.py was changed after this process had begun"


def rewrite(path, change):
    """The file with its content changed and a checksum that fits."""
    content = json.loads(path.read_text().partition("\n")[2])
    change(content)
    body = json.dumps(content)
    path.write_text(f"{graphcache._checksum(body)}\n{body}")


def first_call(content):
    return next(node for node in content["nodes"] if node[0] == "call_function")


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: p.write_text(""),
        lambda p: p.write_bytes(b"\xff\x00garbage"),
        lambda p: p.write_text(p.read_text()[:-100]),
        lambda p: p.write_text(p.read_text().replace("float32", "float64")),
        lambda p: rewrite(p, lambda c: c["nodes"].pop(1)),
        lambda p: rewrite(p, lambda c: first_call(c).__setitem__(2, "os:system")),
        lambda p: rewrite(p, lambda c: first_call(c).__setitem__(2, "aten.nothing.default")),
        lambda p: rewrite(
            p, lambda c: c.__setitem__("values", [["torch.int8", "cpu", 1]] * len(c["values"]))
        ),
        lambda p: rewrite(p, lambda c: c.pop("kernels")),
        lambda p: rewrite(p, lambda c: c.__setitem__("passes", [{"name": "x", "unknown": 1}])),
    ],
    ids="empty garbage truncated changed node function operator values kernels log".split(),
)
def test_a_damaged_file_is_made_anew(folder, damage):
    want, _, _ = run(block(), *inputs())
    ((_, _, path),) = graphcache.files()
    damage(path)
    y, _, report = run(block(), *inputs())
    assert not only(report).cached and only(report).uncached is None and torch.equal(y, want)
    y, _, report = run(block(), *inputs())
    assert only(report).cached and torch.equal(y, want)


def test_a_folder_that_cannot_be_written_is_bypassed(folder, monkeypatch):
    folder.write_text("a file")
    want, _, report = run(block(), *inputs())
    assert only(report).uncached.startswith("its file cannot be written: ") and only(report).fallback is None
    monkeypatch.setenv("DSOPT_CACHE", "0")
    y, _, report = run(block(), *inputs())
    assert only(report).uncached == "DSOPT_CACHE=0" and torch.equal(y, want)


@pytest.mark.parametrize("variable", ["DSOPT_FUEL", "DSOPT_DUMP"])
def test_debugging_bypasses_it(folder, monkeypatch, tmp_path, variable):
    run(block(), *inputs())
    monkeypatch.setenv(variable, "1" if variable == "DSOPT_FUEL" else str(tmp_path / "dump"))
    graph = only(run(block(), *inputs())[2])
    assert not graph.cached and graph.uncached == f"{variable} is set"


def test_a_graph_with_a_failed_pass_is_not_kept(folder, monkeypatch):
    def broken(gm, log):
        raise RuntimeError("no")

    monkeypatch.setattr("dsopt.passes.fuse_rope.run", broken)
    graph = only(run(block(), *inputs(), strict=False)[2])
    assert graph.uncached == "a pass failed: fuse_rope" and not graphcache.files()


def test_a_graph_with_guards_on_floats_is_not_kept(folder):
    class Scaled(Block):
        scale = 0.75

        def forward(self, x, cache, at):
            return super().forward(x * self.scale, cache, at)

    for scale in (0.75, 0.5):
        model = Scaled()
        model.scale = scale
        args = inputs()
        want = model(*(a.clone() for a in args))
        y, _, report = run(model, *args, dynamic=True)
        assert not only(report).cached and only(report).uncached.startswith("a shape guard holds ")
        torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)


class Shifted(Block):
    """The offsets are a constant of the code's."""

    def forward(self, x, cache, at):
        return super().forward(x, cache, at) + torch.tensor([0.1, -2.0, 3e-9, float("inf")]).repeat(4)


def test_guards_and_constants_of_capture_come_back(folder, monkeypatch):
    def divides(symbols):
        return decode_condition(["Equality", ["Mod", ["Mul", 6, name], ["Add", name, 10]], 0], symbols)

    def asking(gm, example_inputs):
        graph = capture(gm, example_inputs)
        add_guard(fake_mode_of(graph), divides)
        return graph

    def call():
        x, cache, at = inputs(5)
        torch._dynamo.mark_dynamic(x, 1)
        torch._dynamo.mark_dynamic(at, 0)
        torch.manual_seed(0)
        return run(Shifted(), x, cache, at)

    want, _, _ = call()
    ((_, _, path),) = graphcache.files()
    content = json.loads(path.read_text().partition("\n")[2])
    assert any(node[0] == "get_attr" for node in content["nodes"]) and not content["guards"]
    replaced = {fact.split()[0] for fact in content["sizes"] if " is s" in fact}
    (name,) = {fact.split()[0] for fact in content["sizes"] if ", was 5" in fact} - replaced
    path.unlink()
    monkeypatch.setattr("dsopt.backend.capture", asking)
    for cached in (False, True):
        got, _, report = call()
        assert only(report).cached is cached and torch.equal(got, want)
    (guard,) = json.loads(path.read_text().partition("\n")[2])["guards"]
    assert guard[0] == "Equality"
    # one that does not hold for these sizes, or that capture did not come to, is no hit
    for other in (["Equality", 1, 2], ["Unequality", name, 77]):
        rewrite(path, lambda c, other=other: c["guards"].append(other))
        got, _, report = call()
        assert not only(report).cached and torch.equal(got, want)


def test_a_kernel_that_refuses_by_now_is_chosen_anew(folder, monkeypatch):
    _, _, report = run(block(), *inputs())
    used = next(k.kernel for k in only(report).kernels if k.op == "rms_norm")
    chosen = next(k for k in kernels("rms_norm")[0] if k.label == used)
    others = tuple(k for k in kernels("rms_norm")[0] if k is not chosen)
    now = Kernel("rms_norm", chosen.backend, chosen.plan, lambda *_: "not today", priority=chosen.priority)
    monkeypatch.setattr(
        "dsopt.op.kernels", lambda name: ((now, *others), ()) if name == "rms_norm" else kernels(name)
    )
    monkeypatch.setattr("dsopt.op._kernel", lambda name, label: now if label == used else None)
    for _ in range(2):
        y, _, report = run(block(), *inputs())
        use = next(k for k in only(report).kernels if k.op == "rms_norm")
        assert only(report).cached and use.kernel != used and "not today" in {r.reason for r in use.refused}
    with torch.no_grad():
        torch.testing.assert_close(y, block()(*inputs()), rtol=1e-5, atol=1e-5)


def test_nothing_to_fuse_is_known_at_once(folder):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(3.0))

        def forward(self, x, cache, at):
            return cache.index_copy_(1, at, x) * self.scale

    for cached in (False, True):
        y, _, report = run(Plain(), *inputs())
        assert (only(report).cached, only(report).fallback) == (cached, "nothing to fuse")
        assert torch.equal(y, Plain()(*inputs()))


def test_the_oldest_are_dropped(folder):
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.graph").write_text("x" * 100)
        os.utime(folder / f"{i}.graph", (i, i))
    graphcache._drop_oldest(250)
    assert [path.name for _, _, path in graphcache.files()] == ["2.graph", "3.graph"]


CHILD = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import test_graphcache as t
t.graphkey._STARTED = float("inf")
y, cache, report = t.run(t.block(), *t.inputs())
print(t.only(report).uncached, y.view(torch.int32).sum().item(), cache.view(torch.int32).sum().item())
"""


def test_processes_at_once_and_one_after(folder):
    command = [sys.executable, "-W", "ignore", "-c", CHILD, str(Path(__file__).parent)]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [child.communicate(timeout=300)[0].splitlines()[-1] for child in children]
    y, cache, report = run(block(), *inputs())
    sums = f"{y.view(torch.int32).sum().item()} {cache.view(torch.int32).sum().item()}"
    assert told == [f"None {sums}"] * 2 and only(report).cached
    assert [path.suffix for path in folder.iterdir()] == [".graph"]


def test_arguments_come_back_as_they_were():
    given = (
        None, True, 1, 1.0, float("inf"), "a", (1, [2, (3,)]), {"a": 1, 2: "b"}, slice(0, None, 2), 1j, ...,
        torch.bfloat16, torch.strided, torch.channels_last, torch.device("cuda", 1),
    )  # fmt: skip
    got = decode(json.loads(json.dumps(encode(given, {}))), [])
    assert got == given and list(map(type, got)) == list(map(type, given))
    with pytest.raises(Refused, match="an argument of type object"):
        encode([object()], {})
    for wrong in ({"dtype": "nn"}, {"layout": "float32"}):
        with pytest.raises((ValueError, KeyError)):
            decode(wrong, [])


def test_targets_are_named_only_where_a_name_says_what_they_do():
    def silu(x):
        return x

    silu.__module__ = "torch.nn.functional"
    assert target_name(F.silu) == "torch.nn.functional.silu"
    assert target_name(operator.mul) == "_operator.mul"
    assert target_name(torch.ops.aten.add.Tensor) == "torch.ops.aten.add.Tensor"
    for unknown in (silu, run, Path.exists):
        with pytest.raises(Refused, match="a call of"):
            target_name(unknown)


@pytest.mark.parametrize("editable", [True, False])
def test_kernels_of_a_package_that_is_being_edited(folder, monkeypatch, tmp_path, editable):
    """Its version stays the same while its code changes."""
    info = tmp_path / "acme-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[dsopt.kernels]\nacme = acme_kernels\n")
    (info / "direct_url.json").write_text(json.dumps({"url": "", "dir_info": {"editable": editable}}))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(graphkey, "_installed", graphkey._installed.__wrapped__)
    if editable:
        with pytest.raises(Refused, match="acme, which offers kernels, is installed for development"):
            graphkey._installed()
    else:
        assert ("acme", "acme_kernels", "1.0") in graphkey._installed()[-1]

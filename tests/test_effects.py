import operator
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dsopt.capture import capture
from dsopt.effects import EffectError, bases, check_effects, effects, is_impure, written
from dsopt.pipeline import run_pipeline
from dsopt.testing import relative_l2, rewritten

aten = torch.ops.aten
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def graph_of(fn, *args):
    """fn as Dynamo and capture leave it."""
    return rewritten(fn, *args, passes=()).graphs[-1]


def step(cache, x, position):
    """Reads the cache, writes one row of it, reads it again."""
    before = cache.sum(0)
    cache.index_copy_(0, position, x)
    return before, cache * 2


ARGS = torch.randn(4, 3), torch.randn(1, 3), torch.tensor([2])


def find(graph, target):
    return next(n for n in graph.graph.nodes if n.target == target)


def test_writes_and_what_each_result_read():
    found = effects(graph_of(step, *ARGS))
    assert len(found.writes) == 1
    (cache,) = found.writes
    assert (cache, 0) in found.sinks[0]
    assert (cache, 0) in found.sinks[1] and (cache, 1) not in found.sinks[1]
    assert (cache, 1) in found.sinks[2]


def test_moving_a_read_behind_a_write_raises():
    graph = graph_of(step, *ARGS)
    before = effects(graph)
    find(graph, aten.index_copy_.default).append(find(graph, aten.sum.dim_IntList))
    with pytest.raises(EffectError, match="pass late lets sink"):
        check_effects(before, effects(graph), "late")


def test_moving_a_read_before_a_write_raises():
    def written_then_read(cache, x, position):
        cache.index_copy_(0, position, x)
        return cache[1:] * 2

    graph = graph_of(written_then_read, *ARGS)
    before = effects(graph)
    write, product = find(graph, aten.index_copy_.default), find(graph, aten.mul.Tensor)
    cache = write.args[0]
    with graph.graph.inserting_before(write):
        early = graph.graph.call_function(aten.mul.Tensor, (cache, 2))
    product.replace_all_uses_with(early)
    graph.graph.erase_node(product)
    with pytest.raises(EffectError):
        check_effects(before, effects(graph), "early")


def test_views_carry_the_order():
    def through_a_view(cache, x, position):
        view = cache.view(2, 2, 3)[:, 0]
        early = view + 1
        cache.index_copy_(0, position, x)
        return early

    graph = graph_of(through_a_view, *ARGS)
    before = effects(graph)
    find(graph, aten.index_copy_.default).append(find(graph, aten.add.Tensor))
    with pytest.raises(EffectError):
        check_effects(before, effects(graph), "views")


def test_fresh_tensors_keep_their_order_too():
    def fresh(cache, x, position):
        total = x + 1
        early = total * 2
        total.add_(1)
        return early, total

    graph = graph_of(fresh, *ARGS)
    before = effects(graph)
    find(graph, aten.add_.Tensor).append(find(graph, aten.mul.Tensor))
    with pytest.raises(EffectError):
        check_effects(before, effects(graph), "fresh")


@pytest.mark.parametrize("change", ["drop", "double", "reorder"])
def test_writes_stay_as_they_are(change):
    def two_writes(cache, other, x, position):
        cache.index_copy_(0, position, x)
        other.index_copy_(0, position, x)
        return cache + other

    graph = graph_of(two_writes, ARGS[0], ARGS[0].clone(), *ARGS[1:])
    before = effects(graph)
    first, second = (n for n in graph.graph.nodes if written(n))
    if change == "drop":
        first.replace_all_uses_with(first.args[0])
        graph.graph.erase_node(first)
    elif change == "double":
        with graph.graph.inserting_after(first):
            graph.graph.call_function(first.target, first.args)
    else:
        second.append(first)
    with pytest.raises(EffectError, match="changed the writes"):
        check_effects(before, effects(graph), change)


def test_dropping_a_read_is_allowed():
    graph = graph_of(step, *ARGS)
    before = effects(graph)
    product = find(graph, aten.mul.Tensor)
    product.args = (find(graph, aten.sum.dim_IntList), 2)
    after = effects(graph)
    with pytest.raises(EffectError):
        check_effects(before, after, "other version")
    product.args = (graph.graph.find_nodes(op="placeholder")[1], 2)
    assert check_effects(before, effects(graph), "dropped") == effects(graph)


def test_dead_code_removal_keeps_mutations():
    def only_writes(cache, x, position):
        cache.index_copy_(0, position, x)
        cache[:1].mul_(3)
        x.exp()
        return x + 1

    cache, x, position = ARGS
    result = rewritten(only_writes, cache.clone(), x, position)
    assert (
        "aten.index_copy_" in result.ops() and "aten.mul_" in result.ops() and "aten.exp" not in result.ops()
    )
    got, want = cache.clone(), cache.clone()
    result.run(got, x, position)
    only_writes(want, x, position)
    assert torch.equal(got, want)


def test_bases_see_through_views_and_writes():
    def fn(cache, x, position):
        written_cache = cache.transpose(0, 1).index_copy_(1, position, x.T)
        return written_cache.reshape(-1), cache.clone()

    graph = graph_of(fn, *ARGS)
    base_of = bases(graph)
    cache = graph.graph.find_nodes(op="placeholder")[0]
    assert base_of[find(graph, aten.index_copy_.default)] == {cache}
    assert cache in base_of[find(graph, aten.reshape.default)]
    assert cache not in base_of[find(graph, aten.clone.default)]


def test_what_dead_code_removal_must_keep():
    def fn(x):
        torch.rand(2)
        a, _ = x.split(2, -1)
        return a.add_(1)

    graph = graph_of(fn, torch.randn(3, 4))
    impure = {n.target for n in graph.graph.nodes if is_impure(n)}
    assert {aten.rand.default, aten.add_.Tensor} <= impure
    assert not impure & {aten.split.Tensor, operator.getitem}


class Block(nn.Module):
    """A norm, a rotation-free attention over a static cache that is written in place, a gated MLP."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.kv, self.out = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x, cache, position):
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight
        before = cache.mean()
        cache.index_copy_(1, position, self.kv(x))
        scores = torch.softmax(x @ cache.transpose(1, 2), -1)
        cache[:, :1] += 1
        return self.out(scores @ cache), before, cache.mean()


def test_pipeline_keeps_cache_writes_in_place():
    model = Block()
    x, position = torch.randn(2, 1, 8), torch.tensor([3])
    caches = [torch.randn(2, 6, 8)] * 2
    caches = [c.clone() for c in caches]
    result = rewritten(model, x, caches[0].clone(), position)
    assert {"aten.index_copy_", "dsopt.rms_norm"} <= set(result.ops())
    for _ in range(2):
        got, want = result.run(x, caches[0], position), model(x, caches[1], position)
        assert all(relative_l2(a, b) < 1e-5 for a, b in zip(got, want, strict=True))
        assert relative_l2(*caches) < 1e-6


def test_pipeline_refuses_a_bad_pass(monkeypatch):
    def run(gm, log):
        find(gm, aten.index_copy_.default).append(find(gm, aten.sum.dim_IntList))

    bad = SimpleNamespace(__name__="dsopt.passes.bad", run=run)
    monkeypatch.setattr("dsopt.pipeline.load_pass", lambda name: bad)
    with pytest.raises(Exception, match="pass bad lets sink"):
        rewritten(step, *ARGS, passes=("bad",))


def test_capture_without_dynamo():
    graph = capture(torch.fx.symbolic_trace(nn.Linear(3, 2)), [torch.randn(1, 3)])
    assert find(graph, aten.linear.default)
    assert run_pipeline(graph)

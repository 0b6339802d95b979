"""Runs made again by address give what the graph's code gives, whatever happens to the tensors between them."""

import gc
import threading
import weakref

import pytest
import torch
from torch import nn

import dsopt
from dsopt import recording
from dsopt.backend import dsopt_backend
from dsopt.lower import lower
from dsopt.replay import MAX_RECORDED, MAX_RECORDINGS, Replay, cannot_replay
from dsopt.testing import rewritten

pytest.importorskip("dsopt._cpu")
pytestmark = pytest.mark.usefixtures("fresh_dynamo")

WIDTH = 32


class Layer(nn.Module):
    """A norm, a gated MLP, and a cache of one row a position that is written in place and read by a kernel."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.gate, self.up, self.down = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.to(dtype)

    def forward(self, x, cache, position):
        h = self.norm(x)
        cache.index_copy_(0, position, h)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h)) + self.norm(cache).sum(0), h * 2


class Graphs:
    """A backend that is dsopt's and keeps what it compiled."""

    def __init__(self):
        self.replays: list[Replay] = []

    def __call__(self, gm, example_inputs):
        compiled = dsopt_backend(gm, example_inputs, options={"strict": True})
        assert isinstance(compiled.fn, Replay), compiled.report.not_replayed
        self.replays.append(compiled.fn)
        return compiled


def compiled(fn):
    graphs = Graphs()
    return torch.compile(fn, backend=graphs, dynamic=False), graphs


def inputs(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, WIDTH, generator=generator).to(dtype)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_run_gives_what_the_code_gives(mode, dtype):
    layer = Layer(dtype)
    fast, graphs = compiled(layer)
    with mode():
        cache = torch.zeros(8, WIDTH, dtype=dtype)
        kept = []
        for i in range(8):
            args = inputs(i, dtype), cache, torch.tensor([i])
            before = cache.clone()
            got = fast(*args)
            (replay,) = graphs.replays
            again = args[0], before, args[2]
            want = replay.graph(*_ordered(replay, layer, again))
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
            assert torch.equal(cache, before)
            kept.append((got, [x.clone() for x in got]))
    assert replay._runs and replay.report.not_replayed is None
    # what earlier runs returned is the caller's
    assert all(torch.equal(a, b) for got, copies in kept for a, b in zip(got, copies, strict=True))


def _ordered(replay, layer, args):
    """A graph's inputs by what they are: Dynamo lifts weights in an order of its own."""
    graph = replay.graph.graph
    by_shape = {(1, WIDTH): args[0], (8, WIDTH): args[1], (1,): args[2]}
    weights = iter([layer.norm.weight, layer.gate.weight, layer.up.weight, layer.down.weight])
    return [
        by_shape[shape] if (shape := tuple(n.meta["val"].shape)) in by_shape else next(weights)
        for n in graph.find_nodes(op="placeholder")
    ]


def check(fast, layer, x, cache, position):
    mirror = cache.clone()
    want = layer(x, mirror, position)
    got = fast(x, cache, position)
    for a, b in zip((*got, cache), (*want, mirror), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_caches_take_turns():
    layer = Layer()
    fast, graphs = compiled(layer)
    caches = [torch.zeros(8, WIDTH) for _ in range(MAX_RECORDINGS)]
    for i in range(4 * len(caches)):
        check(fast, layer, inputs(i), caches[i % len(caches)], torch.tensor([i % 8]))
    (replay,) = graphs.replays
    assert replay.report.not_replayed is None and len(replay._runs) == MAX_RECORDINGS
    recorded = replay._recorded
    for i in range(len(caches)):
        check(fast, layer, inputs(i), caches[i], torch.tensor([i]))
    assert replay._recorded == recorded, "each cache has its recording"


@torch.no_grad()
def test_it_stops_where_every_run_has_another_cache():
    layer = Layer()
    fast, graphs = compiled(layer)
    caches = [torch.zeros(8, WIDTH) for _ in range(MAX_RECORDED + 4)]
    for i, cache in enumerate(caches):
        check(fast, layer, inputs(i), cache, torch.tensor([0]))
    (replay,) = graphs.replays
    assert "elsewhere" in replay.report.not_replayed and not replay._runs


@torch.no_grad()
def test_no_input_is_held():
    layer = Layer()
    fast, graphs = compiled(layer)
    cache = torch.zeros(8, WIDTH)
    for i in range(4):
        fast(inputs(i), cache, torch.tensor([i]))
    assert graphs.replays[0]._runs
    gone = weakref.ref(cache)
    del cache
    gc.collect()
    assert gone() is None


@torch.no_grad()
def test_small_inputs_that_move_are_copied():
    layer = Layer()
    fast, graphs = compiled(layer)
    cache, alive = torch.zeros(8, WIDTH), []
    for i in range(12):
        alive.append(inputs(i))  # a new address each time
        check(fast, layer, alive[-1], cache, torch.tensor([i % 8]))
    (replay,) = graphs.replays
    assert len(replay._copied) == 1 and replay._recorded <= 3 and replay.report.not_replayed is None


@torch.no_grad()
def test_an_input_inside_the_cache_is_not_read_from_a_copy():
    layer = Layer()

    def twice(x, cache, position):
        first = layer(x, cache, position)[1]
        return first + layer.norm(x), cache

    fast, graphs = compiled(twice)
    cache, alive = torch.zeros(8, WIDTH), [inputs(i) for i in range(6)]
    for i, x in enumerate(alive):
        fast(x, cache, torch.tensor([i % 8]))
    assert graphs.replays[0]._copied
    cache.normal_()
    mirror = cache.clone()
    want = twice(mirror[2:3], mirror, torch.tensor([2]))
    got = fast(cache[2:3], cache, torch.tensor([2]))
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(cache, mirror)


@torch.no_grad()
def test_new_weights_are_used():
    layer = Layer()
    fast, graphs = compiled(layer)
    cache = torch.zeros(8, WIDTH)
    for change in (
        lambda w: None,
        lambda w: w.mul_(2),
        lambda w: setattr(w, "data", torch.randn(WIDTH, WIDTH)),
    ):
        change(layer.gate.weight)
        for i in range(3):
            check(fast, layer, inputs(i), cache, torch.tensor([i]))
    assert graphs.replays[0]._recorded >= 2


@torch.no_grad()
def test_an_error_leaves_later_runs_right():
    layer = Layer()
    fast, _ = compiled(layer)
    cache = torch.zeros(8, WIDTH)
    for i in (0, 1, 2, 99, 3, 99, 4):
        if i == 99:
            with pytest.raises((IndexError, RuntimeError)):
                fast(inputs(i), cache, torch.tensor([i]))
        else:
            check(fast, layer, inputs(i), cache, torch.tensor([i]))


@torch.no_grad()
def test_threads_at_once():
    layer = Layer()
    fast, graphs = compiled(layer)
    caches = [torch.zeros(8, WIDTH) for _ in range(3)]
    for cache in caches * 2:
        fast(inputs(0), cache, torch.tensor([0]))
    wrong = []

    def work(number):
        with torch.no_grad():
            for i in range(60):
                try:
                    check(fast, layer, inputs(100 * number + i), caches[number], torch.tensor([i % 8]))
                except AssertionError as error:
                    wrong.append(str(error))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and graphs.replays[0]._runs


@torch.no_grad()
def test_what_is_drawn_or_filled_is_new_in_each_run():
    layer = Layer()

    def fn(x):
        counts = torch.zeros(4, dtype=torch.long)
        counts += 1
        return layer.norm(x) + torch.rand(1), layer.norm(x) * counts.sum(), torch.arange(3)

    fast, graphs = compiled(fn)
    x = inputs(0)
    seen = [fast(x) for _ in range(5)]
    assert graphs.replays[0]._runs
    assert len({float(drawn[0, 0]) for drawn, *_ in seen}) == 5
    for _, scaled, indices in seen:
        torch.testing.assert_close(scaled, layer.norm(x) * 4)
        assert indices.tolist() == [0, 1, 2]
        indices.zero_()


@torch.no_grad()
def test_outputs_may_be_inputs_or_views_of_them():
    layer = Layer()

    def fn(x, cache, position):
        return layer(x, cache, position)[0], cache, cache[:2], x

    fast, _ = compiled(fn)
    cache, alive = torch.zeros(8, WIDTH), []
    for i in range(6):
        alive.append(x := inputs(i))
        _, whole, part, same = fast(x, cache, torch.tensor([i]))
        assert whole is cache and part.data_ptr() == cache.data_ptr() and part.shape == (2, WIDTH)
        assert same.data_ptr() == x.data_ptr()


def test_a_run_recorded_in_inference_mode_serves_outside_of_it():
    """Also where a kernel handed over to ATen: its result may not be one that only inference mode can write to."""
    layer = Layer().requires_grad_(False)
    fast, graphs = compiled(lambda x: layer.norm(layer.gate(x)))
    x = torch.randn(300, WIDTH)
    with torch.no_grad():
        fast(x)
        (replay,) = graphs.replays
        by_shape = {(300, WIDTH): x, (WIDTH, WIDTH): layer.gate.weight, (WIDTH,): layer.norm.weight}
        inputs_of = replay.graph.graph.find_nodes(op="placeholder")
        args = [by_shape[tuple(n.meta["val"].shape)] for n in inputs_of]
        want = replay.graph(*args)[0]
    with torch.inference_mode():
        torch.testing.assert_close(replay(*args)[0].clone(), want.clone())
    assert replay._runs
    with torch.no_grad():
        torch.testing.assert_close(replay(*args)[0], want)


@torch.no_grad()
def test_many_tokens_go_through_aten():
    """Kernels that hand over to ATen are called as they are."""
    layer = Layer()
    fast, graphs = compiled(
        lambda x: layer.down(nn.functional.silu(layer.gate(x)) * layer.up(x)) + layer.norm(x)
    )
    x = torch.randn(300, WIDTH)
    want = layer.down(nn.functional.silu(layer.gate(x)) * layer.up(x)) + layer.norm(x)
    for _ in range(4):
        torch.testing.assert_close(fast(x), want)
    assert graphs.replays[0]._runs


@torch.no_grad()
def test_what_is_too_much_to_keep_is_not_kept(monkeypatch):
    layer = Layer()
    fast, graphs = compiled(layer)
    monkeypatch.setattr(recording, "MAX_BYTES", 100)
    cache = torch.zeros(8, WIDTH)
    for i in range(4):
        check(fast, layer, inputs(i), cache, torch.tensor([i]))
    assert "too much to keep" in graphs.replays[0].report.not_replayed and not graphs.replays[0]._runs


@torch.no_grad()
def test_a_kernel_that_reads_numbers_is_called_each_time():
    """Its native calls may differ from run to run though the addresses do not."""
    layer = Layer()
    fast, graphs = compiled(layer.norm)
    x = inputs(0)
    fast(x)
    (replay,) = graphs.replays
    (node,) = [n for n in replay.graph.graph.nodes if n.meta.get("records")]
    norm = node.target

    def scaled(x, weight, eps):
        return norm(x, weight, eps) if x[0, 0].item() > 0 else norm(x, weight, 1e3)

    node.target = scaled
    for _ in range(4):
        x.neg_()
        torch.testing.assert_close(*replay(*_of(replay, x, layer)), scaled(x, layer.norm.weight, 1e-6))


def _of(replay, x, layer):
    return [
        x if n.meta["val"].ndim == 2 else layer.norm.weight
        for n in replay.graph.graph.find_nodes(op="placeholder")
    ]


def lowered(fn, *args, **prefer):
    torch._dynamo.reset()
    graph = rewritten(fn, *args).graphs[-1]
    lower(graph, prefer)
    return graph


def test_reasons():
    layer = Layer().requires_grad_(False)
    weight = torch.randn(WIDTH)

    def norm(x):
        return nn.functional.rms_norm(x, (WIDTH,), weight, 1e-6)

    assert cannot_replay(lowered(norm, torch.randn(2, WIDTH))) is None
    assert "no kernel" in cannot_replay(lowered(norm, torch.randn(2, WIDTH), rms_norm="torch"))
    assert "MiB" in cannot_replay(lowered(norm, torch.randn(5_000_000 // WIDTH, WIDTH)))
    assert "empty" in cannot_replay(lowered(norm, torch.randn(0, WIDTH)))
    fast = torch.compile(layer.norm, backend=dsopt_backend, dynamic=True)
    with torch.no_grad():
        fast(torch.randn(3, WIDTH))
    (graph,) = dsopt.report(layer.norm).graphs
    assert graph.not_replayed == "a size is an input"
    assert graph.to_dict()["not_replayed"] == graph.not_replayed
    torch._dynamo.reset()
    off = torch.compile(layer.norm, backend=dsopt_backend, dynamic=False, options={"replay": False})
    with torch.no_grad():
        off(torch.randn(3, WIDTH))
    assert dsopt.report(layer.norm).graphs[-1].not_replayed == "options say so"

"""Peers are called as their llama-bench wants it, and a model of another geometry is refused."""

import json
import stat
import sys

import pytest
import torch

from dsopt.bench import peers
from dsopt.bench.ceilings import BANDWIDTH, Ceiling, Ceilings
from dsopt.models import presets

pytest.importorskip("transformers")

FAKE = """#!{python}
import json, sys
print("[\\n===== a line of its own")
print(json.dumps({{"samples_ts": [2.0], "model_n_params": {parameters}, "args": sys.argv[1:]}}, indent=1), "\\n]")
"""


@pytest.fixture
def tiny(monkeypatch):
    """The preset at tiny widths, and its number of parameters."""
    values = presets.tiny(presets.v2_lite())
    monkeypatch.setitem(presets.PRESETS, "v2-lite", lambda: values)
    monkeypatch.setattr(peers, "STEPS", 2)
    quick = Ceilings([Ceiling(BANDWIDTH, 1, 1e9), Ceiling("float32", 1, 1e9)])
    monkeypatch.setattr(peers.ceilings, "measure", lambda *args, **kwargs: quick)
    config = presets.config(values, num_hidden_layers=2, vocab_size=64)
    return sum(p.numel() for p in presets.random_model(config).parameters())


def bench(tmp_path, parameters):
    path = tmp_path / "llama-bench"
    path.write_text(FAKE.format(python=sys.executable, parameters=parameters))
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return str(path)


def plan(path, **changes):
    sizes = {"layers": 2, "vocabulary": 64, "context": (8,), "prefill": (4,), "rounds": 2}
    return peers.Plan({"llama": path, "ik": path}, "model.gguf", **(sizes | changes))


def test_rows_hold_each_way_and_the_limit(tiny, tmp_path, fresh_dynamo):
    threads = torch.get_num_threads()
    try:
        found = peers.run(plan(bench(tmp_path, tiny)))
    finally:
        torch.set_num_threads(threads)
    decode, prefill = found["rows"]
    assert decode["median"].keys() == {"dsopt", "llama", "ik"} and decode["median"]["ik"] == 2.0
    assert decode["limit"] > 0 and prefill["limit"] is None and prefill["size"] == 4
    assert json.loads(json.dumps(found)) == found
    assert peers.table(found["rows"]).row_count == 2


def test_another_geometry_is_refused(tiny, tmp_path, fresh_dynamo):
    with pytest.raises(ValueError, match="parameters of v2-lite, llama read"):
        peers.run(plan(bench(tmp_path, 2 * tiny), prefill=(), rounds=1))


def test_commands():
    assert "-d" in peers.peer_command("llama", "x", "m", "decode", 128, 1)
    assert "-gp" in peers.peer_command("ik", "x", "m", "decode", 128, 1)
    assert peers.peer_command("ik", "x", "m", "prefill", 512, 2)[-4:] == ["-p", "512", "-n", "0"]


def test_active_bytes_count_chosen_experts_and_one_embedding():
    config = presets.config(presets.tiny(presets.v2_lite()), num_hidden_layers=2, vocab_size=64)
    model = presets.random_model(config)
    experts = model.model.layers[1].mlp.experts
    idle = sum(p.numel() for p in experts.parameters()) * (
        1 - config.num_experts_per_tok / config.n_routed_experts
    )
    embedding = model.model.embed_tokens.weight
    all_of_it = sum(p.numel() for p in model.parameters())
    want = 2 * (all_of_it - idle - embedding.numel() + embedding.shape[1])
    assert peers.active_bytes(model, config) == want

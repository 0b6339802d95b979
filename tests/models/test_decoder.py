"""dsopt.models against transformers, against itself in its other spellings, and through dsopt."""

from __future__ import annotations

import copy
import sys

import pytest
import torch

import dsopt
from dsopt.models import presets
from dsopt.models.config import Config
from dsopt.models.decoder import Decoder, make_decoder
from dsopt.models.experts import EXPERTS, MoE
from dsopt.models.layers import rope_frequencies
from dsopt.models.weights import load_transformers, rename
from dsopt.testing import relative_l2

TOKENS = 12


def changes(preset: str) -> dict:
    """Two layers; an indexer that hides some of TOKENS tokens, with enough heads that no two scores are both 0."""
    return {"num_hidden_layers": 2} | ({"index_topk": 6, "index_n_heads": 16} if preset == "v3.2" else {})


def tiny(preset: str) -> dict:
    return {**presets.tiny(presets.PRESETS[preset]()), **changes(preset)}


def lively(model: torch.nn.Module) -> torch.nn.Module:
    """Weights large enough that every part of the model moves the logits."""
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.7 * p.shape[-1] ** -0.5) if p.ndim > 1 else p.uniform_(0.5, 1.5)
        for name, b in model.named_buffers():
            if name.endswith("bias"):
                b.uniform_(-0.1, 0.1)
    return model


def decoder(preset: str, **options) -> Decoder:
    options = {**changes(preset), **options}
    return lively(make_decoder(preset, tiny=True, dtype=torch.float32, **options))


def in_steps(
    model, ids: torch.Tensor, lengths: tuple[int, ...], max_tokens: int = TOKENS + 5
) -> torch.Tensor:
    """Logits of consecutive calls on one cache."""
    cache, start, logits = model.new_cache(ids.shape[0], max_tokens), 0, []
    for length in lengths:
        end = start + length
        logits.append(model(ids[:, start:end], torch.arange(start, end), cache))
        start = end
    return torch.cat(logits, 1)


@pytest.mark.parametrize("preset", ["v2-lite", "v2", "v3", "v3.2"])
@torch.inference_mode()
def test_transformers_weights_give_the_same_logits(preset):
    values = tiny(preset)
    model = lively(presets.random_model(presets.config(values), torch.float32))
    model.set_experts_implementation("eager")
    ids = torch.randint(3, 200, (2, TOKENS))
    want = model(ids).logits
    for absorbed in (False, True):
        ours = Decoder(Config.of(values), absorbed).eval()
        load_transformers(ours, model.state_dict())
        assert relative_l2(ours(ids, torch.arange(TOKENS)), want) < 5e-6
        assert relative_l2(in_steps(ours, ids, (9, 1, 2)), want) < 5e-6


@torch.inference_mode()
def test_mscales_that_differ_scale_the_tables_too():
    values = tiny("v3")
    values["rope_parameters"] = {**values["rope_parameters"], "mscale": 0.6, "mscale_all_dim": 1.3}
    model = lively(presets.random_model(presets.config(values), torch.float32))
    model.set_experts_implementation("eager")
    ours = Decoder(Config.of(values)).eval()
    load_transformers(ours, model.state_dict())
    ids = torch.randint(3, 200, (1, TOKENS))
    assert relative_l2(ours(ids, torch.arange(TOKENS)), model(ids).logits) < 5e-6


@pytest.mark.parametrize("preset", ["v2", "v3.2"])
@torch.inference_mode()
def test_spellings_agree_in_float64(preset):
    """Both spellings of the attention; the cache at gaps in the positions; one row alone and in a batch."""
    expanded = decoder(preset).double()
    absorbed = copy.deepcopy(expanded)
    for layer in absorbed.layers:
        layer.attention.absorbed = True
    ids, positions = torch.randint(3, 200, (3, 8)), torch.tensor([0, 1, 2, 5, 6, 9, 10, 11])
    want = expanded(ids, positions)
    assert relative_l2(absorbed(ids, positions), want) < 1e-12
    assert relative_l2(absorbed(ids[:1], positions), want[:1]) < 1e-12
    assert relative_l2(expanded(ids, positions, last_only=True), want[:, -1:]) < 1e-12


@pytest.mark.parametrize("scoring", ["v2-lite", "v2", "v3"])
@torch.inference_mode()
def test_expert_spellings_agree(scoring):
    """One formula in float64, whatever spells it; the loops' weights are the rows of the stacked ones."""
    config = Config.of(tiny(scoring))
    layers = {name: lively(MoE(config, name)) for name in EXPERTS}
    stacked = layers["stacked"]
    for layer in layers.values():
        layer.router, layer.shared = stacked.router, stacked.shared
        if layer is not stacked:
            for e, expert in enumerate(layer.experts):
                expert.gate.weight.data, expert.up.weight.data = stacked.experts.w13[e].chunk(2)
                expert.down.weight.data = stacked.experts.w2[e]
    x = torch.randn(2, 7, config.hidden_size)
    truth = copy.deepcopy(stacked).double()
    flat = x.view(14, -1).double()
    weights, ids = truth.router(flat)
    want = torch.zeros_like(flat)
    for t in range(14):
        for weight, e in zip(weights[t], ids[t], strict=True):
            gate, up = (truth.experts.w13[e] @ flat[t]).chunk(2)
            want[t] += weight * (truth.experts.w2[e] @ (torch.nn.functional.silu(gate) * up))
    want = want.view(x.shape) + truth.shared(x.double())
    for layer in layers.values():
        assert relative_l2(layer(x), want) < 1e-5
        assert layer(x[:, :0]).shape == (2, 0, config.hidden_size)
    half = copy.deepcopy(stacked).bfloat16()
    loop = copy.deepcopy(layers["where_loop"]).bfloat16()
    assert relative_l2(half(x.bfloat16()), loop(x.bfloat16())) < 2e-2


def test_casts_leave_the_frequencies_alone():
    config = Config.of(presets.v3())
    model = decoder("v3").bfloat16()
    assert model.rope.frequencies.dtype == torch.float32
    assert torch.equal(model.rope.frequencies, rope_frequencies(model.config))
    # YaRN: the fastest pair turns as without it, the slowest 40 times slower
    frequencies = rope_frequencies(config)
    assert frequencies[0] == 1.0
    assert frequencies[-1].item() == pytest.approx(10000 ** -(62 / 64) / 40, rel=1e-5)


@pytest.mark.parametrize("preset", presets.PRESETS)
def test_every_preset_builds_at_its_own_geometry(preset):
    """On the meta device, so that nothing is allocated; a step of decoding gives logits of the right shape."""
    model = make_decoder(preset, layers=4, device="meta")
    with torch.device("meta"), torch.inference_mode():
        cache = model.new_cache(2, 64)
        logits = model(torch.zeros(2, 3, dtype=torch.long), torch.arange(3), cache, last_only=True)
    assert logits.shape == (2, 1, presets.PRESETS[preset]()["vocab_size"])
    values = presets.config(presets.PRESETS[preset](), num_hidden_layers=4)
    assert sum(p.nbytes for p in model.parameters()) == presets.weight_bytes(values)


def test_names_of_checkpoints():
    assert rename("model.layers.3.mlp.experts.7.gate_proj.weight") == "layers.3.mlp.experts.7.gate.weight"
    assert rename("model.layers.3.mlp.gate.weight") == "layers.3.mlp.router.weight"
    with pytest.raises(RuntimeError, match=r"Missing key.*head\.weight"):
        load_transformers(decoder("v2-lite"), {})


def test_errors_name_what_is_accepted():
    with pytest.raises(ValueError, match=r"preset must be one of v2-lite.*got 'v9'"):
        make_decoder("v9")
    with pytest.raises(ValueError, match=r"experts must be one of stacked.*got 'loop'"):
        make_decoder("v3", tiny=True, experts="loop")
    with pytest.raises(TypeError, match="unknown entries hiden_size; known entries: vocab_size"):
        make_decoder("v3", tiny=True, hiden_size=8)
    with pytest.raises(ValueError, match=r"model_type must be one of deepseek_v2.*got 'llama'"):
        Config.of({**presets.v3(), "model_type": "llama"})


def test_needs_no_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with torch.inference_mode():
        logits = decoder("v3")(torch.zeros(1, 2, dtype=torch.long), torch.arange(2))
    assert logits.isfinite().all()


def sites(preset: str, layers: int) -> dict[str, int]:
    """What the census counts in a decoder whose last layer alone has experts."""
    norms, rotations = 3 + (preset != "v2-lite"), 2 + 2 * (preset == "v3.2")
    return {
        "mla": layers,
        "moe": 1,
        "router": 1,
        "norm": layers * norms + 1,
        "rope": layers * rotations,
        "mlp": layers,
    }


# each compiles two or three graphs, so that most are slow ones
@pytest.mark.parametrize(
    "preset, absorbed, layers, dtype, lengths",
    [
        ("v2-lite", True, 2, torch.bfloat16, (5, 1, 1)),
        ("v3.2", False, 1, torch.float32, (5, 1, 1)),
        pytest.param("v2", False, 2, torch.bfloat16, (5, 1, 4, 1, 1), marks=pytest.mark.slow),
        pytest.param("v3", True, 2, torch.float32, (5, 1, 4, 1, 1), marks=pytest.mark.slow),
        pytest.param("v3.2", True, 2, torch.bfloat16, (4, 6, 1, 1), marks=pytest.mark.slow),
    ],
)
@torch.inference_mode()
def test_compiles_with_every_site_matched(preset, absorbed, layers, dtype, lengths):
    """As near to float64 as eager is; a prompt and each kind of step compile once, whatever the positions."""
    # every expert is chosen, so that no rounding can choose otherwise
    routing = {"num_experts_per_tok": 8, "n_group": 1, "topk_group": 1}
    dense = {"first_k_dense_replace": layers - 1, "num_hidden_layers": layers}
    model = decoder(preset, absorbed=absorbed, **routing, **dense).to(dtype)
    truth = copy.deepcopy(model).double()
    fast = torch.compile(model, backend="dsopt", fullgraph=True, options={"strict": True})
    ids = torch.randint(3, 200, (2, TOKENS))
    caches = [m.new_cache(2, TOKENS + 5) for m in (truth, model, model)]
    start = 0
    for i, length in enumerate(lengths):
        positions = torch.arange(start, start + length)
        inputs = ids[:, start : start + length], positions
        want, eager = (m(*inputs, cache) for m, cache in zip((truth, model), caches, strict=False))
        with torch.compiler.set_stance("fail_on_recompile" if i == len(lengths) - 1 else "default"):
            got = fast(*inputs, caches[-1])
        own, ours = relative_l2(eager, want), relative_l2(got, want)
        slack = 1e-6 if dtype == torch.float32 else 1e-3
        assert ours <= 1.5 * own + slack, f"{positions}: {ours:.2e}, eager {own:.2e}"
        start += length
    report = dsopt.report(model)
    assert 2 <= len(report.graphs) <= 3 and not report.fallbacks
    for graph in report.graphs:
        matched = {family: n for family, n in graph.matched().items() if n != (0, 0)}
        assert matched == {family: (n, n) for family, n in sites(preset, layers).items()}, graph.to_dict()

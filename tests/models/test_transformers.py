"""Every family in every situation a decoder meets: as near to float64 as eager is, and every site matched."""

from __future__ import annotations

import copy
import inspect
import warnings

import pytest
import torch
from families import FAMILIES, all_experts, build
from transformers import DynamicCache, StaticCache
from transformers.integrations.moe import batched_mm_experts_forward

import dsopt
from dsopt.testing import relative_l2

# what dsopt may add to 1.5 times eager's own error
SLACK = {torch.float32: 1e-6, torch.bfloat16: 1e-3}


def make_cache(kind: str, config):
    if kind == "none":
        return None
    return StaticCache(config=config, max_cache_len=48) if kind == "static" else DynamicCache(config=config)


def steps(batch: int, lengths: list[int], left_padding: int = 0, gap: int = 0):
    """Inputs of consecutive calls on one cache: prompts, padding of row 0, positions that jump by `gap`."""
    seen = 0
    for length in lengths:
        inputs = {"input_ids": torch.randint(3, 120, (batch, length))}
        if left_padding:
            mask = torch.ones(batch, seen + length, dtype=torch.long)
            mask[0, :left_padding] = 0
            inputs["attention_mask"] = mask
        if gap or left_padding:
            start = seen + gap * (seen > 0)
            positions = torch.arange(start, start + length).expand(batch, -1).clone()
            if left_padding:
                positions[0] = (positions[0] - left_padding).clamp(min=0)
            inputs["position_ids"] = positions
        seen += length
        yield inputs


SITUATIONS = {
    "plain": {"batch": 1, "lengths": [7, 1, 1, 3, 1]},
    "padded": {"batch": 3, "lengths": [9, 1, 3, 1], "left_padding": 4},
    "gaps": {"batch": 2, "lengths": [5, 1, 1, 3], "gap": 6},
}


def check(
    family: str,
    dtype: torch.dtype,
    cache: str,
    situations,
    attention: str = "sdpa",
    experts: str = "grouped_mm",
    **overrides,
):
    """Runs the situations and compares each call's logits; returns the last cache used and the report."""
    model = build(family, dtype, attention, **{**all_experts(FAMILIES[family][0]), **overrides})
    if FAMILIES[family][1]["moe"]:
        model.set_experts_implementation(experts)
    truth = copy.deepcopy(model).double()
    if FAMILIES[family][1]["moe"]:
        truth.set_experts_implementation("eager")  # grouped GEMMs have no float64
    fast = dsopt.compile(model, strict=True)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in situations:
            situation = SITUATIONS[name]
            lengths = situation["lengths"] if cache != "none" else situation["lengths"][:1]
            caches = [make_cache(cache, model.config) for _ in range(3)]
            for i, inputs in enumerate(steps(**{**situation, "lengths": lengths})):
                want, eager, got = (
                    m(**inputs, past_key_values=c, use_cache=c is not None).logits
                    for m, c in zip((truth, model, fast), caches, strict=True)
                )
                pad = situation.get("left_padding", 0) if i == 0 else 0
                rows = torch.ones(got.shape[:2], dtype=torch.bool)
                rows[0, :pad] = False
                own, ours = relative_l2(eager[rows], want[rows]), relative_l2(got[rows], want[rows])
                assert ours <= 1.5 * own + SLACK[dtype], f"{name}, call {i}: {ours:.2e}, eager {own:.2e}"
    return caches[-1], dsopt.report(fast)


def is_expanded(cache) -> bool:
    """True when a cache holds keys of every head, as older transformers do, instead of a latent for all."""
    return cache is not None and cache.layers[0].keys.shape[1] > 1


def assert_all_matched(report, family: str, cache=None):
    """Every site is matched; latent attention over an expanded cache is missed and says so."""
    expected = {k: (n, n) for k, n in FAMILIES[family][1].items()}
    if is_expanded(cache):
        expected["mla"] = (0, expected["mla"][1])
    assert report.graphs and not report.fallbacks
    for graph in report.graphs:
        found = {k: v for k, v in graph.matched().items() if k in expected}
        assert found == expected, f"{graph.name}: {graph.to_dict()}"
        reasons = [m["reason"] for p in graph.passes if p.name == "absorb_mla" for m in p.misses]
        assert len(reasons) == expected["mla"][1] - expected["mla"][0]
        assert all("cache is expanded" in reason for reason in reasons)
        assert all(k.calls >= k.sites for k in graph.kernels)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


# every family once by default; each test compiles several graphs, so the other combinations are slow ones
@pytest.mark.parametrize(
    "family, dtype, cache, situation",
    [
        ("v2", torch.bfloat16, "static", "plain"),
        ("v2-q_lora", torch.float32, "dynamic", "gaps"),
        ("v3", torch.float32, "static", "padded"),
        ("v3-half-biased", torch.bfloat16, "dynamic", "plain"),
        ("v32", torch.float32, "static", "plain"),
        ("mixtral", torch.bfloat16, "static", "padded"),
        ("qwen3_moe", torch.float32, "dynamic", "plain"),
        ("gpt_oss", torch.float32, "static", "padded"),
        ("llama", torch.bfloat16, "static", "padded"),
        ("qwen2", torch.float32, "dynamic", "padded"),
        *(
            slow(family, dtype, cache, situation)
            for family in FAMILIES
            for dtype in (torch.float32, torch.bfloat16)
            for cache in ("static", "dynamic")
            for situation in SITUATIONS
        ),
    ],
)
def test_matches_eager(family, dtype, cache, situation):
    last, report = check(family, dtype, cache, [situation])
    assert_all_matched(report, family, last)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_cache(family):
    rounded = FAMILIES[family][1]["moe"]
    dtype = torch.bfloat16 if rounded else torch.float32
    _, report = check(family, dtype, "none", ["padded"])
    assert_all_matched(report, family)


@pytest.mark.parametrize("family", ["v2", slow("v3"), "llama"])
def test_eager_attention_is_canonicalized(family):
    # no padding: transformers' eager attention makes NaN of float64 rows that see nothing
    _, report = check(family, torch.float32, "none", ["plain"], attention="eager")
    assert_all_matched(report, family)
    for graph in report.graphs:
        (rewrites,) = (p.rewrites for p in graph.passes if p.name == "canonicalize_attention")
        assert rewrites == 2


@pytest.mark.parametrize(
    "family, dtype, experts",
    [
        ("v2-q_lora", torch.bfloat16, "batched_mm"),
        ("v3", torch.float32, "batched_mm"),
        ("v3", torch.float32, "eager"),
        ("mixtral", torch.bfloat16, "eager"),
        ("qwen3_moe", torch.float32, "batched_mm"),
        *(
            slow(family, dtype, experts)
            for family in FAMILIES
            if FAMILIES[family][1]["moe"]
            for dtype in (torch.float32, torch.bfloat16)
            for experts in ("grouped_mm", "batched_mm", "eager")
        ),
    ],
)
def test_experts_implementations(family, dtype, experts):
    _, report = check(family, dtype, "none", ["plain"], experts=experts)
    (graph,) = report.graphs
    if experts == "batched_mm" and "sentinel_mask" not in inspect.getsource(batched_mm_experts_forward):
        # older transformers compute another expert for an id that is none's, which no op does
        reasons = [m["reason"] for p in graph.passes if p.name == "batch_experts" for m in p.misses]
        assert len(reasons) == graph.matched()["moe"][1]
        assert all("gives ids that are no expert's to another expert" in reason for reason in reasons)
    else:
        assert_all_matched(report, family)


def test_free_routing_chooses_the_same_experts():
    """With routing left to itself float32 is far from any tie, so whole-model errors stay at rounding."""
    routing = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
    for family in ("v2-q_lora", "v3"):
        check(family, torch.float32, "none", ["plain"], **routing)


def test_dynamic_shapes_from_the_start():
    """dynamic=True also turns epsilons and scales into symbols; they must not cost a match."""
    model = build("v3")
    compiled = torch.compile(model, backend="dsopt", dynamic=True, options={"strict": True})
    with torch.inference_mode():
        cache, other = (make_cache("static", model.config) for _ in range(2))
        for length in (5, 3):
            ids = torch.randint(3, 120, (2, length))
            got, want = compiled(ids, past_key_values=cache).logits, model(ids, past_key_values=other).logits
            assert relative_l2(got, want) < 1e-5
    assert_all_matched(dsopt.report(model), "v3", cache)


def test_verify_passes_on_every_family():
    for family in ("v2", "v32"):
        model = build(family, torch.bfloat16)
        cache = make_cache("static", model.config)
        with torch.inference_mode():
            model(torch.randint(3, 120, (2, 6)), past_key_values=cache)
        result = dsopt.verify(model, {"input_ids": torch.randint(3, 120, (2, 1)), "past_key_values": cache})
        kernels = {s.kernel for s in result.sites}
        assert is_expanded(cache) or {"cpu_mla_attention", "torch_mla_attention"} & kernels
        assert int(cache.get_seq_length()) == 6, "verify must not advance the caller's cache"

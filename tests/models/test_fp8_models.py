"""Quantized models of transformers compiled: every op reads FP8, nothing is widened, the error is eager's."""

import copy

import pytest
import torch
from families import all_experts, build

import dsopt
from dsopt.fp8 import FP8Block
from dsopt.testing import relative_l2

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
IDS = torch.arange(18).view(2, 9) + 3
READS_FP8 = {"multi_linear", "gated_mlp", "moe_experts", "mla_attention"}


def quantized(family, dtype, **format):
    model = build(family, dtype, **all_experts({"n_routed_experts": 8}))
    dsopt.quantize_(model, FP8Block(**format))
    return model


def steps(model, cache):
    """Logits of a prompt and of two tokens after it, or of the prompt alone without a cache."""
    if cache is None:
        return [model(IDS, use_cache=False).logits]
    parts = IDS[:, :7], IDS[:, 7:8], IDS[:, 8:]
    return [model(part, past_key_values=cache, use_cache=True).logits for part in parts]


def assert_nothing_is_widened(report, caches=0):
    assert report.graphs and not report.fallbacks
    for graph in report.graphs:
        matched, ops = graph.matched(), {use.op for use in graph.kernels}
        assert all(got == total for got, total in matched.values()), matched
        # two layers: 4 or 5 linears of attention and 3 of an MLP each, the experts beside the second's
        assert matched["fp8"][0] >= 2 * (4 + 3) + 1 + caches
        assert ops >= READS_FP8 and "dequantize" not in ops
        assert not [m for p in graph.passes if p.name.endswith("dequantize") for m in p.misses]


# blocks that heads are made of, that they are not, and of exponents
@pytest.mark.parametrize(
    ("family", "format"),
    [
        ("v2", {"rows": 4, "columns": 16}),
        ("v3", {}),
        pytest.param("v2-q_lora", {"scale_fmt": "ue8m0"}, marks=pytest.mark.slow),
        pytest.param("v32", {"rows": 16}, marks=pytest.mark.slow),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16], ids=str
)
@torch.no_grad()
def test_ops_read_weights_in_fp8(family, format, dtype):
    model = quantized(family, dtype, **format)
    fast = dsopt.compile(model, strict=True)
    (truth,), (eager,) = steps(copy.deepcopy(model).double(), None), steps(model, None)
    (got,) = steps(fast, None)
    allowed = 1.5 * relative_l2(eager, truth) + (1e-3 if dtype == torch.bfloat16 else 1e-6)
    assert relative_l2(got, truth) <= allowed
    assert_nothing_is_widened(dsopt.report(fast))


@pytest.mark.parametrize(
    "length", [pytest.param(None, marks=pytest.mark.slow), 16], ids=["growing", "static"]
)
@torch.no_grad()
def test_a_cache_in_fp8_beside_weights_in_fp8(length):
    model = quantized("v3", torch.float32)
    fast = dsopt.compile(model, strict=True)
    want = steps(model, dsopt.LatentCache(model.config, max_cache_len=length))
    got = steps(fast, dsopt.LatentCache(model.config, max_cache_len=length))
    for a, b in zip(got, want, strict=True):
        assert relative_l2(a, b) < 1e-5
    assert_nothing_is_widened(dsopt.report(fast), caches=2)

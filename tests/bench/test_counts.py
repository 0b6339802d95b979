"""Bytes and FLOPs, by hand."""

from types import SimpleNamespace

import pytest
import torch

from dsopt.bench.counts import count, nbytes, seen_pairs
from dsopt.fp8 import FP8Block, quantize
from dsopt.ops import OPS


def of(name, *args):
    op = OPS[name]
    args = op.bind(args)
    results = op.reference(*args)
    return count(op, args, list(results) if isinstance(results, (tuple, list)) else [results])


def bf16(*shape):
    return torch.randn(*shape).bfloat16()


def test_norms():
    x, weight = bf16(3, 8), bf16(8)
    assert of("rms_norm", x, weight, 1e-6) == (48 + 16 + 48, 4 * 24)
    assert of("add_rms_norm", x, x.clone(), weight, 1e-6) == (4 * 48 + 16, 5 * 24)


def test_rope():
    x, table = bf16(1, 2, 3, 8), bf16(1, 1, 3, 8)
    assert of("rope", x, table, table.clone(), True, False) == (2 * 96 + 2 * 48, 3 * 48)


def test_linears():
    x, weights = bf16(2, 8), [bf16(6, 8), bf16(4, 8)]
    moved = 32 + 96 + 64 + 2 * 2 * (6 + 4)
    assert of("multi_linear", x, weights, [None, None]) == (moved, 2 * 2 * (48 + 32))
    assert of("gated_mlp", x, bf16(6, 8), bf16(6, 8), bf16(8, 6)) == (32 + 3 * 96 + 32, 2 * 2 * 3 * 48)


def attention(new, keys, mask=None, causal=False, heads=2, nope=4, rope=2, rank=8, value=6):
    q = bf16(1, heads, new, nope), bf16(1, heads, new, rope)
    cache = bf16(1, keys, rank), bf16(1, keys, rope)
    return of(
        "mla_attention", *q, *cache, bf16(heads, nope, rank), bf16(heads, value, rank), mask, 1.0, causal
    )


def test_attention_of_one_token_is_absorbed():
    # per head: q w_uk and out w_uv, 2 * 8 * (4 + 6); scores and sums over 100 keys, 2 * 100 * (8 + 2 + 8)
    weights, cache, ends = 2 * 2 * 8 * (4 + 6), 2 * 100 * (8 + 2), 2 * 2 * (4 + 2 + 6)
    assert attention(1, 100) == (weights + cache + ends, 2 * (160 + 3600))


def test_attention_of_a_prompt_is_expanded():
    # per head: keys and values of 50 tokens, 2 * 50 * 8 * 10; 50 * 51 / 2 pairs of 2 * (4 + 2 + 6)
    assert attention(50, 50, causal=True)[1] == 2 * (8000 + 1275 * 24)


def test_masked_pairs_cost_nothing():
    mask = torch.ones(1, 1, 3, 5, dtype=torch.bool).tril(2)
    assert seen_pairs(mask, False, 1, 3, 5) == 3 + 4 + 5
    assert seen_pairs(mask[:, :, :1], False, 2, 3, 5) == 2 * 3 * 3, "a mask that all rows and sequences share"
    assert seen_pairs(mask.float(), False, 2, 3, 5) == 2 * 15
    assert seen_pairs(None, True, 2, 3, 2) == 2 * (1 + 2 + 2)


def test_experts_count_once_and_only_if_chosen():
    x, weights = bf16(3, 8), torch.rand(3, 2)
    ids = torch.tensor([[0, 2], [2, 5], [-1, 2]])  # 5 and -1 are no expert's
    w13, w2 = bf16(5, 12, 8), bf16(5, 8, 6)
    ends = 2 * 48 + 6 * 8 + 6 * 4
    moved, flops = of("moe_experts", x, ids, weights, w13, w2)
    assert moved == ends + 2 * 2 * (96 + 48) and flops == 2 * 4 * (96 + 48)
    shared = bf16(4, 8), bf16(4, 8), bf16(8, 4)
    given = (None,) * 4 + ("silu", True, False, None, *shared)
    assert of("moe_experts", x, ids, weights, w13, w2, *given) == (moved + 3 * 64, flops + 2 * 3 * 96)


def test_routing_counts_bytes_only():
    logits = torch.randn(3, 8)
    assert of("moe_route", logits, 2) == (3 * 8 * 4 + 3 * 2 * (4 + 8), 0)


def test_an_op_without_a_count_moves_its_arguments_and_results():
    x = torch.zeros(4, 4)
    assert count(SimpleNamespace(name="other"), (x, [x[:2].clone(), None], 3), [x[0].clone()]) == (
        64 + 32 + 16,
        0,
    )


@pytest.mark.parametrize(("x", "bytes_"), [(torch.zeros(5, 1).expand(5, 7), 20), (torch.zeros(0, 3), 0)])
def test_expanded_and_empty_tensors(x, bytes_):
    assert nbytes(x, None) == bytes_


def test_weights_in_fp8_are_a_byte_an_element_and_their_scales():
    x, (w, scale) = bf16(3, 8), quantize(bf16(6, 8), FP8Block(rows=2, columns=4))
    given = None, [scale], [2, 4]
    assert of("multi_linear", x, [w], [None], *given) == (48 + 48 + 6 * 4 + 3 * 6 * 2, 2 * 3 * 48)
    (w13, scale13), (w2, scale2) = (
        quantize(bf16(*s), FP8Block(rows=2, columns=4)) for s in ((5, 12, 8), (5, 8, 6))
    )
    ids, weights = torch.tensor([[0, 2], [2, 2], [0, 2]]), torch.rand(3, 2)
    plain = (None,) * 4 + ("silu", True, False, None, None, None, None)
    moved, _ = of(
        "moe_experts", x, ids, weights, w13, w2, *plain, scale13, scale2, None, None, None, None, [2, 4]
    )
    assert moved == 2 * 48 + 6 * 8 + 6 * 4 + 2 * (96 + 48 + 4 * (12 + 8))

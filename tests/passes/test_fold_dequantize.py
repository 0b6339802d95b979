"""Ops take weights and latents in FP8 with their scales; what they cannot take stays a wide copy and says why."""

import pytest
import torch
from torch.nn import functional as F

from dsopt.fp8 import FP8Block, FP8Group, quantize
from dsopt.ops.attention import mla_attention
from dsopt.ops.experts import moe_experts
from dsopt.ops.linear import gated_mlp, multi_linear
from dsopt.ops.quant import dequantize
from dsopt.testing import rand, relative_l2, rewritten

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
R = rand("cpu", torch.float32)
BLOCK = (16, 8)
PASSES = (
    "canonicalize",
    "fuse_dequantize",
    "fuse_gated_mlp",
    "batch_experts",
    "fold_shared_experts",
    "absorb_mla",
    "merge_linears",
    "fold_dequantize",
    "canonicalize",
)


def fp8(*sizes, rows=16, columns=8, fmt="float32"):
    """(weight, scale) of a weight whose product keeps the size of what it is multiplied with."""
    return quantize(R(*sizes) * sizes[-1] ** -0.5, FP8Block(fmt, rows, columns))


def wide(pair, dtype=torch.float32, block=BLOCK):
    return dequantize.overload(*pair, dtype, list(block))


def folded(fn, *args, passes=PASSES, sites=1):
    """What the passes made of a function whose every dequantization an op takes up."""
    result = rewritten(fn, *args, passes=passes, dynamic=False)
    log = result.log("fold_dequantize")
    assert not log.misses and result.count("dsopt.dequantize") == 0
    assert log.families == {"fp8": sites}
    assert relative_l2(result.run(*args), fn(*args)) < 1e-6
    return result


def call(result, op) -> dict:
    """The arguments of the one call of an op, by name, as fake values."""
    (node,) = [n for n in result.graphs[-1].graph.nodes if n.target is op.overload]
    names = [a.name for a in op.overload._schema.arguments]
    values = torch.fx.node.map_arg(op.bind(node.args, node.kwargs), lambda n: n.meta["val"])
    return dict(zip(names, values, strict=True))


def test_sibling_linears():
    x, q, kv = R(2, 3, 24), fp8(40, 24), fp8(19, 24)

    def fn(x, q, kv):
        return torch.cat((F.linear(x, wide(q)), F.linear(x, wide(kv))), -1)

    args = call(folded(fn, x, q, kv, sites=2), multi_linear)
    assert [w.dtype for w in args["weights"]] == [torch.float8_e4m3fn] * 2
    assert [s.shape for s in args["scales"]] == [(3, 3), (2, 3)] and args["block"] == [16, 8]


def test_a_gated_mlp():
    x, weights = R(3, 24), (fp8(33, 24), fp8(33, 24), fp8(24, 33))

    def fn(x, gate, up, down):
        return F.linear(F.silu(F.linear(x, wide(gate))) * F.linear(x, wide(up)), wide(down))

    args = call(folded(fn, x, *weights, sites=3), gated_mlp)
    assert [args[s].shape for s in ("scale_gate", "scale_up", "scale_down")] == [(3, 3), (3, 3), (2, 5)]


@pytest.mark.parametrize("inner", [32, 24])  # the second's up begins inside of a block
def test_gate_and_up_of_one_weight(inner):
    x, both, down = R(3, 24), fp8(2 * inner, 24), fp8(24, inner)

    def fn(x, both, down):
        gate, up = F.linear(x, wide(both)).chunk(2, -1)
        return F.linear(F.silu(gate) * up, wide(down))

    args = call(folded(fn, x, both, down, sites=2), gated_mlp)
    assert args["block"] == ([16, 8] if inner == 32 else [1, 8])
    assert args["w_up"].dtype == torch.float8_e4m3fn and args["scale_down"].shape[1] == -(-inner // 8)


def attend(x, latent, k_rope, kv_b, heads, nope, value):
    """Keys and values expanded from a latent, as in DeepSeek-V2."""
    batch, tokens = latent.shape[:2]
    q = x.view(batch, tokens, heads, -1).transpose(1, 2)
    kv = F.linear(latent, kv_b).view(batch, tokens, heads, nope + value).transpose(1, 2)
    k_nope, v = kv.split([nope, value], -1)
    k = torch.cat((k_nope, k_rope.unsqueeze(1).expand(-1, heads, -1, -1)), -1)
    return F.scaled_dot_product_attention(q, k, v, scale=0.2)


@pytest.mark.parametrize(("nope", "value", "rows"), [(16, 32, 16), (12, 20, 1)])
def test_the_expansion_of_a_latent(nope, value, rows):
    """Heads of whole blocks keep the blocks; others have the scales repeated for each row."""
    heads, x = 3, R(2, 5, 3 * (nope + 8))
    latent, k_rope, kv_b = R(2, 5, 24), R(2, 5, 8), fp8(heads * (nope + value), 24)

    def fn(x, latent, k_rope, kv_b):
        return attend(x, latent, k_rope, wide(kv_b), heads, nope, value)

    args = call(folded(fn, x, latent, k_rope, kv_b), mla_attention)
    assert args["block"] == [rows, 8] and args["w_uk"].shape == (heads, nope, 24)
    assert args["w_uk_scale"].shape == (heads, nope // rows, 3)
    assert args["w_uv_scale"].shape == (heads, value // rows, 3)
    assert args["w_uk"].dtype == args["w_uv"].dtype == torch.float8_e4m3fn


def test_a_latent_in_fp8():
    heads, nope, value = 3, 16, 32
    x, k_rope, kv_b = R(2, 5, heads * 24), R(2, 5, 8), fp8(heads * 48, 130)
    latent = quantize(R(2, 9, 130), FP8Group())

    def fn(x, latent, k_rope, kv_b):
        cached = wide(latent, block=(1, 128))[:, :5]
        return attend(x, cached, k_rope, wide(kv_b), heads, nope, value)

    args = call(folded(fn, x, latent, k_rope, kv_b, sites=2), mla_attention)
    assert args["latent"].dtype == torch.float8_e4m3fn and args["latent_scale"].shape == (2, 5, 2)
    assert args["block"] == [16, 8]


def test_a_latent_with_an_axis_of_one_head_and_a_growing_length():
    heads, nope, value = 2, 16, 16
    kv_b = fp8(heads * 32, 24)

    def fn(x, latent, k_rope, kv_b):
        cached = wide(latent, block=(1, 128)).squeeze(1)
        return attend(x, cached, k_rope, wide(kv_b), heads, nope, value)

    def args(tokens):
        latent = quantize(R(2, 1, tokens, 24), FP8Group())
        return R(2, tokens, heads * 24), latent, R(2, tokens, 8), kv_b

    first = args(5)
    for x in (first[0], *first[1], first[2]):
        torch._dynamo.mark_dynamic(x, x.ndim - 2)
    result = rewritten(fn, *first, passes=PASSES)
    assert result.count("dsopt.dequantize") == 0 and result.log("fold_dequantize").families == {"fp8": 2}
    for given in (first, args(9)):
        assert relative_l2(result.run(*given), fn(*given)) < 1e-6
    assert len(result.graphs) == 1


def test_experts_and_the_shared_mlp():
    x, ids, weights = R(3, 24), torch.tensor([[0, 2], [1, 3], [2, 0]]), R(3, 2)
    w13, w2 = fp8(4, 64, 24), fp8(4, 24, 32)
    gate, up, down = fp8(20, 24), fp8(20, 24), fp8(24, 20)

    def fn(x, ids, weights, w13, w2, gate, up, down):
        routed = moe_experts.overload(
            x, ids, weights, w13[0], w2[0], scale13=w13[1], scale2=w2[1], block=list(BLOCK)
        )
        shared = F.linear(F.silu(F.linear(x, wide(gate))) * F.linear(x, wide(up)), wide(down))
        return routed + shared

    args = call(folded(fn, x, ids, weights, w13, w2, gate, up, down, sites=4), moe_experts)
    assert args["shared_scale_down"].shape == (2, 3) and args["scale13"].shape == (4, 4, 3)

    def dequantized(x, ids, weights, w13, w2):
        return moe_experts.overload(x, ids, weights, wide(w13), wide(w2))

    args = call(folded(dequantized, x, ids, weights, w13, w2, sites=2), moe_experts)
    assert args["w13"].dtype == torch.float8_e4m3fn and args["scale2"].shape == (4, 2, 4)

    def gate_and_up_apart(x, ids, weights, w13, w2):
        gate, up = wide(w13).chunk(2, 1)
        return moe_experts.overload(x, ids, weights, gate, wide(w2), up)

    args = call(folded(gate_and_up_apart, x, ids, weights, w13, w2, sites=2), moe_experts)
    assert args["scale13"].shape == args["scale3"].shape == (4, 2, 3)


def test_exponents_are_taken_as_they_are():
    x, pair = R(3, 24), fp8(40, 24, fmt="ue8m0")
    result = folded(lambda x, pair: F.linear(x, wide(pair)), x, pair)
    assert call(result, multi_linear)["scales"][0].dtype == torch.float8_e8m0fnu


def missed(fn, *args) -> str:
    """The reason why the one dequantization of a function stays."""
    result = rewritten(fn, *args, passes=PASSES, dynamic=False)
    log = result.log("fold_dequantize")
    assert result.count("dsopt.dequantize") == 1 and "fp8" not in log.families
    torch.testing.assert_close(result.run(*args), fn(*args))
    (miss,) = log.misses
    return miss["reason"]


def test_what_no_op_takes_up_stays():
    x, pair = R(3, 24), fp8(40, 24)
    assert "read by aten.sum" in missed(lambda pair: wide(pair).sum(), pair)
    assert "splits columns" in missed(
        lambda x, pair: F.linear(x[:, :12], wide(pair).reshape(80, 12)), x, pair
    )
    assert "transposed" in missed(lambda x, pair: F.linear(x, wide(pair).t()), R(3, 40), pair)
    reason = missed(lambda x, pair: F.linear(x[:, 4:], wide(pair)[:, 4:]), x, pair)
    assert reason == "a slice of the dequantized tensor begins inside of a block of 8 columns"

    def read_twice(x, pair):
        weight = wide(pair)
        return F.linear(x, weight) + weight.sum()

    assert "read by aten.sum" in missed(read_twice, x, pair)


def mlp(x, gate, up, down):
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def test_blocks_that_differ_in_columns_stay():
    x, gate, up, down = R(3, 24), fp8(40, 24), fp8(40, 24, columns=16), R(24, 40)

    def fn(x, gate, up, down):
        return mlp(x, wide(gate), wide(up, block=(16, 16)), down)

    result = rewritten(fn, x, gate, up, down, passes=PASSES)
    assert result.count("dsopt.dequantize") == 2
    assert all("blocks of [16, 8] and [16, 16]" in m["reason"] for m in result.log("fold_dequantize").misses)
    assert relative_l2(result.run(x, gate, up, down), fn(x, gate, up, down)) < 1e-6


def test_blocks_that_differ_in_rows_have_scales_for_each_row():
    x, gate, up, down = R(3, 24), fp8(40, 24), fp8(40, 24, rows=8), fp8(24, 40)

    def fn(x, gate, up, down):
        return mlp(x, wide(gate), wide(up, block=(8, 8)), wide(down))

    args = call(folded(fn, x, gate, up, down, sites=3), gated_mlp)
    assert args["block"] == [1, 8] and args["scale_gate"].shape == args["scale_up"].shape == (40, 3)


def test_what_stays_stands_before_its_first_reader():
    x, pair = R(3, 24), fp8(40, 24)

    def fn(x, pair):
        return x.exp().sum() + wide(pair).sum()

    ops = rewritten(fn, x, pair, passes=PASSES).ops()
    assert ops.index("dsopt.dequantize") == ops.index("aten.sum", ops.index("aten.sum") + 1) - 1


def test_a_write_in_between_keeps_the_order():
    x, (w, s) = R(3, 24), fp8(40, 24)

    def fn(x, w, s):
        weight = wide((w, s))
        s.mul_(2)
        return F.linear(x, weight)

    result = rewritten(fn, x, w, s.clone(), passes=PASSES)
    assert result.count("dsopt.dequantize") == 1
    assert "writes between" in result.log("fold_dequantize").misses[0]["reason"]
    assert relative_l2(result.run(x, w, s.clone()), fn(x, w, s.clone())) < 1e-6


def test_weights_of_one_kind_are_put_together():
    x, a, b, wide_weight = R(3, 24), fp8(40, 24), fp8(19, 24), R(5, 24)

    def fn(x, a, b, w):
        return torch.cat((F.linear(x, w), F.linear(x, wide(a)), F.linear(x, wide(b))), -1)

    result = folded(fn, x, a, b, wide_weight, sites=2)
    kinds = [n.args for n in result.graphs[-1].graph.nodes if n.target is multi_linear.overload]
    assert sorted(len(args[1]) for args in kinds) == [1, 2]


def test_a_wide_shared_mlp_stays_beside_experts_in_fp8():
    x, ids, weights = R(3, 24), torch.tensor([[0, 2], [1, 3], [2, 0]]), R(3, 2)
    w13, w2, (gate, up, down) = fp8(4, 64, 24), fp8(4, 24, 32), (R(20, 24), R(20, 24), R(24, 20))

    def fn(x, ids, weights, w13, w2, gate, up, down):
        routed = moe_experts.overload(x, ids, weights, wide(w13), wide(w2))
        return routed + F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    result = folded(fn, x, ids, weights, w13, w2, gate, up, down, sites=2)
    assert result.count("dsopt.gated_mlp") == 1


def test_a_weight_whose_scales_are_made_later_is_merged_for_itself():
    x, a, (w, s) = R(3, 24), fp8(24, 24), fp8(19, 24)

    def fn(x, a, w, s):
        first = F.linear(x, wide(a))
        return first, F.linear(x, wide((w, s * first.abs().mean())))

    result = rewritten(fn, x, a, w, s, passes=PASSES)
    assert result.count("dsopt.multi_linear") == 2 and result.count("dsopt.dequantize") == 0
    assert all(
        relative_l2(got, want) < 1e-6
        for got, want in zip(result.run(x, a, w, s), fn(x, a, w, s), strict=True)
    )

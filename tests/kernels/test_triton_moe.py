"""Experts in Triton, interpreted: blocks, tiles and alignments that the op's samples are too small for."""

import pytest
import torch

from dsopt.ops.experts import moe_experts
from dsopt.testing import poisoned, rand, relative_l2, triton_interpreter, truth

pytest.importorskip("triton")

from dsopt.kernels.triton import moe_align
from dsopt.kernels.triton import moe_experts as kernel
from dsopt.kernels.triton.moe_experts import Tile, Tiles

SMALL = Tiles(Tile(16, 16, 16, 4, 2), Tile(16, 32, 16, 4, 2))
CHOICES = {
    "spread": lambda n, e: torch.arange(n) * 7 % e,
    "one expert": lambda n, e: torch.full((n,), e - 1),
    "none": lambda n, e: torch.full((n,), e),
    "sentinels": lambda n, e: torch.arange(n) % (e + 3) - 1,
    "wide sentinels": lambda n, e: torch.where(torch.arange(n) % 3 > 0, torch.arange(n) % e, 2**40),
}


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("kind", CHOICES)
def test_alignment(kind, few, monkeypatch):
    """Each choice of an expert stands once, in order, in blocks of that expert alone; blocks left over are last."""
    choices, num_experts, block_m = 100, 5, 16
    monkeypatch.setattr(moe_align, "FEW", choices if few else 0)
    ids = CHOICES[kind](choices, num_experts)
    with triton_interpreter(), poisoned():
        order, block_expert = moe_align.align(ids.view(50, 2), num_experts, block_m)
    assert block_expert.numel() == moe_align.most_blocks(choices, num_experts, block_m)
    blocks = order.view(-1, block_m)[: int((block_expert >= 0).sum())]
    assert (block_expert[len(blocks) :] == -1).all()
    assert torch.equal(block_expert[: len(blocks)], block_expert[: len(blocks)].sort().values)
    for e in range(num_experts):
        rows = blocks[block_expert[: len(blocks)] == e].flatten()
        mine = (ids == e).nonzero().flatten()
        assert rows[: len(mine)].tolist() == mine.tolist()
        assert (rows[len(mine) :] == choices).all() and len(rows) - len(mine) < block_m


def test_blocks_that_any_choice_may_need():
    """The bound holds however choices fall, and one choice an expert reaches it."""
    for choices, num_experts, block_m in ((1, 8, 16), (6, 64, 16), (40, 3, 16), (300, 7, 64), (64, 64, 32)):
        bound = moe_align.most_blocks(choices, num_experts, block_m)
        for used in range(1, min(choices, num_experts) + 1):
            counts = [1] * (used - 1) + [choices - used + 1]
            assert sum(-(-c // block_m) for c in counts) <= bound
    assert moe_align.most_blocks(6, 64, 16) == 6


def case(tokens, topk, experts, hidden, inner, dtype, seed=0):
    r = rand("cpu", dtype, seed)
    chosen = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed)).argsort(-1)[:, :topk]
    w13, w2 = r(experts, 2 * inner, hidden) * hidden**-0.5, r(experts, hidden, inner) * inner**-0.5
    return r(tokens, hidden), chosen, r(tokens, topk).float().softmax(-1), w13, w2


def check(args, **options):
    with triton_interpreter(), poisoned():
        got = kernel.moe_experts(*moe_experts.bind(args), **options)
    want = truth(moe_experts, moe_experts.bind(args))[0]
    assert got.dtype == args[0].dtype and relative_l2(got, want) <= moe_experts.tolerance[got.dtype]


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_several_blocks_of_rows_columns_and_depth(dtype, few, monkeypatch):
    """45 choices over 3 experts, 3 columns of 16 hidden, 2 of 32 out, 3 and 4 steps along the sums, all ragged."""
    monkeypatch.setattr(moe_align, "FEW", 64 if few else 0)
    args = case(15, 3, 3, 41, 50, dtype)
    check(args, chosen=SMALL)
    gate, up = args[3].chunk(2, 1)
    check((*args[:3], gate, args[4], up), chosen=SMALL)


def test_uneven_choices():
    x, _, weights, w13, w2 = case(40, 2, 4, 32, 20, torch.bfloat16)
    few = torch.zeros(40, 2, dtype=torch.int64)
    few[0, 1], few[7] = 3, -1
    few[:, 0] = torch.where(torch.arange(40) % 5 == 0, 2, 0)
    check((x, few, weights, w13, w2), chosen=SMALL)


@pytest.mark.parametrize("tokens", [4, 24, 48, 130])
def test_tiles_of_every_size(tokens):
    """The tiles in use for few and many choices an expert."""
    x, ids, weights, w13, w2 = case(tokens, 1, 1, 24, 16, torch.bfloat16)
    use = kernel.tiles(tokens, 1, 2)
    assert use.gate_up.block_m == use.down.block_m == {4: 16, 24: 32, 48: 64, 130: 128}[tokens]
    check((x, ids, weights, w13, w2))


def test_the_weight_of_a_sentinel_is_not_looked_at():
    x, ids, weights, w13, w2 = case(5, 2, 4, 16, 16, torch.float32)
    ids[:, 1], weights[:, 1] = -1, float("nan")
    args = (x, ids, weights, w13, w2)
    check(args)


def test_nan_stays_in_its_token():
    """Through every activation: a NaN in one token makes that token NaN and no other."""
    x, ids, weights, w13, w2 = case(5, 2, 4, 16, 16, torch.float32)
    x[2, 3] = float("nan")
    for activation in ("silu", "gelu", "gelu_tanh", "relu", "relu2", "swiglu_oai"):
        with triton_interpreter(), poisoned():
            args = (x, ids, weights, w13, w2, None, None, None, None, activation, True, False, 1.0)
            got = kernel.moe_experts(*args)
        assert got[2].isnan().all() and not got[[0, 1, 3, 4]].isnan().any(), activation


def test_operands_that_do_not_belong_together_are_refused():
    args = case(3, 2, 4, 16, 8, torch.bfloat16)
    x, ids, weights, w13, w2 = args
    refuses = kernel.KERNELS[0].check
    assert refuses(*args) is None
    assert "ids of int32 or int64" in refuses(x, ids.float(), weights, w13, w2)
    assert "needs ids of shape [3, 2]" in refuses(x, ids[:2], weights, w13, w2)
    assert "needs weights of shape [3, 2]" in refuses(x, ids, weights[:, :1], w13, w2)
    assert "needs w13 of shape [4, 16, 16]" in refuses(x, ids, weights, w13[..., :8], w2)
    assert "needs w2 of shape [4, 16, 8]" in refuses(x, ids, weights, w13, w2[..., :4])
    assert "needs w2 of shape [4, 16, 8]" in refuses(x, ids, weights, w13, w2[:2])
    assert "needs w2 of torch.bfloat16 on cpu, got torch.float32" in refuses(x, ids, weights, w13, w2.float())
    assert "knows activations silu, " in refuses(*args, None, None, None, None, "tanh")
    wide = torch.empty(9000, 2, 16, dtype=x.dtype), torch.empty(9000, 16, 1, dtype=x.dtype)
    assert "at most 8192 experts" in refuses(x, ids, weights, *wide)

"""Latent attention in Triton, interpreted: blocks, splits and masks that the op's samples are too small for."""

import pytest
import torch

from dsopt.ops.attention import mla_attention
from dsopt.testing import interpreted, poisoned, rand, relative_l2, run_kernel, triton_interpreter, truth

pytest.importorskip("triton")

from dsopt.kernels.triton import mla_attention as kernel
from dsopt.kernels.triton import mla_decode, mla_prefill
from dsopt.kernels.triton.masking import prepare_mask

FEW, MANY = mla_decode.Tile(16, 16, 4, 1, 1), mla_prefill.Tile(16, 16, 4, 1)


def case(dtype, batch=2, heads=4, new=5, cached=45, nope=10, rope=6, rank=19, v=12, seed=0):
    r = rand("cpu", dtype, seed)
    q = r(batch, new, heads, nope + rope).transpose(1, 2)
    w = r(heads, nope + v, rank) * rank**-0.5
    return (
        q[..., :nope],
        q[..., nope:],
        r(batch, cached, rank),
        r(batch, cached, rope),
        w[:, :nope],
        w[:, nope:],
    )


def masks(batch, new, cached, dtype):
    """name -> mask: padding, holes, queries that see nothing or one key, all kinds of hiding values."""
    seen = torch.arange(cached) <= torch.arange(new)[:, None] + cached - new - 7
    seen = seen[None, None].repeat(batch, 1, 1, 1)
    seen[-1, :, :, :18] = False
    seen[-1, :, 1] = False
    seen[0, :, 2, 5:25] = False
    seen[0, :, 3] = torch.arange(cached) == 20
    lowest = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    return {
        "none": None,
        "bool": seen,
        "lowest": lowest,
        "infinite": torch.zeros(seen.shape).masked_fill(~seen, float("-inf")),
        "float64": torch.zeros(seen.shape, dtype=torch.float64).masked_fill(
            ~seen, torch.finfo(torch.float64).min
        ),
        "bias": rand("cpu", dtype, 1)(1, 1, new, cached),
        "one row": seen[:1, :, :1],
        "one key": torch.tensor([True, False])[:batch, None, None, None],
        "keys": seen[0, 0, 0],
    }


KINDS = tuple(masks(2, 5, 45, torch.float32))


def close(got, args):
    assert not got.isnan().any()
    want = truth(mla_attention, mla_attention.bind(args))[0]
    assert got.shape == want.shape and got.is_contiguous()
    assert relative_l2(got, want) <= mla_attention.tolerance[got.dtype]


def absorbed(args, splits, use=FEW):
    *operands, mask, scale, is_causal = mla_attention.bind(args)[:9]
    batch, _, new, _ = operands[0].shape
    with triton_interpreter(), poisoned():
        seen = prepare_mask(mask, batch, new, operands[2].shape[1])
        return mla_decode.absorbed(*operands, seen, scale, is_causal, use, splits)


def expanded(args, use=MANY):
    *operands, mask, scale, is_causal = mla_attention.bind(args)[:9]
    batch, _, new, _ = operands[0].shape
    with triton_interpreter(), poisoned():
        seen = prepare_mask(mask, batch, new, operands[2].shape[1])
        return mla_prefill.expanded(*operands, seen, scale, is_causal, use)


@pytest.mark.parametrize("kind", KINDS)
def test_ranges_hold_what_a_query_sees(kind):
    batch, new, cached = 2, 5, 45
    mask = masks(batch, new, cached, torch.float32)[kind]
    with triton_interpreter(), poisoned():
        got = prepare_mask(mask, batch, new, cached)
    if mask is None:
        assert got.ranges is None and got.values is None
        return
    seen = mask if mask.dtype == torch.bool else mask > -1e30
    if mask.is_floating_point():
        # a row hidden by finite values sees everything
        seen = seen | (~seen.any(-1, keepdim=True) & (mask > float("-inf")))
    for b, rows in enumerate(seen.expand(batch, 1, new, cached)[:, 0]):
        for s, row in enumerate(rows):
            keys = row.nonzero().flatten().tolist()
            assert got.ranges[b, s].tolist() == ([keys[0], keys[-1] + 1] if keys else [cached, 0])


@pytest.mark.parametrize(("kind", "splits"), [*((kind, 3) for kind in KINDS), ("lowest", 1), ("none", 2)])
def test_absorbed_over_blocks_and_splits(kind, splits):
    """20 rows in blocks of 16, 45 keys in blocks of 16, in splits of which some see nothing."""
    args = (*case(torch.float32), masks(2, 5, 45, torch.float32)[kind], 0.3)
    close(absorbed(args, splits), args)


@pytest.mark.parametrize("kind", KINDS)
def test_expanded_over_blocks(kind):
    """20 queries and 45 keys in blocks of 16."""
    args = (*case(torch.float32, heads=1, new=20), masks(2, 20, 45, torch.float32)[kind], 0.3)
    close(expanded(args), args)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["none", "bool", "lowest"])
def test_half_precision(kind, dtype):
    args = (*case(dtype), masks(2, 5, 45, dtype)[kind], 0.3)
    close(absorbed(args, 3), args)
    args = (*case(dtype, heads=1, new=20), masks(2, 20, 45, dtype)[kind], 0.3)
    close(expanded(args), args)


@pytest.mark.parametrize("cached", [10, 20, 40])
@pytest.mark.parametrize("kind", ["none", "bool"])
def test_causal(kind, cached):
    """Upper-left aligned, with fewer, as many and more keys than queries, alone and beside a mask."""
    mask = None if kind == "none" else torch.arange(cached) >= torch.tensor([3, 0])[:, None, None, None]
    args = (*case(torch.float32, heads=1, new=20, cached=cached), mask, 0.3, True)
    close(absorbed(args, 2), args)
    close(expanded(args), args)


@pytest.mark.parametrize("rope", [0, 6])
def test_widths_and_groups_of_heads(rope, monkeypatch):
    """No rotated part, values wider than keys, one head a group."""
    args = (*case(torch.float32, 1, 2, new=20, cached=30, rope=rope, nope=33, v=70, rank=40), None, 0.2)
    close(absorbed(args, 1), args)
    close(expanded(args), args)
    monkeypatch.setattr(mla_prefill, "GROUP_BYTES", 1)
    close(expanded(args), args)


def test_scores_beyond_what_exp_holds():
    q_nope, q_rope, *rest = case(torch.float32, batch=1)
    for factor in (200.0, -200.0):
        args = (q_nope * factor, q_rope * factor, *rest, None, 1.0)
        close(absorbed(args, 3), args)
        close(expanded(args), args)


def test_free_slots_of_a_static_cache_are_not_read():
    """NaN in slots that the mask hides after the last visible key, and before the first, stays there."""
    q_nope, q_rope, latent, k_rope, w_uk, w_uv = case(torch.float32, new=3)
    seen = (torch.arange(45) >= 4) & (torch.arange(45) < 21)
    for x in (latent, k_rope):
        x[:, ~seen] = float("nan")
    got = [
        f((q_nope, q_rope, latent, k_rope, w_uk, w_uv, seen, 0.3))
        for f in (lambda a: absorbed(a, 3), expanded)
    ]
    clean = (q_nope, q_rope, latent[:, 4:21], k_rope[:, 4:21], w_uk, w_uv, None, 0.3)
    for out in got:
        close(out, clean)


def test_a_mask_whose_rows_are_far_apart():
    mask = masks(2, 5, 45, torch.float32)["bool"]
    far = torch.empty_strided(mask.shape, (64, 64, 2**24, 1), dtype=torch.bool).copy_(mask)
    args = (*case(torch.float32), far, 0.3)
    close(absorbed(args, 1), args)
    close(expanded(args), args)


def test_few_new_tokens_are_absorbed_and_many_expanded(monkeypatch):
    """At DeepSeek's widths the two cost the same at 171 new tokens."""
    called = []
    monkeypatch.setattr(mla_decode, "absorbed", lambda *_: called.append("absorbed"))
    monkeypatch.setattr(mla_prefill, "expanded", lambda *_: called.append("expanded"))
    fn = interpreted(kernel.KERNELS[0])
    for new, nope, rope, want in (
        (1, 128, 64, "absorbed"),
        (170, 128, 64, "absorbed"),
        (172, 128, 64, "expanded"),
        (172, 300, 64, "absorbed"),
        (172, 128, 65, "absorbed"),
    ):
        args = (*case(torch.bfloat16, 1, 1, new, 2, nope=nope, rope=rope, rank=512, v=128), None, 1.0, False)
        fn.plan(*args)(*args)
        assert called.pop() == want, (new, nope, rope)


@pytest.mark.parametrize(("new", "chip"), [(9, (9, 0)), (9, (8, 0)), (9, (8, 6)), (60, (9, 0)), (60, (8, 6))])
def test_through_the_plan(new, chip):
    """The tiles in use for more than 16 rows, on chips with much shared memory and with little."""
    args = mla_attention.bind((*case(torch.bfloat16, batch=1, heads=2, new=new), None, 0.3))
    close(run_kernel(interpreted(kernel.KERNELS[0], chip), args)[0], args)


def test_splits_fill_the_chip():
    assert mla_decode.num_splits(1, 4096, 132) == 64
    assert mla_decode.num_splits(1, 100_000, 264) == 128
    assert mla_decode.num_splits(4, 100_000, 132) == 33
    assert mla_decode.num_splits(1, 300, 132) == 5
    assert mla_decode.num_splits(500, 100_000, 132) == 1
    assert mla_decode.num_splits(0, 0, 132) == 1


def test_what_does_not_fit_is_refused():
    args, refuses = (*case(torch.bfloat16), None, 0.3), kernel.KERNELS[0].check
    assert refuses(*args) is None
    for i, name in enumerate(("q_rope", "latent", "k_rope", "w_uk", "w_uv"), 1):
        for bad in (args[i][:1], args[i].float(), args[i][None]):
            assert refuses(*args[:i], bad, *args[i + 1 :]).startswith("needs "), name
    wide = case(torch.bfloat16, rank=513, heads=1, cached=3)
    assert "kv_lora_rank of at most 512, got 513" in refuses(*wide, None, 1.0)
    wide = case(torch.bfloat16, rope=129, heads=1, cached=3)
    assert "qk_rope_head_dim of at most 128, got 129" in refuses(*wide, None, 1.0)
    for mask, reason in (
        (torch.zeros(2, 4, 5, 45), "one mask for all heads"),
        (torch.zeros(45, dtype=torch.int64), "bool or float mask"),
        (torch.zeros(3, 1, 5, 45), "broadcasts to [2, 1, 5, 45]"),
        (torch.zeros(46), "broadcasts to [2, 1, 5, 45]"),
    ):
        assert reason in refuses(*args[:6], mask, 0.3)

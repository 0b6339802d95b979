"""Native latent attention, absorbed and expanded: sizes around their blocks, masks, bits, refusals."""

import pytest
import torch

from dsopt import _cpu
from dsopt.kernels.cpu import mla_attention as kernel
from dsopt.ops.attention import mla_attention
from dsopt.testing import poisoned, rand, truth

CPU = torch.device("cpu")
KERNEL = kernel.KERNELS[0]
each_dtype = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
each_form = pytest.mark.parametrize("form", (kernel.absorbed, kernel.expanded), ids=lambda f: f.__name__)
WIDE = {"nope": 128, "rope": 64, "rank": 512, "value": 128}


@pytest.fixture(params=_cpu.isas())
def isa(request):
    _cpu.set_isa(request.param)
    yield request.param
    _cpu.set_isa()


def case(dtype, batch=1, heads=4, new=1, cached=40, nope=16, rope=8, rank=32, value=24, seed=0):
    r = rand(CPU, dtype, seed)
    q = r(batch, heads, new, nope + rope)
    kv_b = r(heads, nope + value, rank) * rank**-0.5
    keys = r(batch, cached, rank), r(batch, cached, rope)
    return (q[..., :nope], q[..., nope:], *keys, kv_b[:, :nope], kv_b[:, nope:])


def lower_right(new, cached):
    """The mask of new tokens at the end of all."""
    return (torch.arange(cached) <= cached - new + torch.arange(new)[:, None])[None, None]


def assert_right(form, args, tolerance=None):
    args = mla_attention.bind(args)
    with torch.no_grad(), poisoned():
        got = form(*args)
    like = mla_attention.reference(*args)
    assert got.shape == like.shape and got.dtype == like.dtype and got.is_contiguous()
    error = mla_attention.error(args, [got], truth(mla_attention, args))
    assert error <= (tolerance or mla_attention.tolerance[args[0].dtype])


@each_dtype
@each_form
def test_samples(form, dtype, isa):
    for args in mla_attention.samples(CPU, dtype):
        assert_right(form, args)


@each_dtype
@each_form
def test_sizes(form, dtype, isa):
    """Heads, tokens, keys and widths around the kernels' own block sizes."""
    sizes = [
        {"heads": 1, "cached": 1, "nope": 1, "rope": 2, "rank": 1, "value": 1},
        {"batch": 2, "new": 2, "cached": 0},
        {"heads": 3, "new": 2, "cached": 63, "nope": 9, "rope": 6, "rank": 19, "value": 5},
        {"heads": 5, "new": 16, "cached": 65, "rank": 17},
        {"heads": 33, "new": 1, "cached": 513, "rank": 16, "rope": 16},
        {"batch": 3, "heads": 16, "new": 5, "cached": 1030, "rank": 48, "rope": 4},
        {"batch": 9, "heads": 6, "new": 1, "cached": 130, "rank": 33},
        {"heads": 16, "new": 3, "cached": 70, **WIDE},
        {"batch": 2, "heads": 2, "new": 13, "cached": 257, "nope": 250, "rope": 17, "rank": 259, "value": 70},
        {"heads": 1, "new": 11, "cached": 320, "nope": 64, "rope": 0, "rank": 256, "value": 65},
    ]
    for i, size in enumerate(sizes):
        args = case(dtype, **size, seed=i)
        assert_right(form, (*args, None, 0.2))
        assert_right(form, (*args, None, 0.2, True))


def test_prompts(isa):
    """More queries than one item of work takes, and new tokens behind a cache."""
    small = {"heads": 1, "nope": 4, "rope": 2, "rank": 8, "value": 4}
    assert_right(kernel.expanded, (*case(torch.float32, new=2055, cached=2055, **small), None, 0.2, True))
    for new, cached in ((70, 70), (6, 262), (65, 700)):
        args = case(torch.float32, batch=2, heads=2, new=new, cached=cached)
        assert_right(kernel.expanded, (*args, lower_right(new, cached), 0.2))


@each_form
@pytest.mark.parametrize("mask_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_additive_mask(mask_dtype, form, isa):
    """The lowest finite value hides a key, unless a query has nothing else; -inf always hides."""
    args = case(torch.float32, batch=2, new=4, cached=700)
    low = torch.finfo(mask_dtype).min
    mask = rand(CPU, torch.float32)(2, 1, 4, 700).to(mask_dtype)
    mask[0, 0, 0, 100:] = low
    mask[0, 0, 1, :650] = float("-inf")
    mask[0, 0, 2] = low
    mask[0, 0, 3] = float("-inf")
    mask[1, 0, :, :600] = low
    mask[1, 0, 2, 600:] = float("-inf")
    # float32 holds a score beside float16's lowest value to 8 bits behind the point
    tolerance = 1e-2 if mask_dtype == torch.float16 else None
    assert_right(form, (*args, mask, 0.2), tolerance)
    assert form(*args, mask, 0.2)[0, 3].eq(0).all()


@each_form
def test_masks_that_add_nothing_to_whole_chunks(form, isa):
    """Chunks of zeros, or of one value that is not zero, beside those where a single key is hidden or moved."""
    args = case(torch.float32, batch=2, new=8, cached=600)
    mask = torch.zeros(2, 1, 8, 600)
    mask[0, 0, 1, 64:128] = 1.5
    mask[0, 0, 2, 255] = -2.0
    mask[0, 0, 3, 256] = float("-inf")
    mask[0, 0, 4, :512] = torch.finfo(torch.float32).min
    mask[1, 0, 5, 64:576] = float("-inf")
    mask[1, 0, 6, 599] = 3.0
    assert_right(form, (*args, mask, 0.2))
    assert_right(form, (*args, mask.bfloat16(), 0.2))
    assert_right(form, (*args, mask == 0, 0.2))
    assert_right(form, (*args, mask, 0.2, True))


@each_form
def test_broadcast_masks(form, isa):
    args = case(torch.float32, batch=2, new=3, cached=150)
    every_key = torch.tensor([True, False, True]).view(1, 1, 3, 1)
    one_query = torch.rand(150, generator=torch.Generator().manual_seed(0)) > 0.5
    for mask in (
        every_key,
        one_query,
        one_query[None, None, None],
        one_query.expand(2, 1, 3, 150),
        ~every_key[:, 0],
        lower_right(3, 150).transpose(2, 3).contiguous().transpose(2, 3),
    ):
        assert_right(form, (*args, mask, 0.2))
        assert_right(form, (*args, mask, 0.2, True))


@each_dtype
@each_form
def test_strides(form, dtype, isa):
    """Heads and tokens either way round, a cache within a larger one, weights as halves of one."""
    r = rand(CPU, dtype)
    batch, heads, new, cached = 2, 3, 7, 70
    q = r(batch, new, heads, 24).transpose(1, 2)
    cache = r(cached + 5, batch, 48)[3:-2].transpose(0, 1)
    kv_b = r(heads, 33, 64)[..., ::2] * 0.2
    args = (q[..., 8:], q[..., :8], cache[..., 8:40], cache[..., :8], kv_b[:, :16], kv_b[:, 16:])
    assert_right(form, (*args, None, 0.2))
    assert_right(form, (*args, lower_right(new, cached), 0.2))


@each_form
def test_hidden_keys_are_not_read(form, isa):
    """Chunks without a visible key may hold anything: what a static cache was allocated with, even NaN."""
    args = case(torch.float32, cached=2000)
    valid = torch.arange(2000) < 128
    want = form(*args, valid, 0.2)
    args[2][:, 128:] = float("nan")
    assert torch.equal(form(*args, valid, 0.2), want)


@each_dtype
@each_form
def test_same_bits_for_any_threads_batch_and_buffer(form, dtype, isa, threads):
    """A row's answer depends on nothing but the row."""
    for heads, new, cached in ((16, 1, 1500), (5, 3, 700), (40, 2, 1100), (1, 17, 300)):
        args = case(dtype, batch=7, heads=heads, new=new, cached=cached, rank=64)
        threads(1)
        one = form(*args, None, 0.2)
        alone = [form(*[x[i : i + 1] for x in args[:4]], *args[4:], None, 0.2) for i in range(7)]
        threads(2)
        assert torch.equal(one, form(*args, None, 0.2))
        assert torch.equal(one[2:3], form(*[x[2:3] for x in args[:4]], *args[4:], None, 0.2))
        assert torch.equal(one, torch.cat(alone))
        # the same keys at the start of a longer buffer
        longer = [torch.cat((x, x), 1) for x in args[2:4]]
        valid = torch.arange(2 * cached) < cached
        assert torch.equal(one, form(*args[:2], *longer, *args[4:], valid, 0.2))


def test_same_bits_whatever_queries_are_beside(isa):
    """A prompt taken in pieces gives what it gives whole."""
    *args, latent, k_rope, w_uk, w_uv = case(torch.float32, heads=2, new=40, cached=333)
    mask = lower_right(40, 333)
    whole = kernel.expanded(*args, latent, k_rope, w_uk, w_uv, mask, 0.2)
    for first, last in ((0, 1), (3, 10), (10, 40)):
        part = [q[:, :, first:last] for q in args]
        got = kernel.expanded(*part, latent, k_rope, w_uk, w_uv, mask[:, :, first:last], 0.2)
        assert torch.equal(got, whole[:, first:last])


@each_dtype
def test_many_tokens_are_expanded(dtype, monkeypatch):
    calls = []
    for form in (kernel.absorbed, kernel.expanded):
        monkeypatch.setattr(
            kernel, form.__name__, lambda *args, form=form: calls.append(form.__name__) or form(*args)
        )
    sizes = {"heads": 2, "nope": 32, "rope": 8, "rank": 64, "value": 32}
    for new, expected in ((1, "absorbed"), (16, "absorbed"), (600, "expanded")):
        args = (*case(dtype, new=new, cached=600, **sizes), None, 0.2, True)
        assert_right(KERNEL.plan(*args), args)
        assert calls.pop() == expected and not calls


def test_refusals():
    args = case(torch.float32)
    assert "one dtype" in KERNEL.refuses((*args[:5], args[5].bfloat16(), None, 1.0))
    assert "one mask for all heads" in KERNEL.refuses((*args, torch.zeros(1, 4, 1, 40), 1.0))
    assert "bool or float" in KERNEL.refuses((*args, torch.zeros(40, dtype=torch.int64), 1.0))


@each_form
def test_operands_that_do_not_belong_together(form):
    args = case(torch.float32, batch=2, new=3)
    for i, name in enumerate(("q_nope", "q_rope", "latent", "k_rope", "w_uk", "w_uv")):
        bad = [args[i][0], args[i].bfloat16(), args[i][:1]]
        bad += [args[i][:, :1]] if name != "w_uv" else []  # values may be of any width
        for x in bad:
            changed = (*args[:i], x, *args[i + 1 :], None, 0.2)
            assert KERNEL.refuses(mla_attention.bind(changed)) is not None, (name, x.shape, x.dtype)
            with pytest.raises(ValueError, match=r"^(q_nope|q_rope|latent|k_rope|w_uk|w_uv) must "):
                form(*changed)
    for mask in (torch.zeros(41), torch.zeros(2, 4, 3, 40), torch.zeros(40, dtype=torch.int64)):
        with pytest.raises(ValueError, match="mask"):
            form(*args, mask, 0.2)

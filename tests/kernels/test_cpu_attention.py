"""The native attention of heads that share keys: both forms, every instruction set, masks, threads."""

import pytest
import torch

from dsopt import _cpu
from dsopt.capture import flat
from dsopt.kernels.cpu import attention as kernel
from dsopt.ops.attention import attention
from dsopt.testing import poisoned, rand, truth

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMS = (kernel.few, kernel.many)
each_form = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)


@pytest.fixture(params=_cpu.isas())
def isa(request):
    _cpu.set_isa(request.param)
    yield request.param
    _cpu.set_isa()


def case(dtype, batch=1, heads=4, kv_heads=2, new=1, cached=40, width=16, value=16, seed=0):
    r = rand(CPU, dtype, seed)
    keys = r(batch, kv_heads, cached, width), r(batch, kv_heads, cached, value)
    return r(batch, new, heads, width).transpose(1, 2), *keys


def assert_right(form, args, tolerance=None):
    args = attention.bind(args)
    with poisoned():
        (got,) = flat(form(*args))
    (want,) = truth(attention, args)
    assert got.shape == want.shape and got.dtype == args[0].dtype and got.is_contiguous()
    assert attention.error(args, [got], [want]) <= (tolerance or attention.tolerance[got.dtype])


@each_form
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(form, dtype, isa):
    """Heads, tokens, keys and widths around the kernels' own block sizes."""
    sizes = [
        {"heads": 1, "kv_heads": 1, "cached": 1, "width": 1, "value": 1},
        {"batch": 2, "new": 2, "cached": 0},
        {"heads": 9, "kv_heads": 3, "new": 2, "cached": 63, "width": 9, "value": 5},
        {"heads": 6, "kv_heads": 3, "new": 16, "cached": 65, "width": 17, "value": 40},
        {"heads": 33, "kv_heads": 1, "cached": 513, "width": 24, "value": 8},
        {"batch": 3, "heads": 16, "kv_heads": 2, "new": 5, "cached": 1030, "width": 48, "value": 20},
        {"batch": 9, "heads": 6, "kv_heads": 6, "cached": 130, "width": 33},
        {"heads": 8, "kv_heads": 1, "new": 70, "cached": 300, "width": 64, "value": 80},
        {"heads": 4, "kv_heads": 4, "new": 3, "cached": 70, "width": 300, "value": 128},
    ]
    for i, size in enumerate(sizes):
        args = case(dtype, **size, seed=i)
        assert_right(form, (*args, None, 0.2))
        assert_right(form, (*args, None, 0.2, True, rand(CPU, dtype)(args[0].shape[1])))


@each_form
@pytest.mark.parametrize("mask_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_additive_mask(form, mask_dtype, isa):
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
    by_head = mask.expand(2, 4, 4, 700) + torch.arange(4.0).view(1, 4, 1, 1).to(mask_dtype)
    assert_right(form, (*args, by_head, 0.2), tolerance)


@each_form
def test_broadcast_masks(form, isa):
    args = case(torch.float32, batch=2, new=3, cached=150)
    r = torch.Generator().manual_seed(0)
    every_key = torch.tensor([True, False, True]).view(1, 1, 3, 1)
    one_query = torch.rand(150, generator=r) > 0.5
    by_head = torch.rand(1, 4, 1, 150, generator=r) > 0.5
    for mask in (every_key, one_query, one_query.expand(2, 1, 3, 150), ~every_key[:, 0], by_head, by_head[0]):
        assert_right(form, (*args, mask, 0.2))
        assert_right(form, (*args, mask, 0.2, True))


@each_form
def test_hidden_keys_are_not_read(form, isa):
    """Chunks without a visible key may hold anything: what a static cache was allocated with, even NaN."""
    q, k, v = case(torch.float32, cached=2000)
    valid = torch.arange(2000) < 128
    want = form(q, k, v, valid, 0.2)
    k[:, :, 128:], v[:, :, 128:] = float("nan"), float("nan")
    assert torch.equal(form(q, k, v, valid, 0.2), want)


@each_form
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_any_threads_batch_and_buffer(form, dtype, isa, threads):
    """A row's answer depends on nothing but the row."""
    for heads, kv_heads, new, cached in ((16, 4, 1, 1500), (6, 2, 3, 700), (40, 1, 4, 1100)):
        q, k, v = case(dtype, batch=5, heads=heads, kv_heads=kv_heads, new=new, cached=cached)
        threads(1)
        one = form(q, k, v, None, 0.2)
        alone = [form(*[x[i : i + 1] for x in (q, k, v)], None, 0.2) for i in range(5)]
        threads(2)
        assert torch.equal(one, form(q, k, v, None, 0.2))
        assert torch.equal(one[2:3], form(*[x[2:3] for x in (q, k, v)], None, 0.2))
        assert torch.equal(one, torch.cat(alone))
        # the same keys at the start of a longer buffer
        longer = [torch.cat((x, x), 2) for x in (k, v)]
        assert torch.equal(one, form(q, *longer, torch.arange(2 * cached) < cached, 0.2))


def test_many_rows_take_the_packed_form(monkeypatch):
    calls = []
    many = kernel.many
    monkeypatch.setattr(kernel, "many", lambda *args: calls.append(1) or many(*args))
    for new, expected in ((1, 0), (32, 0), (33, 1)):
        args = (*case(torch.float32, new=new, cached=64), None, 0.2)
        assert_right(kernel.KERNELS[0].plan(*attention.bind(args)), args)
        assert len(calls) == expected


def test_operands_that_do_not_belong_together():
    """Refused before, and a ValueError at the call: native code would read past the end."""
    q, k, v = case(torch.float32, batch=2, new=3)
    bad = [
        (q[0], k, v, "q must"),
        (q[:1], k, v, "k must"),
        (q[:, :3], k, v, "q must have a multiple"),
        (q, k[..., :8], v, "k must"),
        (q, k.bfloat16(), v, "k must"),
        (q, k, v[:, :1], "v must"),
        (q, k, v[:, :, :7], "v must"),
    ]
    for *args, says in bad:
        assert kernel.KERNELS[0].refuses(attention.bind((*args, None, 0.2))) is not None
        with pytest.raises(ValueError, match=says):
            kernel.few(*args, None, 0.2)
    for mask in (torch.zeros(41), torch.zeros(2, 3, 3, 40), torch.zeros(40, dtype=torch.int64)):
        with pytest.raises(ValueError, match="mask"):
            kernel.few(q, k, v, mask, 0.2)
    with pytest.raises(ValueError, match="sinks must"):
        kernel.few(q, k, v, None, 0.2, False, torch.zeros(3))
    assert "sinks of 4 floats" in kernel.KERNELS[0].refuses((q, k, v, None, 0.2, False, torch.zeros(3)))
    assert "1 or 4 heads" in kernel.KERNELS[0].refuses((q, k, v, torch.zeros(2, 3, 3, 40), 0.2, False, None))

"""LatentCache: the rows it keeps, every way of decoding, and compiled steps, beside transformers' own caches."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
import transformers
from families import build
from transformers import AutoConfig, DynamicCache, StaticCache

import dsopt
from dsopt.cache import FP8Rows, GrowingRows, StaticRows, WideRows
from dsopt.fp8 import FP8Group, dequantize, quantize
from dsopt.models import presets
from dsopt.testing import relative_l2

FORMS = {"growing": None, "static": 40}
caches_v32 = pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23),
    reason="before 5.23, transformers caches V3.2's keys and values of every head",
)
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}


def prompt(length: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, 120, (batch, length), generator=torch.Generator().manual_seed(length))


def rounded(latent: torch.Tensor) -> torch.Tensor:
    """A latent as FP8 keeps it."""
    return dequantize(*quantize(latent, FP8Group()), latent.dtype, (1, 128))


@pytest.fixture(autouse=True)
def every_test(fresh_dynamo):
    """Models of one class share its code, and with it Dynamo's recompile limit."""


class Rounding:
    """transformers' own cache, of latents that went through FP8."""

    def update(self, key_states, value_states, layer_idx):
        return super().update(rounded(key_states), value_states, layer_idx)


class RoundingDynamic(Rounding, DynamicCache):
    pass


class RoundingStatic(Rounding, StaticCache):
    pass


DTYPES = {"bf16": (DynamicCache, StaticCache), "fp8": (RoundingDynamic, RoundingStatic)}


def theirs(config, dtype: str, size: int | None):
    """transformers' own cache of what a LatentCache keeps, whose results it has to give."""
    growing, static = DTYPES[dtype]
    return growing(config=config) if size is None else static(config=config, max_cache_len=size)


def test_v3_takes_656_bytes_a_token_and_layer():
    config = presets.config(presets.v3())
    cache = dsopt.LatentCache(config)
    assert cache.bytes_per_token == 512 + 4 * 4 + 2 * 64 == 656
    assert cache.expanded_bytes_per_token == 2 * 128 * (192 + 128)
    assert dsopt.LatentCache(config, "bf16").bytes_per_token == 2 * (512 + 64)
    assert "61 layers, 0 tokens of 656 bytes a layer, 0.8% of expanded" in repr(cache)
    assert len(dsopt.LatentCache(presets.config(presets.v2_lite()))) == 27


@pytest.mark.parametrize("rank, rope", [(128, 32), (512, 64), (32, 16), (130, 6), (257, 5), (7, 1)])
def test_rows_keep_what_fp8_says(rank, rope):
    """Bit for bit, with partial groups and odd widths; the rotary part as it was."""
    rows, latent, k_rope = FP8Rows(rank, rope), torch.randn(2, 3, rank) * 5, torch.randn(2, 3, rope)
    latent, k_rope = latent.bfloat16(), k_rope.bfloat16()
    latent[0, 1] = 0
    packed = rows.pack(latent, k_rope)
    assert packed.shape == (2, 3, rows.width) and packed.dtype == torch.uint8 and rows.width % 4 == 0
    got, rope_got = rows.unpack(packed, torch.bfloat16)
    assert torch.equal(got, rounded(latent)) and torch.equal(rope_got, k_rope)
    x, y = latent.double(), got.double()
    assert 1 - 2 * (x * y).sum() / (x.square().sum() + y.square().sum()) < 1e-3
    wide = WideRows(rank, rope)
    assert all(
        torch.equal(*pair)
        for pair in zip(wide.unpack(wide.pack(latent, k_rope), torch.bfloat16), (latent, k_rope))
    )


def test_what_is_not_finite_stays_seen():
    latent = torch.randn(1, 2, 256)
    latent[0, 0, 3], latent[0, 1, 200] = float("inf"), float("nan")
    rows = FP8Rows(256, 4)
    got, _ = rows.unpack(rows.pack(latent, torch.zeros(1, 2, 4)), torch.float32)
    assert got.isnan().tolist() == [[[i < 128 for i in range(256)], [i >= 128 for i in range(256)]]]


@pytest.mark.parametrize("make", [GrowingRows, lambda: StaticRows(700)], ids=FORMS)
def test_rows_are_found_where_they_were_put(make):
    """Through growth, crops, a new order and a new number of sequences; what lies behind is never shown."""
    rows, want = make(), torch.empty(2, 0, 3)
    for tokens, crop in ((5, 0), (300, 7), (1, 0), (290, 400), (2, 0)):
        new = torch.randn(2, tokens, 3)
        got, want = rows.append(new), torch.cat((want, new), 1)
        assert torch.equal(got[:, : want.shape[1]], want)
        rows.crop(crop)
        want = want[:, : want.shape[1] - crop]
        if isinstance(rows, GrowingRows):
            rows.data[:, rows.length :] = torch.nan
    place = rows.data.data_ptr()
    rows.select(torch.tensor([1, 0]))
    want = want[[1, 0]]
    assert isinstance(rows, GrowingRows) or rows.data.data_ptr() == place
    rows.select(torch.tensor([0, 1, 1]))
    new = torch.randn(3, 1, 3)
    got, want = rows.append(new), torch.cat((want[[0, 1, 1]], new), 1)
    assert torch.equal(got[:, : want.shape[1]], want)
    rows.crop(10_000)
    assert rows.length == 0
    rows.reset()
    assert torch.equal(rows.append(new)[:, :1], new)


WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beams": {"num_beams": 3},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "assistant": {"assistant_model": True},
    "parts": {"prefill_chunk_size": 4},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_way_of_decoding_in_eager(dtype, way):
    """The tokens and logits of transformers' own cache of the same latents, bit for bit; crops and orders included."""
    model = build("v3", torch.bfloat16)
    options = {**GREEDY, **WAYS[way], "output_logits": True, "return_dict_in_generate": True}
    if "assistant_model" in options:
        options["assistant_model"] = build("v3", torch.bfloat16)
    crops = way in ("lookup", "assistant")

    def run(cache):
        torch.manual_seed(1)
        return model.generate(prompt(9, batch=1 if crops else 2), past_key_values=cache, **options)

    for size in FORMS.values():
        # a StaticCache cannot be cropped
        want = run(theirs(model.config, dtype, None if crops else size))
        got = run(dsopt.LatentCache(model.config, dtype, size))
        assert torch.equal(got.sequences, want.sequences)
        assert (crops and size) or all(
            torch.equal(*pair) for pair in zip(got.logits, want.logits, strict=True)
        )


@pytest.mark.parametrize("size", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("family", ["v2", pytest.param("v32", marks=caches_v32)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_chat_that_goes_on(dtype, family, size):
    """And beams, and a second chat; V3.2 keeps its indexer's keys, too."""
    model, said = build(family, torch.bfloat16), []
    for cache in (theirs(model.config, dtype, size), dsopt.LatentCache(model.config, dtype, size)):
        first = model.generate(prompt(12), past_key_values=cache, **GREEDY)
        second = model.generate(torch.cat((first, prompt(4)), 1), past_key_values=cache, **GREEDY)
        said.append(second)
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    assert torch.equal(model.generate(prompt(12), past_key_values=cache, **GREEDY), first)
    assert torch.equal(*said)
    beams = [
        model.generate(
            prompt(5), past_key_values=make(model.config, dtype, size), **{**GREEDY, "num_beams": 2}
        )
        for make in (theirs, dsopt.LatentCache)
    ]
    assert torch.equal(*beams)


@caches_v32
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_indexer_is_cropped_with_the_latents(dtype):
    model = build("v32", torch.bfloat16)
    logits = []
    with torch.inference_mode():
        for crop in (0, 3):
            cache = dsopt.LatentCache(model.config, dtype)
            model(prompt(12), past_key_values=cache)
            if crop:
                model(prompt(crop), past_key_values=cache)
                cache.crop(-crop)
            logits.append(model(prompt(2), past_key_values=cache).logits)
    assert torch.equal(*logits)


def test_a_model_in_float32_rounds_to_the_cache_and_back():
    model = build("v3")
    with torch.inference_mode():
        want = model(prompt(9), past_key_values=DynamicCache(config=model.config)).logits
        for dtype, error in (("bf16", 0.02), ("fp8", 0.1)):
            got = model(prompt(9), past_key_values=dsopt.LatentCache(model.config, dtype)).logits
            assert got.dtype == torch.float32 and 1e-4 < relative_l2(got, want) < error


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_steps_of_a_static_cache_are_one_graph(dtype):
    """Nothing is compiled behind the first steps, attention is absorbed, and every step is as near as eager's."""
    model = build("v3", num_hidden_layers=1)
    fast = dsopt.compile(model, strict=True)
    tokens = [prompt(7), *(prompt(1) + i for i in range(6))]
    with torch.no_grad():
        for again in range(2):
            caches = [dsopt.LatentCache(model.config, dtype, 64) for _ in range(2)]
            for i, ids in enumerate(tokens):
                ready = again or i > 1
                with torch.compiler.set_stance("fail_on_recompile") if ready else contextlib.nullcontext():
                    got = fast(ids, past_key_values=caches[0]).logits
                # a latent that lies between two codes may be rounded to the other one
                assert relative_l2(got, model(ids, past_key_values=caches[1]).logits) < 0.03
    report = dsopt.report(fast)
    assert not report.fallbacks and len(report.graphs) == 2
    assert all(graph.matched()["mla"] == (1, 1) for graph in report.graphs)
    calls = {k.op: k.calls for k in report.graphs[-1].kernels}
    assert calls["mla_attention"] == 2 * len(tokens[1:])
    assert "dequantize" not in calls  # the attention reads bytes and scales as they are


@pytest.mark.slow
def test_a_growing_cache_is_compiled_for_every_length():
    """Past the end of its first buffer, too, which is 256 rows."""
    model = build("v2", num_hidden_layers=1)
    fast = dsopt.compile(model, strict=True)
    caches = [dsopt.LatentCache(model.config, "fp8") for _ in range(2)]
    with torch.no_grad():
        for ids in map(prompt, (5, 1, 1, 248, 4, 1, 1)):
            got, want = (m(ids, past_key_values=cache).logits for m, cache in zip((fast, model), caches))
            assert relative_l2(got, want) < 0.03
    assert int(caches[0].get_seq_length()) == 261
    report = dsopt.report(fast)
    assert not report.fallbacks and len(report.graphs) <= 5
    assert all(graph.matched()["mla"] == (1, 1) for graph in report.graphs)


def test_wrong_arguments_are_named():
    config = build("v3").config
    for wrong, error in (
        ({"config": "v3"}, (TypeError, "config must be a transformers config, got str")),
        (
            {"config": AutoConfig.for_model("llama")},
            (ValueError, "llama has no kv_lora_rank, qk_rope_head_dim"),
        ),
        ({"dtype": "fp4"}, (ValueError, "dtype must be one of fp8, bf16, got 'fp4'")),
        ({"max_cache_len": 0}, (ValueError, "max_cache_len must be None or a whole number above 0, got 0")),
        ({"max_cache_len": True}, (ValueError, "got True")),
    ):
        with pytest.raises(error[0], match=error[1]):
            dsopt.LatentCache(**{"config": config, **wrong})
    cache = dsopt.LatentCache(config, "fp8", 8)
    with pytest.raises(ValueError, match=r"latent must be \[1, 1, 2, 32\] to be cached, got \[1, 5, 2, 44\]"):
        cache.update(torch.zeros(1, 5, 2, 44), torch.zeros(1, 5, 2, 24), 0)
    with pytest.raises(ValueError, match=r"k_rope must be \[1, 1, 2, 16\]"):
        cache.update(torch.zeros(1, 1, 2, 32), torch.zeros(1, 1, 3, 16), 0)
    assert not cache.is_initialized and cache.batch_size == -1
    cache.update(torch.zeros(2, 1, 2, 32), torch.zeros(2, 1, 2, 16), 0)
    with pytest.raises(ValueError, match="holds 2 sequences, got 1"):
        cache.update(torch.zeros(1, 1, 2, 32), torch.zeros(1, 1, 2, 16), 0)
    with pytest.raises(ValueError, match="-n forgets n tokens, got 1"):
        cache.crop(1)


def test_a_copy_is_a_cache_of_its_own():
    config = build("v3").config
    cache = dsopt.LatentCache(config)
    cache.update(torch.ones(1, 1, 2, 32), torch.ones(1, 1, 2, 16), 0)
    other = copy.deepcopy(cache)
    other.update(torch.ones(1, 1, 3, 32), torch.ones(1, 1, 3, 16), 0)
    assert (cache.get_seq_length(), other.get_seq_length(), cache.get_seq_length(1)) == (2, 5, 0)

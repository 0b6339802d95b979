"""Cases: arguments that kernels take, sets that differ, witnesses that look at a part of the same call."""

import math
from types import SimpleNamespace

import pytest
import torch

from dsopt.bench import data
from dsopt.bench.cases import Sizes, cases, chosen_sizes, default_sizes, geometry
from dsopt.capture import flat
from dsopt.models.presets import PRESETS
from dsopt.numerics import relative_l2
from dsopt.ops import OPS

OWN_DTYPES = {"moe_route": torch.float32, "dequantize": torch.float8_e4m3fn}  # of the first argument


@pytest.mark.parametrize("preset", ["v2-lite", "v3", "v3.2"])
@pytest.mark.parametrize("op", OPS)
def test_a_witness_sees_what_the_whole_call_gives(op, preset):
    geo = geometry(preset, torch.float32, "cpu", quick=True)
    found = cases(OPS[op], geo, (Sizes(1, 9), Sizes(6, 6, 2), Sizes(3, 11)))
    assert found
    for case in found:
        args = case.make(0)
        assert len(args) == len(OPS[op].overload._schema.arguments), "all of them, defaults too"
        small, pick = case.witness(args)
        got, want = pick(flat(OPS[op].reference(*args))), flat(OPS[op].reference(*small))
        assert OPS[op].error(small, got, want) < 1e-5, case.title


@pytest.mark.parametrize("op", OPS)
def test_sets_differ_and_repeat_by_number(op):
    geo = geometry("v2-lite", torch.bfloat16, "cpu", quick=True)
    (case, *_) = cases(OPS[op], geo, (Sizes(2, 4),))
    first, again, other = case.make(0)[0], case.make(0)[0], case.make(1)[0]
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.dtype == OWN_DTYPES.get(op, torch.bfloat16)


def test_neighbouring_sets_choose_no_expert_twice():
    geo = geometry("v2-lite", torch.bfloat16, "cpu", quick=True)
    (case,) = cases(OPS["moe_experts"], geo, (Sizes(1),))
    args = [case.make(i) for i in range(4)]  # 8 experts, 2 of them each
    assert sorted(torch.cat([a[1].flatten() for a in args]).tolist()) == list(range(8))
    assert all(a[3] is args[0][3] for a in args), "the weights are made once"


def test_attention_masks_are_those_of_decoding_and_of_prompts():
    geo = geometry("v2-lite", torch.float32, "cpu", quick=True)
    sizes = Sizes(1, 9), Sizes(5, 5), Sizes(2, 4)
    decode, prompt, chunk = (cases(OPS["mla_attention"], geo, (s,))[0].make(0) for s in sizes)
    assert decode[6] is None and not decode[8]
    assert prompt[6] is None and prompt[8]
    assert chunk[6][0, 0].tolist() == [[True, True, True, False], [True] * 4] and not chunk[8]


def test_an_op_of_another_package_is_measured_on_its_samples():
    samples = [(torch.ones(2), 1), (torch.ones(3), 2)]
    op = SimpleNamespace(name="other", samples=lambda device, dtype: iter(samples), bind=tuple)
    found = cases(op, geometry("v3", torch.float32, "cpu"), default_sizes("other"))
    assert [case.name for case in found] == ["sample 0", "sample 1"]
    args = found[1].make(7)
    assert (
        torch.equal(args[0], samples[1][0])
        and args[0].data_ptr() != samples[1][0].data_ptr()
        and args[1] == 2
    )


def test_sizes_are_every_combination_of_what_was_asked_for():
    assert chosen_sizes("mla_attention", context=[7, 9]) == (Sizes(1, 7), Sizes(1, 9))
    assert chosen_sizes("mla_attention", tokens=[8], context=[4], batch=[1, 2]) == (
        Sizes(8, 8),
        Sizes(8, 8, 2),
    )
    assert chosen_sizes("rms_norm", tokens=[3], context=[4]) == (Sizes(3),)
    assert chosen_sizes("rms_norm", batch=[4])[0] == Sizes(1, 0, 4)
    assert chosen_sizes("rms_norm") == default_sizes("rms_norm")


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (Sizes(1), "1 token"),
        (Sizes(5, 7), "5 tokens of 7"),
        (Sizes(2, 0, 3), "3 x 2 tokens"),
        (Sizes(0), ""),
    ],
)
def test_sizes_in_words(sizes, words):
    assert str(sizes) == words and sizes.rows == sizes.tokens * sizes.batch


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="unknown preset 'v9'") as error:
        geometry("v9", torch.float32, "cpu")
    assert all(preset in str(error.value) for preset in PRESETS)


def test_large_tensors_are_random_and_as_asked(monkeypatch):
    monkeypatch.setattr(data, "BLOCK", 1009)
    r = data.Data(torch.float32, "cpu").random(3)
    x = r(50, 100, scale=2.0)
    assert x.shape == (50, 100) and abs(x.std() - 2.0) < 0.2
    assert len(x[:10].unique()) > 900, "only the block repeats"
    assert relative_l2(data.Data(torch.float32, "cpu").random(3)(50, 100, scale=2.0), x) == 0


@pytest.mark.parametrize("callers", [1, 6, 7])
@pytest.mark.parametrize("touched", [1000, 4096, 10**6, 3 * 10**6 + 1])
def test_sets_between_two_uses_fill_three_caches(touched, callers):
    cache = 10**6
    count = data.set_count(touched, cache, callers)
    assert touched > 3 * cache or (count - 1) * touched >= 3 * cache
    assert math.gcd(count, callers) == 1


def test_a_rotation_hands_out_each_set_in_turn():
    first = (torch.tensor(0),)
    turn = data.Rotation(lambda i: (torch.tensor(i),), first, touched=10, cache=10, callers=3)
    assert [int(turn()[0]) for _ in range(5)] == [0, 1, 2, 3, 0]
    assert turn.sets[0] is first


def test_the_cache_size_is_read_from_the_system(tmp_path):
    for text, size in (("48K\n", 48 << 10), ("49152K", 48 << 20), ("2M", 2 << 20), ("unknown", 0)):
        (tmp_path / "size").write_text(text)
        assert data._size(tmp_path / "size") == size
    assert data.cache_bytes() >= 1 << 15

"""Expert layers at the edges: how many tokens, which experts, how the weights lie in memory."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from safetensors.torch import safe_open, save_file

import dsopt
from dsopt.models import presets
from dsopt.models.config import Config
from dsopt.models.experts import MoE
from dsopt.testing import relative_l2

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def layer(preset: str = "v3", dtype: torch.dtype = torch.float32, **changes) -> MoE:
    geometry = dataclasses.replace(Config.of(presets.tiny(presets.PRESETS[preset]())), **changes)
    moe = MoE(geometry)
    with torch.no_grad():
        for p in moe.parameters():
            p.normal_(std=0.7 * p.shape[-1] ** -0.5)
        if moe.router.bias is not None:
            moe.router.bias.uniform_(-0.1, 0.1)
    return moe.to(dtype).eval()


def truth(moe: MoE, x: torch.Tensor) -> torch.Tensor:
    return copy.deepcopy(moe).double()(x.double())


def fused(moe: MoE):
    """The layer through dsopt, and the numbers of routers and expert layers in each of its graphs."""
    fast = dsopt.compile(moe, strict=True)

    def sites():
        return [(g.matched()["router"], g.matched()["moe"]) for g in dsopt.report(fast).graphs]

    return fast, sites


@torch.inference_mode()
def check(moe: MoE, *inputs: torch.Tensor, tolerance: float = TOLERANCE[torch.float32]) -> None:
    fast, sites = fused(moe)
    for x in inputs:
        got, want = fast(x), truth(moe, x)
        assert got.shape == x.shape and got.dtype == x.dtype
        assert relative_l2(got, want) < tolerance
    assert sites() and all(counts == ((1, 1), (1, 1)) for counts in sites())


@pytest.mark.parametrize("preset", ["v2-lite", "v2", "v3"])
def test_zero_one_and_many_tokens_on_any_batch(preset):
    moe = layer(preset)
    check(
        moe, *(torch.randn(batch, tokens, 64) for batch, tokens in ((2, 3), (1, 1), (16, 1), (5, 0), (3, 40)))
    )


def test_two_graphs_serve_batches_of_2_to_16():
    moe = layer()
    fast, sites = fused(moe)
    with torch.inference_mode():
        for batch in range(2, 17):
            x = torch.randn(batch, 1, 64)
            assert relative_l2(fast(x), truth(moe, x)) < 2e-6
    assert len(sites()) <= 2


def test_all_tokens_on_the_same_experts_and_others_never_used():
    moe = layer(n_group=1, topk_group=1)
    with torch.no_grad():
        moe.router.bias.fill_(-1.0)[[3, 5]] = 1.0
        # what nobody chooses must not be read into the result
        moe.experts.w13[0].fill_(float("nan"))
        moe.experts.w2[7].fill_(float("nan"))
    with torch.inference_mode():
        x = torch.randn(2, 9, 64)
        fast, sites = fused(moe)
        got = fast(x)
        moe.experts.w13.data[0], moe.experts.w2.data[7] = 0.0, 0.0
        assert relative_l2(got, truth(moe, x)) < 2e-6 and sites() == [((1, 1), (1, 1))]


@pytest.mark.parametrize(
    "changes",
    [
        {"n_routed_experts": 257, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 9},
        {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 4},
        {"n_routed_experts": 4, "n_group": 2, "topk_group": 2, "num_experts_per_tok": 4},
        {"n_routed_experts": 6, "n_group": 3, "topk_group": 2, "num_experts_per_tok": 1},
    ],
    ids=["257", "all", "all groups", "one choice"],
)
def test_numbers_of_experts(changes):
    check(layer(**changes), torch.randn(2, 5, 64), torch.randn(1, 1, 64))


def test_equal_scores():
    """Every choice is a tie: whichever experts are taken, alike ones give the same result."""
    moe = layer(n_group=1, topk_group=1)
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.bias.zero_()
        moe.experts.w13.copy_(moe.experts.w13[:1].expand_as(moe.experts.w13).clone())
        moe.experts.w2.copy_(moe.experts.w2[:1].expand_as(moe.experts.w2).clone())
    check(moe, torch.randn(2, 6, 64))


def replaced(moe: MoE, tensors: dict[str, torch.Tensor]) -> MoE:
    moe = copy.deepcopy(moe)
    moe.load_state_dict(tensors, assign=True)
    return moe


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_memory_mapped_weights(dtype, tmp_path):
    moe = layer(dtype=dtype)
    # a name as long as this puts the data of the file where its header happens to end
    save_file({"a": torch.zeros(1, dtype=torch.uint8), **moe.state_dict()}, tmp_path / "weights.safetensors")
    with safe_open(tmp_path / "weights.safetensors", framework="pt") as file:
        mapped = replaced(moe, {name: file.get_tensor(name) for name in moe.state_dict()})
        check(mapped, torch.randn(2, 3, 64, dtype=dtype), tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_unaligned_weights(dtype):
    moe = layer(dtype=dtype)
    state = {}
    for name, tensor in moe.state_dict().items():
        storage = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
        state[name] = storage[1:].view(tensor.shape).copy_(tensor)
        assert state[name].data_ptr() % 16
    unaligned = replaced(moe, state)
    for tokens in (1, 3, 40):
        torch._dynamo.reset()
        check(unaligned, torch.randn(1, tokens, 64, dtype=dtype), tolerance=TOLERANCE[dtype])

"""Modules in FP8: what they compute, and that converting, moving and loading them leaves their weights as they are."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dsopt.fp8 import FP8Block, dequantize, quantize
from dsopt.fp8.modules import FP8Experts, FP8Linear
from dsopt.testing import rand, relative_l2

SMALL = FP8Block(rows=16, columns=8)
BLOCK = (16, 8)


def linear(format=SMALL, bias=True, n=40, k=33) -> FP8Linear:
    r = rand("cpu", torch.float32)
    return FP8Linear(*quantize(r(n, k), format), r(n) if bias else None, format.block_of((n, k)))


def experts(intermediate=24, format=SMALL, hidden=20, num_experts=4, **options) -> FP8Experts:
    r = rand("cpu", torch.float32, 1)
    halves = [quantize(r(num_experts, intermediate, hidden), format) for _ in range(2)]
    gate_up, scale = (torch.cat([h[i].view(h[i].dtype) for h in halves], 1) for i in (0, 1))
    down = quantize(r(num_experts, hidden, intermediate) * 0.2, format)
    return FP8Experts(gate_up, scale, *down, block=format.block_of((1, 1)), **options)


def bits(module: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: p.detach().clone().view(torch.uint8)
        for name, p in module.named_parameters()
        if p.dtype == torch.float8_e4m3fn or name.endswith("_scale_inv")
    }


@pytest.mark.parametrize("scale_fmt", ["float32", "ue8m0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_multiplies_with_the_dequantized_weight(dtype, scale_fmt):
    module = linear(FP8Block(scale_fmt, 16, 8)).to(dtype)
    x = rand("cpu", dtype, 2)(2, 3, 33)
    weight = dequantize(module.weight, module.weight_scale_inv, dtype, BLOCK)
    assert torch.equal(module(x), F.linear(x, weight, module.bias)) and module.bias.dtype == dtype


@pytest.mark.parametrize("intermediate", [32, 24])  # of whole blocks, and of partial ones
@pytest.mark.parametrize("activation", ["silu", "relu2"])
def test_experts_compute_the_chosen_gated_mlps(intermediate, activation):
    module = experts(intermediate, activation=activation, limit=None)
    x, r = rand("cpu", torch.float32, 3)(5, 20), rand("cpu", torch.float32, 4)
    ids, weights = torch.tensor([[0, 2], [1, 3], [2, 2], [3, 0], [1, 2]]), r(5, 2)
    blocks = module.gate_up_proj_scale_inv.shape[1] // 2
    want = torch.zeros(5, 20)
    for t in range(5):
        for k in range(2):
            e = ids[t, k]
            gate, up = module.gate_up_proj[e].split(intermediate)
            scales = module.gate_up_proj_scale_inv[e].split(blocks)
            gate, up = (
                dequantize(w, s, torch.float32, BLOCK) for w, s in zip((gate, up), scales, strict=True)
            )
            down = dequantize(module.down_proj[e], module.down_proj_scale_inv[e], torch.float32, BLOCK)
            hidden = F.silu(gate @ x[t]) if activation == "silu" else F.relu(gate @ x[t]).square()
            want[t] += weights[t, k] * (down @ (hidden * (up @ x[t])))
    assert relative_l2(module(x, ids, weights), want) < 1e-5
    assert torch.equal(module(x.view(5, 1, 20), ids, weights), module(x, ids, weights).view(5, 1, 20))


@pytest.mark.parametrize("make", [linear, experts, lambda: linear(FP8Block("ue8m0", 16, 8))])
@pytest.mark.parametrize(
    "convert",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.type(torch.float32),
        lambda m: m.to("cpu", torch.bfloat16),
        copy.deepcopy,
        lambda m: m.share_memory(),
    ],
)
def test_conversions_keep_weights_and_scales(make, convert):
    module = make()
    before, dtypes = bits(module), {n: p.dtype for n, p in module.named_parameters()}
    converted = convert(nn.Sequential(module))[0]
    after = bits(converted)
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert all(p.dtype == dtypes[n] for n, p in converted.named_parameters() if n != "bias")


def test_parameters_stay_the_same_objects_when_converted():
    module = linear()
    weight, scale = module.weight, module.weight_scale_inv
    module.bfloat16()
    assert module.weight is weight and module.weight_scale_inv is scale
    assert not weight.requires_grad and not scale.requires_grad


def test_moving_to_another_device_moves_bytes():
    module = linear().to("meta", torch.bfloat16)
    assert {p.device.type for p in module.parameters()} == {"meta"}
    assert (module.weight.dtype, module.weight_scale_inv.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert module.to_empty(device="cpu").weight.shape == (40, 33)


@pytest.mark.parametrize("make", [linear, experts])
@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts_go_round(make, assign):
    module, other = make(), make()
    state = {k: v.clone() for k, v in module.state_dict().items()}
    for p in other.parameters():
        p.data.zero_()
    assert not other.load_state_dict(state, assign=assign).missing_keys
    assert all(
        torch.equal(v.view(torch.uint8), other.state_dict()[k].view(torch.uint8)) for k, v in state.items()
    )


def test_a_wide_weight_is_not_loaded():
    module = linear()
    before, state = bits(module), module.state_dict()
    state["weight"] = torch.ones(40, 33)
    with pytest.raises(RuntimeError, match=r"weight must be torch\.float8_e4m3fn, got torch\.float32"):
        module.load_state_dict(state)
    assert all(torch.equal(before[n], after) for n, after in bits(module).items())
    state["weight"] = module.weight.data
    state["weight_scale_inv"] = module.weight_scale_inv.data.half()
    with pytest.raises(RuntimeError, match=r"weight_scale_inv must be torch\.float32, got torch\.float16"):
        module.load_state_dict(state)


def test_wrong_tensors_are_refused():
    weight, scale = quantize(torch.ones(40, 33), SMALL)
    with pytest.raises(TypeError, match=r"weight must be float8_e4m3fn, got torch\.float32"):
        FP8Linear(torch.ones(40, 33), scale, block=BLOCK)
    with pytest.raises(
        TypeError, match=r"weight_scale_inv must be float32 or float8_e8m0fnu, got torch\.float16"
    ):
        FP8Linear(weight, scale.half(), block=BLOCK)
    with pytest.raises(ValueError, match=r"weight_scale_inv must have shape \[1, 1\]"):
        FP8Linear(weight, scale)
    with pytest.raises(ValueError, match=r"bias must have shape \[40\]"):
        FP8Linear(weight, scale, torch.ones(39), BLOCK)
    good = experts()
    gate, gate_scale, down, down_scale = (p.data for p in good.parameters())
    with pytest.raises(ValueError, match="activation must be one of silu"):
        FP8Experts(gate, gate_scale, down, down_scale, "tanh", block=BLOCK)
    with pytest.raises(ValueError, match=r"gate_up_proj must have shape \[4, 48, 20\]"):
        FP8Experts(gate[:, 1:], gate_scale, down, down_scale, block=BLOCK)
    with pytest.raises(ValueError, match="must have 4 rows of blocks"):
        FP8Experts(gate, gate_scale[:, :3], down, down_scale, block=BLOCK)
    with pytest.raises(ValueError, match="down_proj_scale_inv must have shape"):
        FP8Experts(gate, gate_scale, down, down_scale[:3], block=BLOCK)

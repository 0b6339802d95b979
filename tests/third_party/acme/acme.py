"""Kernels of backend `acme`: a norm that goes before all others, a gated MLP for those who ask for it."""

import torch
from torch.nn import functional as F

from dsopt.op import Kernel


def _plan_norm(x, weight, eps):
    def rms_norm(x, weight, eps):
        wide = x.float()
        wide = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()
        return (wide if weight is None else wide * weight.float()).to(x.dtype).contiguous()

    return rms_norm


def _plan_mlp(*args):
    def gated_mlp(x, w_gate, w_up, w_down, b_gate, b_up, b_down, activation, limit, *_):
        h = F.silu(F.linear(x, w_gate, b_gate)) * F.linear(x, w_up, b_up)
        return F.linear(h, w_down, b_down).contiguous()

    return gated_mlp


def _check_mlp(*args):
    activation, limit, *scales, _ = args[7:]
    if any(scale is not None for scale in scales):
        return "reads no weights in FP8"
    return None if (activation, limit) == ("silu", None) else "computes silu without a limit"


KERNELS = (
    Kernel("rms_norm", "acme", _plan_norm, device="cpu", priority=1000),
    Kernel(
        "gated_mlp",
        "acme",
        _plan_mlp,
        _check_mlp,
        device="cpu",
        dtypes=frozenset({torch.float32}),
        priority=-1,
    ),
)

"""Linear layers that share their input, and the gated MLP."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.nn import functional as F

from dsopt.numerics import rand
from dsopt.op import Op

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def multi_linear_reference(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    dtype: torch.dtype | None = None,
) -> list[torch.Tensor]:
    """[x @ w.T + b for each weight and bias]: sibling projections of one input, read in one sweep.

    x (..., in_features); weights[i] (out_features_i, in_features); biases[i] (out_features_i,) or None, one
    per weight. The weights stay where they are: nothing is concatenated.
    dtype: what everything is widened to first, and the results' dtype; by default that of x.
    """
    wide = x.dtype if dtype is None else dtype
    return [
        F.linear(x.to(wide), w.to(wide), None if b is None else b.to(wide))
        for w, b in zip(weights, biases, strict=True)
    ]


def gated_mlp_reference(
    x: torch.Tensor,
    w_gate: torch.Tensor,
    w_up: torch.Tensor,
    w_down: torch.Tensor,
    b_gate: torch.Tensor | None = None,
    b_up: torch.Tensor | None = None,
    b_down: torch.Tensor | None = None,
    activation: str = "silu",
    limit: float | None = None,
) -> torch.Tensor:
    """(act(x @ w_gate.T + b_gate) * (x @ w_up.T + b_up)) @ w_down.T + b_down.

    x (..., hidden); w_gate and w_up (intermediate, hidden); w_down (hidden_out, intermediate).
    activation: silu, gelu or gelu_tanh. limit: gate = min(gate, limit) and -limit <= up <= limit before it.
    Source: Shazeer, arXiv 2002.05202 (SwiGLU).
    """
    gate, up = F.linear(x, w_gate, b_gate), F.linear(x, w_up, b_up)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return F.linear(ACTIVATIONS[activation](gate) * up, w_down, b_down)


def refuse_variants(activation: str, limit: float | None) -> str | None:
    """Why a kernel that computes silu without a limit refuses these arguments of gated_mlp, or None."""
    if activation != "silu":
        return f"computes silu, got activation {activation}"
    return None if limit is None else f"has no limit before the activation, got {limit}"


def _multi_linear_samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple]:
    r = rand(device, dtype)

    def w(n, k):
        return r(n, k) * k**-0.5

    for shape, widths in (
        ((1, 1, 64), (48, 48)),
        ((2, 3, 33), (7, 1, 50)),
        ((5, 128), (16,)),
        ((0, 16), (8, 8)),
    ):
        k = shape[-1]
        yield r(*shape), [w(n, k) for n in widths], [None] * len(widths)
        yield r(*shape), [w(n, k) for n in widths], [None, *(r(n) for n in widths[1:])]
    yield r(3, 2, 40)[:, 1], [w(24, 80)[:, ::2], w(40, 9).T], [r(24), None]
    wide = torch.promote_types(dtype, torch.float32)
    for tokens in (1, 3, 300):
        yield r(tokens, 40), [w(24, 40), w(3, 40)], [None, r(3)], wide


def _gated_mlp_samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple]:
    r = rand(device, dtype)
    for shape, inner, out in (
        ((1, 1, 64), 96, 64),
        ((2, 3, 33), 17, 5),
        ((300, 16), 40, 16),
        ((0, 16), 8, 16),
    ):
        k = shape[-1]
        w = (r(inner, k) * k**-0.5, r(inner, k) * k**-0.5, r(out, inner) * inner**-0.5)
        yield (r(*shape), *w)
        yield (r(*shape), *w, r(inner), r(inner), r(out))
    yield (r(2, 48)[:, ::2], *(r(12, 24), r(12, 24), r(12, 24).T))
    w = (r(24, 16), r(24, 16), r(16, 24) * 24**-0.5)
    for activation in ACTIVATIONS:
        yield (r(3, 16), *w, None, None, None, activation)
    yield (r(3, 16), *w, r(24), r(24), None, "silu", 1.5)


multi_linear = Op(
    name="multi_linear",
    schema="(Tensor x, Tensor[] weights, Tensor?[] biases, ScalarType? dtype=None) -> Tensor[]",
    reference=multi_linear_reference,
    samples=_multi_linear_samples,
)
gated_mlp = Op(
    name="gated_mlp",
    schema="(Tensor x, Tensor w_gate, Tensor w_up, Tensor w_down, Tensor? b_gate=None, Tensor? b_up=None, "
    "Tensor? b_down=None, str activation='silu', float? limit=None) -> Tensor",
    reference=gated_mlp_reference,
    samples=_gated_mlp_samples,
    family="mlp",
)

"""Linear layers that share their input, and the gated MLP."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.nn import functional as F

from dsopt.fp8 import FP8Block
from dsopt.numerics import rand
from dsopt.op import Op
from dsopt.ops.quant import fp8_operands, widened

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
    scales: Sequence[torch.Tensor | None] | None = None,
    block: Sequence[int] = (128, 128),
) -> list[torch.Tensor]:
    """[x @ w.T + b for each weight and bias]: sibling projections of one input, read in one sweep.

    x (..., in_features); weights[i] (out_features_i, in_features); biases[i] (out_features_i,) or None, one
    per weight. The weights stay where they are: nothing is concatenated.
    dtype: what everything is widened to first, and the results' dtype; by default that of x.
    scales[i]: the scales of weights[i] where it is float8_e4m3fn, else None, as for `dsopt::dequantize` in blocks of
        `block`; None for no scales at all.
    """
    wide = x.dtype if dtype is None else dtype
    scales = [None] * len(weights) if scales is None else scales
    weights = [widened(w, s, wide, block).to(wide) for w, s in zip(weights, scales, strict=True)]
    return [
        F.linear(x.to(wide), w, None if b is None else b.to(wide))
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
    scale_gate: torch.Tensor | None = None,
    scale_up: torch.Tensor | None = None,
    scale_down: torch.Tensor | None = None,
    block: Sequence[int] = (128, 128),
) -> torch.Tensor:
    """(act(x @ w_gate.T + b_gate) * (x @ w_up.T + b_up)) @ w_down.T + b_down.

    x (..., hidden); w_gate and w_up (intermediate, hidden); w_down (hidden_out, intermediate).
    activation: silu, gelu or gelu_tanh. limit: gate = min(gate, limit) and -limit <= up <= limit before it.
    scale_gate, scale_up, scale_down: the scales of those weights that are float8_e4m3fn, as for
        `dsopt::dequantize` in blocks of `block`.
    Source: Shazeer, arXiv 2002.05202 (SwiGLU).
    """
    w_gate = widened(w_gate, scale_gate, x.dtype, block)
    w_up, w_down = widened(w_up, scale_up, x.dtype, block), widened(w_down, scale_down, x.dtype, block)
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
    small = FP8Block(rows=16, columns=8)
    for tokens, format in ((1, small), (3, FP8Block("ue8m0")), (300, small), (0, small)):
        weights, scales, block = fp8_operands([w(33, 40), w(16, 40), w(3, 40)], format)
        yield r(tokens, 40), weights, [None, r(16), None], None, scales, block
    weights, scales, block = fp8_operands([w(130, 257)], FP8Block())
    yield r(2, 257), weights, [r(130)], wide, scales, block
    # one of two in FP8, rows out of the middle of a weight
    weights, scales, block = fp8_operands([w(64, 40)], small)
    yield r(2, 40), [weights[0][16:41], w(9, 40)], [None, None], None, [scales[0][1:3], None], block


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
    for shape, inner, out, format in (
        ((1, 1, 64), 40, 33, FP8Block(rows=16, columns=8)),
        ((3, 257), 131, 129, FP8Block()),
        ((300, 33), 17, 5, FP8Block("ue8m0", 16, 8)),
        ((0, 16), 8, 16, FP8Block()),
    ):
        k = shape[-1]
        w = [r(inner, k) * k**-0.5, r(inner, k) * k**-0.5, r(out, inner) * inner**-0.5]
        weights, scales, block = fp8_operands(w, format)
        yield (r(*shape), *weights, None, None, None, "silu", None, *scales, block)
    yield (r(*shape), *weights[:2], w[2], r(8), None, r(16), "gelu", 1.0, *scales[:2], None, block)


multi_linear = Op(
    name="multi_linear",
    schema="(Tensor x, Tensor[] weights, Tensor?[] biases, ScalarType? dtype=None, Tensor?[]? scales=None, "
    "int[2] block=[128, 128]) -> Tensor[]",
    reference=multi_linear_reference,
    samples=_multi_linear_samples,
)
gated_mlp = Op(
    name="gated_mlp",
    schema="(Tensor x, Tensor w_gate, Tensor w_up, Tensor w_down, Tensor? b_gate=None, Tensor? b_up=None, "
    "Tensor? b_down=None, str activation='silu', float? limit=None, Tensor? scale_gate=None, "
    "Tensor? scale_up=None, Tensor? scale_down=None, int[2] block=[128, 128]) -> Tensor",
    reference=gated_mlp_reference,
    samples=_gated_mlp_samples,
    family="mlp",
)

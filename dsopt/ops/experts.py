"""Mixture of experts: the chosen experts' gated MLPs, weighted and summed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.nn import functional as F

from dsopt.fp8 import FP8Block
from dsopt.numerics import rand
from dsopt.op import Op
from dsopt.ops import linear
from dsopt.ops.linear import gated_mlp_reference
from dsopt.ops.quant import fp8_operands, widened

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    **linear.ACTIVATIONS,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    # of gpt-oss: x * sigmoid(1.702 x), whose partner is up + 1
    "swiglu_oai": lambda x: x * torch.sigmoid(1.702 * x),
}


def gate_and_up(
    h: torch.Tensor, other: torch.Tensor | None, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two halves (..., intermediate) of what w13 gave, or what w13 and w3 gave, as views."""
    if other is not None:
        return h, other
    return (h[..., 0::2], h[..., 1::2]) if interleaved else h.chunk(2, -1)


def activate(
    h: torch.Tensor,
    other: torch.Tensor | None,
    activation: str,
    gated: bool,
    interleaved: bool,
    limit: float | None,
) -> torch.Tensor:
    """What w2 is given, from what w13 (and w3) gave; see `moe_experts_reference`."""
    if not gated:
        return ACTIVATIONS[activation](h)
    gate, up = gate_and_up(h, other, interleaved)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return ACTIVATIONS[activation](gate) * (up + 1 if activation == "swiglu_oai" else up)


def moe_experts_reference(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    w3: torch.Tensor | None = None,
    b13: torch.Tensor | None = None,
    b2: torch.Tensor | None = None,
    b3: torch.Tensor | None = None,
    activation: str = "silu",
    gated: bool = True,
    interleaved: bool = False,
    limit: float | None = None,
    shared_gate: torch.Tensor | None = None,
    shared_up: torch.Tensor | None = None,
    shared_down: torch.Tensor | None = None,
    scale13: torch.Tensor | None = None,
    scale2: torch.Tensor | None = None,
    scale3: torch.Tensor | None = None,
    shared_scale_gate: torch.Tensor | None = None,
    shared_scale_up: torch.Tensor | None = None,
    shared_scale_down: torch.Tensor | None = None,
    block: Sequence[int] = (128, 128),
) -> torch.Tensor:
    """sum_k weights[t,k] * expert[ids[t,k]](x[t]) + shared(x[t]) for each token t.

    expert[e](x) = w2[e] @ (act(gate) * up) + b2[e];   (gate, up) = w13[e] @ x + b13[e]
    or w2[e] @ act(w13[e] @ x + b13[e]) + b2[e] if not gated
    shared(x) = gated_mlp(x, shared_gate, shared_up, shared_down)

    x (num_tokens, hidden); ids (num_tokens, topk), int32 or int64; weights (num_tokens, topk), of any float dtype.
    w13 (num_experts, 2 * intermediate, hidden), views of any strides: the rows of gate before those of up, or
        taking turns if `interleaved`. With w3 the gate's rows are in w13 and up's in w3, (num_experts,
        intermediate, hidden) both. Not gated: w13 (num_experts, intermediate, hidden).
    w2 (num_experts, hidden_out, intermediate); b13, b3 and b2 (num_experts, rows of w13, w3 and w2) or None.
    activation: silu, gelu, gelu_tanh, relu, relu2 (its square), or swiglu_oai: act(x) = x * sigmoid(1.702 x)
        beside up + 1.
    limit: gate = min(gate, limit) and -limit <= up <= limit before the activation.
    shared_gate, shared_up (shared_intermediate, hidden), shared_down (hidden_out, shared_intermediate): the MLP
        that every token passes, or None all three.
    scale13, scale2, scale3, shared_scale_gate, shared_scale_up, shared_scale_down: the scales of those weights that
        are float8_e4m3fn, as for `dsopt::dequantize` in blocks of `block`; those of the first three have a leading
        axis of experts. Each matrix is in blocks of its own: where gate and up share w13 and the intermediate width
        is no multiple of the block's rows, one block holds rows of both.
    Returns (num_tokens, hidden_out) of x's dtype, contiguous. An id that is no expert's (below 0, or
    num_experts and above) adds nothing: the sentinel of expert parallelism. Its weight is not looked at.

    Source: DeepSeekMoE, arXiv 2401.06066, section 3; gpt-oss, arXiv 2508.10925, for swiglu_oai.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    out = torch.zeros(x.shape[0], w2.shape[1], dtype=wide, device=x.device)
    if shared_gate is not None:
        shared_scales = shared_scale_gate, shared_scale_up, shared_scale_down
        mlp = shared_gate, shared_up, shared_down, None, None, None, "silu", None, *shared_scales, block
        out = out + gated_mlp_reference(x, *mlp)
    w13, w2 = widened(w13, scale13, x.dtype, block), widened(w2, scale2, x.dtype, block)
    w3 = None if w3 is None else widened(w3, scale3, x.dtype, block)
    # every expert sees every token, so that nothing here depends on what the ids are
    for e in range(w13.shape[0]):
        h = F.linear(x, w13[e], None if b13 is None else b13[e])
        other = None if w3 is None else F.linear(x, w3[e], None if b3 is None else b3[e])
        h = activate(h, other, activation, gated, interleaved, limit)
        y = F.linear(h, w2[e], None if b2 is None else b2[e]).to(wide)
        hit = ids == e
        weight = weights.to(wide).masked_fill(~hit, 0.0).sum(-1, keepdim=True)
        out = out + (y * weight).masked_fill(~hit.any(-1, keepdim=True), 0.0)
    return out.to(x.dtype)


def _fake(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, *_):
    return x.new_empty((x.shape[0], w2.shape[1]))


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple]:
    def case(tokens, topk, experts, hidden, inner, out=None, gated=True, seed=0):
        r = rand(device, dtype, seed)
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.rand(tokens, experts, generator=generator).argsort(-1)[:, :topk].to(device)
        weights = r(tokens, topk).float().softmax(-1) if topk else r(tokens, 0).float()
        rows = 2 * inner if gated else inner
        w13 = r(experts, rows, hidden) * hidden**-0.5
        w2 = r(experts, hidden if out is None else out, inner) * inner**-0.5
        return r(tokens, hidden), chosen, weights, w13, w2

    yield case(1, 2, 4, 16, 12)
    for tokens in (1, 2, 5, 16, 40):
        yield case(tokens, 2, 8, 64, 48)
    yield case(3, 5, 257, 24, 16)
    yield case(1, 6, 64, 256, 176)
    # odd widths, every expert, no token, no choice, another width out
    yield case(7, 3, 6, 33, 17, out=9)
    yield case(4, 5, 5, 16, 24)
    yield case(0, 2, 4, 16, 8)
    yield case(3, 0, 4, 16, 8)
    # all tokens on one expert, the same expert twice, sentinels beside real ones and alone
    x, ids, weights, w13, w2 = case(9, 2, 4, 32, 24)
    yield x, torch.full_like(ids, 3), weights, w13, w2
    yield x, torch.stack((ids[:, 0], torch.full_like(ids[:, 0], 4)), 1), weights, w13, w2
    yield x, torch.full_like(ids, -1), weights, w13, w2
    yield x, ids.to(torch.int32), weights.to(dtype), w13, w2
    # split, transposed, interleaved, biased, limited, not gated, shared
    gate, up = w13.chunk(2, 1)
    yield x, ids, weights, gate.contiguous(), w2, up.contiguous()
    yield x, ids, weights, w13.mT.contiguous().mT, w2.mT.contiguous().mT
    r = rand(device, dtype, 1)
    b13, b2 = r(4, 48), r(4, 32)
    yield x, ids, weights, w13, w2, None, b13, b2
    yield x, ids, weights, gate, w2, up, b13[:, :24], b2, b13[:, 24:], "gelu"
    yield x * 3, ids, weights, w13, w2, None, b13, b2, None, "swiglu_oai", True, True, 1.5
    yield x * 3, ids, weights, w13, w2, None, None, None, None, "silu", True, False, 1.0
    for activation in ("silu", "gelu_tanh", "relu", "relu2"):
        yield x, ids, weights, gate, w2, None, None, None, None, activation, False
    shared = [r(20, 32) * 0.2, r(20, 32) * 0.2, r(32, 20) * 0.2]
    yield x, ids, weights, w13, w2, None, None, None, None, "silu", True, False, None, *shared
    yield x[::2], ids[::2], weights[::2], w13[:, ::2], w2[..., ::2]
    # FP8: partial blocks, exponents, gate and up apart, the shared MLP too
    plain = None, None, None, "silu", True, False, None
    for sizes, format in (
        ((1, 2, 4, 40, 24), FP8Block(rows=8, columns=16)),
        ((5, 3, 6, 33, 17), FP8Block("ue8m0", 8, 16)),
        ((3, 2, 4, 257, 131), FP8Block()),
        ((40, 2, 4, 24, 16), FP8Block(rows=8, columns=8)),
        ((0, 2, 4, 16, 8), FP8Block()),
    ):
        x, ids, weights, *w = case(*sizes)
        (w13, w2), scales, block = fp8_operands(w, format)
        yield x, ids, weights, w13, w2, None, *plain, None, None, None, *scales, None, None, None, None, block
    x, ids, weights, w13, w2 = case(9, 2, 4, 32, 24)
    gate, up = w13.chunk(2, 1)
    (gate, down, up), scales, block = fp8_operands([gate, w2, up], FP8Block(rows=16, columns=16))
    mlp, mlp_scales, _ = fp8_operands(shared, FP8Block(rows=16, columns=16))
    yield x, ids, weights, gate, down, up, *plain, *mlp, *scales, *mlp_scales, block
    biased = b13, b2, None, "swiglu_oai", True, True, 1.5
    (wide13, wide2), scales, block = fp8_operands([w13, w2], FP8Block(rows=16, columns=16))
    yield x, ids, weights, wide13, wide2, None, *biased, *shared, *scales, None, None, None, None, block
    yield x, ids, weights, wide13, w2, None, *plain, *mlp, scales[0], None, None, *mlp_scales, block


moe_experts = Op(
    name="moe_experts",
    schema="(Tensor x, Tensor ids, Tensor weights, Tensor w13, Tensor w2, Tensor? w3=None, Tensor? b13=None, "
    "Tensor? b2=None, Tensor? b3=None, str activation='silu', bool gated=True, bool interleaved=False, "
    "float? limit=None, Tensor? shared_gate=None, Tensor? shared_up=None, Tensor? shared_down=None, "
    "Tensor? scale13=None, Tensor? scale2=None, Tensor? scale3=None, Tensor? shared_scale_gate=None, "
    "Tensor? shared_scale_up=None, Tensor? shared_scale_down=None, int[2] block=[128, 128]) -> Tensor",
    reference=moe_experts_reference,
    samples=_samples,
    fake=_fake,
    family="moe",
)

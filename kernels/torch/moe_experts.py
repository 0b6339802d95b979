"""Experts through ATen: choices sorted by expert, then GEMMs over each expert's tokens where its weights lie.

`grouped` multiplies all experts' tokens in one `torch._grouped_mm`, without asking the host how many each has.
`by_expert` loops over the experts that were chosen; on CPU it is faster where an expert has many tokens and bfloat16
is slow (see `gemm`), and on any device it takes the layouts and dtypes that `grouped` cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from dsopt.kernels.torch.gated_mlp import gated_mlp
from dsopt.kernels.torch.gemm import MANY_TOKENS, is_slow, linear
from dsopt.op import Kernel
from dsopt.ops.experts import activate
from dsopt.ops.quant import refuse_scales


def by_expert(
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
    """One expert after another, those without tokens left out; reads the counts on the host.

    Where weights are in FP8, an expert's are widened when it is its turn.
    """
    expert, order = _sorted(ids, w13.shape[0])
    counts = torch.bincount(expert, minlength=w13.shape[0] + 1)[:-1].tolist()
    tokens = order // max(1, ids.shape[1])
    shared_scales = shared_scale_gate, shared_scale_up, shared_scale_down
    out = _shared(x, w2.shape[1], shared_gate, shared_up, shared_down, *shared_scales, block)
    weights = weights.reshape(-1)[order].to(out.dtype).unsqueeze(-1)
    start = 0
    for e, count in enumerate(counts):
        if count == 0:
            continue
        rows = slice(start, start + count)
        start += count
        token = tokens[rows]
        picked = x[token]
        h = linear(picked, w13[e], _of(b13, e), _of(scale13, e), block)
        other = None if w3 is None else linear(picked, w3[e], _of(b3, e), _of(scale3, e), block)
        h = activate(h, other, activation, gated, interleaved, limit)
        y = linear(h, w2[e], _of(b2, e), _of(scale2, e), block)
        out.index_add_(0, token, y * weights[rows])
    return out.to(x.dtype)


def _of(stack: torch.Tensor | None, expert: int) -> torch.Tensor | None:
    return None if stack is None else stack[expert]


def grouped(
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
    *_,
) -> torch.Tensor:
    """All experts in one product per weight, without a word from the device to the host; no weights in FP8."""
    num_experts, topk = w13.shape[0], ids.shape[1]
    out = _shared(x, w2.shape[1], shared_gate, shared_up, shared_down)
    if ids.numel() == 0:
        return out.to(x.dtype)
    expert, order = _sorted(ids, num_experts)
    # searchsorted rather than bincount, which asks for the largest value on the host
    experts = torch.arange(num_experts, device=x.device)
    ends = torch.searchsorted(expert, experts, right=True, out_int32=True)

    def product(rows: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
        y = torch._grouped_mm(rows, w.mT, offs=ends)
        return y if b is None else y + b[expert.clamp(max=num_experts - 1)]

    picked = x[order // topk]
    h = product(picked, w13, b13)
    other = None if w3 is None else product(picked, w3, b3)
    y = product(activate(h, other, activation, gated, interleaved, limit), w2, b2)
    y = y * weights.reshape(-1)[order].to(out.dtype).unsqueeze(-1)
    # rows of ids that are no expert's were never written
    y = y.masked_fill((expert == num_experts).unsqueeze(-1), 0.0)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=x.device))
    out += y[back].view(*ids.shape, -1).sum(1)
    return out.to(x.dtype)


def _sorted(ids: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts chosen in order, num_experts for what is none's, and the choice each of them is."""
    expert = ids.reshape(-1).long()
    expert = expert.masked_fill((expert < 0) | (expert > num_experts), num_experts)
    return expert.sort(stable=True)


def _shared(
    x: torch.Tensor,
    width: int,
    gate: torch.Tensor | None,
    up: torch.Tensor | None,
    down: torch.Tensor | None,
    *scales_and_block: torch.Tensor | Sequence[int] | None,
) -> torch.Tensor:
    """What the shared experts give, or zeros, in at least float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if gate is None:
        return torch.zeros(x.shape[0], width, dtype=wide, device=x.device)
    return gated_mlp(x, gate, up, down, None, None, None, "silu", None, *scales_and_block).to(wide)


def _groups(w: torch.Tensor) -> bool:
    """Whether `torch._grouped_mm` reads a weight where it lies: neighbours in one dimension, 16 bytes in the others.

    The rows it is multiplied with, of its width, are read under the same rule.
    """
    *aligned, rows = [n * w.element_size() % 16 == 0 for n in (*w.stride(), w.shape[2])]
    return rows and aligned[0] and ((w.stride(2) == 1 and aligned[1]) or (w.stride(1) == 1 and aligned[2]))


def _plan(x, ids, weights, w13, w2, w3, *rest) -> Callable:
    *_, scale13, scale2, scale3, scale_gate, scale_up, scale_down, _ = rest
    in_fp8 = refuse_scales(scale13, scale2, scale3, scale_gate, scale_up, scale_down) is not None
    groups = (
        not in_fp8 and x.dtype == torch.bfloat16 and all(_groups(w) for w in (w13, w2, w3) if w is not None)
    )
    if x.device.type == "cuda":
        return grouped if groups and torch.cuda.get_device_capability(x.device) >= (8, 0) else by_expert
    if not groups or x.device.type != "cpu":
        return by_expert

    def moe_experts(x, ids, weights, w13, *rest):
        many = is_slow(x.dtype) and ids.numel() >= MANY_TOKENS * w13.shape[0]
        return (by_expert if many else grouped)(x, ids, weights, w13, *rest)

    return moe_experts


KERNELS = (Kernel(op="moe_experts", backend="torch", plan=_plan, priority=1),)

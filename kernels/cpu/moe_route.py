"""Native routing: one pass per token over its scores, the row in the first-level cache, logits of any of NATIVE."""

from __future__ import annotations

import torch

from dsopt.capture import known
from dsopt.kernels.cpu.native import CPU, DTYPES, NATIVE, _cpu, plan, rows
from dsopt.op import Kernel
from dsopt.ops.route import GROUP_SCORES

SCORING = _cpu.Scoring.__members__
BIAS_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def moe_route(
    logits: torch.Tensor,
    topk: int,
    scoring: str = "softmax",
    bias: torch.Tensor | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    group_score: str = "max",
    outside: float | None = None,
    renormalize: bool = False,
    eps: float = 0.0,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    *tokens, num_experts = logits.shape
    weights = torch.empty(*tokens, topk, dtype=torch.float32, device=CPU)
    ids = torch.empty(*tokens, topk, dtype=torch.int64, device=CPU)
    num_tokens = logits.numel() // num_experts if num_experts else 0
    logits, stride = rows(logits)
    if bias is not None:
        bias = bias.to(torch.float32).contiguous()
    _cpu.moe_route(
        logits.data_ptr(),
        stride,
        0 if bias is None else bias.data_ptr(),
        weights.data_ptr(),
        ids.data_ptr(),
        (num_tokens, num_experts, topk, num_groups, topk_groups),
        float("-inf") if outside is None else outside,
        eps,
        scale,
        SCORING[scoring],
        group_score == "top2",
        renormalize,
        NATIVE[logits.dtype],
    )
    return weights, ids


def _check(logits, topk, scoring, bias, num_groups, topk_groups, group_score, *rest) -> str | None:
    num_experts = logits.shape[-1]
    if logits.ndim == 0 or not (
        0 <= topk <= num_experts and num_groups > 0 and num_experts % num_groups == 0
    ):
        return (
            f"needs topk <= experts in groups of one size, got {topk} of {num_experts} in {num_groups} groups"
        )
    if group_score not in GROUP_SCORES or topk_groups < 1:
        return f"needs the best groups by {' or '.join(GROUP_SCORES)}, got {topk_groups} by {group_score}"
    if scoring not in SCORING:
        return f"computes {', '.join(SCORING)}, got scoring {scoring}"
    if bias is None:
        return None
    if bias.dtype not in BIAS_DTYPES or bias.device.type != "cpu":
        return f"needs a float32, bfloat16 or float16 bias on the CPU, got {bias.dtype} on {bias.device}"
    if bias.ndim != 1 or known(bias.shape[0] != num_experts):
        return f"needs a bias of shape [{num_experts}], got {list(bias.shape)}"
    return None


KERNELS = (
    Kernel(
        "moe_route", "cpu", plan(moe_route), _check, device="cpu", dtypes=DTYPES, priority=20, records=True
    ),
)

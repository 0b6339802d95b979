"""Choice of experts by Numba: one pass over the scores of each token, in float32."""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import prange

from dsopt.capture import known
from dsopt.kernels.numba.runtime import flat, inner, kernel, nothing, run_rows
from dsopt.op import Kernel
from dsopt.ops.route import GROUP_SCORES

_SCORINGS = ("softmax", "sigmoid", "sqrtsoftplus")


@inner
def _scores(kind, logits, out):
    if kind == 0:
        most, total = np.float32(-np.inf), np.float32(0)
        for x in logits:
            most = x if x > most else most
        for i in range(logits.size):
            out[i] = math.exp(logits[i] - most)
            total += out[i]
        for i in range(logits.size):
            out[i] /= total
    elif kind == 1:
        for i in range(logits.size):
            out[i] = np.float32(1) / (np.float32(1) + math.exp(-logits[i]))
    else:
        for i in range(logits.size):
            x = logits[i]
            out[i] = math.sqrt(x if x > 20 else math.log1p(math.exp(x)))


@inner
def _key(x):
    """An integer that orders as torch.sort does: NaN above all, the two zeros equal."""
    if x != x:
        return np.int32(0x7FFFFFFF)
    if x == 0:
        return np.int32(0)
    bits = np.float32(x).view(np.int32)
    return np.int32(bits ^ np.int32(0x7FFFFFFF)) if bits < 0 else bits


@inner
def _largest(x, k, keys, ids):
    """ids[:k] = the indices of the k largest of x, the largest first, of equal ones the lower index first."""
    filled = 0
    for i in range(x.size):
        key = _key(x[i])
        if filled == k and (k == 0 or key <= keys[k - 1]):
            continue
        j = min(filled, k - 1)
        filled = min(filled + 1, k)
        while j > 0 and keys[j - 1] < key:
            keys[j], ids[j] = keys[j - 1], ids[j - 1]
            j -= 1
        keys[j], ids[j] = key, i


@inner
def _group_score(x, top2):
    """The largest of x, or the sum of its largest two; NaN if that has one."""
    keys, best = np.empty(2, np.int32), np.empty(2, np.int64)
    count = min(x.size, 2 if top2 else 1)
    _largest(x, count, keys, best)
    return x[best[0]] + x[best[1]] if count == 2 else x[best[0]]


@inner
def _some(
    begin, end, logits, bias, weights, ids, experts, topk, scoring, groups, topk_groups, top2, outside,
    renormalize, eps, scale,
):  # fmt: skip
    scores, choice = np.empty(experts, np.float32), np.empty(experts, np.float32)
    keys, best = np.empty(max(topk, topk_groups), np.int32), np.empty(topk_groups, np.int64)
    by_group, inside = np.empty(groups, np.float32), np.empty(groups, np.bool_)
    size = experts // groups
    for t in range(begin, end):
        chosen = ids[t * topk : (t + 1) * topk]
        _scores(scoring, logits[t * experts : (t + 1) * experts], scores)
        for e in range(experts):
            choice[e] = scores[e] + bias[e] if bias.size else scores[e]
        if topk_groups < groups:
            for g in range(groups):
                by_group[g] = _group_score(choice[g * size : (g + 1) * size], top2)
            _largest(by_group, topk_groups, keys, best)
            inside[:] = False
            for g in best:
                inside[g] = True
            for e in range(experts):
                if not inside[e // size]:
                    choice[e] = outside
        _largest(choice, topk, keys, chosen)
        total = np.float32(1)
        if renormalize:
            total = np.float32(eps)
            for e in chosen:
                total += scores[e]
        for k in range(topk):
            weights[t * topk + k] = scores[chosen[k]] / total * np.float32(scale)


@kernel
def _all(
    tokens, logits, bias, weights, ids, experts, topk, scoring, groups, topk_groups, top2, outside,
    renormalize, eps, scale,
):  # fmt: skip
    for t in prange(tokens):
        _some(
            t, t + 1, logits, bias, weights, ids, experts, topk, scoring, groups, topk_groups, top2, outside,
            renormalize, eps, scale,
        )  # fmt: skip


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
    shape = (*logits.shape[:-1], topk)
    weights, ids = torch.empty(shape, dtype=torch.float32), torch.empty(shape, dtype=torch.int64)
    if ids.numel():
        wide = logits.float().contiguous()
        add = nothing(torch.float32) if bias is None else flat(bias.float().contiguous())
        never = np.float32(-math.inf if outside is None else outside)
        groups = (num_groups, topk_groups, GROUP_SCORES[group_score] == 2, never)
        operands = (flat(wide), add, flat(weights), flat(ids))
        how = (
            logits.shape[-1],
            topk,
            _SCORINGS.index(scoring),
            *groups,
            renormalize,
            float(eps),
            float(scale),
        )
        run_rows(32 * wide.numel(), _some, _all, ids.numel() // topk, *operands, *how)
    return weights, ids


def _check(logits, topk, scoring="softmax", bias=None, num_groups=1, *rest):
    if scoring not in _SCORINGS:
        return f"needs a scoring of {', '.join(_SCORINGS)}, got {scoring}"
    if bias is not None and bias.device != logits.device:
        return f"needs a bias on {logits.device}, got {bias.device}"
    if bias is not None and (bias.ndim != 1 or known(bias.shape[0] != logits.shape[-1])):
        return f"needs a bias for each expert, got {list(bias.shape)} for {list(logits.shape)}"
    if not known(topk <= logits.shape[-1]) or not known(logits.shape[-1] % num_groups == 0):
        return f"needs topk <= num_experts in equal groups, got {topk} of {logits.shape[-1]} in {num_groups}"
    return None


KERNELS = (
    Kernel(
        "moe_route",
        "numba",
        lambda *_: moe_route,
        _check,
        device="cpu",
        dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16}),
        priority=10,
    ),
)

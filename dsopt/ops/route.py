"""Choice of experts: scores, groups, top-k, mixing weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.nn import functional as F

from dsopt.numerics import rand, relative_l2
from dsopt.op import Op

SCORES = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: F.softplus(logits).sqrt(),
}
# what makes one number of a group: its best choice score, or the sum of its best two
GROUP_SCORES = {"max": 1, "top2": 2}


def choice_scores(
    logits: torch.Tensor,
    scoring: str,
    bias: torch.Tensor | None,
    num_groups: int,
    topk_groups: int,
    group_score: str,
    outside: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(scores, choice, group scores): what mixes, what is chosen by, and what groups are chosen by.

    All in at least float32; see `moe_route_reference`. The group scores are (..., num_groups).
    """
    scores = SCORES[scoring](logits.to(torch.promote_types(logits.dtype, torch.float32)))
    choice = scores if bias is None else scores + bias
    grouped = choice.unflatten(-1, (num_groups, -1))
    by_group = torch.sort(grouped, dim=-1, descending=True).values[..., : GROUP_SCORES[group_score]].sum(-1)
    if topk_groups < num_groups:
        chosen = torch.sort(by_group, dim=-1, descending=True, stable=True).indices[..., :topk_groups]
        inside = torch.zeros_like(by_group, dtype=torch.bool).scatter(-1, chosen, True)
        never = float("-inf") if outside is None else outside
        choice = grouped.masked_fill(~inside.unsqueeze(-1), never).flatten(-2)
    return scores, choice, by_group


def moe_route_reference(
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
    """The topk experts of each token and the weights their outputs are mixed with.

    s = softmax(logits) | sigmoid(logits) | sqrt(softplus(logits));   choice = s + bias
    group g of num_experts / num_groups neighbours scores max(choice in g), or the sum of its best two (`top2`);
    outside the topk_groups best groups, choice = `outside`, or -inf if that is None
    ids = the topk experts of largest choice;   w = s[ids];   w = w / (sum(w) + eps) if renormalize;   w * scale

    logits (..., num_experts); bias (num_experts,) or None. Computed in at least float32. Returns weights
    (..., topk) of that dtype and ids (..., topk), int64, from the largest choice to the smallest. The bias
    decides who is chosen and never what is mixed. Of equal choices (or groups) the one of lower index comes
    first. NaN counts as larger than anything, as in torch.topk, and makes its token's weights NaN if renormalized.

    Source: DeepSeek-V2, arXiv 2405.04434, sections 2.2.1-2.2.2; DeepSeek-V3, arXiv 2412.19437, section 2.1.2.
    """
    scores, choice, _ = choice_scores(logits, scoring, bias, num_groups, topk_groups, group_score, outside)
    ids = torch.sort(choice, dim=-1, descending=True, stable=True).indices[..., :topk].contiguous()
    weights = scores.gather(-1, ids)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    return weights * scale, ids


def moe_route_error(args: tuple, got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> float:
    """Distance of two routings of the same logits: relative L2 of the weights as (num_tokens, num_experts).

    Where two experts or groups tie as far as rounding can tell, either may be chosen and the order is free:
    such tokens are left out. inf where the experts chosen differ otherwise, or one has NaN where the other has none.
    """
    logits, _, scoring, bias, num_groups, topk_groups, group_score, outside = args[:8]
    (weights, ids), (other_weights, other_ids) = got, want
    if ids.shape != other_ids.shape or not bool(((ids >= 0) & (ids < logits.shape[-1])).all()):
        return float("inf")
    wide = logits.double()
    _, choice, by_group = choice_scores(
        wide, scoring, None if bias is None else bias.double(), num_groups, topk_groups, group_score, outside
    )
    dtypes = (torch.float32, weights.dtype, other_weights.dtype)
    resolution = max(torch.finfo(dtype).eps for dtype in dtypes)
    differ = (ids.sort(-1).values != other_ids.sort(-1).values).any(-1)
    tied = _narrow(by_group, topk_groups, resolution) | _narrow(choice, ids.shape[-1], resolution)
    if bool((differ & ~tied).any()):
        return float("inf")
    dense = torch.zeros(logits.shape, dtype=torch.float64, device=logits.device)
    mine = dense.scatter(-1, ids, weights.double())[~differ]
    other = dense.scatter(-1, other_ids, other_weights.double())[~differ]
    if not torch.equal(mine.isnan(), other.isnan()):
        return float("inf")
    return relative_l2(mine.nan_to_num(nan=0.0), other.nan_to_num(nan=0.0))


def _narrow(scores: torch.Tensor, topk: int, resolution: float) -> torch.Tensor:
    """True where the topk-th and the next score differ by less than rounding may move them."""
    if topk >= scores.shape[-1]:
        return torch.zeros(scores.shape[:-1], dtype=torch.bool, device=scores.device)
    best = torch.sort(scores, dim=-1, descending=True).values
    margin = best[..., topk - 1] - best[..., topk]
    size = scores.masked_fill(~scores.isfinite(), 0.0).abs().amax(-1)
    return ~(margin > 8 * resolution * size)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple]:
    r = rand(device, dtype)
    yield r(1, 8), 2
    yield r(7, 64), 6, "softmax", None, 1, 1, "max", None, True
    yield r(5, 160), 6, "softmax", None, 8, 3, "max", None, False, 0.0, 16.0
    yield r(3, 16), 4, "softmax", None, 4, 2, "top2", 0.0, True, 1e-20
    bias = r(256).float() * 0.1
    yield r(9, 256), 8, "sigmoid", bias, 8, 4, "top2", None, True, 1e-20, 2.5
    yield r(9, 256), 8, "sigmoid", bias, 1, 1, "max", None, True, 1e-20, 2.5
    yield r(4, 16), 3, "sigmoid", r(16).to(dtype) - 1, 4, 2, "top2", 0.0, False, 0.0, 1.0
    yield r(4, 257), 5, "sqrtsoftplus", r(257).float() * 0.1, 1, 1, "max", None, True, 1e-20, 1.5
    # every expert, one expert, many tokens, none
    yield r(6, 5), 5, "softmax"
    yield r(6, 1), 1, "sigmoid", None, 1, 1, "max", None, True
    yield r(700, 33), 7, "sigmoid"
    yield r(0, 16), 4
    yield r(2, 3, 12), 2
    yield r(5, 24)[:, ::2], 3
    # equal scores: the lower index first; saturated and tiny ones
    yield torch.zeros(3, 10, device=device, dtype=dtype), 4
    yield (r(4, 12) * 2).round(), 5, "sigmoid", None, 3, 2, "top2"
    yield r(4, 12) * 40, 5, "softmax", None, 1, 1, "max", None, True
    spoilt = r(3, 12)
    spoilt[1, 4] = float("nan")
    yield spoilt, 3, "sigmoid"
    yield spoilt, 3, "softmax", None, 1, 1, "max", None, True
    yield r(4, 12) * 40 - 60, 5, "sigmoid", None, 1, 1, "max", None, True, 1e-20


moe_route = Op(
    name="moe_route",
    schema="(Tensor logits, int topk, str scoring='softmax', Tensor? bias=None, int num_groups=1, "
    "int topk_groups=1, str group_score='max', float? outside=None, bool renormalize=False, float eps=0.0, "
    "float scale=1.0) -> (Tensor, Tensor)",
    reference=moe_route_reference,
    samples=_samples,
    tolerance=dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), 1e-5),
    error=moe_route_error,
    family="router",
)

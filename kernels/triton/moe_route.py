"""Choice of experts in Triton: a program holds the whole rows of a few tokens in registers, in float32.

The largest is taken topk times: the maximum of integer keys that order as the scores do, then the least index that
has it. So equal scores go to the lower index, NaN counts as larger than anything, and a second equal score in a group
counts towards the group's best two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dsopt.capture import known
from dsopt.op import Kernel
from dsopt.ops.route import GROUP_SCORES

DTYPES = frozenset({torch.bfloat16, torch.float16, torch.float32})
SCORINGS = ("softmax", "sigmoid", "sqrtsoftplus")
MAX_EXPERTS = 4096  # in registers, groups filled up to powers of two
NEVER = tl.constexpr(-(2**31))  # below the key of any score, -inf included


@triton.jit
def scored(x, SCORING: tl.constexpr):
    """softmax, sigmoid or sqrt(softplus) of rows x (tokens, experts) of float32; what is -inf gets no weight."""
    if SCORING == "softmax":
        powers = tl.exp(x - tl.max(x, 1)[:, None])
        return powers / tl.sum(powers, 1)[:, None]
    elif SCORING == "sigmoid":
        return 1.0 / (1.0 + tl.exp(-x))
    else:
        tl.static_assert(SCORING == "sqrtsoftplus")
        # log(1 + e) loses a small e; the rounding of 1 + e is undone by the second factor
        e = tl.exp(x)
        more = 1.0 + e
        log1p = tl.where(more == 1.0, e, tl.log(more) * (e / (more - 1.0)))
        return tl.sqrt(tl.where(x > 20.0, x, log1p))


@triton.jit
def key_of(x):
    """int32 keys that order as float32 x does: NaN above all, the two zeros equal."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, 0x7FFFFFFF, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))


@triton.jit
def first_of_largest(keys, index, AXIS: tl.constexpr, END: tl.constexpr):
    """Along an axis, which is kept: the index of the largest key, the least one if several are; END is beyond all."""
    best = tl.max(keys, AXIS, keep_dims=True)
    return tl.min(tl.where(keys == best, index, END), AXIS, keep_dims=True)


@triton.jit
def value_at(x, index, which, AXIS: tl.constexpr):
    """x where index is `which`, summed along an axis, which is kept; other values, NaN included, do not count."""
    return tl.sum(tl.where(index == which, x, 0.0), AXIS, keep_dims=True)


@triton.jit
def outside_groups(
    choice, valid,
    GROUPS: tl.constexpr, TOPK_GROUPS: tl.constexpr, TOP2: tl.constexpr, SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """True (BLOCK_T, BLOCK_G * BLOCK_S) where an expert's group is not among a token's best TOPK_GROUPS."""
    choice = tl.reshape(choice, (BLOCK_T, BLOCK_G, BLOCK_S))
    keys = tl.where(tl.reshape(valid, (BLOCK_T, BLOCK_G, BLOCK_S)), key_of(choice), NEVER)
    member = tl.arange(0, BLOCK_S)[None, None, :]
    best = first_of_largest(keys, member, 2, BLOCK_S)
    score = value_at(choice, member, best, 2)
    if TOP2 and SIZE > 1:
        second = first_of_largest(tl.where(member == best, NEVER, keys), member, 2, BLOCK_S)
        score += value_at(choice, member, second, 2)
    group = tl.arange(0, BLOCK_G)[None, :, None]
    keys = tl.where(group < GROUPS, key_of(score), NEVER)
    outside = tl.full((BLOCK_T, BLOCK_G, 1), 1, tl.int1)
    for _ in range(TOPK_GROUPS):
        chosen = group == first_of_largest(keys, group, 1, BLOCK_G)
        keys = tl.where(chosen, NEVER, keys)
        outside = outside & (chosen == 0)
    return tl.reshape(tl.broadcast_to(outside, (BLOCK_T, BLOCK_G, BLOCK_S)), (BLOCK_T, BLOCK_G * BLOCK_S))


@triton.jit(do_not_specialize=["tokens"])  # a batch of another size compiles nothing
def route_kernel(
    logits, bias, weights, ids, tokens, token_stride, expert_stride, bias_stride, outside, eps, scale,
    EXPERTS: tl.constexpr, TOPK: tl.constexpr, SCORING: tl.constexpr,
    GROUPS: tl.constexpr, TOPK_GROUPS: tl.constexpr, TOP2: tl.constexpr, RENORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Weights and ids (tokens, TOPK) of BLOCK_T tokens; columns hold the experts, each group filled up to BLOCK_S."""
    BLOCK_E: tl.constexpr = BLOCK_G * BLOCK_S
    SIZE: tl.constexpr = EXPERTS // GROUPS
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    column = tl.arange(0, BLOCK_E)[None, :]
    expert = column // BLOCK_S * SIZE + column % BLOCK_S
    real = (column % BLOCK_S < SIZE) & (column // BLOCK_S < GROUPS)
    at = logits + token * token_stride + expert.to(tl.int64) * expert_stride
    x = tl.load(at, mask=real & (token < tokens), other=float("-inf")).to(tl.float32)
    scores = scored(x, SCORING)
    choice = scores
    if bias is not None:
        choice += tl.load(bias + expert * bias_stride, mask=real, other=0.0).to(tl.float32)
    valid = real & (token >= 0)
    if TOPK_GROUPS < GROUPS:
        left_out = outside_groups(choice, valid, GROUPS, TOPK_GROUPS, TOP2, SIZE, BLOCK_T, BLOCK_G, BLOCK_S)
        choice = tl.where(left_out, outside, choice)
    keys = tl.where(valid, key_of(choice), NEVER)
    k = tl.arange(0, BLOCK_K)[None, :]
    chosen = tl.zeros((BLOCK_T, BLOCK_K), tl.int32)
    mixing = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    for i in range(TOPK):
        best = first_of_largest(keys, column, 1, BLOCK_E)
        chosen = tl.where(k == i, best // BLOCK_S * SIZE + best % BLOCK_S, chosen)
        mixing = tl.where(k == i, value_at(scores, column, best, 1), mixing)
        keys = tl.where(column == best, NEVER, keys)
    if RENORMALIZE:
        mixing /= tl.sum(mixing, 1, keep_dims=True) + eps
    written = (k < TOPK) & (token < tokens)
    tl.store(weights + token * TOPK + k, mixing * scale, mask=written)
    tl.store(ids + token * TOPK + k, chosen.to(tl.int64), mask=written)


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
    weights = torch.empty(shape, dtype=torch.float32, device=logits.device)
    ids = torch.empty(shape, dtype=torch.int64, device=logits.device)
    if ids.numel() == 0:
        return weights, ids
    num_experts = logits.shape[-1]
    logits = logits.reshape(-1, num_experts)
    tokens = logits.shape[0]
    groups = num_groups if topk_groups < num_groups else 1
    block_g, block_s = triton.next_power_of_2(groups), triton.next_power_of_2(num_experts // groups)
    block_t = max(1, min(4, 256 // (block_g * block_s)))
    with torch.cuda.device_of(logits):
        route_kernel[(triton.cdiv(tokens, block_t),)](
            logits, bias, weights, ids, tokens, *logits.stride(), 0 if bias is None else bias.stride(0),
            float("-inf") if outside is None else outside, eps, scale,
            EXPERTS=num_experts, TOPK=topk, SCORING=scoring,
            GROUPS=groups, TOPK_GROUPS=min(topk_groups, groups), TOP2=GROUP_SCORES[group_score] == 2,
            RENORMALIZE=renormalize,
            BLOCK_T=block_t, BLOCK_G=block_g, BLOCK_S=block_s, BLOCK_K=triton.next_power_of_2(topk),
            num_warps=1 if block_g * block_s <= 512 else 4,
        )  # fmt: skip
    return weights, ids


def _check(logits, topk, scoring="softmax", bias=None, num_groups=1, topk_groups=1, group_score="max", *rest):
    if scoring not in SCORINGS:
        return f"needs a scoring of {', '.join(SCORINGS)}, got {scoring}"
    if group_score not in GROUP_SCORES:
        return f"needs a group score of {', '.join(GROUP_SCORES)}, got {group_score}"
    if bias is not None and (bias.device != logits.device or bias.dtype not in DTYPES):
        return f"needs a bias of at most float32 on {logits.device}, got {bias.dtype} on {bias.device}"
    if bias is not None and (bias.ndim != 1 or known(bias.shape[0] != logits.shape[-1])):
        return f"needs a bias for each expert, got {list(bias.shape)} for {list(logits.shape)}"
    num_experts = logits.shape[-1]
    if not known(topk <= num_experts) or not known(num_experts % num_groups == 0):
        return f"needs topk <= num_experts in equal groups, got {topk} of {num_experts} in {num_groups}"
    if not known(2 * num_experts <= MAX_EXPERTS):
        return f"needs at most {MAX_EXPERTS // 2} experts, got {num_experts}"
    return None


def ahead_of_time(tensor):
    """Routers of V3, V2-Lite, V2 and Mixtral, with logits in float32 as transformers has them, and in bfloat16."""
    bias = tensor(256, dtype=torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        logits = tensor(64, 256, dtype=dtype)
        yield logits, 8, "sigmoid", bias, 8, 4, "top2", None, True, 1e-20, 2.5
    yield tensor(64, 64, dtype=torch.float32), 6
    yield tensor(64, 160, dtype=torch.float32), 6, "softmax", None, 8, 3, "max", None, False, 0.0, 16.0
    yield tensor(64, 8), 2, "softmax", None, 1, 1, "max", None, True
    yield tensor(64, 256), 8, "sqrtsoftplus", bias, 1, 1, "max", None, True, 1e-20, 1.5
    yield tensor(64, MAX_EXPERTS // 2), 8, "softmax"


KERNELS = (
    Kernel("moe_route", "triton", lambda *_: moe_route, _check, device="cuda", dtypes=DTYPES, priority=30),
)

"""topk(group-limited(score(logits) + bias)), its weights renormalized and scaled -> moe_route(logits, ...)

The pass finds a top-k over experts, the score above it, and the chain of calls that the weights go through
below it. Which of the many spellings of group limits and normalisation stand in between is settled by running
that part of the graph on random logits beside the op's reference (`dsopt.probe`).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import replace as changed
from typing import Any

import torch
from torch.fx import GraphModule, Node

from dsopt.capture import known
from dsopt.effects import between
from dsopt.ops.route import moe_route, moe_route_error, moe_route_reference
from dsopt.probe import Probe, Unknowable, random_like, size
from dsopt.rewrite import (
    Emitter,
    Log,
    argument,
    aten,
    is_float_cast,
    is_inner_dim,
    is_op,
    is_tensor,
    replace,
    shape,
    val,
)

FAMILY = "router"
# rows of logits a proposal is tried on
ROWS = 24
# (spread, shift) of logits and bias: as models have them, mostly negative choices, near ties, far apart, tiny scores
REGIMES = (
    ((2.0, 0.0), (0.5, 0.0)),
    ((2.0, 0.0), (0.5, -1.5)),
    ((0.05, 0.0), (0.01, 0.0)),
    ((20.0, 0.0), (5.0, 0.0)),
    ((2.0, -20.0), (1e-9, 0.0)),
)
_SCORES = {aten.softmax.int: "softmax", aten._softmax.default: "softmax", aten.sigmoid.default: "sigmoid"}
_ADDS = (aten.add.Tensor, aten.add_.Tensor)
_MULS = (aten.mul.Tensor, aten.mul_.Tensor)
_DIVS = (aten.div.Tensor, aten.div_.Tensor)
_SUMS = (aten.sum.dim_IntList,)
_FILLS = (aten.masked_fill.Scalar, aten.masked_fill_.Scalar)


@dataclass(frozen=True)
class Proposal:
    """What a router may compute.

    end: the node that holds the weights in the end; `bias` may need a reshape; fills: what masks put in place of
    choice scores, beside 0 and -inf.
    """

    logits: Node
    topk: int
    scoring: str
    end: Node
    bias: Node | None = None
    num_groups: int = 1
    topk_groups: int = 1
    group_score: str = "max"
    outside: float | None = None
    renormalize: bool = False
    eps: float = 0.0
    scale: float = 1.0
    fills: tuple[float, ...] = ()

    def options(self) -> tuple[Any, ...]:
        """The op's arguments after the bias."""
        names = "num_groups topk_groups group_score outside renormalize eps scale".split()
        return tuple(getattr(self, name) for name in names)


def run(gm: GraphModule, log: Log) -> None:
    probe, settled = Probe(gm), {}
    inner: set[Node] = set()
    for topk in reversed(gm.graph.find_nodes(op="call_function", target=aten.topk.default)):
        if topk in inner or not _chooses_experts(topk):
            continue
        ids, found = _read(topk)
        if found is None or isinstance(found, str):
            if found is not None:
                log.miss(topk, found)
            continue
        inner.update(between(topk, [found.logits]))
        found = _settle(probe, found, ids, settled)
        if isinstance(found, str):
            log.miss(topk, found)
            continue
        leaves = [found.logits, *([] if found.bias is None else [found.bias])]
        if reason := log.moved(between(found.end, leaves), topk):
            log.miss(topk, reason)
            continue
        log.hit("router", topk)
        _rewrite(gm, topk, ids, found)


def _chooses_experts(topk: Node) -> bool:
    x, k = argument(topk, "self"), argument(topk, "k")
    dim, largest = argument(topk, "dim"), argument(topk, "largest")
    static = isinstance(shape(x)[-1], int) and isinstance(k, int)
    return static and largest and is_inner_dim(dim, val(x).ndim) and val(x).dtype.is_floating_point


def _read(topk: Node) -> tuple[Node | None, Proposal | str | None]:
    """(ids, what the router may compute); a reason in its place for a near miss, None for what is no router."""
    ids = next((u for u in topk.users if is_op(u, operator.getitem) and u.args[1] == 1), None)
    values = next((u for u in topk.users if is_op(u, operator.getitem) and u.args[1] == 0), None)
    scored = _score(argument(topk, "self"))
    start = _gathered(ids) or (values if values is not None and values.users else None)
    if ids is None or start is None:
        return ids, None
    if scored is None:
        logits = argument(topk, "self")
        while is_float_cast(logits):
            logits = logits.args[0]
        found = _follow(start, Proposal(logits, argument(topk, "k"), "", start))
        return ids, (found if found.scoring else None)
    score, logits, scoring = scored
    found = _follow(start, Proposal(logits, argument(topk, "k"), scoring, start))
    return ids, _choice(topk, score, found)


def _score(node: Node) -> tuple[Node, Node, str] | None:
    """(score, its logits, its name) above what a top-k takes."""
    seen, stack = set(), [node]
    while stack:
        n = stack.pop(0)
        if n in seen or n.op != "call_function":
            continue
        seen.add(n)
        if n.target in _SCORES and is_inner_dim(n.args[1] if len(n.args) > 1 else -1, val(n).ndim):
            return n, _uncast(n.args[0]), _SCORES[n.target]
        if is_op(n, aten.sqrt.default) and is_op(n.args[0], aten.softplus.default):
            return n, _uncast(n.args[0].args[0]), "sqrtsoftplus"
        if not is_op(n, aten.linear.default, aten.matmul.default, aten._grouped_mm.default):
            stack += n.all_input_nodes
    return None


def _uncast(node: Node) -> Node:
    """What was widened to `node`."""
    while (
        is_float_cast(node)
        and torch.promote_types(val(node).dtype, val(node.args[0]).dtype) == val(node).dtype
    ):
        node = node.args[0]
    return node


def _gathered(ids: Node | None) -> Node | None:
    """The scores picked by the ids."""
    for user in ids.users if ids is not None else ():
        gathers = is_op(user, aten.gather.default) and argument(user, "index") is ids
        if gathers and is_inner_dim(argument(user, "dim"), val(user).ndim):
            return user
    return None


def _follow(node: Node, found: Proposal) -> Proposal:
    """The proposal with what the weights go through below `node`, as far as the op can follow."""
    users = list(node.users)
    division = _division(node, users)
    if division is not None and not found.renormalize and found.scale == 1.0:
        end, eps = division
        return _follow(end, changed(found, end=end, renormalize=True, eps=eps))
    if len(users) != 1:
        return found
    (user,) = users
    other = user.args[1] if len(user.args) > 1 else None
    if is_float_cast(user):
        return _follow(user, changed(found, end=user))
    if (
        is_op(user, *_MULS, *_DIVS)
        and user.args[0] is node
        and isinstance(other, (int, float))
        and found.scoring
    ):
        factor = 1 / other if is_op(user, *_DIVS) and other else other
        return _follow(user, changed(found, end=user, scale=found.scale * factor))
    if not found.scoring and user.target in _SCORES:
        scoring = _SCORES[user.target]
        # softmax over the chosen logits is the softmax over all, renormalized
        return _follow(user, changed(found, end=user, scoring=scoring, renormalize=scoring == "softmax"))
    return found


def _division(node: Node, users: list[Node]) -> tuple[Node, float] | None:
    """(quotient, eps) where all that reads `node` is node / (sum(node, -1) + eps)."""
    sums = [u for u in users if is_op(u, *_SUMS)]
    quotients = [u for u in users if is_op(u, *_DIVS) and u.args[0] is node]
    if len(sums) != 1 or len(quotients) != 1 or len(users) != 2:
        return None
    total, eps = sums[0], 0.0
    divisor = quotients[0].args[1]
    if is_op(divisor, *_ADDS) and divisor.args[0] is total and isinstance(divisor.args[1], (int, float)):
        divisor, eps = divisor.args[0], float(divisor.args[1])
    if divisor is not total or not argument(total, "keepdim"):
        return None
    dims = argument(total, "dim")
    return (quotients[0], eps) if len(dims) == 1 and is_inner_dim(dims[0], val(node).ndim) else None


def _choice(topk: Node, score: Node, found: Proposal) -> Proposal | str:
    """The proposal with bias and groups, read off what stands between the score and the top-k."""
    num_experts = shape(topk.args[0])[-1]
    region = between(topk.args[0], [score])
    bias = None
    for node in region:
        for other in _outside(node, score, region):
            if bias not in (None, other):
                return f"{other.name} takes part in the choice beside the score and its bias"
            bias = other
    if bias is not None and not (is_tensor(bias) and known(val(bias).numel() == num_experts)):
        return f"{bias.name} takes part in the choice and is no bias by expert"
    found = changed(found, bias=bias, fills=tuple(dict.fromkeys(filter(None, map(_fill, region)))))
    widths = [shape(n)[-2:] for n in region if val(n) is not None and is_tensor(n) and val(n).ndim > 1]
    split = [
        w for w in widths if isinstance(w[0], int) and w[0] * w[1] == num_experts and val(score).ndim > 1
    ]
    inner = [n for n in region if is_op(n, aten.topk.default)]
    groups = {w[0] for w in split if any(shape(n.args[0])[-1] == w[0] for n in inner)}
    if not inner:
        return found
    if len(groups) != 1:
        return "experts are chosen in steps that are no groups"
    (num_groups,) = groups
    by_group = [n for n in inner if shape(n.args[0])[-1] == num_groups]
    topk_groups = argument(by_group[-1], "k")
    pairs = any(argument(n, "k") == 2 and shape(n.args[0])[-1] != num_groups for n in inner)
    pairs = pairs or any(argument(n, "k") == 2 and n is not by_group[-1] for n in inner)
    return changed(
        found, num_groups=num_groups, topk_groups=topk_groups, group_score="top2" if pairs else "max"
    )


def _fill(node: Node) -> float | None:
    """The finite number that a node puts in place of some elements."""
    filled = {**dict.fromkeys(_FILLS, 2), aten.where.ScalarOther: 2, aten.where.ScalarSelf: 1}
    value = node.args[filled[node.target]] if node.target in filled else None
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _outside(node: Node, score: Node, region: list[Node]) -> Iterator[Node]:
    """Tensors that a node of the region takes from elsewhere; what has no input of its own is no such tensor."""
    inside = set(region)
    for source in node.all_input_nodes:
        if source is score or source in inside or not is_tensor(source):
            continue
        yield source


def _settle(
    probe: Probe, found: Proposal, ids: Node, settled: dict[str, tuple[Any, ...] | str]
) -> Proposal | str:
    """The proposal that the graph agrees with on random logits, or why there is none."""
    leaves = [found.logits, *([] if found.bias is None else [found.bias])]
    try:
        key = probe.fingerprint([found.end, ids], leaves)
    except Unknowable as error:
        return str(error)
    if key not in settled:
        settled[key] = _first_right(probe, found, ids, leaves)
    verdict = settled[key]
    return verdict if isinstance(verdict, str) else changed(found, group_score=verdict[0], outside=verdict[1])


def _first_right(probe: Probe, found: Proposal, ids: Node, leaves: list[Node]) -> tuple[Any, ...] | str:
    trials = []
    generator = torch.Generator().manual_seed(0)
    rows = max(1, val(found.logits).ndim and size(val(found.logits).numel()) // size(shape(found.logits)[-1]))
    try:
        for i in range(max(len(REGIMES), -(-ROWS // rows))):
            regime = REGIMES[i % len(REGIMES)]
            given = [
                random_like(n, generator, spread=spread) + shift
                for n, (spread, shift) in zip(leaves, regime, strict=False)
            ]
            values = dict(zip(leaves, given, strict=True))
            trials.append(
                (given, probe.run([found.end, ids], values), max(1.0, *(abs(shift) for _, shift in regime)))
            )
    except Unknowable as error:
        return str(error)
    # where weights are rounded, logits may be as well, by their size
    eps = max(torch.finfo(w.dtype).eps for _, (w, _), _ in trials)
    for group_score in dict.fromkeys((found.group_score, "max", "top2")):
        for outside in (*found.fills, None, 0.0):
            one = changed(found, group_score=group_score, outside=outside)
            if all(_agrees(one, given, got, max(1e-5, 2 * eps * large)) for given, got, large in trials):
                return group_score, outside
    return "scores, groups and weights are put together in a way that moe_route is not"


def _agrees(found: Proposal, given: list[torch.Tensor], got: list[torch.Tensor], tolerance: float) -> bool:
    bias = given[1].reshape(-1) if len(given) > 1 else None
    args = (given[0], found.topk, found.scoring, bias, *found.options())
    want = moe_route_reference(*args)
    if got[0].shape != want[0].shape or got[1].shape != want[1].shape:
        return False
    # as float32, so that rounded weights do not pass for ties
    return moe_route_error(args, (got[0].float(), got[1]), want) <= tolerance


def _rewrite(gm: GraphModule, topk: Node, ids: Node, found: Proposal) -> None:
    emit = Emitter(gm, topk)
    bias = found.bias
    if bias is not None and val(bias).ndim != 1:
        bias = emit(aten.reshape.default, bias, [-1])
    wide = torch.promote_types(val(found.logits).dtype, torch.float32)
    like = (val(found.end).to(wide), val(ids))
    args = (found.logits, found.topk, found.scoring, bias, *found.options())
    routed = emit(moe_route.overload, *args, like=like)
    weights = emit(operator.getitem, routed, 0, like=like[0])
    if val(found.end).dtype != wide:
        weights = emit(aten.to.dtype, weights, val(found.end).dtype, like=val(found.end))
    replace(found.end, weights)
    replace(ids, emit(operator.getitem, routed, 1, like=like[1]))

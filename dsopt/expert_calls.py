"""Calling a block of experts on a few random tokens, and comparing two spellings of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from dsopt.expert_form import Refused
from dsopt.numerics import rand, relative_l2
from dsopt.ops.experts import moe_experts

_SCALES = (0.01, 30.0, 1000.0)
# what reordering a sum and rounding once less may change, between two spellings of one formula
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


# what each parameter of a forward is given: one of x, x3 (as a batch of one), ids and weights, or its default
Given = dict[str, Any]


def defaults(owner: nn.Module) -> Given:
    """The parameters of a module's forward and their defaults; those without one are `inspect.Parameter.empty`."""
    parameters = list(inspect.signature(type(owner).forward).parameters.values())[1:]
    empty = {inspect.Parameter.VAR_POSITIONAL: (), inspect.Parameter.VAR_KEYWORD: {}}
    return {p.name: empty.get(p.kind, p.default) for p in parameters}


class Role(str):
    """Stands for a tensor in a call."""


def inputs(
    call: Given, like: torch.Tensor, width: int, num_experts: int, num_tokens: int, seed: int, topk: int = 2
) -> Given:
    """A call with random tensors in the places of roles, of the device and dtype of `like`."""
    x = rand(like.device, like.dtype, seed)(num_tokens, width)
    scores = rand(like.device, torch.float32, seed)(num_tokens, num_experts).softmax(-1)
    weights, ids = scores.topk(min(topk, num_experts))
    given = {"x": x, "x3": x.unsqueeze(0), "ids": ids, "weights": weights.to(like.dtype)}
    return {name: given[value].clone() if isinstance(value, Role) else value for name, value in call.items()}


def settings(module: nn.Module) -> tuple:
    """The plain values that a module's forward may read."""
    plain = (int, float, str, type(None))
    return tuple(
        (path, k, v) for path, m in module.named_modules() for k, v in vars(m).items() if isinstance(v, plain)
    )


def compare(owner: nn.Module, batched: nn.Module, make: Callable[[int, int], Given]) -> None:
    """Compares two spellings of one block on a few tokens. Raises Refused where they differ.

    make: num_tokens, seed -> a call. Many equal tokens show whether an expert turns some away, small and large
    numbers whether something is kept within limits.
    """
    crowd = make(16, 4)
    for x in tensors_of(crowd).values():
        rows = x.view(-1, x.shape[-1])
        rows.copy_(rows[:1].clone().expand_as(rows))
    scaled = [make(6, seed) for seed in range(len(_SCALES))]
    for call, scale in zip(scaled, _SCALES, strict=True):
        for x in tensors_of(call).values():
            if x.is_floating_point():
                # float16 ends at 65504, and an MLP of large numbers multiplies two of them
                x.mul_(min(scale, 10.0) if x.dtype == torch.float16 else scale)
    for call in (make(2, 2), make(1, 1), make(0, 0), *scaled, crowd):
        given = tensors_of(call)
        again = {name: x.clone() for name, x in given.items()}
        try:
            with undisturbed(owner):
                want = tree_leaves(type(owner).forward(owner, **given))
        except Refused:
            raise
        except Exception:
            if any(x.numel() for x in given.values()):
                raise
            continue  # a loop may well fail where there is no token
        got = tree_leaves(batched.forward(**again))
        if call is crowd and not any(
            isinstance(x, torch.Tensor) and x.isfinite().all() and x.any() for x in want
        ):
            raise Refused("its weights give zeros or NaN, so there is nothing to compare by")
        if len(got) != len(want) or not all(map(_alike, got, want)):
            raise Refused("its result differs from that of the batched experts")


def tensors_of(call: Given) -> Given:
    """The tensors of a call, by parameter."""
    return {name: value for name, value in call.items() if isinstance(value, torch.Tensor)}


def _alike(got: Any, want: Any) -> bool:
    if not isinstance(want, torch.Tensor):
        return got is want or got == want
    if not isinstance(got, torch.Tensor) or (got.shape, got.dtype) != (want.shape, want.dtype):
        return False
    if not want.is_floating_point():
        return torch.equal(got, want)
    return relative_l2(got, want) <= TOLERANCE[want.dtype]


@contextmanager
def undisturbed(owner: nn.Module) -> Iterator[None]:
    """Puts the state of a module and its submodules back as it was. Raises Refused if its own had changed.

    A batched block would lose what the module itself keeps; its submodules run as they did.
    """
    tables = [(table, dict(table)) for m in owner.modules() for table in _tables(m)]
    own = tables[: len(_tables(owner))]
    values = [(b, b.clone()) for b in owner.buffers()]
    own_buffers = {id(b): name for name, b in owner.named_buffers(recurse=False)}
    changed: list[str] = []
    try:
        yield
    finally:
        for table, kept in own:
            changed += [name for name in table | kept if table.get(name) is not kept.get(name)]
        changed += [own_buffers[id(b)] for b, v in values if id(b) in own_buffers and not torch.equal(b, v)]
        for table, kept in tables:
            table.clear()
            table.update(kept)
        for b, value in values:
            b.copy_(value)
    if changed:
        raise Refused(f"its forward keeps {changed[0]!r} from one call to the next")


def _tables(module: nn.Module) -> tuple[dict, ...]:
    return vars(module), module._parameters, module._buffers, module._modules


def inference_only(run: Callable, num_inputs: int) -> Callable:
    """The forward of a batched module: `run`, or its class's own where `run` will not do.

    That is in training mode, where a gradient of one of `self.dsopt_weights` may be wanted, where a call gives more
    than num_inputs arguments, and where `self.dsopt_stacks`, which `run` reads, are not the module's weights any more:
    in a deep copy always; otherwise it is looked at outside compiled graphs only.
    """

    def forward(self, *args, **kwargs):
        differentiable = torch.is_grad_enabled() and any(w.requires_grad for w in self.dsopt_weights)
        outdated = self.dsopt_stacks is None or (
            not torch.compiler.is_compiling() and self.dsopt_stacks.stale()
        )
        if self.training or differentiable or outdated or len(args) + len(kwargs) != num_inputs:
            return type(self).forward(self, *args, **kwargs)
        return run(self, *args, **kwargs)

    return forward


def batched_experts(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    b13: torch.Tensor | None = None,
    b2: torch.Tensor | None = None,
    w3: torch.Tensor | None = None,
    b3: torch.Tensor | None = None,
    *,
    num_identity: int = 0,
    **how: Any,
) -> torch.Tensor:
    """`moe_experts` on tokens of any leading dimensions, of x's shape.

    The num_identity ids after the experts' hand back their input: x * sum of their weights is added.
    how: activation, gated, interleaved and limit of `moe_experts`.
    """
    tokens, ids, weights = (t.reshape(-1, t.shape[-1]) for t in (x, ids, weights))
    out = moe_experts.overload(tokens, ids, weights, w13, w2, w3, b13, b2, b3, **how)
    if num_identity:
        identity = (ids >= w2.shape[0]) & (ids < w2.shape[0] + num_identity)
        share = weights.float().masked_fill(~identity, 0.0).sum(-1, keepdim=True)
        out = (out + tokens * share).to(x.dtype)
    return out.view(x.shape)

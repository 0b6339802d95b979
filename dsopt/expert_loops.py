"""Blocks that loop over a list of experts in Python, with the loop as one call of `moe_experts`.

The block's forward is traced on a few random tokens. Among the values before the first expert is called are the
tokens, the ids and the weights; after it comes sum_k weights[t,k] * expert[ids[t,k]](x[t]). Which nodes these
are is found by computing that sum; then everything only the loop needed is dropped.
"""

from __future__ import annotations

import copy
import inspect
import types
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from dsopt.expert_calls import (
    TOLERANCE,
    Given,
    Role,
    batched_experts,
    compare,
    defaults,
    inference_only,
    inputs,
    settings,
    tensors_of,
    undisturbed,
)
from dsopt.expert_form import Form, Refused, Stacks, check_plain, form_of, owners_of_weights
from dsopt.expert_trace import Trace, reachable, storages, trace
from dsopt.numerics import relative_l2

_STACKS = ("w13", "w2", "b13", "b2")


@dataclass(frozen=True)
class Experts:
    """A list of experts. paths: theirs from the module that loops over them; num_identity: how many more, after
    them, hand back their input."""

    paths: tuple[str, ...]
    num_identity: int = 0


def experts_of(owner: nn.Module) -> Experts | None:
    """The list of MLPs of one shape that a module, or a list right below it, holds; None if there is none."""
    lists = [
        (f"{name}.", child)
        for name, child in owner.named_children()
        if _is_list(child) and not _is_called(child)
    ]
    if _is_list(owner) and _is_called(owner):
        lists.append(("", owner))
    for prefix, holder in lists:
        children = list(holder._modules.items())
        num_experts = sum(child is not None and not isinstance(child, nn.Identity) for _, child in children)
        experts = [child for _, child in children[:num_experts]]
        if num_experts < 2 or any(e is None or _outline(e) != _outline(experts[0]) for e in experts):
            continue
        if 2 <= len(owners_of_weights(experts[0])) <= 3 and not _is_list(experts[0]):
            paths = tuple(f"{prefix}{name}" for name, _ in children[:num_experts])
            return Experts(paths, len(children) - num_experts)
    return None


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.ModuleDict))


def _is_called(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def _outline(module: nn.Module) -> list[tuple]:
    """The classes and shapes that modules which compute one function of their weights have in common."""
    return [
        (path, type(m), [(name, p.shape) for name, p in m._parameters.items() if p is not None])
        for path, m in module.named_modules()
    ]


@torch.no_grad()
def batch_loop(owner: nn.Module, experts: Experts, uses: Counter) -> tuple[nn.Module, Stacks]:
    """A shallow copy of `owner` whose forward calls `moe_experts` once, and the weights that it reads.

    uses: see `Stacks`. Raises Refused for a module whose loop is not understood; it is left as it was then.
    """
    if owner.training:
        raise Refused("it is in training mode; call eval() first")
    if "forward" in vars(owner):
        raise Refused("its forward was replaced on the instance")
    modules = [owner.get_submodule(path) for path in experts.paths]
    for m in modules:
        check_plain(m)
    forms = {form_of(m) for m in {settings(m): m for m in modules}.values()}
    if len(forms) > 1:
        raise Refused("its experts compute different functions")
    form = forms.pop()
    linear = modules[0].get_submodule(form.up[0])
    refusals, failures = [], []
    for call in _calls(owner):
        make = partial(inputs, call, linear.weight, linear.in_features, len(modules))
        try:
            return _batched(owner, experts, form, make, uses)
        except Refused as error:
            refusals.append(str(error))
        except Exception as error:
            failures.append(
                f"its forward cannot be traced: {type(error).__name__}: {str(error).splitlines()[0]}"
            )
    # what was understood and refused says more than a call of another shape that failed
    raise Refused([*refusals, *failures, "its forward takes neither x nor x, ids and weights"][0])


def _calls(owner: nn.Module) -> Iterator[Given]:
    """Ways to call a module: with tokens, or with tokens, ids and weights."""
    known = defaults(owner)
    required = [name for name, default in known.items() if default is inspect.Parameter.empty]
    for roles in (("x3",), ("x",), ("x", "ids", "weights"), ("x", "weights", "ids")):
        if len(required) == len(roles):
            yield known | dict(zip(required, map(Role, roles), strict=True))


def _batched(
    owner: nn.Module, experts: Experts, form: Form, make: Callable[[int, int], Given], uses: Counter
) -> tuple[nn.Module, Stacks]:
    call = make(3, 0)
    tensors = tensors_of(call)
    x = next(iter(tensors.values()))
    with undisturbed(owner):
        traced = trace(owner, call, x.numel())
    _replace(traced, _find(traced, owner, experts, x.shape[-1]), form, experts)
    stacks = Stacks(owner, _groups(owner, experts, form), uses)
    try:
        batched = copy.copy(owner)
        weights = [p for path in experts.paths for p in owner.get_submodule(path).parameters()]
        vars(batched).update(dsopt_stacks=stacks, dsopt_weights=weights)
        for name in _STACKS:
            vars(batched)[f"dsopt_{name}"] = stacks.tensors.get(name)
        run = type(GraphModule(batched, traced.graph)).forward
        batched.forward = types.MethodType(inference_only(run, len(tensors)), batched)
        compare(owner, batched, make)
    except BaseException:
        stacks.undo()
        raise
    stacks.keep()
    return batched, stacks


def _groups(owner: nn.Module, experts: Experts, form: Form) -> dict[str, list[list[str]]]:
    """Paths of the parameters that make each stack."""
    rows = {"w13": ("weight", form.up), "w2": ("weight", (form.down,))}
    rows |= {"b13": ("bias", form.up), "b2": ("bias", (form.down,))}
    groups = {}
    for name, (parameter, linears) in rows.items():
        paths = [[f"{e}.{linear}.{parameter}" for linear in linears] for e in experts.paths]
        have = {
            owner.get_submodule(p.rpartition(".")[0])._parameters[parameter] is not None
            for ps in paths
            for p in ps
        }
        if len(have) > 1:
            raise Refused("some of its experts' linears have a bias and others have none")
        if have == {True}:
            groups[name] = paths
    return groups


@dataclass(frozen=True)
class _Found:
    """Nodes of a trace: what goes into the sum over experts, and the one that holds it once `after` has run."""

    x: Node
    ids: Node
    weights: Node
    result: Node
    after: Node


def _find(traced: Trace, owner: nn.Module, experts: Experts, width: int) -> _Found:
    """The sum over experts among the values of a trace. Raises Refused where there is none."""
    values, num_experts = traced.values, len(experts.paths)
    nodes = list(traced.graph.nodes)
    order = {n: i for i, n in enumerate(nodes)}
    first = next(
        (i for i, n in enumerate(nodes) if n.op == "call_module" and n.target in experts.paths), None
    )
    if first is None:
        raise Refused("its forward calls none of its experts")
    before = [n for n in nodes[:first] if isinstance(values.get(n), torch.Tensor)]
    hidden = _distinct(
        [n for n in before if values[n].is_floating_point() and values[n].shape[-1:] == (width,)], values
    )
    seen = False
    for ids in before:
        chosen = values[ids]
        integral = not (chosen.is_floating_point() or chosen.is_complex() or chosen.dtype == torch.bool)
        last = num_experts + experts.num_identity
        if not integral or not chosen.ndim or not chosen.numel() or chosen.min() < 0 or chosen.max() >= last:
            continue
        for x in hidden:
            if values[x].numel() // width != chosen.numel() // chosen.shape[-1]:
                continue
            mixed = [n for n in before if values[n].is_floating_point() and values[n].shape == chosen.shape]
            outputs = (
                _outputs(owner, experts, values[x].reshape(-1, width), chosen.flatten(0, -2))
                if mixed
                else None
            )
            for weights in reversed(mixed):
                seen = True
                want = (outputs * values[weights].double().reshape(-1, chosen.shape[-1], 1)).sum(1)
                tolerance = TOLERANCE[values[x].dtype]
                same = [s for s in traced.snapshots if order[s[0]] > first and _agrees(s[2], want, tolerance)]
                if same:
                    # the last one: what comes between may read the loop's values
                    result = max((s[1] for s in same), key=order.__getitem__)
                    after = max((s[0] for s in same if s[1] is result), key=order.__getitem__)
                    alike = [n for n in before if _equal(values[n], values[x])]
                    x = next((n for n in alike if values[n].shape == values[result].shape), x)
                    return _Found(x, ids, weights, result, after)
    raise Refused(
        "no value after its experts is the sum of their outputs, weighted by a value before them"
        if seen
        else "no ids and weights of the chosen experts are seen before the first expert is called"
    )


def _distinct(nodes: Sequence[Node], values: dict[Node, Any]) -> list[Node]:
    """The first node of each value."""
    kept: list[Node] = []
    for n in nodes:
        if not any(_equal(values[n], values[k]) for k in kept):
            kept.append(n)
    return kept


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.numel() == b.numel() and a.dtype == b.dtype and torch.equal(a.flatten(), b.flatten())


def _outputs(owner: nn.Module, experts: Experts, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """expert[ids[t,k]](x[t]) for each t, k, in float64."""
    out = x.double().unsqueeze(1).repeat(1, ids.shape[1], 1)
    for e in ids.unique().tolist():
        if e < len(experts.paths):
            token, k = torch.where(ids == e)
            out[token, k] = owner.get_submodule(experts.paths[e])(x[token]).double()
    return out


def _agrees(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> bool:
    return bool(want.any()) and relative_l2(got.reshape(want.shape), want) <= tolerance


def _replace(traced: Trace, found: _Found, form: Form, experts: Experts) -> None:
    """Puts one call in place of the loop, and drops what only the loop needed."""
    graph, values = traced.graph, traced.values
    order = {n: i for i, n in enumerate(graph.nodes)}
    needs = traced.dependencies()
    for node in traced.decided:
        behind = reachable([node], needs, static=False)
        by_values = any(n.op in ("placeholder", "get_attr", "call_module") for n in behind)
        by_outputs = any(n.op == "call_module" and n.target in experts.paths for n in behind)
        if by_outputs or (by_values and found.ids not in behind):
            raise Refused(f"its forward decides by something else than the ids: {node.format_node()}")
    # in-place methods return the tensor they were called on
    same = [n for n in order if values.get(n) is values[found.result]]
    later = {(user, n) for n in same for user in n.users if order[user] > order[found.after]}
    names = {
        "activation": form.activation,
        "gated": form.gated,
        "interleaved": form.interleaved,
        "limit": form.limit,
    }
    stacks = [f"dsopt_{name}" for name in _STACKS]
    with graph.inserting_after(found.after):
        new = graph.call_function(batched_experts, kwargs=names | {"num_identity": experts.num_identity})
    with graph.inserting_before(new):
        new.args = (found.x, found.ids, found.weights, *map(graph.get_attr, stacks))
    value = values[found.result]
    if value.shape != values[found.x].shape:
        like = [
            n for n in graph.find_nodes(op="placeholder") if getattr(values[n], "shape", None) == value.shape
        ]
        if not like:
            raise Refused(f"the sum over its experts has shape {tuple(value.shape)}")
        with graph.inserting_after(new):
            new = graph.call_method("view_as", (new, like[0]))
    if value.dtype != values[found.x].dtype:
        with graph.inserting_after(new):
            new = graph.call_method("to", (new, value.dtype))
    for user, n in later:
        user.replace_input_with(n, new)
    alive = reachable([graph.output_node()], traced.dependencies())
    for node in reversed(graph.nodes):
        if node not in alive and node.op != "placeholder":
            graph.erase_node(node)
    if any(n.op == "call_module" and n.target in experts.paths for n in graph.nodes):
        raise Refused("the outputs of its experts are read beside their sum")
    outside = storages(
        [values[n] for n in graph.nodes if n.op in ("placeholder", "get_attr") and n in values]
    )
    if any(traced.writes.get(n, set()) & outside for n in graph.nodes):
        raise Refused("its forward writes to its inputs or weights")

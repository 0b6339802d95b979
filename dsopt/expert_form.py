"""What one expert computes, found in its graph, and the weights of all experts as one tensor."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node, Tracer
from torch.fx.node import map_arg

from dsopt.ops.experts import ACTIVATIONS, activate


class Refused(Exception):
    """Why a module is left as it is, in words for the report."""


@dataclass(frozen=True)
class Form:
    """The MLP w2 @ activate(w13 @ x), in the words of `moe_experts`.

    up: paths of the linears that make w13, gate's before up's; down: that of w2.
    """

    up: tuple[str, ...]
    down: str
    activation: str
    gated: bool
    interleaved: bool = False
    limit: float | None = None


def owners_of_weights(module: nn.Module) -> dict[str, nn.Module]:
    """The submodules that own parameters, by path."""
    return {
        path: m for path, m in module.named_modules() if next(m.parameters(recurse=False), None) is not None
    }


def check_plain(expert: nn.Module) -> None:
    """Raises Refused where more than its class's forward and its linears' weights decides what an expert computes."""
    for path, m in expert.named_modules():
        if any(value for name, value in vars(m).items() if name.endswith("hooks")):
            raise Refused(f"the expert's {path or 'module'} has hooks, which would not run")
        if "forward" in vars(m):
            raise Refused(f"the forward of the expert's {path or 'module'} was replaced")
    for path, m in owners_of_weights(expert).items():
        if type(m) is not nn.Linear:
            raise Refused(f"the expert's {path or 'module'} is a {type(m).__name__}, not a plain nn.Linear")


def form_of(expert: nn.Module) -> Form:
    """How an expert's linears are put together. Raises Refused for what `moe_experts` cannot compute."""
    try:
        graph = _Shallow().trace(expert)
    except Exception as error:
        raise Refused(f"an expert cannot be traced: {type(error).__name__}: {error}") from error
    gm = GraphModule(expert, graph)
    calls = [n for n in graph.find_nodes(op="call_module", sort=True) if _is_linear(gm, n)]
    inputs = graph.find_nodes(op="placeholder")
    if len(inputs) != 1 or not 2 <= len(calls) <= 3 or len({n.target for n in calls}) != len(calls):
        raise Refused("an expert is not an MLP of one input and two or three linears")
    (x,), (*firsts, last) = inputs, calls
    (result,) = graph.output_node().args
    widths = {n: gm.get_submodule(n.target).out_features for n in calls}
    probe = _probe(gm.get_submodule(last.target).in_features)
    passes_on = [(x, n.args[0], probe) for n in firsts]
    passes_on.append((last, result, _probe(widths[last])))
    if not all(_same(_between(gm, {a: value}, b), value) for a, b, value in passes_on):
        raise Refused("an expert does more to its input or output than its linears")
    hidden = last.args[0]
    limits = [None, *{float(c) for n in graph.nodes for c in _numbers(n) if c > 0}]
    for order in itertools.permutations(firsts):
        h = [_probe(widths[n], seed) for seed, n in enumerate(order)]
        got = _between(gm, dict(zip(order, h, strict=True)), hidden)
        for how in _ways(len(order), limits):
            w13 = h[0] if len(h) == 1 else torch.cat(h, -1)
            if (not how["gated"] or w13.shape[-1] % 2 == 0) and _same(got, activate(w13, None, **how)):
                return Form(tuple(n.target for n in order), last.target, **how)
    raise Refused(f"an expert's activation is none of {', '.join(ACTIVATIONS)}")


def _ways(num_linears: int, limits: Sequence[float | None]) -> Iterator[dict[str, Any]]:
    layouts = [(True, False)] if num_linears == 2 else [(True, False), (True, True), (False, False)]
    for (gated, interleaved), activation in itertools.product(layouts, ACTIVATIONS):
        for limit in limits if gated else [None]:
            yield {"activation": activation, "gated": gated, "interleaved": interleaved, "limit": limit}


class _Shallow(Tracer):
    """Each submodule's call is one node."""

    def is_leaf_module(self, m, module_qualified_name):
        return True


def _is_linear(gm: GraphModule, node: Node) -> bool:
    return isinstance(gm.get_submodule(node.target), nn.Linear)


def _numbers(node: Node) -> list[float]:
    found = torch.utils._pytree.tree_leaves((node.args, node.kwargs))
    return [x for x in found if isinstance(x, (int, float)) and not isinstance(x, bool)]


def _probe(width: int, seed: int = 0) -> torch.Tensor:
    """Some rows of float64 numbers, from tiny to beyond what activations are usually limited to."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([0.1, 1.0, 10.0, 100.0], dtype=torch.float64).unsqueeze(-1)
    return torch.randn(4, width, generator=generator, dtype=torch.float64) * scale


def _between(gm: GraphModule, known: dict[Node, torch.Tensor], target: Node) -> torch.Tensor | None:
    """The value of a node from those of others; None if it needs more than them."""
    values: dict[Node, Any] = dict(known)

    def value(node: Node) -> Any:
        if node not in values:
            if node.op not in ("call_function", "call_method", "call_module") or (
                node.op == "call_module" and _is_linear(gm, node)
            ):
                raise LookupError(node.name)
            args, kwargs = map_arg((node.args, node.kwargs), value)
            if node.op == "call_module":
                values[node] = gm.get_submodule(node.target)(*args, **kwargs)
            elif node.op == "call_method":
                values[node] = getattr(args[0], node.target)(*args[1:], **kwargs)
            else:
                values[node] = node.target(*args, **kwargs)
        return values[node]

    try:
        return value(target)
    except (LookupError, RuntimeError, TypeError):
        return None


def _same(got: Any, want: torch.Tensor) -> bool:
    """Equal up to a rounding to float32 somewhere."""
    return (
        isinstance(got, torch.Tensor)
        and got.shape == want.shape
        and torch.allclose(got.double(), want, rtol=1e-5, atol=1e-6)
    )


class Stacks:
    """The weights of all experts as stacked tensors, of which the experts' own parameters are views.

    tensors: name -> (num_experts, rows, columns) or (num_experts, rows).
    """

    def __init__(self, owner: nn.Module, groups: dict[str, Group], uses: Counter):
        """groups: name -> for each expert the paths from `owner` of the parameters that make its rows, in order.

        uses: how many parameters and buffers of the whole model lie in the storage at an address.
        Takes the memory of these weights once more, until `keep`. Raises Refused, and leaves every parameter as
        it was, if one of them is more than a plain parameter.
        """
        self.tensors: dict[str, torch.Tensor] = {}
        self._old: list[tuple[nn.Parameter, torch.Tensor]] = []
        found = {
            name: [[_lookup(owner, p) for p in paths] for paths in group] for name, group in groups.items()
        }
        try:
            for name, group in found.items():
                self.tensors[name] = _as_it_lies(group) if _is_stacked(group, uses) else _stack(group, uses)
            for name, group in found.items():
                for p, view in _views(self.tensors[name], group):
                    if p.data_ptr() != view.data_ptr():
                        self._old.append((p, p.data))
                        p.data = view
        except BaseException:
            self.undo()
            raise
        paths = [p for group in groups.values() for paths in group for p in paths]
        self._links = {
            (id(d), key): (d, key, value) for path in paths for d, key, value in _links(owner, path)
        }
        self._addresses = [(*_links(owner, path)[-1][:2], _lookup(owner, path).data_ptr()) for path in paths]

    def __deepcopy__(self, memo: dict) -> None:
        """A deep copy's parameters are views of nothing, so it has no stacks."""
        return None

    def keep(self) -> None:
        """Lets go of the parameters' old memory."""
        self._old = []

    def undo(self) -> None:
        """Gives the parameters their old memory back."""
        for p, data in self._old:
            p.data = data
        self._old = []

    def stale(self) -> bool:
        """True when a weight is no longer a view of its stack: it was moved, converted or replaced."""
        return any(d.get(key) is not value for d, key, value in self._links.values()) or any(
            d[key].data_ptr() != address for d, key, address in self._addresses
        )


Group = Sequence[Sequence[str]]
Parameters = Sequence[Sequence[nn.Parameter]]


def _links(owner: nn.Module, path: str) -> list[tuple[dict, str, Any]]:
    """The steps from a module to a parameter: (the dict looked into, the key, what is found)."""
    *modules, last = path.split(".")
    links = []
    for name in modules:
        links.append((owner._modules, name, owner._modules[name]))
        owner = owner._modules[name]
    return [*links, (owner._parameters, last, owner._parameters[last])]


def _lookup(owner: nn.Module, path: str) -> nn.Parameter:
    return _links(owner, path)[-1][2]


def _views(stack: torch.Tensor, group: Parameters) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
    for rows, parameters in zip(stack, group, strict=True):
        yield from zip(parameters, rows.split([p.shape[0] for p in parameters]), strict=True)


def _is_stacked(group: Parameters, uses: Counter) -> bool:
    """True when parameters lie in one storage, one behind the other, and nothing else does: stacked before."""
    flat = [p for parameters in group for p in parameters]
    first = flat[0]
    storage, end = first.untyped_storage(), first.data_ptr()
    for p in flat:
        together = p.untyped_storage()._cdata == storage._cdata and p.data_ptr() == end
        if not together or not p.is_contiguous() or p.dtype != first.dtype:
            return False
        end += p.nbytes
    return (
        len(flat) > 1 and storage.nbytes() == end - first.data_ptr() and uses[storage.data_ptr()] == len(flat)
    )


def _as_it_lies(group: Parameters) -> torch.Tensor:
    first, size = group[0][0].detach(), _size(group)
    return first.as_strided(size, torch.empty(size, device="meta").stride())


def _size(group: Parameters) -> tuple[int, ...]:
    return (len(group), sum(p.shape[0] for p in group[0]), *group[0][0].shape[1:])


def _stack(group: Parameters, uses: Counter) -> torch.Tensor:
    first = group[0][0]
    for p in (p for parameters in group for p in parameters):
        if (reason := _not_plain(p, first, uses)) is not None:
            raise Refused(f"an expert's weight {reason}")
    stack = torch.empty(_size(group), dtype=first.dtype, device=first.device)
    for p, view in _views(stack, group):
        view.copy_(p.detach())
    return stack


def _not_plain(p: nn.Parameter, first: nn.Parameter, uses: Counter) -> str | None:
    if type(p) is not nn.Parameter:
        return f"is a {type(p).__name__}, not a plain parameter"
    if p.is_meta:
        return "is on the meta device"
    if (p.dtype, p.device) != (first.dtype, first.device):
        return f"is {p.dtype} on {p.device}, another's {first.dtype} on {first.device}"
    if p.is_inference():
        return "was made in inference mode"
    storage = p.untyped_storage()
    if uses[storage.data_ptr()] > 1:
        return "shares its memory with another parameter or buffer"
    if storage.nbytes() != p.nbytes or not p.is_contiguous():
        return "is a view of larger memory"
    if p.is_cpu and p.is_shared():
        return "lies in memory shared with other processes"
    return None

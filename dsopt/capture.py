"""From Dynamo's or torch.export's graph to the one dialect that passes read; home of all private torch calls.

The dialect is ATen before dispatch: `aten.linear`, `aten.scaled_dot_product_attention`, `aten.silu` stay
whole, in-place writes to the caller's caches stay in place, sizes may be symbolic. Parameters and buffers
are placeholders, so a compiled graph always reads the caller's current weights.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import guard_float, statically_known_true
from torch.fx.node import map_arg
from torch.fx.traceback import preserve_node_meta
from torch.utils.weak import WeakIdKeyDictionary

__all__ = [
    "WeakIdKeyDictionary",
    "add_guard",
    "capture",
    "eager",
    "expression",
    "fake_inputs",
    "fake_mode_of",
    "flat",
    "from_export",
    "graph_breaks",
    "guard_count",
    "hint",
    "inductor",
    "known",
    "map_tensors",
    "module_path",
    "over_recompile_limit",
    "raise_recompile_limit",
    "shape_facts",
    "shape_guards",
    "storage_key",
    "unflat",
    "unsupported",
]


def capture(gm: GraphModule, example_inputs: Sequence[Any]) -> GraphModule:
    """Dynamo's graph retraced into the dialect, one placeholder per input in the same order.

    Dynamo's fake mode and its symbols are kept, so what was dynamic stays dynamic. Each node keeps the stack
    of modules it came from.
    """
    mode, fakes = fake_inputs(gm, example_inputs)
    plain = _without_transforms(_without_idle_autocast(gm))
    with mode, preserve_node_meta():
        return _specialize_floats(_make_fx(plain, pre_dispatch=True)(*fakes))


def fake_inputs(gm: GraphModule, example_inputs: Sequence[Any]) -> tuple[Any, list]:
    """The fake mode that a graph is captured under, Dynamo's if it has one, and the inputs as it sees them."""
    context = torch._guards.TracingContext.try_get()
    mode = context.fake_mode if context is not None else None
    if mode is None:
        mode = torch._guards.detect_fake_mode(example_inputs) or torch._subclasses.FakeTensorMode(
            allow_non_fake_inputs=True
        )

    def fake(x: Any, placeholder: Node) -> Any:
        if not isinstance(x, torch.Tensor) or (
            isinstance(x, torch._subclasses.FakeTensor) and x.fake_mode is mode
        ):
            return x
        symbolic = context.tensor_to_context.get(x) if context is not None else None
        # the symbols Dynamo guards are found by their source; without it sizes would get new ones
        source = symbolic.tensor_source if symbolic is not None else None
        return mode.from_tensor(
            x, symbolic_context=symbolic, source=source or getattr(placeholder, "_dynamo_source", None)
        )

    placeholders = gm.graph.find_nodes(op="placeholder")
    return mode, [fake(x, p) for x, p in zip(example_inputs, placeholders, strict=True)]


def _make_fx(gm: GraphModule, pre_dispatch: bool) -> Callable[..., GraphModule]:
    def interpret(*args):
        return torch.fx.Interpreter(gm).run(*args)

    return make_fx(interpret, pre_dispatch=pre_dispatch, tracing_mode="real", _allow_non_fake_inputs=True)


def _without_idle_autocast(gm: GraphModule) -> GraphModule:
    """Dynamo's graph without the regions that switch autocast off where it is off; itself if it has none.

    transformers before 5 computes its rotary angles in one.
    """
    if not any(_is_idle_autocast(n) for n in gm.graph.nodes):
        return gm
    gm = GraphModule(gm, copy.deepcopy(gm.graph))
    for node in [n for n in gm.graph.nodes if _is_idle_autocast(n)]:
        for leave in list(node.users):
            gm.graph.erase_node(leave)
        gm.graph.erase_node(node)
    return gm


def _is_idle_autocast(node: Node) -> bool:
    if node.op != "call_function" or getattr(node.target, "__name__", "") != "_enter_autocast":
        return False
    device, _, enabled, _ = node.args
    return not enabled and not torch.is_autocast_enabled(device)


def _without_transforms(gm: GraphModule) -> GraphModule:
    """Dynamo's graph with the ATen calls that vmap and its kin come to in their place; itself if it has none.

    Tracing before dispatch cannot see into the wrapped tensors inside them and would keep constants instead.
    """
    if not any(_nesting(n) for n in gm.graph.nodes):
        return gm
    gm = GraphModule(gm, copy.deepcopy(gm.graph))
    region, depth = [], 0
    for node in list(gm.graph.nodes):
        depth += _nesting(node)
        if depth or region:
            region.append(node)
        if region and not depth:
            _expand(gm, region)
            region = []
    gm.recompile()
    return gm


def _nesting(node: Node) -> int:
    """1 where a vmap, grad or jvp begins, -1 where it ends, else 0."""
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    return name.endswith("_increment_nesting") - name.endswith("_decrement_nesting")


def _expand(gm: GraphModule, region: list[Node]) -> None:
    """Puts the ATen calls that some adjoining nodes of Dynamo's come to in their place."""
    inputs = [*dict.fromkeys(a for n in region for a in n.all_input_nodes if a not in region)]
    outputs = [n for n in region if any(user not in region for user in n.users)]
    part = torch.fx.Graph()
    copies = {a: part.placeholder(a.name) for a in inputs}
    for node in region:
        copies[node] = part.node_copy(node, copies.__getitem__)
    part.output([copies[n] for n in outputs])
    values = [a.meta["example_value"] for a in inputs]
    # Dynamo's own fake mode; detect_fake_mode would prefer the one it has made for backends
    modes = (v.fake_mode for v in values if isinstance(v, torch._subclasses.FakeTensor))
    with next(modes, contextlib.nullcontext()), preserve_node_meta():
        traced = _make_fx(GraphModule(gm, part), pre_dispatch=False)(*values)
    for constant in traced.graph.find_nodes(op="get_attr"):
        name = f"{region[0].name}_{constant.target}"
        setattr(gm, name, getattr(traced, constant.target))
        constant.target = name
    placeholders = traced.graph.find_nodes(op="placeholder")
    with gm.graph.inserting_before(region[0]):
        results = gm.graph.graph_copy(traced.graph, dict(zip(placeholders, inputs, strict=True)))
    for node, result in zip(outputs, results, strict=True):
        node.replace_all_uses_with(result, delete_user_cb=lambda user: user not in region)
    for node in reversed(region):
        gm.graph.erase_node(node)


def _specialize_floats(gm: GraphModule) -> GraphModule:
    """Symbolic floats (an epsilon, a scale) as the numbers they are, under a guard that Dynamo checks."""
    for node in list(gm.graph.nodes):
        if isinstance(node.meta.get("val"), torch.SymFloat) and node.op != "placeholder":
            number = guard_float(node.meta["val"])
            for user in list(node.users):
                user.args, user.kwargs = map_arg(
                    (user.args, user.kwargs), lambda a, node=node, number=number: number if a is node else a
                )
            gm.graph.erase_node(node)
    return gm


def unsupported(gm: GraphModule) -> str | None:
    """Why a Dynamo graph's meaning would not survive capture, or None: modes that it switches as it runs."""
    transforms = 0  # torch.func.grad enables gradients for itself
    for node in gm.graph.nodes:
        name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        transforms += _nesting(node)
        if "enter_autocast" in name and not _is_idle_autocast(node):
            return "an autocast region begins inside the graph: its casts are decided as it runs"
        if "set_grad_enabled" in name and node.args[:1] == (True,) and not transforms:
            return "part of the graph enables gradients: dsopt's kernels compute forward only"
    return None


def from_export(program: torch.export.ExportedProgram) -> GraphModule:
    """The graph of an exported program in the dialect; its placeholders are the program's, weights first.

    torch.export traces to the same ATen ops before dispatch, so this only detaches the graph from the
    program. Call the result with the weights and buffers in the order of `program.graph_signature`, then
    the user's flattened inputs.
    """
    return copy.deepcopy(program.graph_module)


def flat(args: Any) -> list:
    """The leaves of nested arguments, in the order an exported program takes them."""
    return torch.utils._pytree.tree_leaves(args)


def map_tensors(change: Callable[[torch.Tensor], Any], args: Any) -> Any:
    """Nested arguments with every tensor changed."""
    return torch.utils._pytree.tree_map_only(torch.Tensor, change, args)


def unflat(program: torch.export.ExportedProgram, outputs: Sequence[Any]) -> Any:
    """What a program returns, from its graph's flat outputs."""
    return torch.utils._pytree.tree_unflatten(list(outputs), program.call_spec.out_spec)


def fake_mode_of(gm: GraphModule):
    """The fake mode that made the graph's values, or a context that does nothing if it holds no tensor."""
    vals = [node.meta.get("val") for node in gm.graph.nodes]
    return torch._guards.detect_fake_mode(vals) or contextlib.nullcontext()


def guard_count(gm: GraphModule) -> int:
    """How many shape guards the graph's sizes are under. Passes and kernel checks must not add any."""
    shape_env = getattr(fake_mode_of(gm), "shape_env", None)
    return len(shape_env.guards) if shape_env is not None else 0


def expression(value: Any) -> str:
    """A size as an expression of the shape environment's symbols, whose names a second process gives them, too."""
    return (
        str(value.node.expr)
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))
        else str(value)
    )


def shape_facts(mode: Any, values: Iterable[Any]) -> list[str]:
    """What is known of some symbolic values: guards, what symbols were replaced by, their ranges and hints."""
    env = getattr(mode, "shape_env", None)
    if env is None:
        return []
    guards = [guard.expr for guard in env.guards]
    asserts = [a.expr for found in env.deferred_runtime_asserts.values() for a in found]
    exprs = [*guards, *asserts, *(x.node.expr for x in values)]
    symbols = set().union(*(expr.free_symbols for expr in exprs))
    # a symbol that was replaced is in no expression any more, but its source may still be asked for it
    symbols |= {s for old, new in env.replacements.items() for s in (old, *new.free_symbols)}
    facts = [f"guard {expr}" for expr in guards] + [f"assert {expr}" for expr in asserts]
    facts += sorted(f"{old} is {new}" for old, new in env.replacements.items())
    facts += sorted(f"{expr} is 0" for expr in env.divisible)
    hints = env.backed_var_to_val
    facts += sorted(f"{s} in {env.var_to_range.get(s)}, was {hints.get(s)}" for s in symbols)
    return [*facts, repr(env.settings)]


def shape_guards(mode: Any) -> list[Any]:
    """The conditions on symbolic sizes that the graph is under so far, in the order they were added."""
    env = getattr(mode, "shape_env", None)
    return [] if env is None else [guard.expr for guard in env.guards]


def add_guard(mode: Any, condition: Callable[[dict[str, Any]], Any]) -> None:
    """Puts the graph under one more condition, made of the symbols by name. ValueError if it does not hold."""
    env = mode.shape_env
    made = condition({symbol.name: symbol for symbol in env.var_to_range})
    if not env.evaluate_expr(made):
        raise ValueError(f"{made} does not hold")


def known(condition: Any) -> bool:
    """True when a condition on sizes holds for every size the graph serves; never adds a guard."""
    return statically_known_true(condition)


def hint(value: torch.SymInt) -> int | None:
    """The value a symbolic size had in the inputs that were traced, None if it had none; never adds a guard."""
    return value.node.hint if value.node.has_hint() else None


def storage_key(x: torch.Tensor) -> int:
    """What fake tensors that are views of one memory have in common, while they are alive."""
    return x.untyped_storage()._cdata


def over_recompile_limit(functions: Sequence[Callable] | None = None) -> int | None:
    """Dynamo's recompile limit if one of these functions has used it up and something ran eager for it, else None.

    functions: any function of this process by default.
    """
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list
    from torch._dynamo.utils import counters

    limit = torch._dynamo.config.recompile_limit
    if not any("recompile limit exceeded" in reason for reason in counters["unimplemented"]):
        return None
    codes = {code for f in functions or () if (code := getattr(f, "__code__", None)) is not None}
    full = functions is None or any(len(_debug_get_cache_entry_list(code)) >= limit for code in codes)
    return limit if full else None


def graph_breaks() -> dict[str, int]:
    """Why Dynamo split functions of this process into several graphs since it was last reset, and how often."""
    from torch._dynamo.utils import counters

    return {reason.splitlines()[0]: count for reason, count in counters["graph_break"].items()}


def raise_recompile_limit(limit: int) -> None:
    """Lets Dynamo compile a function at least so many times before it runs it eager."""
    torch._dynamo.config.recompile_limit = max(limit, torch._dynamo.config.recompile_limit)


def module_path(node: Node) -> str:
    """Dotted path of the innermost module that produced a node, such as `model.layers.3.self_attn`, or ""."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values()]
    if not paths:
        return ""
    path = paths[-1]
    for root in ("L['self']", "L['fn']", ".__self__"):
        path = path.replace(root, "")
    for noise in ("._modules", "['", "']", "_modules"):
        path = path.replace(noise, "." if noise == "['" else "")
    return ".".join(filter(None, path.split(".")))


def inductor(gm: GraphModule, example_inputs: Sequence[Any], mode: str | None = None) -> Callable:
    """Dynamo's graph compiled by Inductor, as `torch.compile` does by default."""
    from torch._dynamo import lookup_backend

    kwargs = {"mode": mode} if mode and mode != "default" else {}
    return lookup_backend("inductor")(gm, list(example_inputs), **kwargs)


def eager(gm: GraphModule) -> Callable:
    """Dynamo's graph as it is."""
    return gm.forward

"""What passes are written with: reading nodes, matching expressions, emitting and replacing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from dsopt.capture import fake_mode_of, known, module_path
from dsopt.effects import Order

aten = torch.ops.aten
END = 9223372036854775807


def val(node: Node) -> Any:
    """The fake value of a node: its shape, dtype and device."""
    return node.meta["val"]


def shape(node: Node) -> tuple:
    return tuple(val(node).shape)


def same_shape(a: Sequence, b: Sequence) -> bool:
    """True when two shapes are equal for every size the graph serves."""
    return len(a) == len(b) and all(known(x == y) for x, y in zip(a, b, strict=True))


def is_op(node: Any, *targets: Callable) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def is_tensor(node: Any) -> bool:
    return isinstance(node, Node) and isinstance(node.meta.get("val"), torch.Tensor)


def argument(node: Node, name: str) -> Any:
    """A call's argument by its schema name, the default when it was not given."""
    for i, arg in enumerate(node.target._schema.arguments):
        if arg.name == name:
            if not arg.kwarg_only and i < len(node.args):
                return node.args[i]
            return node.kwargs.get(name, arg.default_value)
    raise KeyError(f"{node.target} has no argument {name!r}")


def site(node: Node) -> str:
    """Where a node stands, for reports: its module's path and its own name."""
    path = module_path(node)
    return f"{path}:{node.name}" if path else node.name


def is_inner_dim(dim: int, ndim: int) -> bool:
    return dim in (-1, ndim - 1)


class OutOfFuel(Exception):
    """Raised by `Log.hit` when `DSOPT_FUEL` rewrites have been made: the pipeline stops there."""


@dataclass
class Log:
    """What one pass did: `hit` before each rewrite, `miss` for each near miss and why it stayed.

    hits: {"family", "site"} of each rewrite of a site family (`mla`, `norm`, ...); misses: {"site", "reason"}, and
        {"family"} where it is another than `family`.
    family: what the pass's misses are about, its module's `FAMILY`. order knows the graph's writes; a log that was
        read from the cache has none, for its pass is done.
    """

    name: str
    order: Order | None
    fuel: list[int] | None = None
    family: str | None = None
    rewrites: int = 0
    hits: list[dict[str, str]] = field(default_factory=list)
    misses: list[dict[str, str]] = field(default_factory=list)

    def hit(self, family: str | None = None, node: Node | None = None) -> None:
        """Counts one rewrite, about to be made. Raises OutOfFuel instead when the budget is spent.

        family: what kind of site it is, for the report; node: where the site ends.
        """
        if self.fuel is not None:
            if self.fuel[0] <= 0:
                raise OutOfFuel
            self.fuel[0] -= 1
        self.rewrites += 1
        if family is not None:
            self.hits.append({"family": family, "site": "" if node is None else site(node)})

    def standing(self, family: str, node: Node) -> None:
        """Counts a site that is one op already: written so by the user, or by `dsopt.compile` before tracing."""
        self.hits.append({"family": family, "site": site(node)})

    @property
    def families(self) -> dict[str, int]:
        """Number of hits by family."""
        return dict(Counter(hit["family"] for hit in self.hits))

    def moved(self, nodes: Iterable[Node], at: Node) -> str | None:
        """Why what `nodes` read may not be read at `at` instead: something writes to it in between. None if fine."""
        write = self.order.moved(nodes, at)
        return None if write is None else f"{write.name} writes between the reads that would become one"

    def miss(self, node: Node, reason: str, family: str | None = None) -> None:
        """Counts a near miss. family: what it is about, if not what the pass's misses are about."""
        given = {} if family in (None, self.family) else {"family": family}
        self.misses.append({"site": site(node), "reason": reason, **given})


class Emitter:
    """Adds nodes before a given node, each with its fake value and that node's origin."""

    def __init__(self, gm: GraphModule, before: Node):
        self.graph: Graph = gm.graph
        self.before = before
        self.mode = fake_mode_of(gm)

    def __call__(self, target: Callable, *args: Any, like: Any = None, **kwargs: Any) -> Node:
        """One call. like: the value to give it; by default the target is run on the arguments' fake values."""
        if like is None:
            like_args, like_kwargs = torch.fx.node.map_arg((args, kwargs), val)
            with self.mode:
                like = target(*like_args, **like_kwargs)
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(target, args, kwargs)
        node.meta = {k: v for k, v in self.before.meta.items() if k in ("nn_module_stack", "stack_trace")}
        node.meta["val"] = like
        return node


def replace(old: Node, new: Node) -> None:
    """Every reader of `old` reads `new`; `old` stays until dead code is removed.

    `new` remembers which node of the original graph it stands for, which `dsopt.verify` compares.
    """
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    new.meta["origin"] = old.meta.get("origin", old.name)
    for key in ("nn_module_stack", "stack_trace"):
        if key in old.meta:
            new.meta[key] = old.meta[key]


def precedes(a: Node, b: Node) -> bool:
    """True when a stands before b in their graph."""
    return a < b


# Expressions. A pattern is matched against a node and yields every way it fits, as a dict of bindings.

Bindings = dict[str, Any]


class Pattern:
    """A shape of expression. `match` yields the bindings of each way a value fits."""

    def match(self, value: Any, found: Bindings) -> Iterator[Bindings]:
        raise NotImplementedError


@dataclass(frozen=True)
class Var(Pattern):
    """Any value that passes `where`; the same name must bind the same value throughout."""

    name: str
    where: Callable[[Any], bool] = lambda value: True

    def match(self, value, found):
        if self.name in found:
            if found[self.name] is value or (not isinstance(value, Node) and found[self.name] == value):
                yield found
        elif self.where(value):
            yield {**found, self.name: value}


@dataclass(frozen=True)
class Const(Pattern):
    """A given plain value."""

    value: Any

    def match(self, value, found):
        if not isinstance(value, Node) and value == self.value:
            yield found


@dataclass(frozen=True)
class Call(Pattern):
    """A call of one of `targets` whose leading arguments fit `args`; `swap` also tries the first two swapped.

    The node is bound to the list under `inner`, so that its other readers can be looked at.
    """

    targets: tuple[Callable, ...]
    args: tuple[Pattern, ...]
    swap: bool = False
    name: str = ""

    def match(self, value, found):
        if not is_op(value, *self.targets) or len(value.args) < len(self.args):
            return
        # `alpha` of add/sub and a kwarg spelled dtype would change the meaning
        if value.kwargs.get("alpha", 1) != 1 or value.kwargs.get("dtype") is not None:
            return
        orders = [value.args]
        if self.swap:
            orders.append((value.args[1], value.args[0], *value.args[2:]))
        for args in orders:
            yield from self._match_args(list(zip(self.args, args, strict=False)), value, found)

    def _match_args(self, pairs, node, found):
        if not pairs:
            inner = [*found.get("inner", ()), node]
            yield {**found, "inner": inner, **({self.name: node} if self.name else {})}
            return
        (pattern, arg), *rest = pairs
        for bindings in pattern.match(arg, found):
            yield from self._match_args(rest, node, bindings)


@dataclass(frozen=True)
class Items(Pattern):
    """A list argument, item by item."""

    items: tuple[Pattern, ...]

    def match(self, value, found):
        if isinstance(value, (list, tuple)) and len(value) == len(self.items):
            yield from self._from(0, value, found)

    def _from(self, i, value, found):
        if i == len(self.items):
            yield found
            return
        for bindings in self.items[i].match(value[i], found):
            yield from self._from(i + 1, value, bindings)


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_float_cast(node: Any) -> bool:
    """True for a cast from one floating dtype to another of those that arithmetic is done in."""
    return is_op(node, aten.to.dtype) and val(node).dtype in _FLOATS and val(node.args[0]).dtype in _FLOATS


def keeps(found: Bindings, dtype: torch.dtype) -> bool:
    """False when a cast inside a match rounds to less than dtype: a fused op, which rounds to it once, does not."""
    return all(torch.promote_types(rounded, dtype) == rounded for rounded in found.get("rounded", ()))


@dataclass(frozen=True)
class Cast(Pattern):
    """The inner pattern, behind any number of casts between floating dtypes.

    The dtypes that a cast rounds to are bound to `rounded`; see `keeps`.
    """

    inner: Pattern

    def match(self, value, found):
        chain = [value]
        while is_float_cast(chain[-1]):
            chain.append(chain[-1].args[0])
        # from the inside out, so that a variable binds what was cast rather than the cast
        for i in reversed(range(len(chain))):
            dtypes = [val(c).dtype for c in chain[: i + 1]] if i else []
            rounded = [a for a, b in pairwise(dtypes) if torch.promote_types(a, b) != a]
            behind = {"inner": [*found.get("inner", ()), *chain[:i]]}
            behind["rounded"] = [*found.get("rounded", ()), *rounded]
            yield from self.inner.match(chain[i], {**found, **behind} if i else found)


def mul(a: Pattern, b: Pattern, name: str = "") -> Pattern:
    return Call((aten.mul.Tensor,), (a, b), swap=True, name=name)


def add(a: Pattern, b: Pattern, name: str = "") -> Pattern:
    return Call((aten.add.Tensor,), (a, b), swap=True, name=name)


def sub(a: Pattern, b: Pattern) -> Pattern:
    return Call((aten.sub.Tensor,), (a, b))


def best_match(
    pattern: Pattern, node: Node, good: Callable[[Bindings], bool] = lambda found: True
) -> Bindings | None:
    """The first way the pattern fits that is also `good`; else the first way, to say why not; else None."""
    ways = list(pattern.match(node, {}))
    return next((w for w in ways if good(w)), ways[0] if ways else None)


def last_cast(node: Node, dtype: torch.dtype) -> Node:
    """The cast of `node` to `dtype` if that is all that reads it, else `node`: where a fused op's result ends."""
    if val(node).dtype != dtype and len(node.users) == 1:
        (user,) = node.users
        if is_op(user, aten.to.dtype) and val(user).dtype == dtype:
            return user
    return node


def other_reader(root: Node, inner: Sequence[Node], shared: Sequence[Node] = ()) -> Node | None:
    """A node inside a match, below its root, that something outside the match reads; None if there is none.

    shared: nodes that may have other readers, such as the casts of an input.
    """
    inside = {root, *inner}
    for node in inner:
        if node is not root and node not in shared and any(user not in inside for user in node.users):
            return node
    return None

"""sum_k weights[t,k] * expert[ids[t,k]](x[t]) -> moe_experts(x, ids, weights, w13, w2, ...)

Grouped GEMMs over sorted rows and batched ones over gathered matrices come to the same op. The two products of
an expert and the activation between them are read by structure; that each row meets the matrix of its expert,
carries the weight of its choice and returns to its token is settled by running the index arithmetic on random
choices (`dsopt.probe`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from dsopt.capture import known
from dsopt.effects import between
from dsopt.expertmap import Product, core, is_last_axis, product
from dsopt.expertproof import Activation, Experts, NoMatch, settle
from dsopt.ops.experts import moe_experts
from dsopt.probe import Probe
from dsopt.rewrite import (
    END,
    Emitter,
    Log,
    argument,
    aten,
    is_float_cast,
    is_op,
    is_tensor,
    replace,
    shape,
    val,
)

_ADDS = (aten.add.Tensor, aten.add_.Tensor)
_MULS = (aten.mul.Tensor, aten.mul_.Tensor)
_FILLS = (aten.masked_fill.Scalar, aten.masked_fill_.Scalar)
_ZEROS = (aten.zeros_like.default, aten.new_zeros.default, aten.zeros.default)
_BUFFERS = (*_ZEROS, aten.empty_like.default, aten.new_empty.default)
_GELU = {"none": "gelu", "tanh": "gelu_tanh"}
# of gpt-oss, the only one in use
_ALPHA = 1.702
FAMILY = "moe"


def run(gm: GraphModule, log: Log) -> None:
    for node in gm.graph.find_nodes(op="call_function", target=moe_experts.overload):
        log.standing("moe", node)
    probe, settled = Probe(gm), {}
    products = {n: p for n in gm.graph.nodes if (p := product(n)) is not None}
    for down in reversed(products.values()):
        if not _sources(down.a, products):
            continue
        try:
            found = _read(down, products)
            settle(probe, found, settled)
        except NoMatch as reason:
            log.miss(down.out, str(reason))
            continue
        if found.base is not None and log.order.is_written_before(found.base, found.root):
            log.miss(down.out, f"{found.base.name} holds more than zeros when rows are added to it")
            continue
        if reason := log.moved(between(found.root, found.leaves()), found.root):
            log.miss(down.out, reason)
            continue
        log.hit("moe", found.root)
        _rewrite(gm, found)


def _sources(node: Node, products: dict[Node, Product]) -> set[Node]:
    """Products that `node` is a pointwise function of."""
    seen, stack, found = set(), [node], set()
    while stack:
        n = stack.pop()
        if n in seen or n.op != "call_function":
            continue
        seen.add(n)
        if n in products:
            found.add(n)
        elif core(n) is not n or is_float_cast(n) or n.target in _POINTWISE:
            stack += n.all_input_nodes
    return found


_POINTWISE = {
    *_ADDS,
    *_MULS,
    *_FILLS,
    aten.silu.default,
    aten.gelu.default,
    aten.relu.default,
    aten.sigmoid.default,
    aten.clamp.default,
    aten.pow.Tensor_Scalar,
    aten.slice.Tensor,
    aten.tanh.default,
    aten.div.Tensor,
    aten.sub.Tensor,
    aten.rsqrt.default,
    aten.mean.dim,
    aten.linalg_vector_norm.default,
    aten.clamp_min.default,
    aten.expand.default,
    *(getattr(aten, name).default for name in ("silu_", "relu_", "leaky_relu", "softplus", "erf", "exp")),
}


def _read(down: Product, products: dict[Node, Product]) -> Experts:
    found = Experts(down)
    found.activation = _activation(found, down.a, products)
    first = found.activation.gate
    second = found.activation.up
    if second is not None and second.a is not first.a:
        raise NoMatch("gate and up read different rows")
    _rows(found, first.a)
    _follow(found)
    found.ids = _origin(found, first.index, lambda n: not val(n).dtype.is_floating_point)
    if found.ids is None:
        raise NoMatch("the experts' ids are not (num_tokens, topk)")
    return found


def _plain(found: Experts, node: Node) -> Node:
    """A value without casts that widen it, axes of length 1, and masks of rows."""
    while True:
        inner = core(node)
        if is_float_cast(inner):
            if _narrows(found, inner):
                raise NoMatch(f"{inner.name} rounds to less than the products' dtype")
            inner = inner.args[0]
        elif is_op(inner, *_FILLS) and inner.args[2] == 0:
            found.masks.append(inner.args[1])
            inner = inner.args[0]
        elif inner is node:
            return node
        node = inner


def _narrows(found: Experts, node: Node) -> bool:
    """True for a result that is rounded to less than the products' dtype."""
    return torch.promote_types(val(node).dtype, val(found.down.out).dtype) != val(node).dtype


def _activation(found: Experts, node: Node, products: dict[Node, Product]) -> Activation:
    node = _plain(found, node)
    if is_op(node, *_MULS) and all(map(is_tensor, node.args)):
        for a, b in (node.args, node.args[::-1]):
            if (acted := _act(found, a)) is not None:
                return _gated(found, *acted, b, products)
    if (acted := _act(found, node)) is not None:
        name, inner = acted
        return Activation(name, _biased(found, inner, products), None, gated=False)
    raise NoMatch(f"{node.name} ({node.target}) is no activation that moe_experts has")


def _act(found: Experts, node: Node) -> tuple[str, Node] | None:
    """(name, argument) of an activation."""
    node = _plain(found, node)
    if is_op(node, aten.silu.default, aten.silu_.default):
        return "silu", node.args[0]
    if is_op(node, aten.gelu.default):
        return _GELU[argument(node, "approximate")], node.args[0]
    if is_op(node, aten.relu.default, aten.relu_.default):
        return "relu", node.args[0]
    if is_op(node, aten.pow.Tensor_Scalar) and node.args[1] == 2:
        inner = _plain(found, node.args[0])
        return ("relu2", inner.args[0]) if is_op(inner, aten.relu.default, aten.relu_.default) else None
    if is_op(node, *_MULS) and all(map(is_tensor, node.args)):
        for x, s in (node.args, node.args[::-1]):
            inner = _plain(found, s)
            scaled = _plain(found, inner.args[0]) if is_op(inner, aten.sigmoid.default) else inner
            if not is_op(scaled, aten.mul.Tensor) or scaled is inner or scaled.args[1] != _ALPHA:
                continue
            if _plain(found, scaled.args[0]) is _plain(found, x):
                return "swiglu_oai", x
    return None


def _gated(found: Experts, name: str, gate: Node, up: Node, products: dict[Node, Product]) -> Activation:
    up = _plain(found, up)
    if name == "swiglu_oai":
        if not _is_sum(up) or up.args[1] != 1:
            raise NoMatch("x * sigmoid(1.702 x) is not multiplied with up + 1")
        up = _plain(found, up.args[0])
    gate, top = _clamped(found, gate)
    up, limits = _clamped(found, up)
    limit = None if top is None else top[1]
    if top != (None if limit is None else (None, limit)) or limits != (
        None if limit is None else (-limit, limit)
    ):
        raise NoMatch("gate and up are not clamped to (-inf, limit] and [-limit, limit]")
    (gate_source, gate_part), (up_source, up_part) = _part(gate), _part(up)
    if gate_part is None and up_part is None:
        gate_product, up_product = (_biased(found, n, products) for n in (gate, up))
        return Activation(name, gate_product, up_product, limit=limit)
    if gate_source is not up_source:
        raise NoMatch("gate and up are cut from different products")
    whole = _biased(found, gate_source, products)
    width = shape(whole.w)[2 if whole.transposed else 1]
    halves = {
        (0, width // 2, 1): "gate",
        (width // 2, width, 1): "up",
        (0, width, 2): "even",
        (1, width, 2): "odd",
    }
    order = tuple(halves.get((a, min(b, width), c)) for a, b, c in (gate_part, up_part))
    if order not in (("gate", "up"), ("even", "odd")):
        raise NoMatch("gate and up are not the first and second half, or even and odd rows, of one product")
    return Activation(name, whole, None, interleaved=order == ("even", "odd"), limit=limit)


def _clamped(found: Experts, node: Node) -> tuple[Node, tuple[Any, Any] | None]:
    node = _plain(found, node)
    if not is_op(node, aten.clamp.default):
        return node, None
    return _plain(found, node.args[0]), (argument(node, "min"), argument(node, "max"))


def _part(node: Node) -> tuple[Node, tuple[int, int, int] | None]:
    """(source, (start, end, step)) of a slice along the last axis; (node, None) for anything else."""
    if not is_op(node, aten.slice.Tensor) or not is_last_axis(argument(node, "dim"), node.args[0]):
        return node, None
    start, end, step = (argument(node, a) for a in ("start", "end", "step"))
    return node.args[0], (start or 0, END if end is None else end, step)


def _biased(found: Experts, node: Node, products: dict[Node, Product]) -> Product:
    """The product below a bias by expert, which is noted."""
    node = _plain(found, node)
    if _is_sum(node):
        for h, b in (node.args[:2], node.args[1::-1]):
            inner = _plain(found, h)
            if inner in products and (bias := _bias(b)) is not None:
                found.biases[inner] = bias
                return products[inner]
    if node not in products:
        raise NoMatch(f"{node.name} ({node.target}) stands between the products")
    return products[node]


def _is_sum(node: Node) -> bool:
    return is_op(node, *_ADDS) and node.kwargs.get("alpha", 1) == 1


def _bias(node: Node) -> tuple[Node, Node] | None:
    """(bias, experts) of a bias gathered by expert."""
    node = core(node) if is_tensor(node) else node
    if is_op(node, aten.index.Tensor) and len(node.args[1]) == 1 and val(node.args[0]).ndim == 2:
        return node.args[0], node.args[1][0]
    return None


def _rows(found: Experts, node: Node) -> None:
    """x and the tokens of the rows of the first product; no tokens: each row of x topk times in a row."""
    while True:
        if is_op(node, aten.index.Tensor) and len(node.args[1]) == 1 and val(node.args[0]).ndim == 2:
            found.x, (found.tokens,) = node.args
            return
        if (
            is_op(node, aten.index_select.default)
            and argument(node, "dim") == 0
            and val(node.args[0]).ndim == 2
        ):
            found.x, found.tokens = node.args[0], argument(node, "index")
            return
        if _repeats_rows(node):
            node = node.args[0]
        elif is_op(node, *_FILLS) and node.args[2] == 0:
            found.masks.append(node.args[1])
            node = node.args[0]
        elif val(node).ndim == 2:
            found.x = node
            return
        elif (
            is_op(node, aten.unsqueeze.default, aten.squeeze.dim, aten.reshape.default)
            and core(node) is not node
        ):
            node = node.args[0]
        else:
            raise NoMatch("the rows of the first product are not tokens of x")


def _repeats_rows(node: Node) -> bool:
    """True when each row stands several times in a row, or a flat view of such rows."""
    if is_op(node, aten.repeat_interleave.self_int):
        return argument(node, "dim") == 0
    if is_op(node, aten.reshape.default):
        return is_op(node.args[0], aten.expand.default) and val(node).ndim == 2
    return is_op(node, aten.expand.default) and val(node).ndim == 3 and known(shape(node.args[0])[-2] == 1)


def _follow(found: Experts) -> None:
    """From the second product to the sum over choices: fills root, steps and weights."""
    node, down = found.down.out, found.down
    weighed = False
    while True:
        node = _through_ones(node)
        users = _readers(node)
        if len(users) != 1:
            raise NoMatch(f"{node.name} is read {len(users)} times on the way to the sum over choices")
        (user,) = users
        other = next((a for a in user.args[:2] if a is not node), None)
        if is_float_cast(user) and not _narrows(found, user):
            pass
        elif _is_sum(user) and not weighed and (bias := _bias(other)) is not None:
            found.biases[down.out] = bias
            found.steps.append(("experts", bias[1]))
        elif is_op(user, *_FILLS) and user.args[2] == 0:
            found.steps.append(("mask", user.args[1]))
        elif is_op(user, *_MULS) and is_tensor(other) and not weighed:
            weighed = True
            found.steps.append(("weigh", other))
        elif is_op(user, aten.index.Tensor) and user.args[0] is node and len(user.args[1]) == 1:
            found.steps.append(("pick", user.args[1][0]))
        elif is_op(user, aten.index_copy.default, aten.index_copy_.default) and user.args[1] == 0:
            found.steps.append(("place", user.args[2]))
        elif is_op(user, aten.index_put.default, aten.index_put_.default) and _puts_rows(user, node):
            found.steps.append(("place", user.args[1][0]))
        elif is_op(user, aten.index_add.default, aten.index_add_.default) and _adds_rows(user, node):
            found.steps.append(("add_to", user.args[2]))
            found.base = user.args[0]
            break
        elif is_op(user, aten.reshape.default, aten.unflatten.int) and str(shape(user)[-1]) == str(
            shape(node)[-1]
        ):
            found.steps.append(("rows", None))
        elif is_op(user, aten.sum.dim_IntList) and val(node).ndim == 3 and list(argument(user, "dim")) == [1]:
            if _narrows(found, user):
                raise NoMatch(f"{user.name} sums in less than the products' dtype")
            found.steps.append(("sum", None))
            break
        else:
            raise NoMatch(
                f"{user.name} ({user.target}) stands between the second product and the sum over choices"
            )
        node = user
    if not weighed:
        raise NoMatch("the choices are summed without weights")
    found.root = user
    if is_op(user, aten.sum.dim_IntList) and argument(user, "keepdim"):
        raise NoMatch("the sum over choices keeps its axis")
    (row_weights,) = (n for kind, n in found.steps if kind == "weigh")
    found.weights = _origin(found, row_weights, lambda n: val(n).dtype.is_floating_point)
    if found.weights is None:
        raise NoMatch("the weights are not (num_tokens, topk)")
    dtype = val(found.x).dtype
    while val(found.root).dtype != dtype and len(found.root.users) == 1:
        (user,) = found.root.users
        if not is_float_cast(user):
            break
        found.root = user


def _through_ones(node: Node) -> Node:
    """The last of the calls that only add and drop axes of length 1 behind a node."""
    while len(node.users) == 1:
        (user,) = node.users
        if core(user) is user or core(user) is not core(node):
            break
        node = user
    return node


def _readers(node: Node) -> list[Node]:
    """What reads a node, without buffers made in its shape for another of its readers to fill."""
    return [
        user
        for user in node.users
        if not (is_op(user, *_BUFFERS) and all(reader in node.users for reader in user.users))
    ]


def _puts_rows(put: Node, rows: Node) -> bool:
    return len(put.args[1]) == 1 and put.args[2] is rows and not argument(put, "accumulate")


def _adds_rows(add: Node, rows: Node) -> bool:
    base = add.args[0]
    zeros = is_op(base, *_ZEROS)
    return argument(add, "dim") == 0 and add.args[3] is rows and argument(add, "alpha") == 1 and zeros


def _origin(found: Experts, node: Node, wanted: Callable[[Node], bool]) -> Node | None:
    """The nearest (num_tokens, topk) tensor of the wanted kind above a node."""
    p = found.activation.gate
    tokens, pairs = shape(found.x)[0], shape(p.a)[0] if p.experts is None else val(p.experts).numel()
    seen, queue = set(), [node]
    while queue:
        n = queue.pop(0)
        if n in seen:
            continue
        seen.add(n)
        shaped = is_tensor(n) and val(n).ndim == 2 and known(shape(n)[0] == tokens)
        if shaped and wanted(n) and known(val(n).numel() == pairs):
            return n
        if n.op == "call_function":
            queue += n.all_input_nodes
    return None


def _rewrite(gm: GraphModule, found: Experts) -> None:
    act = found.activation
    emit = Emitter(gm, found.root)
    bias = {out: b for out, (b, _) in found.biases.items()}
    w2 = found.down.weight(emit)
    new = emit(
        moe_experts.overload,
        found.x,
        found.ids,
        found.weights,
        act.gate.weight(emit),
        w2,
        None if act.up is None else act.up.weight(emit),
        bias.get(act.gate.out),
        bias.get(found.down.out),
        None if act.up is None else bias.get(act.up.out),
        act.name,
        act.gated,
        act.interleaved,
        act.limit,
        like=val(found.x).new_empty((shape(found.x)[0], shape(w2)[1])),
    )
    if val(new).dtype != val(found.root).dtype:
        new = emit(aten.to.dtype, new, val(found.root).dtype, like=val(found.root))
    replace(found.root, new)

"""One spelling for what frameworks spell in many ways, and nothing that does nothing.

add_, mul_, silu_ and such of a fresh tensor      -> add, mul, silu
to.device, to.dtype_layout, type_as, _to_copy     -> to.dtype, or gone when nothing changes
detach, alias, dropout(p=0), full slices, no-op
view / reshape / expand / contiguous / permute    -> gone
split, chunk, unbind + getitem; narrow            -> slice, select
transpose, t, mT, permute of permute              -> permute
new_empty + copy_ into adjoining slices           -> cat, or clone where one copy fills it
x * x, square(x)                                  -> pow(x, 2)
x * sigmoid(x)                                    -> silu(x)
1 / sqrt(x), x ** -0.5, y / sqrt(x)               -> rsqrt
x * 1, x / 1, x + 0, clamp(x, -inf, inf)          -> x
x @ w.T, mm, addmm, einsum with a 2-d weight      -> linear
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import torch
from torch.fx import GraphModule, Node

from dsopt.capture import known
from dsopt.effects import MAYBE_VIEWS, Order, bases, between
from dsopt.rewrite import Emitter, Log, argument, aten, is_op, is_tensor, replace, same_shape, shape, val

# calls that take no more than a size or a dtype from their second argument
_LIKE = (aten.type_as.default, aten.to.other, aten.expand_as.default, aten.view_as.default)

Rule = Callable[[GraphModule, Node], Node | None]


def run(gm: GraphModule, log: Log) -> None:
    """Applies the rules from the first node to the last; what a rule emits is canonical already."""
    _drop_empty_copies(gm)
    _in_place_to_pure(gm, log)
    order = Order(gm)
    (output,) = gm.graph.find_nodes(op="output")
    # what the caller gets to write to: the inputs, and all that is returned
    inputs, results = gm.graph.find_nodes(op="placeholder"), set(output.all_input_nodes)
    theirs = set().union(*map(order.base, (*results, *inputs)))
    # a result that shares memory with one of these is still a tensor of its own to the caller
    apart = {*inputs, *results}
    for node in list(gm.graph.nodes):
        if is_op(node, aten.view.default, aten._unsafe_view.default) and not order.is_written(node):
            # what a fused op puts in the place of its input may be laid out otherwise
            node.target = aten.reshape.default
        for rule in RULES.get(node.target, ()) if node.op == "call_function" else ():
            before = node.prev
            new = rule(gm, node)
            if new is None or new is node or (node in results and new in apart):
                continue
            if _serves(node, new, before, order, theirs):
                log.hit()
                replace(node, new)
                if not node.users:
                    gm.graph.erase_node(node)
                break
    for node in list(gm.graph.nodes):
        if is_op(node, aten.new_empty.default, aten.empty.memory_format):
            _copies_to_cat(gm, node, order, log)


def _serves(node: Node, new: Node, before: Node, order: Order, theirs: set[Node]) -> bool:
    """True when no write, in the graph or by the caller afterwards, tells `new` from `node`.

    before: the node that stood before `node` when the rule was asked; what stands between was emitted by it.
    theirs: memory the caller holds in the end.
    """
    if not before < new:
        # y = x * 1 is a copy: x may not stand for it where either is written to
        if node in order.base(node):
            if (
                order.is_written(node)
                or order.is_written(new)
                or (node in theirs and theirs & order.base(new))
            ):
                return False
            theirs |= order.base(new) if node in theirs else set()
        return True
    emitted, step = set(), node.prev
    while step is not before:
        emitted.add(step)
        step = step.prev
    leaves = {a for n in emitted for a in n.all_input_nodes} - emitted
    if node.target in _LIKE:
        leaves.add(node.args[1])
    return order.moved(between(node, leaves), node) is None


def _drop_empty_copies(gm: GraphModule) -> None:
    """Copies of nothing write nothing."""
    for node in gm.graph.find_nodes(op="call_function", target=aten.copy_.default):
        if known(val(node).numel() == 0) and not node.users:
            piece = node.args[0]
            gm.graph.erase_node(node)
            if is_op(piece, aten.slice.Tensor):
                _drop(gm, piece)


def _in_place_to_pure(gm: GraphModule, log: Log) -> None:
    """x.add_(y) -> x + y for a fresh x or a view of one, if its memory is read afterwards through the result alone."""
    base_of = bases(gm)
    aliases: dict[Node, list[Node]] = {}
    for node, its_bases in base_of.items():
        for base in its_bases:
            aliases.setdefault(base, []).append(node)
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node.target not in _PURE:
            continue
        x = node.args[0]
        if len(base_of[x]) != 1:
            continue
        (base,) = base_of[x]
        if base_of[base] != {base} or base.op != "call_function":
            continue
        # what carries on from the call itself sees the new value either way
        earlier, later = (
            [n for n in aliases[base] if (n < node) == side and n is not node] for side in (True, False)
        )
        if any(node < user for n in earlier for user in n.users):
            continue
        pure = Emitter(gm, node)(_PURE[node.target], *node.args, **node.kwargs)
        # what copied a strided view is a view of its compact copy, and the other way round
        laid_out = same_shape(val(pure).stride(), val(node).stride()) or _LAYOUT_MATTERS.isdisjoint(
            n.target for n in later
        )
        if val(pure).dtype != val(node).dtype or not same_shape(shape(pure), shape(node)) or not laid_out:
            gm.graph.erase_node(pure)
            continue
        log.hit()
        replace(node, pure)
        gm.graph.erase_node(node)
        aliases[base], aliases[pure] = earlier, [pure, *later]
        base_of.update((n, base_of.get(n, frozenset()) - {base} | {pure}) for n in aliases[pure])


def _contiguous_strides(sizes) -> list:
    strides, step = [], 1
    for size in reversed(sizes):
        strides.append(step)
        step = step * size
    return strides[::-1]


def _same(gm: GraphModule, node: Node) -> Node | None:
    """A call that returns its input's very elements, in place: the input serves."""
    x = node.args[0]
    return (
        x if is_tensor(x) and same_shape(shape(x), shape(node)) and val(x).dtype == val(node).dtype else None
    )


def _contiguous(gm: GraphModule, node: Node) -> Node | None:
    x = node.args[0]
    if argument(node, "memory_format") not in (None, torch.contiguous_format):
        return None
    strides = zip(val(x).stride(), _contiguous_strides(shape(x)), shape(x), strict=True)
    return x if all(known(a == b) or known(size == 1) for a, b, size in strides) else None


def _cast(gm: GraphModule, node: Node) -> Node | None:
    x = node.args[0]
    old, new = val(x), val(node)
    if old.device != new.device or old.layout != new.layout:
        return None
    takes_format = any(a.name == "memory_format" for a in node.target._schema.arguments)
    if takes_format and argument(node, "memory_format") not in (None, torch.preserve_format):
        return None
    if old.dtype == new.dtype:
        copies = node.target is aten._to_copy.default or True in (node.kwargs.get("copy"), *node.args[2:])
        return None if copies else x
    return (
        None
        if node.target is aten.to.dtype and len(node.args) == 2
        else Emitter(gm, node)(aten.to.dtype, x, new.dtype, like=new)
    )


def _dropout(gm: GraphModule, node: Node) -> Node | None:
    x, p, train = node.args
    return x if p == 0 or not train else None


def _full_slice(gm: GraphModule, node: Node) -> Node | None:
    if argument(node, "step") != 1:
        return None
    return _same(gm, node)


def _piece(gm: GraphModule, node: Node) -> Node | None:
    """getitem of split, chunk or unbind."""
    source, index = node.args
    if not isinstance(source, Node) or source.op != "call_function":
        return None
    emit = Emitter(gm, node)
    if source.target is aten.unbind.int:
        return emit(aten.select.int, source.args[0], argument(source, "dim"), index, like=val(node))
    if source.target not in _SPLITS:
        return None
    x, dim = source.args[0], argument(source, "dim")
    sizes = [v.shape[dim] for v in val(source)]
    if not all(isinstance(s, int) for s in sizes):
        return None
    index = index % len(sizes)
    start = sum(sizes[:index])
    if same_shape(shape(x), shape(node)):
        return x
    return emit(aten.slice.Tensor, x, dim, start, start + sizes[index], like=val(node))


def _narrow(gm: GraphModule, node: Node) -> Node | None:
    x, dim, start, length = node.args
    if not isinstance(start, int) or not isinstance(length, int) or start < 0:
        return None
    return Emitter(gm, node)(aten.slice.Tensor, x, dim, start, start + length, like=val(node))


def _permute(gm: GraphModule, node: Node) -> Node | None:
    x = node.args[0]
    ndim = val(node).ndim
    dims = list(range(ndim))
    if node.target is aten.permute.default:
        dims = [d % ndim for d in node.args[1]]
    elif node.target in (aten.transpose.int, aten.swapaxes.default, aten.swapdims.default):
        a, b = (d % ndim for d in node.args[1:])
        dims[a], dims[b] = dims[b], dims[a]
    elif node.target is aten.mT.default:
        dims[-2:] = dims[:-3:-1]
    else:
        dims = dims[::-1]
    source = x
    if is_op(x, aten.permute.default):
        source, dims = x.args[0], [x.args[1][d] for d in dims]
    if dims == list(range(ndim)):
        return source
    if node.target is aten.permute.default and source is x and list(node.args[1]) == dims:
        return None
    return Emitter(gm, node)(aten.permute.default, source, dims, like=val(node))


def _mul(gm: GraphModule, node: Node) -> Node | None:
    a, b = node.args
    for x, y in ((a, b), (b, a)):
        if not isinstance(y, Node) and isinstance(y, (int, float)) and y == 1 and is_tensor(x):
            return _same(gm, node) if x is a else (x if val(x).dtype == val(node).dtype else None)
        if is_op(y, aten.sigmoid.default) and y.args[0] is x and val(x).dtype.is_floating_point:
            return Emitter(gm, node)(aten.silu.default, x, like=val(node))
    if a is b and val(a).dtype != torch.bool:
        return Emitter(gm, node)(aten.pow.Tensor_Scalar, a, 2, like=val(node))
    return None


def _div(gm: GraphModule, node: Node) -> Node | None:
    a, b = node.args
    if node.kwargs.get("rounding_mode") is not None:
        return None
    if not isinstance(b, Node) and b == 1:
        return _same(gm, node)
    if is_op(b, aten.sqrt.default):
        emit = Emitter(gm, node)
        root = emit(aten.rsqrt.default, b.args[0], like=val(b))
        if not isinstance(a, Node):
            return root if a == 1 else emit(aten.mul.Tensor, root, a, like=val(node))
        return emit(aten.mul.Tensor, a, root, like=val(node))
    return None


def _clamp(gm: GraphModule, node: Node) -> Node | None:
    free = (argument(node, "min") in (None, -math.inf)) and (argument(node, "max") in (None, math.inf))
    return _same(gm, node) if free else None


def _add(gm: GraphModule, node: Node) -> Node | None:
    # -0.0 keeps its sign, as it does in Inductor
    return _same(gm, node) if not isinstance(node.args[1], Node) and node.args[1] == 0 else None


def _pow(gm: GraphModule, node: Node) -> Node | None:
    x, exponent = node.args
    if exponent == -0.5 and val(x).dtype.is_floating_point:
        return Emitter(gm, node)(aten.rsqrt.default, x, like=val(node))
    return None


def _square(gm: GraphModule, node: Node) -> Node:
    return Emitter(gm, node)(aten.pow.Tensor_Scalar, node.args[0], 2, like=val(node))


def _reciprocal(gm: GraphModule, node: Node) -> Node | None:
    x = node.args[0]
    return (
        Emitter(gm, node)(aten.rsqrt.default, x.args[0], like=val(node))
        if is_op(x, aten.sqrt.default)
        else None
    )


def _transposed_weight(node: Node) -> Node | None:
    """w for a node that is the transpose of the 2-d w."""
    return node.args[0] if is_op(node, aten.permute.default) and list(node.args[1]) == [1, 0] else None


def _matmul(gm: GraphModule, node: Node) -> Node | None:
    x, w = node.args
    weight = _transposed_weight(w)
    if weight is None or val(x).ndim < 2:
        return None
    return Emitter(gm, node)(aten.linear.default, x, weight, like=val(node))


def _addmm(gm: GraphModule, node: Node) -> Node | None:
    bias, x, w = node.args
    weight = _transposed_weight(w)
    plain = argument(node, "alpha") == 1 and argument(node, "beta") == 1
    if weight is None or not plain or val(bias).ndim != 1:
        return None
    return Emitter(gm, node)(aten.linear.default, x, weight, bias, like=val(node))


def _einsum(gm: GraphModule, node: Node) -> Node | None:
    """...k,nk->...n with a 2-d second operand is a linear layer."""
    equation, operands = node.args[:2]
    if len(operands) != 2 or not all(is_tensor(x) for x in operands):
        return None
    terms, _, out = equation.replace(" ", "").partition("->")
    left, _, right = terms.partition(",")
    if len(right) != 2 or not left or left[-1] not in right or len(set(right)) != 2:
        return None
    n = right.replace(left[-1], "")
    if out != left[:-1] + n or n in left or len(set(left)) != len(left.replace(".", "")) + ("." in left):
        return None
    x, w = operands
    if not known(shape(x)[-1] == shape(w)[right.index(left[-1])]):
        return None
    emit = Emitter(gm, node)
    weight = w if right == n + left[-1] else emit(aten.permute.default, w, [1, 0])
    return emit(aten.linear.default, x, weight, like=val(node))


def _copies_to_cat(gm: GraphModule, buffer: Node, order: Order, log: Log) -> None:
    """new_empty filled by copy_ into slices that adjoin along one dim -> cat of what was copied; clone if it is one."""
    pieces = []
    for user in sorted(buffer.users):
        whole = is_op(user, aten.copy_.default) and user.args[0] is buffer
        if not whole and (not is_op(user, aten.slice.Tensor) or argument(user, "step") != 1):
            break
        writers = [user] if whole else list(user.users)
        if len(writers) != 1 or not is_op(writers[0], aten.copy_.default) or writers[0].users:
            break
        pieces.append((buffer if whole else user, writers[0]))
    sources = [w.args[1] for _, w in pieces]
    for (piece, _), source in zip(pieces, sources):
        if val(piece).dtype != val(source).dtype or not same_shape(shape(piece), shape(source)):
            return
    dim = _adjoining(buffer, [p for p, _ in pieces])
    is_one = [p for p, _ in pieces] == [buffer]
    if dim is None and not is_one:
        return
    last = pieces[-1][1]
    written = {buffer, *(n for pair in pieces for n in pair)}
    if any(user < last for user in buffer.users if user not in written):
        return
    if order.moved([w for _, w in pieces], last):
        return
    log.hit()
    emit = Emitter(gm, last)
    target, args = (aten.clone.default, sources) if is_one else (aten.cat.default, (sources, dim))
    new = emit(target, *args, like=val(buffer))
    for piece, writer in pieces:
        gm.graph.erase_node(writer)
        if piece is not buffer:
            gm.graph.erase_node(piece)
    replace(buffer, new)


def _adjoining(buffer: Node, pieces: list[Node]) -> int | None:
    """The dim along which slices of a buffer make up the whole of it, in their order; None if they do not."""
    dims = {argument(p, "dim") % val(buffer).ndim for p in pieces if p is not buffer}
    if len(dims) != 1 or buffer in pieces:
        return None
    (dim,) = dims
    end = 0
    for piece in pieces:
        if (argument(piece, "start") or 0) != end or not isinstance(shape(piece)[dim], int):
            return None
        end += shape(piece)[dim]
    return dim if end == shape(buffer)[dim] else None


def _drop(gm: GraphModule, node: Node) -> None:
    if not node.users:
        gm.graph.erase_node(node)


_SPLITS = (
    aten.split_with_sizes.default,
    aten.split.Tensor,
    aten.split.sizes,
    aten.chunk.default,
    aten.unsafe_split.Tensor,
    aten.unsafe_chunk.default,
    aten.tensor_split.sections,
)

_WRITES = "add sub mul div pow silu sigmoid relu neg square sqrt rsqrt exp clamp tanh floor_divide".split()
_WRITES += "masked_fill scatter scatter_add index_put index_copy index_add index_fill logical_not bitwise_not".split()
_PURE = {
    getattr(getattr(aten, f"{name}_"), overload): getattr(getattr(aten, name), overload)
    for name in _WRITES
    for overload in getattr(aten, f"{name}_").overloads()
    if overload in getattr(aten, name).overloads()
}

# calls whose meaning, or whether they copy, depends on how their input lies in memory
_LAYOUT_MATTERS = {*MAYBE_VIEWS, aten.as_strided.default}

RULES: dict[Callable, tuple[Rule, ...]] = {
    **dict.fromkeys((aten.detach.default, aten.alias.default, aten.lift_fresh.default), (_same,)),
    **dict.fromkeys((aten.view.default, aten.reshape.default, aten._unsafe_view.default), (_same,)),
    **dict.fromkeys((aten.expand.default, aten.flatten.using_ints, aten.expand_as.default), (_same,)),
    aten.contiguous.default: (_contiguous,),
    **dict.fromkeys(
        (
            aten.to.dtype,
            aten.to.device,
            aten.to.dtype_layout,
            aten.to.other,
            aten.type_as.default,
            aten._to_copy.default,
        ),
        (_cast,),
    ),
    aten.dropout.default: (_dropout,),
    aten.slice.Tensor: (_full_slice,),
    operator.getitem: (_piece,),
    aten.narrow.default: (_narrow,),
    **dict.fromkeys(
        (
            aten.permute.default,
            aten.transpose.int,
            aten.swapaxes.default,
            aten.swapdims.default,
            aten.t.default,
            aten.numpy_T.default,
            aten.mT.default,
        ),
        (_permute,),
    ),
    aten.mul.Tensor: (_mul,),
    aten.div.Tensor: (_div,),
    aten.add.Tensor: (_add,),
    aten.clamp.default: (_clamp,),
    aten.pow.Tensor_Scalar: (_pow,),
    aten.square.default: (_square,),
    aten.reciprocal.default: (_reciprocal,),
    **dict.fromkeys((aten.matmul.default, aten.mm.default), (_matmul,)),
    aten.addmm.default: (_addmm,),
    aten.einsum.default: (_einsum,),
    **dict.fromkeys((aten._assert_tensor_metadata.default,), (_drop,)),
}

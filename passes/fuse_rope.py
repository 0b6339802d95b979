"""Rotations of pairs by a table of cosines and sines -> rope(x, cos, sin, interleaved_in, interleaved_out)

half-split    x * cos + cat(-x[h:], x[:h]) * sin
interleaved   x * cos + flatten(stack(-odd of x, even of x)) * sin, tables as wide as x
pairwise      cat or stack of (a * cos - b * sin, b * cos + a * sin), a and b the halves or even/odd of x
complex       view_as_real(view_as_complex(x) * table)
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from dsopt.capture import known
from dsopt.ops.rope import rope
from dsopt.rewrite import (
    END,
    Bindings,
    Call,
    Cast,
    Emitter,
    Items,
    Log,
    Var,
    add,
    argument,
    aten,
    best_match,
    is_inner_dim,
    is_op,
    is_tensor,
    keeps,
    last_cast,
    mul,
    other_reader,
    replace,
    same_shape,
    shape,
    sub,
    val,
)

FAMILY = "rope"

X, COS, SIN = Var("x", is_tensor), Var("cos", is_tensor), Var("sin", is_tensor)
A, B = Var("a", is_tensor), Var("b", is_tensor)
_NEG_B = Call((aten.neg.default,), (B,))
_JOINS = (aten.flatten.using_ints, aten.reshape.default, aten.view.default)

HALF_SPLIT = add(
    mul(X, COS),
    mul(Call((aten.cat.default,), (Items((_NEG_B, A)), Var("dim"))), SIN),
)
_TURNED_PAIRS = Call(_JOINS, (Call((aten.stack.default,), (Items((_NEG_B, A)), Var("dim"))),))
INTERLEAVED = add(mul(Cast(X), COS), mul(Cast(_TURNED_PAIRS), SIN))
_ROTATED_A = sub(mul(A, COS), mul(B, SIN))
_ROTATED_B = add(mul(B, COS), mul(A, SIN))
PAIRWISE_HALVES = Call((aten.cat.default,), (Items((Cast(_ROTATED_A), Cast(_ROTATED_B))), Var("dim")))
_STACK = Call((aten.stack.default,), (Items((Cast(_ROTATED_A), Cast(_ROTATED_B))), Var("dim")))
PAIRWISE_INTERLEAVED = Call(_JOINS, (_STACK,))
_PAIRS = Call((aten.reshape.default, aten.view.default), (Cast(X), Var("sizes")))
_COMPLEX = Call((aten.view_as_complex.default,), (_PAIRS,))
COMPLEX = Call(_JOINS, (Call((aten.view_as_real.default,), (mul(_COMPLEX, Var("table", is_tensor)),)),))


def run(gm: GraphModule, log: Log) -> None:
    for node in list(gm.graph.nodes):
        for pattern, rewrite in (
            (HALF_SPLIT, _half_split),
            (INTERLEAVED, _interleaved),
            (PAIRWISE_HALVES, _pairwise),
            (PAIRWISE_INTERLEAVED, _pairwise),
            (COMPLEX, _complex),
        ):
            found = best_match(pattern, node, lambda w, node=node: _fits(node, w))
            if found is not None:
                rewrite(gm, node, found, log)
                break


def _fits(node: Node, found: Bindings) -> bool:
    """False for a way to match that took a table for the input, or the input's cast for the input."""
    x = found.get("x")
    if "a" in found and (pair := _pair_layout(found["a"], found["b"])) is not None:
        return x is None or pair[0] is x
    return x is not None and val(x).dtype == val(last_cast(node, val(x).dtype)).dtype


def _slice_of(node: Node) -> tuple[Node, tuple] | None:
    """(x, (start, stop, step)) for a slice of x's last dim."""
    if not is_op(node, aten.slice.Tensor) or not is_inner_dim(argument(node, "dim"), val(node).ndim):
        return None
    start, stop, step = (argument(node, a) for a in ("start", "end", "step"))
    width = shape(node.args[0])[-1]
    if any(isinstance(bound, Node) for bound in (start, stop, step)) or not isinstance(width, int):
        return None
    return node.args[0], (start or 0, width if stop is None or stop >= width else stop, step)


def _pair_layout(a: Node, b: Node) -> tuple[Node, bool] | None:
    """(x, interleaved) when a and b are the even and odd elements of x, or its halves."""
    left, right = _slice_of(a), _slice_of(b)
    if left is None or right is None or left[0] is not right[0] or shape(left[0])[-1] % 2:
        return None
    width = shape(left[0])[-1]
    if (left[1], right[1]) == ((0, width, 2), (1, width, 2)):
        return left[0], True
    if (left[1], right[1]) == ((0, width // 2, 1), (width // 2, width, 1)):
        return left[0], False
    return None


def _half_split(gm: GraphModule, node: Node, found: Bindings, log: Log) -> None:
    pair = _pair_layout(found["a"], found["b"])
    if pair is None or pair != (found["x"], False) or not is_inner_dim(found["dim"], val(node).ndim):
        return
    _emit(gm, node, found, found["x"], found["cos"], found["sin"], (False, False), log)


def _interleaved(gm: GraphModule, node: Node, found: Bindings, log: Log) -> None:
    x = found["x"]
    if _pair_layout(found["a"], found["b"]) != (x, True) or not is_inner_dim(
        found["dim"], val(node).ndim + 1
    ):
        return
    if not all(same_shape(shape(n), shape(x)) for n in found["inner"] if is_op(n, *_JOINS)):
        return
    if not all(known(shape(found[name])[-1] == shape(x)[-1]) for name in ("cos", "sin")):
        log.miss(node, "the tables are not as wide as the input")
        return
    emit = Emitter(gm, node)
    cos, sin = (_by_halves(emit, found[name]) for name in ("cos", "sin"))
    _emit(gm, node, found, x, cos, sin, (True, True), log)


def _by_halves(emit: Emitter, table: Node) -> Node:
    """A table for pairs side by side as the op takes it: one entry a pair, or those of a' before those of b'."""
    views, source = [], table
    while is_op(source, aten.unsqueeze.default) and source.args[1] % val(source).ndim < val(source).ndim - 1:
        views.append(source)
        source = source.args[0]
    if _is_doubled(source):
        narrow = source.args[0]
        for view in reversed(views):
            narrow = emit(aten.unsqueeze.default, narrow, view.args[1] % val(view).ndim)
        return narrow
    even, odd = (emit(aten.slice.Tensor, table, -1, i, END, 2) for i in (0, 1))
    return emit(aten.cat.default, [even, odd], -1)


def _is_doubled(node: Node) -> bool:
    """True for a last dim whose every entry is repeated twice in a row."""
    if not is_op(node, aten.repeat_interleave.self_int) or argument(node, "repeats") != 2:
        return False
    dim = argument(node, "dim")
    return dim is not None and is_inner_dim(dim, val(node).ndim)


def _pairwise(gm: GraphModule, node: Node, found: Bindings, log: Log) -> None:
    pair = _pair_layout(found["a"], found["b"])
    stacked = not is_op(node, aten.cat.default)
    if pair is None or not is_inner_dim(found["dim"], val(node).ndim + stacked):
        return
    x, interleaved_in = pair
    _emit(gm, node, found, x, found["cos"], found["sin"], (interleaved_in, stacked), log)


def _complex(gm: GraphModule, node: Node, found: Bindings, log: Log) -> None:
    x, table = found["x"], found["table"]
    if not val(table).is_complex() or val(node).ndim != val(x).ndim:
        return
    *leading, width = shape(x)
    pairs = next(n for n in found["inner"] if is_op(n, aten.view_as_complex.default)).args[0]
    if not isinstance(width, int) or not same_shape(shape(pairs), (*leading, width // 2, 2)):
        log.miss(node, "the input is cut into other pairs than those of its last dim")
        return
    if val(table).is_conj():
        log.miss(node, "the table is conjugated")
        return
    if (reason := _table_mismatch(shape(table), shape(pairs)[:-1])) is not None:
        log.miss(node, reason)
        return
    emit = Emitter(gm, next(n for n in found["inner"] if is_op(n, aten.mul.Tensor)))
    parts = emit(aten.view_as_real.default, table)
    cos, sin = (emit(aten.select.int, parts, -1, i) for i in (0, 1))
    _emit(gm, node, found, x, cos, sin, (True, True), log)


def _table_mismatch(table: tuple, pairs: tuple) -> str | None:
    """Why a complex table does not multiply pairs one by one, or None."""
    if len(table) > len(pairs) or not known(table[-1] == pairs[-1]):
        return "the table does not have one entry for each pair"
    sizes = zip(reversed(table), reversed(pairs), strict=False)
    return None if all(known(a == 1) or known(a == b) for a, b in sizes) else "the table broadcasts the input"


def _emit(
    gm: GraphModule,
    node: Node,
    found: Bindings,
    x: Node,
    cos: Node,
    sin: Node,
    layout: tuple[bool, bool],
    log: Log,
) -> None:
    if is_op(x, aten.to.dtype) and (narrow := val(x.args[0]).dtype).itemsize < val(x).dtype.itemsize:
        # widened before and narrowed after, as the op does itself
        x = x.args[0] if last_cast(node, narrow) is not node else x
    root, width = last_cast(node, val(x).dtype), shape(cos)[-1]
    dtype = val(root).dtype
    sources = [n for n in found["inner"] if is_op(n, aten.to.dtype) and n.args[0] is x]
    if other_reader(root, [*found["inner"], node], sources):
        log.miss(node, "part of the rotation is read by another node")
    elif torch.promote_types(val(x).dtype, dtype) != dtype:
        log.miss(node, f"the result is {dtype} but the input is {val(x).dtype}")
    elif not keeps(found, dtype):
        log.miss(node, f"a cast rounds to less than the result's {dtype} in between")
    elif not same_shape(shape(root), shape(x)):
        log.miss(node, "the table broadcasts the input to another shape")
    elif not same_shape(shape(cos)[-1:], shape(sin)[-1:]) or width not in (shape(x)[-1], shape(x)[-1] // 2):
        log.miss(node, "the tables are neither as wide as the input nor half of it")
    elif reason := log.moved([root, node, *found["inner"]], root):
        log.miss(node, reason)
    else:
        log.hit("rope", root)
        emit = Emitter(gm, root)
        # tables of a wider dtype widen the result
        x = x if val(x).dtype == dtype else emit(aten.to.dtype, x, dtype)
        replace(root, emit(rope.overload, x, cos, sin, *layout, like=val(root)))

"""cast(weight) * (scale, repeated over blocks) -> dequantize(weight, scale), weight in float8_e4m3fn

The scales may be repeated, expanded and reshaped, or broadcast over a weight that is viewed block by block; casts may
come before or after the product. Blocks at the edges may be partial. Dequantizations of inputs then go to the front of
the graph, so that those of sibling weights stand before the first layer that reads one; `fold_dequantize` moves back
what it leaves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from dsopt.effects import between
from dsopt.fp8 import scale_shape
from dsopt.ops.quant import dequantize
from dsopt.rewrite import Emitter, Log, aten, is_op, is_tensor, replace, shape, val
from dsopt.strided import Strided, is_move, step

FAMILY = "fp8"
_EXACT = {torch.float64, torch.float32, torch.bfloat16, torch.float16}
_SCALES = (torch.float32, torch.float8_e8m0fnu, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _Operand:
    """A factor of a product: elements of `source`, in the order `strided`, cast to dtypes on the way."""

    source: Node
    strided: Strided
    casts: tuple[torch.dtype, ...]


def run(gm: GraphModule, log: Log) -> None:
    for node in list(gm.graph.nodes):
        if is_op(node, aten.mul.Tensor) and all(map(is_tensor, node.args)):
            for weight, scale in (node.args, node.args[::-1]):
                if (factor := _operand(weight)) is not None and _is_weight(factor):
                    _fuse(gm, node, factor, _operand(scale), log)
                    break
    _to_the_front(gm, log)


def _is_weight(factor: _Operand) -> bool:
    """True for a weight in FP8 that was cast to dtypes only which hold its values exactly."""
    source = val(factor.source)
    return source.dtype == torch.float8_e4m3fn and source.ndim >= 2 and set(factor.casts) <= _EXACT


def _operand(node: Node) -> _Operand | None:
    """What a node holds the elements of, behind moves and casts; None where a size is not static."""
    above, casts = [], []
    while is_move(node) or is_op(node, aten.to.dtype):
        if is_move(node):
            above.append(node)
        else:
            casts.append(val(node).dtype)
        node = node.args[0]
    sizes = shape(node)
    if not is_tensor(node) or not all(isinstance(n, int) for n in sizes):
        return None
    strided: Strided | None = Strided.of(sizes)
    for move in reversed(above):
        strided = None if strided is None else step(move, strided)
    return None if strided is None else _Operand(node, strided, tuple(casts))


def _fuse(gm: GraphModule, node: Node, weight: _Operand, scale: _Operand | None, log: Log) -> None:
    if scale is None or val(scale.source).dtype not in _SCALES:
        log.miss(node, "a weight in float8_e4m3fn is multiplied with what is no repeated scale")
        return
    found = _read(node, weight, scale)
    if isinstance(found, str):
        log.miss(node, found)
        return
    root, block = found
    narrow = [d for d in scale.casts if torch.promote_types(d, val(root).dtype) != d]
    if narrow:
        log.miss(
            node, f"the scale is rounded to {narrow[0]}, which is less than the result's {val(root).dtype}"
        )
        return
    if reason := log.moved(between(root, (weight.source, scale.source)), root):
        log.miss(node, reason)
        return
    log.hit()
    emit = Emitter(gm, root)
    wanted, scales = scale_shape(shape(weight.source), block), scale.source
    if shape(scales) != wanted:
        scales = emit(aten.reshape.default, scales, list(wanted))
    dtype = val(root).dtype
    replace(root, emit(dequantize.overload, weight.source, scales, dtype, list(block), like=val(root)))


def _read(node: Node, weight: _Operand, scale: _Operand) -> tuple[Node, tuple[int, int]] | str:
    """(the node that holds the whole product in the weight's own order, blocks), or why there is none."""
    whole = Strided.of(shape(weight.source))
    ways = [x.strided.expanded(shape(node)) for x in (weight, scale)]
    best = None
    while None not in ways:
        if ways[0] == whole:
            best = node, ways[1]
        if len(node.users) != 1:
            break
        (node,) = node.users
        if is_op(node, aten.to.dtype) and not _widens(node):
            continue
        if not is_move(node):
            break
        ways = [step(node, way) for way in ways]
    if best is None:
        return "the product with a weight in float8_e4m3fn is not put in the weight's order"
    root, way = best
    block = _block(shape(weight.source), way)
    *_, n, k = shape(weight.source)
    count = math.prod(shape(scale.source))
    if block is None or math.prod(wanted := scale_shape((*shape(root)[:-2], n, k), block)) != count:
        return "the scale is not repeated over blocks of the weight"
    expected = Strided.of(wanted).repeated(block[0], -2).repeated(block[1], -1).cut(-2, n).cut(-1, k)
    if _cut(expected) != _cut(way):
        return "the scale is not repeated over blocks of the weight"
    return root, block


def _widens(cast: Node) -> bool:
    old, new = val(cast.args[0]).dtype, val(cast).dtype
    return torch.promote_types(old, new) != old


def _block(sizes: tuple[int, ...], way: Strided) -> tuple[int, int] | None:
    """How many rows and columns share a scale."""
    rows, columns = (axis[-1][0] if axis and axis[-1][1] == 0 else 1 for axis in way.axes[-2:])
    return rows, columns


def _cut(way: Strided) -> tuple:
    """What tells two orders of elements apart: a digit that is not used up may be of any size."""
    axes = []
    for axis, size in zip(way.axes, way.sizes, strict=True):
        inner = math.prod(n for n, _ in axis[1:])
        axes.append(((-(-size // inner), axis[0][1]), *axis[1:]) if axis else ())
    return tuple(axes), way.sizes


def _to_the_front(gm: GraphModule, log: Log) -> None:
    inputs = {n for n in gm.graph.nodes if n.op in ("placeholder", "get_attr")}
    first = next(n for n in gm.graph.nodes if n.op not in ("placeholder", "get_attr"))
    for node in gm.graph.find_nodes(op="call_function", target=dequantize.overload):
        if set(node.all_input_nodes) <= inputs and node is not first and not log.moved([node], first):
            first.prepend(node)

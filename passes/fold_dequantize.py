"""op(x, dequantize(weight, scale)) -> op(x, weight, scale), op one that reads FP8 itself; views of the wide weight too

Views of the dequantized tensor become views of the weight and of its scales. Where a view cuts or splits rows inside of
a block, the scales are repeated for each row. What no op takes up stays, right but in a wide copy, right before its
first reader, and the reason is counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from dsopt.capture import known
from dsopt.effects import is_impure
from dsopt.op import Op
from dsopt.ops.attention import LATENT_BLOCK, mla_attention
from dsopt.ops.experts import moe_experts
from dsopt.ops.linear import gated_mlp, multi_linear
from dsopt.ops.quant import dequantize
from dsopt.quantized import Source, source_of
from dsopt.rewrite import Emitter, Log, argument, aten, is_op, replace, shape, val

FAMILY = "fp8"
# op -> its operands that may be in FP8, each with the argument that its scales go to; of a list each item
SCALED: dict[Op, dict[str, str]] = {
    multi_linear: {"weights": "scales"},
    gated_mlp: {"w_gate": "scale_gate", "w_up": "scale_up", "w_down": "scale_down"},
    moe_experts: {
        "w13": "scale13",
        "w2": "scale2",
        "w3": "scale3",
        "shared_gate": "shared_scale_gate",
        "shared_up": "shared_scale_up",
        "shared_down": "shared_scale_down",
    },
    mla_attention: {"w_uk": "w_uk_scale", "w_uv": "w_uv_scale"},
}
# argument of mla_attention whose blocks are given
LATENT = {"latent": "latent_scale"}


class Unfoldable(Exception):
    """Why an op cannot read what was dequantized where it lies."""


class InsideBlock(Unfoldable):
    """A view begins or splits rows inside of a block."""


@dataclass
class Operand:
    """An operand of an op: its scales if it is in FP8 already, its source if it was dequantized."""

    weight: Node
    scale: Node | None
    source: Source | None


def run(gm: GraphModule, log: Log) -> None:
    taken: list[Node] = []  # dequantizations that an op took up
    reasons: dict[Node, str] = {}
    for op in SCALED:
        for node in gm.graph.find_nodes(op="call_function", target=op.overload):
            taken += _fold(gm, node, op, reasons, log)
    gm.graph.eliminate_dead_code(is_impure)
    kept = gm.graph.find_nodes(op="call_function", target=dequantize.overload)
    for node in kept:
        reader = min(node.users)
        if not log.moved([node], reader):
            reader.prepend(node)
        log.miss(node, reasons.get(node, f"read by {reader.target}, which reads no FP8"))
    for node in dict.fromkeys(taken):
        if node not in kept:
            log.standing(FAMILY, node)


def _fold(gm: GraphModule, node: Node, op: Op, reasons: dict[Node, str], log: Log) -> list[Node]:
    """Folds what an op reads dequantized; the dequantizations that it took up."""
    names = [a.name for a in op.overload._schema.arguments]
    args = dict(zip(names, op.bind(node.args, node.kwargs), strict=True))
    emit, taken = Emitter(gm, node), []
    if any(args[scale] is not None for scale in SCALED[op].values()):
        log.standing(FAMILY, node)
    for pairs, blocks in ((SCALED[op], None), (LATENT, LATENT_BLOCK)):
        if not pairs.keys() <= args.keys():
            continue
        operands = [o for w, s in pairs.items() for o in _operands(args[w], args[s])]
        nodes = [n for o in operands if o.source for n in (o.source.node, *o.source.views)]
        if not nodes:
            continue
        try:
            if reason := log.moved(nodes, node):
                raise Unfoldable(reason)
            block = _take_up(emit, operands, tuple(args["block"]), blocks)
        except Unfoldable as reason:
            reasons.update((o.source.node, str(reason)) for o in operands if o.source)
            continue
        args.update(_arguments(pairs, args, operands))
        if blocks is None:
            args["block"] = list(block)
        taken += [o.source.node for o in operands if o.source]
    if taken:
        log.hit()
        replace(node, emit(op.overload, *args.values(), like=val(node)))
    return taken


def _operands(weights: Any, scales: Any) -> Iterator[Operand]:
    """What an argument and its scales hold: one operand or none, or those of a list."""
    if not isinstance(weights, (list, tuple)):
        weights, scales = [weights], [scales]
    for w, s in zip(weights, scales or [None] * len(weights), strict=True):
        yield Operand(w, s, None if s is not None or w is None else source_of(w))


def _arguments(pairs: dict[str, str], args: dict[str, Any], operands: Sequence[Operand]) -> dict[str, Any]:
    """The values of the arguments in `pairs`, from their operands in order."""
    found, left = {}, list(operands)
    for weight, scale in pairs.items():
        if isinstance(args[weight], (list, tuple)):
            found |= {weight: [o.weight for o in left], scale: [o.scale for o in left]}
        else:
            operand = left.pop(0)
            found |= {weight: operand.weight, scale: operand.scale}
    return found


def _take_up(
    emit: Emitter, operands: Sequence[Operand], given: tuple[int, int], wanted: tuple[int, int] | None
) -> tuple[int, int]:
    """Puts the weights and scales in the operands' places, all in the blocks that it returns.

    given: the blocks of scales that are there already; wanted: the only blocks that will do.
    """
    blocks = {o.source.block for o in operands if o.source}
    blocks |= {given for o in operands if o.scale is not None}
    if wanted is not None and blocks != {wanted}:
        raise Unfoldable(
            f"the op reads blocks of {list(wanted)}, got {' and '.join(map(str, map(list, blocks)))}"
        )
    if len({columns for _, columns in blocks}) > 1:
        raise Unfoldable(f"operands are in blocks of {' and '.join(map(str, map(list, sorted(blocks))))}")
    (block, *more) = sorted(blocks)
    if not more:
        try:
            new = [_read(emit, o, block, block[0]) for o in operands]
        except InsideBlock:
            more = [block]
    if more:
        new = [_read(emit, o, given, 1) for o in operands]
        block = (1, block[1])
    for operand, (weight, scale) in zip(operands, new, strict=True):
        operand.weight, operand.scale = weight, scale
    return block


def _read(emit: Emitter, operand: Operand, given: tuple[int, int], rows: int) -> tuple[Node, Node | None]:
    """An operand's weight and its scales for blocks of so many rows, of the source's blocks or one by one."""
    if operand.source is None:
        if operand.scale is None or rows == given[0]:
            return operand.weight, operand.scale
        return operand.weight, _by_row(emit, operand.scale, given[0], shape(operand.weight)[-2])
    source = operand.source
    weight, scale = source.node.args[:2]
    if rows != source.block[0]:
        scale = _by_row(emit, scale, source.block[0], shape(weight)[-2])
    for view in source.views:
        weight = emit(view.target, weight, *view.args[1:], **view.kwargs)
        scale = _view(emit, view, scale, (rows, source.block[1]))
    return weight, scale


def _by_row(emit: Emitter, scale: Node, rows: int, count: int) -> Node:
    """Scales for blocks of one row, from those for blocks of `rows`."""
    scale = emit(aten.to.dtype, scale, torch.float32)
    repeated = emit(aten.repeat_interleave.self_int, scale, rows, -2)
    return emit(aten.slice.Tensor, repeated, -2, 0, count)


def _view(emit: Emitter, view: Node, scale: Node, block: tuple[int, int]) -> Node:
    """The scales of a view, from those of what it is a view of. Raises Unfoldable where they are no view."""
    old, new = shape(view.args[0]), shape(view)
    ndim = len(old)
    if is_op(view, aten.slice.Tensor):
        return _cut(emit, view, scale, block)
    if is_op(view, aten.permute.default):
        if [d % ndim for d in view.args[1]][-2:] != [ndim - 2, ndim - 1]:
            raise Unfoldable("the dequantized tensor is transposed")
        return emit(aten.permute.default, scale, view.args[1])
    if is_op(view, aten.select.int, aten.unsqueeze.default, aten.squeeze.dim):
        dim = argument(view, "dim") % (ndim + 1 if is_op(view, aten.unsqueeze.default) else ndim)
        if dim > ndim - 2 or (dim == ndim - 2 and not is_op(view, aten.unsqueeze.default)):
            raise Unfoldable("rows or columns of the dequantized tensor are taken one by one")
        return emit(view.target, scale, dim, *view.args[2:])
    if not known(old[-1] == new[-1]) or len(new) < 2:
        raise Unfoldable("a view of the dequantized tensor splits columns")
    if known(old[-2] == new[-2]):
        rows = shape(scale)[-2]
    elif all(isinstance(n, int) and n % block[0] == 0 for n in (old[-2], new[-2])):
        rows = new[-2] // block[0]
    else:
        raise InsideBlock("a view of the dequantized tensor splits rows inside of a block")
    sizes = (*new[:-2], rows, shape(scale)[-1])
    if not all(isinstance(n, int) for n in sizes):
        raise Unfoldable("a view of the dequantized tensor is of unknown size")
    return emit(aten.reshape.default, scale, list(sizes))


def _cut(emit: Emitter, view: Node, scale: Node, block: tuple[int, int]) -> Node:
    """The scales of a slice."""
    ndim = val(view).ndim
    dim, start = argument(view, "dim") % ndim, argument(view, "start") or 0
    if dim < ndim - 2:
        return emit(view.target, scale, dim, *view.args[2:])
    size = block[dim - ndim]
    if size == 1 and dim == ndim - 2:
        return emit(view.target, scale, dim, *view.args[2:])
    if not isinstance(start, int) or start < 0 or argument(view, "step") != 1:
        raise Unfoldable("a slice of the dequantized tensor begins at an unknown place")
    if start % size:
        what = "rows" if dim == ndim - 2 else "columns"
        error = InsideBlock if what == "rows" else Unfoldable
        raise error(f"a slice of the dequantized tensor begins inside of a block of {size} {what}")
    stop = start + shape(view)[dim]
    return emit(aten.slice.Tensor, scale, dim, start // size, -(-stop // size))

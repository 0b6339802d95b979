"""linear(x, w1), linear(x, w2), ... of one x -> multi_linear(x, [w1, w2, ...]), any number of siblings, also one.

Weights in FP8, dequantized where they are read, are siblings of such in the same blocks only: kernels take one kind.

linear(x.to(d), w.to(d)), w narrower than d -> multi_linear(x, [w], dtype=d): nothing widened is stored."""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule, Node

from dsopt.ops.linear import multi_linear
from dsopt.quantized import block_of
from dsopt.rewrite import Emitter, Log, argument, aten, is_op, is_tensor, precedes, replace, val


def run(gm: GraphModule, log: Log) -> None:
    siblings: dict[tuple, list[Node]] = {}
    for node in gm.graph.nodes:
        if is_op(node, aten.linear.default) and val(argument(node, "weight")).ndim == 2:
            siblings.setdefault((node.args[0], block_of(argument(node, "weight"))), []).append(node)
    for (_, block), linears in siblings.items():
        while linears:
            first = linears[0]
            group = [n for n in linears if n is first or (_ready(n, first) and not log.moved([n], first))]
            _merge(gm, group, log)
            # a wide one that is left is a linear layer; one in FP8 needs an op that reads it so
            linears = [] if block is None else [n for n in linears if n not in group]


def _merge(gm: GraphModule, group: list[Node], log: Log) -> None:
    first = group[0]
    log.hit()
    emit = Emitter(gm, first)
    weights = [argument(n, "weight") for n in group]
    biases = [argument(n, "bias") for n in group]
    x = first.args[0]
    operands = (x, weights, biases)
    if not any(map(is_tensor, biases)) and _widened([x, *weights], log, first):
        operands = (x.args[0], [w.args[0] for w in weights], biases, val(x).dtype)
    merged = emit(multi_linear.overload, *operands, like=[val(n) for n in group])
    for i, node in enumerate(group):
        replace(node, emit(operator.getitem, merged, i, like=val(node)))


def _widened(nodes: list[Node], log: Log, at: Node) -> bool:
    """True when all are casts from one narrower float dtype, of what nothing writes to before `at`."""
    if not all(is_op(n, aten.to.dtype) and len(n.args) == 2 for n in nodes):
        return False
    sources = {val(n.args[0]).dtype for n in nodes}
    wide, narrow = val(nodes[0]).dtype, next(iter(sources))
    floats = len(sources) == 1 and narrow.is_floating_point and wide == torch.float32
    return floats and narrow.itemsize < wide.itemsize and not log.moved(nodes, at)


def _ready(node: Node, first: Node) -> bool:
    """True when the node's weight and bias are known where the first sibling stands."""
    operands = [argument(node, "weight"), argument(node, "bias")]
    same_dtype = val(operands[0]).dtype == val(argument(first, "weight")).dtype
    return same_dtype and all(precedes(t, first) for t in operands if is_tensor(t))

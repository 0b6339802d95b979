"""linear(x, w1), linear(x, w2), ... of one x -> multi_linear(x, [w1, w2, ...]), any number of siblings, also one."""

from __future__ import annotations

import operator

from torch.fx import GraphModule, Node

from dsopt.ops.linear import multi_linear
from dsopt.rewrite import Emitter, Log, argument, aten, is_op, is_tensor, precedes, replace, val


def run(gm: GraphModule, log: Log) -> None:
    siblings: dict[Node, list[Node]] = {}
    for node in gm.graph.nodes:
        if is_op(node, aten.linear.default) and val(argument(node, "weight")).ndim == 2:
            siblings.setdefault(node.args[0], []).append(node)
    for x, linears in siblings.items():
        first = linears[0]
        group = [n for n in linears if n is first or (_ready(n, first) and not log.moved([n], first))]
        log.hit()
        emit = Emitter(gm, first)
        weights = [argument(n, "weight") for n in group]
        biases = [argument(n, "bias") for n in group]
        merged = emit(multi_linear.overload, x, weights, biases, like=[val(n) for n in group])
        for i, node in enumerate(group):
            replace(node, emit(operator.getitem, merged, i, like=val(node)))


def _ready(node: Node, first: Node) -> bool:
    """True when the node's weight and bias are known where the first sibling stands."""
    operands = [argument(node, "weight"), argument(node, "bias")]
    same_dtype = val(operands[0]).dtype == val(argument(first, "weight")).dtype
    return same_dtype and all(precedes(t, first) for t in operands if is_tensor(t))

"""Reading where an operand was dequantized: what passes ask before they put operands together."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from dsopt.ops.quant import dequantize
from dsopt.rewrite import argument, aten, is_op

VIEWS = (
    aten.slice.Tensor,
    aten.select.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.permute.default,
    aten.reshape.default,
    aten.view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
)


@dataclass(frozen=True)
class Source:
    """The dequantization that an operand is a view of, and the views between, from the source on."""

    node: Node
    views: tuple[Node, ...]

    @property
    def block(self) -> tuple[int, int]:
        rows, columns = argument(self.node, "block")
        return rows, columns


def source_of(node: Node) -> Source | None:
    """Where an operand was dequantized; None if it was not."""
    views: list[Node] = []
    while is_op(node, *VIEWS):
        views.insert(0, node)
        node = node.args[0]
    return Source(node, tuple(views)) if is_op(node, dequantize.overload) else None


def block_of(node: Node) -> tuple[int, int] | None:
    """The blocks of an operand that was dequantized; None for a wide one. Kernels take operands of one kind."""
    source = source_of(node)
    return None if source is None else source.block

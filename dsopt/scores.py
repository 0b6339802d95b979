"""What stands between the product of queries and keys and its softmax: a scale, a mask, casts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from dsopt.capture import known
from dsopt.rewrite import Emitter, aten, is_float_cast, is_op, is_tensor, shape, val

SOFTMAX = (aten.softmax.int, aten._softmax.default)
_POINTWISE = (aten.to.dtype, aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor)
_POINTWISE += (aten.tanh.default, aten.clamp.default, aten.masked_fill.Scalar, aten.where.self)
_NOT = (aten.bitwise_not.default, aten.logical_not.default)
# masks below this make a weight vanish whatever the score, so filling and adding are the same
_HIDDEN = -1e9


@dataclass
class Scores:
    """scores = scale * product + mask, or that with `hidden_by` where `fill` is True, or -inf where `seen` is False.

    between: the nodes from the softmax's input down to the product, the product left out.
    """

    product: Node
    scale: float = 1.0
    mask: Node | None = None
    fill: Node | None = None
    hidden_by: float = 0.0
    seen: Node | None = None
    between: list[Node] = field(default_factory=list)

    @property
    def masks(self) -> list[Node]:
        return [x for x in (self.mask, self.fill, self.seen) if x is not None]

    def emit_mask(self, emit: Emitter, order: Sequence[int], dtype: torch.dtype) -> Node | None:
        """The mask an attention takes, its axes in `order` of those of the scores; None if there is none.

        Added masks are of float32 or `dtype`. What -inf fills becomes a bool mask; a finite value is added, so
        that a row with nothing else is uniform as it was.
        """
        ndim = len(order)

        def ordered(mask: Node) -> Node:
            if list(order) == list(range(ndim)) and val(mask).ndim >= 2:
                return mask
            for _ in range(ndim - val(mask).ndim):
                mask = emit(aten.unsqueeze.default, mask, 0)
            return mask if list(order) == list(range(ndim)) else emit(aten.permute.default, mask, list(order))

        if self.seen is not None:
            return ordered(self.seen)
        if self.fill is not None and self.hidden_by == float("-inf") and val(self.fill).dtype == torch.bool:
            seen = self.fill.args[0] if is_op(self.fill, *_NOT) else None
            if seen is None or val(seen).dtype != torch.bool:
                seen = emit(aten.logical_not.default, self.fill)
            return ordered(seen)
        mask = None if self.mask is None else ordered(self.mask)
        if self.fill is not None:
            hidden = ordered(self.fill)
            wide = torch.promote_types(dtype, torch.float32)
            zeros = emit(aten.zeros_like.default, hidden, dtype=wide)
            # a score vanishes beside the lowest value
            mask = emit(aten.masked_fill.Scalar, zeros, hidden, torch.finfo(wide).min)
        if mask is not None and val(mask).dtype not in (dtype, torch.float32):
            mask = emit(aten.to.dtype, mask, dtype)
        return mask


def read_scores(
    softmax: Node, is_product: Callable[[Node], bool], start: Node | None = None
) -> tuple[Scores | str | None, Node | None]:
    """(what was read, the product) above a softmax; a reason in its place if it does not fit, None if it is none.

    is_product: whether a node is what the scores are made of: a product of queries and keys.
    start: the scores, if they are not all that the softmax takes.
    """
    found = Scores(product=softmax)
    node = softmax.args[0] if start is None else start
    while not is_product(node):
        plain = found.scale == 1.0 and found.mask is None and found.fill is None
        if is_op(node, aten.to.dtype):
            if not val(node).dtype.is_floating_point:
                return None, None
            step = node.args[0]
        elif is_op(node, aten.mul.Tensor, aten.div.Tensor) and not is_tensor(node.args[1]):
            factor = node.args[1]
            if not isinstance(factor, (int, float)) or (factor == 0 and is_op(node, aten.div.Tensor)):
                return "the scale of the scores is not a number", product_above(node, is_product)
            found.scale = found.scale * factor if is_op(node, aten.mul.Tensor) else found.scale / factor
            step = node.args[0]
        elif is_op(node, aten.add.Tensor) and plain and not node.kwargs:
            a, b = node.args
            product_first = product_above(a, is_product) is not None
            step, found.mask = (a, b) if product_first else (b, a)
            if not is_tensor(found.mask) or product_above(step, is_product) is None:
                return None, None
        elif is_op(node, aten.masked_fill.Scalar) and plain:
            step, found.fill, found.hidden_by = node.args
            if not isinstance(found.hidden_by, (int, float)) or found.hidden_by > _HIDDEN:
                return None, None
        else:
            return _unknown(node), product_above(node, is_product)
        found.between.append(node)
        node = step
    found.product = node
    return found, node


def _unknown(node: Node) -> str:
    if is_op(node, aten.cat.default):
        return "the softmax runs over columns that are no keys (an attention sink)"
    if is_op(node, aten.mul.Tensor, aten.div.Tensor):
        return "the scale of the scores is a tensor"
    what = node.target if node.op == "call_function" else "a graph input"
    return f"{what} stands between the scores and the softmax"


def product_above(node: Node, is_product: Callable[[Node], bool], depth: int = 6) -> Node | None:
    """The product that a chain of pointwise calls starts from."""
    if not isinstance(node, Node) or depth == 0:
        return None
    if is_product(node):
        return node
    if not is_op(node, aten.cat.default, *_POINTWISE):
        return None
    above = node.args[0] if is_op(node, aten.cat.default) else node.args
    return next(filter(None, (product_above(a, is_product, depth - 1) for a in above)), None)


def is_as_wide(node: Node, dtype: torch.dtype) -> bool:
    """False for a cast, or a softmax with a dtype, that rounds to less than `dtype` or to no float."""
    if not is_op(node, aten.to.dtype, *SOFTMAX):
        return True
    if is_op(node, aten.to.dtype) and not is_float_cast(node):
        return False
    old, new = val(node.args[0]).dtype, val(node).dtype
    return new in (torch.promote_types(old, new), torch.promote_types(new, dtype))


def unrepeated_mask(mask: Node | None) -> Node | None:
    """The mask before it was repeated for every head."""
    while (
        mask is not None
        and is_op(mask, aten.expand.default)
        and val(mask).ndim == val(mask.args[0]).ndim == 4
    ):
        source = mask.args[0]
        if known(shape(mask)[1] == 1) or not known(shape(source)[1] == 1):
            break
        mask = source
    return mask

"""Which axes of the operands of a product are which axes of its result.

Labels are plain numbers, one for each axis of a tensor; two axes with one label run together. An axis of size 1
that is repeated for others has the label None. `factors` labels the operands of a product given the labels of
its result, `peel` follows views to what is behind them, `onward` goes from a tensor to the product that reads it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import Node

from dsopt.capture import known
from dsopt.rewrite import Emitter, argument, aten, is_float_cast, is_op, is_tensor, shape, val

Label = int | None
_fresh = itertools.count()
_MATMULS = (aten.matmul.default, aten.bmm.default)
_SAME = (aten.contiguous.default, aten.clone.default)


@dataclass(frozen=True)
class Labelled:
    """A tensor and the label of each of its axes."""

    node: Node
    axes: tuple[Label, ...]

    def labels(self) -> set[int]:
        """The labels of the axes that may be longer than 1."""
        pairs = zip(self.axes, shape(self.node), strict=True)
        return {a for a, size in pairs if a is not None and not known(size == 1)}

    def has(self, order: Sequence[int]) -> bool:
        """True when the tensor has the axes `order` and no others longer than 1."""
        return set(order) <= set(self.axes) and self.labels() <= set(order)

    def emit(self, emit: Emitter, order: Sequence[int]) -> Node:
        """The tensor with exactly the axes `order`; see `has`."""
        node, axes = self.node, list(self.axes)
        for dim in reversed(range(len(axes))):
            if axes[dim] not in order:
                node = emit(aten.squeeze.dim, node, dim)
                del axes[dim]
        dims = [axes.index(a) for a in order]
        return node if dims == sorted(dims) else emit(aten.permute.default, node, dims)


def fresh(count: int) -> tuple[int, ...]:
    """Labels that nothing has yet."""
    return tuple(itertools.islice(_fresh, count))


def is_product(node: object) -> bool:
    """True for a product of two tensors, summed over one axis, that `factors` can read."""
    if is_op(node, *_MATMULS):
        return all(is_tensor(a) and val(a).ndim >= 2 for a in node.args)
    if not is_op(node, aten.einsum.default) or len(node.args[1]) != 2 or "." in node.args[0]:
        return False
    left, right, out = _terms(node)
    summed = set(left) & set(right) - set(out)
    plain = all(len(set(term)) == len(term) for term in (left, right, out))
    if not plain or len(summed) != 1 or not set(left) ^ set(right) <= set(out):
        return False
    (axis,) = summed
    a, b = node.args[1]
    return known(shape(a)[left.index(axis)] == shape(b)[right.index(axis)])


def _terms(einsum: Node) -> tuple[str, str, str]:
    terms, _, out = einsum.args[0].replace(" ", "").partition("->")
    left, _, right = terms.partition(",")
    return left, right, out


def factors(product: Labelled) -> tuple[Labelled, Labelled, int]:
    """The operands of a product, labelled, and the new label of the axis that is summed over."""
    node, axes = product.node, product.axes
    (summed,) = fresh(1)
    if is_op(node, aten.einsum.default):
        left, right, out = _terms(node)
        labels, sizes = dict(zip(out, axes, strict=True)), dict(zip(out, shape(node), strict=True))
        a, b = (
            Labelled(
                x,
                tuple(
                    labels.get(letter, summed) if known(size == sizes.get(letter, size)) else None
                    for letter, size in zip(term, shape(x), strict=True)
                ),
            )
            for x, term in zip(node.args[1], (left, right), strict=True)
        )
        return a, b, summed
    a, b = node.args
    return (
        Labelled(a, (*_batch_axes(a, node, axes), axes[-2], summed)),
        Labelled(b, (*_batch_axes(b, node, axes), summed, axes[-1])),
        summed,
    )


def _batch_axes(x: Node, product: Node, axes: tuple[Label, ...]) -> list[Label]:
    """Labels of a matmul operand's leading axes; None where it has size 1 and the product may have more."""
    lead = val(x).ndim - 2
    pairs = zip(shape(x)[:lead], shape(product)[-2 - lead : -2], axes[-2 - lead : -2], strict=True)
    return [label if known(mine == whole) else None for mine, whole, label in pairs]


def peel(x: Labelled) -> Labelled:
    """The tensor behind views that move or repeat axes, and behind casts that round nothing away."""
    node, axes = x.node, list(x.axes)
    while True:
        if is_op(node, aten.permute.default):
            old: list[Label] = [None] * len(axes)
            for label, dim in zip(axes, node.args[1], strict=True):
                old[dim] = label
            axes = old
        elif is_op(node, aten.unsqueeze.default):
            del axes[argument(node, "dim") % len(axes)]
        elif is_op(node, aten.squeeze.dim) and val(node).ndim < val(node.args[0]).ndim:
            axes.insert(argument(node, "dim") % val(node.args[0]).ndim, None)
        elif is_op(node, aten.expand.default):
            source = node.args[0]
            axes = axes[len(axes) - val(source).ndim :]
            pairs = zip(axes, shape(source), shape(node)[-len(axes) :], strict=True)
            axes = [label if known(mine == whole) else None for label, mine, whole in pairs]
        elif not (is_op(node, *_SAME) or (is_float_cast(node) and _widens(node))):
            return Labelled(node, tuple(axes))
        node = node.args[0]


def _widens(cast: Node) -> bool:
    return val(cast).dtype.itemsize > val(cast.args[0]).dtype.itemsize


def onward(x: Labelled) -> tuple[Labelled, Labelled, list[Node]] | None:
    """(the product that alone reads x, its other factor, the nodes in between), or None if there is none.

    Views and casts may stand in between.
    """
    node, axes, passed = x.node, list(x.axes), []
    while len(node.users) == 1:
        (reader,) = node.users
        if is_product(reader):
            out = Labelled(reader, fresh(val(reader).ndim))
            ours, other, _ = factors(out)
            if ours.node is not node:
                ours, other = other, ours
            same = {
                theirs: mine
                for theirs, mine in zip(ours.axes, axes, strict=True)
                if theirs is not None and mine is not None
            }
            product, factor = (Labelled(y.node, tuple(same.get(a, a) for a in y.axes)) for y in (out, other))
            return product, factor, passed
        if is_op(reader, aten.permute.default):
            axes = [axes[d] for d in reader.args[1]]
        elif is_op(reader, aten.unsqueeze.default):
            axes.insert(argument(reader, "dim") % val(reader).ndim, None)
        elif is_op(reader, aten.squeeze.dim) and val(reader).ndim < len(axes):
            del axes[argument(reader, "dim") % len(axes)]
        elif not (is_op(reader, *_SAME) or is_float_cast(reader)):
            return None
        passed.append(reader)
        node = reader
    return None

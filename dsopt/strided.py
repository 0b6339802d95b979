"""Which element of its source each element of a tensor is, where only views and repetitions lie between.

An axis is a list of digits (size, stride), the slowest first: position p of the axis, written in these sizes, is the
element at sum(digit * stride) of the source, counted as if the source were contiguous. What is repeated has stride 0.
However a scale is spelled over its blocks (repeat_interleave, expand and reshape, unsqueeze and broadcast), the digits
are the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch.fx import Node

from dsopt.rewrite import argument, aten, is_op, shape

Digit = tuple[int, int]
Axis = tuple[Digit, ...]


@dataclass(frozen=True)
class Strided:
    """axes: the digits of each axis, in lowest terms. sizes: how much of each axis is left, from its start."""

    axes: tuple[Axis, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, sizes: Sequence[int]) -> Strided:
        """A source itself."""
        steps = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
        return cls(tuple(_lowest([d]) for d in zip(sizes, steps, strict=True)), tuple(sizes))

    def repeated(self, times: int, dim: int) -> Strided:
        """Each position of an axis that many times in a row."""
        return self._with(dim, (*self.axes[dim], (times, 0)), self.sizes[dim] * times)

    def cut(self, dim: int, end: int) -> Strided:
        return self._with(dim, self.axes[dim], end)

    def permuted(self, dims: Sequence[int]) -> Strided:
        return Strided(tuple(self.axes[d] for d in dims), tuple(self.sizes[d] for d in dims))

    def expanded(self, sizes: Sequence[int]) -> Strided | None:
        """Broadcast to sizes, new axes first."""
        new = len(sizes) - len(self.sizes)
        axes, old = [((), 1)] * new + list(zip(self.axes, self.sizes, strict=True)), []
        for (axis, size), wanted in zip(axes, sizes, strict=True):
            if size not in (1, wanted):
                return None
            old.append(axis if size == wanted else ((wanted, 0),))
        return Strided(tuple(map(_lowest, old)), tuple(sizes))

    def reshaped(self, sizes: Sequence[int]) -> Strided | None:
        """None where an axis would need more digits than it has, or was cut."""
        if any(
            math.prod(n for n, _ in axis) != size for axis, size in zip(self.axes, self.sizes, strict=True)
        ):
            return None
        digits = [d for axis in self.axes for d in axis][::-1]
        axes = []
        for size in reversed(sizes):
            axis: list[Digit] = []
            while size > 1:
                if not digits:
                    return None
                count, stride = digits.pop(0)
                taken = math.gcd(count, size)
                if taken != min(count, size):
                    return None
                axis.insert(0, (taken, stride))
                if count > taken:
                    digits.insert(0, (count // taken, stride * taken))
                size //= taken
            axes.insert(0, _lowest(axis))
        return None if digits else Strided(tuple(axes), tuple(sizes))

    def _with(self, dim: int, axis: Sequence[Digit], size: int) -> Strided:
        axes, sizes = list(self.axes), list(self.sizes)
        axes[dim], sizes[dim] = _lowest(axis), size
        return replace(self, axes=tuple(axes), sizes=tuple(sizes))


def _lowest(axis: Sequence[Digit]) -> Axis:
    """The digits without those of size 1, neighbours that count on made one."""
    found: list[Digit] = []
    for size, stride in axis:
        if size == 1:
            continue
        if found and found[-1][1] == stride * size:
            found[-1] = (found[-1][0] * size, stride)
        else:
            found.append((size, stride))
    return tuple(found)


def is_move(node: Node) -> bool:
    """True for a call whose result has elements of its first argument only, in an order that `step` may know."""
    return is_op(node, *_MOVES)


def step(node: Node, of: Strided) -> Strided | None:
    """What a call of `is_move` makes of its first argument's elements; None where that is not known."""
    sizes = shape(node)
    if not all(isinstance(n, int) for n in sizes):
        return None
    ndim = len(of.sizes)
    if is_op(node, *_SAME):
        return of
    if is_op(node, aten.permute.default):
        return of.permuted(node.args[1])
    if is_op(node, aten.expand.default):
        return of.expanded(sizes)
    if is_op(node, aten.repeat_interleave.self_int):
        dim, times = argument(node, "dim"), node.args[1]
        return None if dim is None or not isinstance(times, int) else of.repeated(times, dim % ndim)
    if is_op(node, aten.slice.Tensor):
        dim = argument(node, "dim") % ndim
        whole = argument(node, "start") in (None, 0) and argument(node, "step") == 1
        return of.cut(dim, sizes[dim]) if whole else None
    return of.reshaped(sizes)


_SAME = (aten.clone.default, aten.contiguous.default)
_MOVES = (
    *_SAME,
    aten.permute.default,
    aten.expand.default,
    aten.repeat_interleave.self_int,
    aten.slice.Tensor,
    aten.reshape.default,
    aten.view.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
)

"""Reading per-head linear maps off a graph: which rows of a weight make up each head of an expanded tensor.

MLA expands keys and values from a latent c as linear(c, w), or as einsum or matmul with a weight that has an
axis of heads, then reshapes, permutes and slices the result to (batch, heads, tokens, dim). `trace` follows
such a chain back to the latent and keeps, for each axis, which of the latent's axes it is or how it steps
through the weight's rows; `HeadMap.weight` is then a view of w.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import Node

from dsopt.capture import known
from dsopt.rewrite import END, Emitter, argument, aten, is_op, shape, val

_VIEW = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints)
_VIEW += (
    aten.unflatten.int,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
    aten.unsqueeze.default,
)
_SAME = (aten.contiguous.default, aten.clone.default)
_CACHE = (
    aten.index_copy_.default,
    aten.index_copy.default,
    aten.index_put_.default,
    aten.slice_scatter.default,
)


@dataclass(frozen=True)
class Axis:
    """One axis of an expanded tensor: axis `lead` of the latent, or a walk over weight rows by `stride`."""

    size: object
    lead: int | None = None
    stride: int = 0

    @property
    def is_rows(self) -> bool:
        return self.lead is None


@dataclass(frozen=True)
class HeadMap:
    """expanded[b, h, t, d] = sum_r w[offset + h * head_stride + d, r] * latent[b, t, r].

    w (rows, rank); or (heads, rows of a head, rank) once `order` has permuted it, if that is not None.
    """

    latent: Node
    w: Node
    num_heads: int
    head_dim: int
    offset: int
    head_stride: int
    order: tuple[int, ...] | None = None

    def weight(self, emit: Emitter) -> Node:
        """(num_heads, head_dim, rank): the rows of each head, a view of w."""
        first = self.offset // self.head_stride * self.head_stride if self.num_heads > 1 else self.offset
        stride = self.head_stride if self.num_heads > 1 else self.head_dim
        skip = self.offset - first
        if self.order is not None:
            w = self.w if self.order == (0, 1, 2) else emit(aten.permute.default, self.w, list(self.order))
            whole = skip == 0 and self.head_dim == stride
            return w if whole else emit(aten.slice.Tensor, w, 1, skip, skip + self.head_dim)
        rows, rank = shape(self.w)
        end = first + self.num_heads * stride
        w = self.w if (first, end) == (0, rows) else emit(aten.slice.Tensor, self.w, 0, first, end)
        w = emit(aten.view.default, w, [self.num_heads, stride, rank])
        whole = skip == 0 and self.head_dim == stride
        return w if whole else emit(aten.slice.Tensor, w, 1, skip, skip + self.head_dim)


def trace(node: Node, order: Sequence[int] | None = None) -> HeadMap | str:
    """The map that makes a (batch, heads, tokens, dim) tensor from a latent, or why it is none.

    order: the permutation that makes such a tensor of `node`, if it is none yet.
    """
    chain = []
    while (product := _product(node)) is None:
        if is_op(node, *_CACHE) or (is_op(node, aten.cat.default) and _is_token_cat(node)):
            return "cache is expanded: keys and values of every head are stored, not the latent"
        if not is_op(node, *_VIEW, *_SAME, aten.permute.default, aten.slice.Tensor, aten.select.int):
            what = node.target if node.op == "call_function" else "a graph input"
            return f"not a linear map of a latent: {what} stands in between"
        chain.append(node)
        node = node.args[0]
    latent, w, rows, axes = product
    if is_op(node, aten.linear.default) and argument(node, "bias") is not None:
        return "the expansion of the latent has a bias"
    if not all(isinstance(s, int) for s in shape(w)):
        return "the expansion's weight is of unknown size"
    offset = 0
    for step in reversed(chain):
        moved = _apply(step, axes, offset)
        if moved is None:
            return f"{step.target} mixes heads and tokens of the expanded tensor"
        axes, offset = moved
    if order is not None:
        axes = [axes[d] for d in order]
    return _head_map(latent, w, rows, axes, offset)


def _product(node: Node) -> tuple[Node, Node, tuple[int, ...] | None, list[Axis]] | None:
    """(latent, weight, order, axes of the product); `order` as in HeadMap. None for anything else."""
    if is_op(node, aten.linear.default):
        latent, w = node.args[:2]
        return latent, w, None, [*_leading(latent), Axis(shape(w)[0], stride=1)] if val(w).ndim == 2 else None
    if is_op(node, aten.matmul.default):
        latent, w = node.args
        if val(latent).ndim != 4 or not known(shape(latent)[1] == 1) or val(w).ndim != 3:
            return None
        heads, _, dim = shape(w)
        batch, _, tokens = _leading(latent)
        return latent, w, (0, 2, 1), [batch, Axis(heads, stride=dim), tokens, Axis(dim, stride=1)]
    if not is_op(node, aten.einsum.default) or len(node.args[1]) != 2 or "." in node.args[0]:
        return None
    terms, _, out = node.args[0].replace(" ", "").partition("->")
    operands = list(zip(terms.split(","), node.args[1], strict=True))
    for (left, latent), (right, w) in (operands, operands[::-1]):
        rank = set(left) & set(right)
        rows = [a for a in out if a in right]
        if len(rank) != 1 or left[-1:] not in rank or len(right) != 3 or len(rows) != 2:
            continue
        sizes = dict(zip(right, shape(w), strict=True))
        leading = dict(zip(left, _leading(latent), strict=False))
        walks = {
            rows[0]: Axis(sizes[rows[0]], stride=sizes[rows[1]]),
            rows[1]: Axis(sizes[rows[1]], stride=1),
        }
        if set(out) == {*leading, *walks} and len(out) == len(leading) + 2:
            order = tuple(right.index(a) for a in (*rows, left[-1]))
            return latent, w, order, [leading.get(a) or walks[a] for a in out]
    return None


def _leading(latent: Node) -> list[Axis]:
    return [Axis(s, lead=i) for i, s in enumerate(shape(latent)[:-1])]


def _is_token_cat(node: Node) -> bool:
    return argument(node, "dim") % val(node).ndim == val(node).ndim - 2 or val(node).ndim == 3


def _head_map(
    latent: Node, w: Node, order: tuple[int, ...] | None, axes: list[Axis], offset: int
) -> HeadMap | str:
    shaped = len(axes) == 4 and not axes[0].is_rows and not axes[2].is_rows and axes[3].is_rows
    if not shaped or axes[3].stride != 1 or (not axes[1].is_rows and not known(axes[1].size == 1)):
        return "the expanded tensor is not (batch, heads, tokens, dim)"
    leads = [None if known(a.size == 1) else a.lead for a in (axes[0], axes[2])]
    if leads[0] not in (None, 0) or leads[1] not in (None, val(latent).ndim - 2):
        return "the expanded tensor is not (batch, heads, tokens, dim)"
    heads = axes[1] if axes[1].is_rows else Axis(1, stride=axes[3].size)
    if heads.size > 1 and (
        heads.stride < axes[3].size or offset % heads.stride + axes[3].size > heads.stride
    ):
        return "the rows of one head overlap another's"
    if order is not None and (heads.size, heads.stride) != tuple(shape(w)[i] for i in order[:2]):
        return "heads of the expansion's weight are cut or joined"
    if val(latent).ndim not in (3, 4) or (val(latent).ndim == 4 and not known(shape(latent)[1] == 1)):
        return "the latent is not (batch, tokens, rank)"
    if is_op(latent, aten.unsqueeze.default) and val(latent).ndim == 4:
        latent = latent.args[0]
    return HeadMap(latent, w, heads.size, axes[3].size, offset, heads.stride or axes[3].size, order)


def _apply(node: Node, axes: list[Axis], offset: int) -> tuple[list[Axis], int] | None:
    if is_op(node, *_SAME):
        return axes, offset
    if is_op(node, aten.permute.default):
        return [axes[d] for d in node.args[1]], offset
    if is_op(node, aten.slice.Tensor, aten.select.int):
        return _cut(node, axes, offset)
    new = _regroup(axes, shape(node))
    return None if new is None else (new, offset)


def _cut(node: Node, axes: list[Axis], offset: int) -> tuple[list[Axis], int] | None:
    dim = argument(node, "dim") % len(axes)
    axis = axes[dim]
    if is_op(node, aten.select.int):
        index = argument(node, "index")
        if axis.is_rows and isinstance(index, int):
            return axes[:dim] + axes[dim + 1 :], offset + index % axis.size * axis.stride
        return (axes[:dim] + axes[dim + 1 :], offset) if known(axis.size == 1) else None
    start, end, step = (argument(node, a) for a in ("start", "end", "step"))
    if not axis.is_rows:
        # fewer tokens than the latent has: the latent itself would have to be cut
        return None
    start, end = start or 0, END if end is None else end
    if step != 1 or not isinstance(start, int) or not isinstance(end, int) or start < 0 or end < 0:
        return None
    size = min(end, axis.size) - start
    return [*axes[:dim], Axis(size, stride=axis.stride), *axes[dim + 1 :]], offset + start * axis.stride


def _regroup(axes: list[Axis], sizes) -> list[Axis] | None:
    """The axes after a view to `sizes`: rows split and join, the latent's axes only lose or gain size 1."""
    old, new = list(axes), []
    sizes = list(sizes)
    while sizes:
        size = sizes.pop(0)
        if old and known(old[0].size == size):
            new.append(old.pop(0))
        elif old and not old[0].is_rows and known(old[0].size == 1):
            old.pop(0)
            sizes.insert(0, size)
        elif known(size == 1):
            new.append(Axis(1, lead=-1))
        elif old and old[0].is_rows and isinstance(size, int) and isinstance(old[0].size, int):
            if old[0].size > size:
                if old[0].size % size:
                    return None
                rest = old[0].size // size
                new.append(Axis(size, stride=old[0].stride * rest))
                old[0] = Axis(rest, stride=old[0].stride)
            else:
                joined = _join(old, size)
                if joined is None:
                    return None
                new.append(joined)
        else:
            return None
    return new if all(known(a.size == 1) for a in old) else None


def _join(old: list[Axis], size: int) -> Axis | None:
    """The leading row axes of `old`, removed from it, as one axis of `size`."""
    axis = old.pop(0)
    while axis.size < size:
        if not old or not old[0].is_rows or axis.stride != old[0].size * old[0].stride:
            return None
        axis = Axis(axis.size * old[0].size, stride=old.pop(0).stride)
    return axis if axis.size == size else None

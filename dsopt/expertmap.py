"""Reading products with one matrix per expert off a graph: whose rows meet which expert's matrix.

A mixture of experts is spelled as a grouped GEMM over rows sorted by expert, or as a batched one over matrices
gathered by expert. Either way it is y[r] = w[e(r)] @ a[r] for rows r, each of which belongs to a pair of
token and choice. `product` reads the operands; what e(r) and the rows are is left to nodes of integers, which
`dsopt.probe` runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from dsopt.rewrite import Emitter, argument, aten, is_op, is_tensor, shape, val

_GROUPED = ("_grouped_mm", "grouped_mm", "grouped_mm_fallback")
_ONES = (
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
    aten.unsqueeze.default,
    aten.reshape.default,
    aten.view.default,
    aten.contiguous.default,
    aten.unflatten.int,
    aten.flatten.using_ints,
)


@dataclass(frozen=True)
class Product:
    """y[r] = w[e(r)] @ a[r], rows r in the order of `out`'s leading axes.

    w (num_experts, n, k), or its last two axes swapped if `transposed`. e(r) is in `experts`, one id a row; or
    `ends` holds how many rows belong to the experts up to each one, and the rows stand in the experts' order.
    """

    out: Node
    a: Node
    w: Node
    transposed: bool
    experts: Node | None = None
    ends: Node | None = None

    def weight(self, emit: Emitter) -> Node:
        """w as (num_experts, n, k), a view."""
        return emit(aten.permute.default, self.w, [0, 2, 1]) if self.transposed else self.w

    @property
    def index(self) -> Node:
        return self.experts if self.ends is None else self.ends


def core(node: Node) -> Node:
    """What a node holds, before axes of length 1 came and went."""
    while is_op(node, *_ONES) and _long(node) == _long(node.args[0]):
        node = node.args[0]
    return node


def _long(node: Node) -> list[str]:
    """The lengths of a tensor's axes except 1, as text: symbols are compared as they are written."""
    return [str(s) for s in shape(node) if str(s) != "1"]


def is_last_axis(dim: int, node: Node) -> bool:
    """True when only axes of length 1 stand behind `dim`."""
    return all(str(s) == "1" for s in shape(node)[dim % val(node).ndim + 1 :])


def product(node: Node) -> Product | None:
    """The product a node computes, or None."""
    packet = getattr(node.target, "overloadpacket", None) if node.op == "call_function" else None
    if packet is not None and packet.__name__ in _GROUPED:
        return _grouped(node)
    if is_op(node, aten.bmm.default, aten.matmul.default) and len(node.args) == 2:
        return _batched(node)
    if is_op(node, aten.einsum.default) and len(node.args[1]) == 2:
        return _einsum(node)
    return None


def _grouped(node: Node) -> Product | None:
    a, w, ends = (*node.args, None)[:3]
    ends = node.kwargs.get("offs", ends)
    plain = len(node.args) < 4 and not {k for k, v in node.kwargs.items() if v is not None} - {"offs"}
    if not plain or not is_tensor(ends) or val(w).ndim != 3 or val(a).ndim != 2:
        return None
    return Product(node, a, *_untransposed(w, True), ends=ends)


def _batched(node: Node) -> Product | None:
    """(rows.., n, k) @ (rows.., k, 1), or (rows.., 1, k) @ (rows.., k, n), the matrices gathered by expert."""
    left, right = node.args
    if not all(is_tensor(x) and val(x).ndim > 2 for x in (left, right)):
        return None
    if (gathered := _gathered(left)) is not None and str(shape(right)[-1]) == "1":
        w, swapped, experts = gathered
        return Product(node, right, *_untransposed(w, swapped), experts=experts)
    if (gathered := _gathered(right)) is not None and str(shape(left)[-2]) == "1":
        w, swapped, experts = gathered
        return Product(node, left, *_untransposed(w, not swapped), experts=experts)
    return None


def _einsum(node: Node) -> Product | None:
    """...nk,...k->...n in any order of axes, the matrices gathered by expert."""
    terms, _, out = node.args[0].replace(" ", "").partition("->")
    sides = list(zip(terms.split(","), node.args[1], strict=True))
    for (left, matrices), (right, a) in (sides, sides[::-1]):
        gathered = _gathered(matrices)
        if gathered is None or "." in terms:
            continue
        w, swapped, experts = gathered
        rows, (first, second) = left[:-2], left[-2:]
        summed = [x for x in (first, second) if x in right and x not in out]
        if len(summed) != 1 or right[-1] != summed[0] or right[:-1] not in (rows, rows[:-1]):
            continue
        if out != rows + (first if summed[0] == second else second):
            continue
        return Product(node, a, *_untransposed(w, swapped != (summed[0] == first)), experts=experts)
    return None


def _gathered(node: Node) -> tuple[Node, bool, Node] | None:
    """(w, whether the matrices are transposed, experts) for matrices w[experts]."""
    swapped = False
    while is_op(node, aten.permute.default) and _swaps_last(node.args[1]):
        node, swapped = node.args[0], not swapped
    if is_op(node, aten.index_select.default) and argument(node, "dim") == 0:
        w, experts = node.args[0], argument(node, "index")
    elif is_op(node, aten.index.Tensor) and len(node.args[1]) == 1:
        w, (experts,) = node.args
    else:
        return None
    if not is_tensor(experts) or val(w).ndim != 3 or val(experts).dtype.is_floating_point:
        return None
    return w, swapped, experts


def _swaps_last(dims: list[int]) -> bool:
    last = len(dims) - 1
    return list(dims) == [*range(last - 1), last, last - 1]


def _untransposed(w: Node, transposed: bool) -> tuple[Node, bool]:
    if is_op(w, aten.permute.default) and _swaps_last(w.args[1]):
        return w.args[0], not transposed
    return w, transposed

"""How many sites of each family a captured graph holds, counted without the passes.

The report sets these totals against what the passes matched, so that a miss cannot hide. Everything here
reads the graph as captured, before any pass, and no matcher decides by it: `is_expanded_latent`, `attention_family`
and `is_norm` only tell passes what their lines in the report are about.

    mla        attention whose keys are expanded from a low-rank latent
    attention  any other: fused calls, and softmax between a product with keys and one with values
    moe        expert layers: grouped GEMMs, batched ones with gathered weights, or one op already
    router     top-k choices of a linear layer's outputs, with softmax, sigmoid or softplus scores above or below
    norm       reciprocal roots of a mean of squares
    rope       rotations by a table of cosines and sines
    mlp        linear layers over silu(a) * b or gelu(a) * b, a and b themselves projected
    fp8        products of what is kept in float8_e4m3fn with its scales, and ops that read it so
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator

import torch
from torch.fx import GraphModule, Node

from dsopt.capture import known

aten = torch.ops.aten
FAMILIES = ("mla", "attention", "moe", "router", "norm", "rope", "mlp", "fp8")


def census(gm: GraphModule) -> dict[str, int]:
    """Number of sites by family."""
    return {family: len(sites) for family, sites in census_sites(gm).items()}


def census_sites(gm: GraphModule) -> dict[str, list[Node]]:
    """The sites by family, each by one node of it, in the graph's order."""
    nodes = [n for n in gm.graph.nodes if n.op == "call_function"]
    scores = [s for n in nodes if _name(n) == "topk" for s in _router_scores(n)]
    turned = [r for n in nodes for r in (*_rotations(n), *_half_rotations(n))]
    attentions = [(attention_family(n), n) for n in nodes]
    return {
        "mla": [n for family, n in attentions if family == "mla"],
        "attention": [n for family, n in attentions if family == "attention"],
        "moe": [n for n in nodes if _is_first_expert_gemm(n) or _name(n) == "moe_experts"],
        "router": list(dict.fromkeys(scores)),
        "norm": [n for n in nodes if is_norm(n)],
        "rope": list(dict.fromkeys(turned)),
        "mlp": [n for n in nodes if _is_gated_linear(n)],
        "fp8": [n for n in nodes if _reads_fp8(n)],
    }


def _reads_fp8(node: Node) -> bool:
    """True for an op of dsopt that is given float8_e4m3fn, and for a product with what was cast from it."""
    if _name(node) in ("mul", "mul_"):
        sources = [n for a in node.all_input_nodes for n in (a, *_upstream(a, _is_view))]
    else:
        sources = node.all_input_nodes if getattr(node.target, "namespace", "") == "dsopt" else ()
    return any(getattr(n.meta.get("val"), "dtype", None) == torch.float8_e4m3fn for n in sources)


def _is_view(node: Node) -> bool:
    return _name(node) in _VIEWS


def _name(node: Node) -> str:
    """Name of the operator a node calls, without namespace and overload; "" for arithmetic on sizes."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet is None:
        return "getitem" if node.target is operator.getitem else ""
    return packet.__name__


_VIEWS = frozenset(
    "view reshape _unsafe_view flatten unflatten permute transpose t numpy_T mT swapaxes movedim "
    "slice split split_with_sizes chunk unbind getitem select narrow expand expand_as squeeze unsqueeze "
    "repeat_interleave repeat constant_pad_nd pad contiguous clone to type_as _to_copy detach alias dropout".split()
)
_MOVES = _VIEWS | frozenset(
    "cat stack index_copy_ index_copy copy_ index_put_ index_put slice_scatter".split()
)
_NORMS = frozenset("mul div rsqrt sqrt pow square mean layer_norm native_layer_norm rms_norm".split())
_QUANTIZES = frozenset("clamp dequantize".split())
_LINEARS = frozenset("linear matmul mm addmm".split())
_SCORES = ("softmax", "_softmax", "sigmoid", "softplus")
_BUFFERS = frozenset("new_empty new_zeros empty zeros empty_like zeros_like".split())


def _sources(node: Node) -> Iterator[Node]:
    """What a node's data comes from: its inputs, or what was written into views of it if it is a buffer."""
    if _name(node) not in _BUFFERS and node.op != "placeholder":
        yield from node.all_input_nodes
        return
    for user in node.users:
        for writer in [user, *user.users]:
            if _name(writer) in ("copy_", "index_copy_", "index_put_"):
                yield from (a for a in writer.all_input_nodes if a is not user and a is not node)


def _upstream(node: Node, through: Callable[[Node], bool]) -> Iterator[Node]:
    """Every node above `node`, going on only from those that satisfy `through`."""
    seen, stack = set(), list(_sources(node)) if through(node) else [node]
    while stack:
        n = stack.pop()
        if n in seen:
            continue
        seen.add(n)
        yield n
        if through(n):
            stack.extend(_sources(n))


def _is_move(node: Node) -> bool:
    return _name(node) in _MOVES or _name(node) in _BUFFERS or node.op == "placeholder"


def _is_move_or_norm(node: Node) -> bool:
    tensors = [a for a in node.all_input_nodes if isinstance(a.meta.get("val"), torch.Tensor)]
    return (
        _is_move(node)
        or _name(node) in _NORMS
        or _name(node) in _QUANTIZES
        or (_name(node) == "add" and len(tensors) == 1)
    )


def _attention_keys(node: Node) -> Iterator[Node]:
    """The keys of an attention: of a fused call, or of the matmul whose product a softmax takes."""
    if _name(node).startswith(("scaled_dot_product_", "_scaled_dot_product_")):
        yield node.args[1]
    elif _name(node) in ("softmax", "_softmax"):
        pointwise = _VIEWS | set("mul div add sub masked_fill where cat".split())
        for n in _upstream(node.args[0], lambda n: _name(n) in pointwise):
            if _name(n) in ("matmul", "bmm", "einsum"):
                operands = n.args[1] if _name(n) == "einsum" else n.args
                yield operands[1]
                return


def attention_family(node: Node) -> str | None:
    """The family of the attention that a fused call or a softmax is; None if it is none."""
    if _name(node) == "attention":
        return "attention"
    keys = list(_attention_keys(node))
    if any(map(is_expanded_latent, keys)) or _is_absorbed(node):
        return "mla"
    if _name(node) in ("softmax", "_softmax"):
        keys = [
            k for k in keys if k.meta["val"].ndim > 2 and any(_name(n) in _PRODUCTS for n in _readers(node))
        ]
    return "attention" if keys else None


def is_expanded_latent(key: Node) -> bool:
    """True when keys are a linear map of a latent narrower than both the keys and what it was projected from."""
    for up in _upstream(key, _is_move):
        if _name(up) not in ("linear", "einsum", "matmul", "mm"):
            continue
        operands = up.args[1] if _name(up) == "einsum" else up.args
        latent = operands[0]
        rank = latent.meta["val"].shape[-1]
        if (
            up.meta["val"].numel() // latent.meta["val"].shape[-2] <= rank
            if _is_static(up, latent)
            else False
        ):
            continue
        for origin in _upstream(latent, _is_move_or_norm):
            if _name(origin) in ("linear", "matmul", "mm") and known(_in_features(origin) > rank):
                return True
    return False


_PRODUCTS = ("matmul", "bmm", "einsum")
_CUTS = frozenset("slice split split_with_sizes chunk unbind getitem select narrow".split())


def _operands(product: Node) -> list[Node]:
    return [a for a in product.all_input_nodes if isinstance(a.meta.get("val"), torch.Tensor)]


def _is_absorbed(attention: Node) -> bool:
    """True when the values are the keys or a part of them, and queries come from a product with matrices by head."""
    if _name(attention).startswith(("scaled_dot_product_", "_scaled_dot_product_")):
        read, values = list(attention.args[:2]), [attention.args[2]]
    elif _name(attention) in ("softmax", "_softmax"):
        pointwise = _VIEWS | set("mul div add sub masked_fill where".split())
        scores = [
            n for n in _upstream(attention.args[0], lambda n: _name(n) in pointwise) if _name(n) in _PRODUCTS
        ]
        read = [a for n in scores for a in _operands(n)]
        values = [a for n in _readers(attention) if _name(n) in _PRODUCTS for a in _operands(n)]
    else:
        return False
    whole = {n for a in read for n in _upstream(a, lambda n: _name(n) in (_VIEWS - _CUTS) | {"cat"})}
    whole |= {_uncut(n) for n in (*whole, *read)}
    latent = [v for v in values if attention not in _upstream(v, lambda n: _name(n) in _VIEWS)]
    if not any(_uncut(v) in whole or _uncut(_without_views(v)) in whole for v in latent):
        return False
    return any(_is_product_by_head(n) for a in read for n in (a, *_upstream(a, _is_move)))


def _uncut(node: Node) -> Node:
    """What views that keep all of a tensor were taken of."""
    while _name(node) in _VIEWS - _CUTS and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _readers(node: Node) -> Iterator[Node]:
    """What reads a node, through views and casts."""
    for user in node.users:
        yield from _readers(user) if _name(user) in _VIEWS else (user,)


def _is_product_by_head(node: Node) -> bool:
    """True for a product with a weight, given to the graph, that has an axis of heads."""
    return _name(node) in _PRODUCTS and any(
        _without_views(a).op == "placeholder" and a.meta["val"].ndim == 3 for a in _operands(node)
    )


def _is_static(*nodes: Node) -> bool:
    return all(isinstance(s, int) for n in nodes for s in n.meta["val"].shape)


def _in_features(node: Node) -> int:
    return node.args[0].meta["val"].shape[-1]


def _is_expert_gemm(node: Node) -> bool:
    if _name(node) in ("_grouped_mm", "grouped_mm", "grouped_mm_fallback"):
        return True
    # a batched GEMM over expert matrices gathered by token
    return _name(node) in ("bmm", "matmul", "einsum") and any(
        _name(up) in ("index", "index_select") and _is_stack(up.args[0])
        for up in _upstream(node, lambda n: n is node or _name(n) in _VIEWS)
    )


def _is_first_expert_gemm(node: Node) -> bool:
    return _is_expert_gemm(node) and not any(map(_is_expert_gemm, _gated_sources(node)))


def _is_stack(node: Node) -> bool:
    """True for an input of the graph that holds one matrix per expert."""
    return node.op == "placeholder" and node.meta["val"].ndim == 3


def _gated_sources(node: Node) -> Iterator[Node]:
    """What the rows of an expert's GEMM are a function of, row by row."""
    pointwise = _VIEWS | set("silu sigmoid mul div gelu relu pow index clamp add add_ masked_fill".split())
    pointwise |= set("masked_fill_ linalg_vector_norm clamp_min mean rsqrt".split())
    for operand in node.all_input_nodes if _name(node) in ("bmm", "matmul", "einsum") else [node.args[0]]:
        yield from _upstream(operand, lambda n: _name(n) in pointwise)


def _router_scores(topk: Node) -> Iterator[Node]:
    """The scores above a top-k, or the top-k itself where what it takes is scored below it."""
    stops = (*_SCORES, "linear", "matmul", "mm")
    above = list(_upstream(topk.args[0], lambda n: _name(n) not in stops))
    scores = [n for n in above if _name(n) in _SCORES]
    for score in scores:
        logits = _upstream(score.args[0], lambda n: _name(n) in _VIEWS or _name(n) in ("add", "mul", "div"))
        if any(_name(n) in ("linear", "matmul", "mm") for n in logits):
            yield score
    chosen = [reader for result in topk.users for reader in (result, *result.users)]
    cast = [
        reader for n in chosen if _name(n) in ("getitem", "gather", "to", "_to_copy") for reader in n.users
    ]
    if not scores and any(_name(n) in _SCORES for n in cast) and any(_name(n) == "linear" for n in above):
        yield topk


def is_norm(node: Node) -> bool:
    """True for the root of a mean of squares, and for norms called by name; not for the root in a layer norm."""
    if _name(node) in ("rms_norm", "_fused_rms_norm"):
        return True
    root = _name(node) in ("rsqrt", "sqrt") or (_name(node) == "pow" and node.args[1] in (-0.5, 0.5))
    if not root:
        return False
    for mean in _upstream(
        node.args[0], lambda n: _name(n) in _VIEWS or _name(n) in ("add", "clamp", "maximum")
    ):
        total = mean.args[0] if _is_sum_by_count(mean) else mean
        if total is not mean or _name(mean) == "mean":
            square = next((n for n in _upstream(total.args[0], _keeps_square) if not _keeps_square(n)), None)
            is_square = square is not None and _name(square) in ("pow", "square", "mul")
            return is_square and not _is_centered(square.args[0])
    return False


def _keeps_square(node: Node) -> bool:
    """True for casts, and for an epsilon that is added inside the mean."""
    return _name(node) in ("to", "_to_copy") or (_name(node) == "add" and not isinstance(node.args[1], Node))


def _is_centered(node: object) -> bool:
    """True for x - mean(x): the square of that makes a layer norm."""
    node = _without_casts(node)
    if not isinstance(node, Node) or _name(node) != "sub":
        return False
    x, mean = (_without_casts(a) for a in node.args[:2])
    return isinstance(mean, Node) and _name(mean) == "mean" and _without_casts(mean.args[0]) is x


def _without_casts(node: object) -> object:
    while isinstance(node, Node) and _name(node) in ("to", "_to_copy", "type_as"):
        node = node.args[0]
    return node


def _is_sum_by_count(node: Node) -> bool:
    """True for a sum over the last axis divided by the length of that axis."""
    total, count = node.args[:2] if _name(node) == "div" and len(node.args) == 2 else (None, None)
    if not isinstance(total, Node) or _name(total) != "sum" or not isinstance(count, (int, float)):
        return False
    summed = total.args[0].meta["val"]
    dims = total.args[1] if len(total.args) > 1 else ()
    return list(dims or ()) in ([-1], [summed.ndim - 1]) and known(summed.shape[-1] == count)


def _is_table(node: Node, roots: tuple[str, ...]) -> bool:
    """True for what is made of the cosines or complex exponentials by views and factors alone."""
    above = _upstream(node, lambda n: _name(n) in _VIEWS or _name(n) in ("mul", "index", "cat", "stack"))
    return any(_name(n) in roots for n in above)


def _rotations(node: Node) -> Iterator[Node]:
    """The node where a rotation of which `node` is the cosine product ends, if it is one."""
    if _name(node) != "mul" or not all(isinstance(a, Node) for a in node.args):
        return
    value = node.meta["val"]
    roots = ("polar", "complex", "exp") if value.is_complex() else ("cos",)
    tables = [a for a in node.args if _is_table(a, roots)]
    if value.is_complex() and any(_name(_without_views(a)) == "view_as_complex" for a in node.args):
        tables += [a for a in node.args if _is_given(a)]
    if len(tables) != 1:
        return
    if value.is_complex():
        yield node
        return
    for user in node.users:
        if _name(user) in ("add", "sub", "addcmul"):
            joins = [u for u in user.users if _name(u) in ("cat", "stack") and _only_rotated(u)]
            yield joins[0] if joins else user


def _half_rotations(node: Node) -> Iterator[Node]:
    """`node` if it is x * a + cat(-x2, x1) * b with tables a and b that the graph is given."""
    if _name(node) != "add" or not all(isinstance(a, Node) and _name(a) == "mul" for a in node.args[:2]):
        return
    for plain, turned in (node.args[:2], node.args[1::-1]):
        for x, a in (plain.args, plain.args[::-1]):
            for half, b in (turned.args, turned.args[::-1]):
                if _is_given(a) and _is_given(b) and _is_turned(half, x):
                    yield node
                    return


def _is_given(table: object) -> bool:
    """True for a table that the graph is given, or rows of one."""
    if not isinstance(table, Node):
        return False
    rows = _without_views(table)
    while _name(rows) in ("index", "index_select", "embedding"):
        rows = _without_views(rows.args[0])
    return rows.op == "placeholder"


def _is_turned(node: object, x: object) -> bool:
    """True for cat(-x2, x1) of the halves of x."""
    if not isinstance(node, Node) or not isinstance(x, Node) or _name(node) != "cat":
        return False
    parts = node.args[0]
    if len(parts) != 2 or _name(parts[0]) != "neg" or _name(parts[1]) == "neg":
        return False
    sources = {_without_views(parts[0].args[0]), _without_views(parts[1]), _without_views(x)}
    return len(sources) == 1 and parts[1] is not x


def _without_views(node: Node) -> Node:
    while _name(node) in _VIEWS and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _only_rotated(join: Node) -> bool:
    """True when a cat or stack joins exactly the two results of a rotation by pairs."""
    parts = join.args[0]
    return len(parts) == 2 and all(
        _name(p) in ("add", "sub") and all(isinstance(a, Node) and _name(a) == "mul" for a in p.args)
        for p in parts
    )


def _is_gated_linear(node: Node) -> bool:
    if _name(node) not in _LINEARS:
        return False
    x = node.args[1 if _name(node) == "addmm" else 0]
    while _name(x) in _VIEWS and x.all_input_nodes:
        x = x.all_input_nodes[0]
    if _name(x) != "mul" or not all(isinstance(a, Node) for a in x.args):
        return False
    # what a state space or an attention made, and a gate beside it, is no MLP
    return any(map(_is_activated, x.args)) and all(map(_is_projected, x.args))


def _is_projected(node: Node) -> bool:
    """True for what views, clamps and an activation make of a linear layer."""
    pointwise = _VIEWS | {"silu", "gelu", "sigmoid", "mul", "clamp", "clamp_max"}
    return any(_is_linear(n) for n in _upstream(node, lambda n: _name(n) in pointwise))


def _is_linear(node: Node) -> bool:
    """True for a product with a matrix, and not with as many as a batch has."""
    return _name(node) in _LINEARS and node.all_input_nodes[-1].meta["val"].ndim <= 2


def _is_activated(node: Node) -> bool:
    """True for silu, by name or as x * sigmoid(x), and for gelu."""
    while _name(node) in ("to", "_to_copy"):
        node = node.args[0]
    if _name(node) in ("silu", "gelu"):
        return True
    return _name(node) == "mul" and any(
        isinstance(a, Node) and _name(a) == "sigmoid" and a.args[0] in node.args for a in node.args
    )

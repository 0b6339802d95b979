"""What a pass has read of an expert layer, and the proof that its index arithmetic is right.

Sorting, counting, gathering and putting back can be spelled in many ways, and a wrong one looks like a right one.
So the nodes of integers are run on random choices: each row must meet the matrix of an expert that its
token chose, carry that choice's weight, and return to that token, and each choice must have one row.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.fx import Node

from dsopt.expertmap import Product
from dsopt.probe import Probe, Unknowable, size
from dsopt.rewrite import shape, val

TRIALS = 4
# calls that sort, count, gather and put rows; and among them those that tell how many rows there are
_ORDERING = frozenset(
    "sort argsort topk reshape view flatten unflatten unsqueeze squeeze expand permute clone contiguous to index "
    "index_select gather floor_divide div arange empty_like new_empty zeros_like new_zeros zeros ones_like "
    "index_put index_put_ index_copy index_copy_ scatter scatter_ scatter_add scatter_add_ histc bincount one_hot "
    "cumsum sum repeat_interleave ge gt lt le eq ne clamp clamp_ masked_fill masked_fill_ bitwise_not logical_not "
    "alias detach _to_copy select slice mul searchsorted".split()
)
_COUNTING = frozenset("histc bincount cumsum sum scatter_add scatter_add_".split())


class NoMatch(Exception):
    """Why some expert products are not the op."""


@dataclass
class Activation:
    """What stands between the products: act(gate) * up of one or two products, or act(h)."""

    name: str
    gate: Product
    up: Product | None
    gated: bool = True
    interleaved: bool = False
    limit: float | None = None


@dataclass
class Experts:
    """The operands of one site, and what must hold of its index arithmetic.

    steps: what happens to the rows after the second product, in order: (kind, node of integers or weights).
    """

    down: Product
    root: Node | None = None
    activation: Activation | None = None
    x: Node | None = None
    tokens: Node | None = None
    ids: Node | None = None
    weights: Node | None = None
    steps: list[tuple[str, Node | None]] = field(default_factory=list)
    biases: dict[Node, tuple[Node, Node]] = field(default_factory=dict)
    masks: list[Node] = field(default_factory=list)
    base: Node | None = None

    def products(self) -> list[Product]:
        act = self.activation
        return [act.gate, *([act.up] if act.up is not None else []), self.down]

    def leaves(self) -> list[Node]:
        """What the layer is computed from."""
        biases = [b for b, _ in self.biases.values()]
        return [self.x, self.ids, self.weights, *(p.w for p in self.products()), *biases]


def settle(probe: Probe, found: Experts, settled: dict[str, str | None]) -> None:
    """Raises NoMatch unless the index arithmetic is right on random choices."""
    roles = [p.index for p in found.products()]
    roles += [index for _, index in found.biases.values()]
    roles += found.masks + [n for _, n in found.steps if n is not None]
    roles += [found.tokens] if found.tokens is not None else []
    leaves, num_experts = [found.ids, found.weights], shape(found.activation.gate.w)[0]
    kinds = (
        [kind for kind, _ in found.steps],
        [p.ends is None for p in found.products()],
        found.tokens is None,
    )
    biased = [p.out in found.biases for p in found.products()]
    try:
        _look(found, probe.part(roles, leaves, found.root))
        key = f"{num_experts} {kinds} {biased} {len(found.masks)} {probe.fingerprint(roles, leaves, found.root)}"
        if key not in settled:
            settled[key] = _try(probe, found, list(dict.fromkeys(roles)), num_experts)
    except Unknowable as error:
        raise NoMatch(str(error)) from error
    if settled[key] is not None:
        raise NoMatch(settled[key])


def _look(found: Experts, part: list[Node]) -> None:
    """Raises NoMatch where index arithmetic holds a call whose effect a trial of a few choices need not show."""
    for node in part:
        packet = getattr(node.target, "overloadpacket", None) if node.op == "call_function" else None
        if packet is not None and packet.__name__ not in _ORDERING:
            raise NoMatch(f"{node.name} ({node.target}) takes part in what rows belong to which choice")
        clamps = packet is not None and packet.__name__.rstrip("_") == "clamp"
        if clamps and not found.masks and not any("masked_fill" in str(n.target) for n in part):
            raise NoMatch(f"{node.name} gives ids that are no expert's to another expert")
        counts = packet is not None and packet.__name__ in _COUNTING
        if counts and any(node in above(mask) for mask in _masks(found, part)):
            raise NoMatch(f"rows are masked by how many there are ({node.name})")


def _masks(found: Experts, part: list[Node]) -> list[Node]:
    """What hides rows: masks of rows, and those of their weights."""
    of_rows = found.masks + [n for kind, n in found.steps if kind == "mask"]
    return of_rows + [n.args[1] for n in part if "masked_fill" in str(n.target)]


def above(node: Node) -> set[Node]:
    """The nodes that a node depends on, itself included."""
    seen, stack = set(), [node]
    while stack:
        if (n := stack.pop()) not in seen:
            seen.add(n)
            stack += n.all_input_nodes
    return seen


def _try(probe: Probe, found: Experts, nodes: list[Node], num_experts: int) -> str | None:
    """What is wrong with the index arithmetic, or None."""
    generator = torch.Generator().manual_seed(0)
    tokens, topk = map(size, shape(found.ids))
    if list(map(size, shape(found.weights))) != [tokens, topk] or size(shape(found.x)[0]) != tokens:
        return "ids, weights and x disagree in the number of tokens or choices"
    if topk > num_experts:
        return "more experts are chosen than there are"
    for i in range(TRIALS):
        # every other time all tokens choose the same experts
        draws = torch.rand(1 if i % 2 else tokens, num_experts, generator=generator, device="cpu")
        draws = draws.expand(tokens, -1)
        ids = draws.argsort(-1)[:, :topk].to(val(found.ids).dtype)
        # of both signs, tiny to large, and one of zero
        weights = torch.randn(tokens, topk, generator=generator, device="cpu")
        weights *= 10.0 ** torch.empty_like(weights).uniform_(-6, 2, generator=generator)
        weights[:1, :1] = 0.0
        weights = weights.to(val(found.weights).dtype)
        values = dict(
            zip(nodes, probe.run(nodes, {found.ids: ids, found.weights: weights}, found.root), strict=True)
        )
        if (reason := _wrong(found, ids, weights, values)) is not None:
            return reason
    return None


def _wrong(
    found: Experts, ids: torch.Tensor, weights: torch.Tensor, values: dict[Node, torch.Tensor]
) -> str | None:
    tokens, topk = ids.shape
    pairs = ids.numel()

    def experts(p: Product) -> torch.Tensor:
        if p.ends is None:
            return values[p.experts].reshape(-1)
        return torch.searchsorted(values[p.ends].long(), torch.arange(pairs, device="cpu"), right=True)

    expert = experts(found.activation.gate)
    token = torch.arange(tokens, device="cpu").repeat_interleave(topk)
    token = token if found.tokens is None else values[found.tokens].reshape(-1)
    if expert.numel() != pairs or token.numel() != pairs:
        return "the rows of the products are not one for each token and choice"
    for p in found.products()[1:]:
        if not torch.equal(experts(p), expert):
            return "the products of a row are with matrices of different experts"
    hit = ids[token] == expert.unsqueeze(-1)
    if not bool((hit.sum(-1) == 1).all()):
        return "rows meet matrices of experts that their tokens did not choose"
    pair = token * topk + hit.long().argmax(-1)
    if not torch.equal(pair.sort().values, torch.arange(pairs, device="cpu")):
        return "the rows of the products are not one for each token and choice"
    flat = ids.reshape(-1)
    for out, (_, index) in found.biases.items():
        if out is not found.down.out and not torch.equal(values[index].reshape(-1), expert):
            return "a bias is another expert's"
    if any(bool(values[mask].any()) for mask in found.masks):
        return "rows of chosen experts are masked"
    for kind, node in found.steps:
        value = None if node is None else values[node].reshape(-1)
        if kind == "experts" and not torch.equal(value, flat[pair]):
            return "a bias is another expert's"
        if kind == "mask" and bool(value.any()):
            return "rows of chosen experts are masked"
        if kind == "weigh" and not torch.equal(value, weights.reshape(-1)[pair].to(value.dtype)):
            return "rows are multiplied with weights that are not their choice's"
        if kind == "pick":
            pair = pair[value]
        if kind == "place":
            placed = torch.full_like(pair, -1)
            placed[value] = pair
            pair = placed
        if kind == "sum" and not torch.equal(pair, torch.arange(pairs, device="cpu")):
            return "the sum over choices does not add a token's own"
        if kind == "add_to" and not torch.equal(value, pair // topk):
            return "rows are added to other tokens than their own"
    return None

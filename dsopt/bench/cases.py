"""What is measured: each op at the geometry of a model, and at sizes that serving meets.

`CASES[op]` makes an op's cases from a `Geometry` and `Sizes`. An op without an entry (a third party's, say) is
measured on its own samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dsopt import machine
from dsopt.bench.data import Data
from dsopt.fp8 import FP8Block, quantize
from dsopt.models import presets
from dsopt.op import Op
from dsopt.ops import OPS

# experts take so much of the memory that is free; the rest of them are left out
_EXPERT_SHARE = 0.25


@dataclass(frozen=True)
class Sizes:
    """batch sequences of `tokens` new tokens each; context: tokens of a sequence that attention sees, new ones too."""

    tokens: int
    context: int = 0
    batch: int = 1

    @property
    def rows(self) -> int:
        return self.batch * self.tokens

    def __str__(self) -> str:
        batch = f"{self.batch} x " if self.batch > 1 else ""
        tokens = f"{self.tokens} token{'s' if self.tokens != 1 else ''}" if self.tokens else ""
        return f"{batch}{tokens}{f' of {self.context}' if self.context else ''}"


def _all_rows(args: tuple) -> tuple[tuple, Callable]:
    return args, lambda results: results


@dataclass(frozen=True)
class Case:
    """One op at one geometry and size.

    name: which tensors of the model it is, such as "dense MLP"; note: what differs from the model.
    make: `make(i)` gives the i-th set of arguments, as `Op.bind` orders them. Sets share only what is far larger
        than a cache.
    witness: `witness(args)` is a smaller call that the reference can do in reasonable time, and what picks the same
        part of a kernel's results.
    """

    op: Op
    name: str
    sizes: Sizes
    make: Callable[[int], tuple]
    note: str = ""
    witness: Callable[[tuple], tuple[tuple, Callable]] = field(default=_all_rows)

    @property
    def title(self) -> str:
        return ", ".join(filter(None, (self.name, str(self.sizes))))


@dataclass(frozen=True)
class Geometry:
    """A preset's sizes in transformers' words, with what the random tensors are made of."""

    preset: str
    values: dict[str, Any]
    data: Data

    def __getattr__(self, name: str) -> Any:
        if name not in self.values:
            raise AttributeError(f"{self.preset} has no {name}")
        return self.values[name]

    @property
    def query_width(self) -> int:
        return self.num_attention_heads * (self.qk_nope_head_dim + self.qk_rope_head_dim)


def geometry(preset: str, dtype: torch.dtype, device: str, quick: bool = False) -> Geometry:
    """A preset's geometry; quick: at tiny widths. Raises ValueError for an unknown preset."""
    if preset not in presets.PRESETS:
        raise ValueError(f"unknown preset {preset!r}; known presets: {', '.join(presets.PRESETS)}")
    values = presets.PRESETS[preset]()
    return Geometry(preset, presets.tiny(values) if quick else values, Data(dtype, device))


DECODE, PREFILL = (1, 4, 16), 512
ROWS = tuple(Sizes(tokens) for tokens in (*DECODE, PREFILL))
# what is seconds a call on a small CPU takes a shorter prompt
SHORT_ROWS = tuple(Sizes(tokens) for tokens in (*DECODE, 128))
ATTENTION = ("mla_attention", "attention")
DEFAULT_SIZES: dict[str, tuple[Sizes, ...]] = {
    "gated_mlp": SHORT_ROWS,
    "moe_experts": SHORT_ROWS,
    "dequantize": (Sizes(0),),
    **dict.fromkeys(ATTENTION, (Sizes(1, 128), Sizes(1, 2048), Sizes(1, 8192), Sizes(PREFILL, PREFILL))),
}
QUICK_SIZES: dict[str, tuple[Sizes, ...]] = {
    "dequantize": (Sizes(0),),
    **dict.fromkeys(ATTENTION, (Sizes(1, 16), Sizes(5, 5))),
}
QUICK_ROWS = (Sizes(1), Sizes(5))


def default_sizes(op: str, quick: bool = False) -> tuple[Sizes, ...]:
    """The sizes an op is measured at where none were asked for."""
    return QUICK_SIZES.get(op, QUICK_ROWS) if quick else DEFAULT_SIZES.get(op, ROWS)


def chosen_sizes(
    op: str,
    tokens: Sequence[int] = (),
    context: Sequence[int] = (),
    batch: Sequence[int] = (),
    quick: bool = False,
) -> tuple[Sizes, ...]:
    """Every combination of what was asked for, what was not asked for being as by default."""
    defaults = default_sizes(op, quick)
    if not tokens and not context:
        plain = [(s.tokens, s.context) for s in defaults]
    elif op in ATTENTION:
        plain = [
            (t, max(t, c)) for t in tokens or (1,) for c in context or sorted({s.context for s in defaults})
        ]
    else:
        plain = [(t, 0) for t in tokens or [s.tokens for s in defaults]]
    return tuple(Sizes(t, c, b) for b in batch or (1,) for t, c in dict.fromkeys(plain))


def cases(op: Op, geo: Geometry, sizes: Sequence[Sizes]) -> list[Case]:
    """The cases of an op at some sizes; those of its samples where the op is not of this tree."""
    if op.name in CASES:
        return [case for size in sizes for case in CASES[op.name](geo, size)]
    samples = [op.bind(args) for args in op.samples(torch.device(geo.data.device), geo.data.dtype)]
    return [
        Case(op, f"sample {i}", Sizes(0), lambda _, args=args: geo.data.copied(args))
        for i, args in enumerate(samples)
    ]


def _first_rows(args: tuple) -> tuple[tuple, Callable]:
    """The same call of up to four rows of the first argument."""
    x, *rest = args
    return (x[:4], *rest), lambda results: [y[:4] for y in results]


def _norm(geo: Geometry, sizes: Sizes) -> Iterator[Case]:
    def make(i: int) -> tuple:
        r = geo.data.random(i)
        return r(sizes.batch, sizes.tokens, geo.hidden_size), r(geo.hidden_size), geo.rms_norm_eps

    yield Case(OPS["rms_norm"], f"width {geo.hidden_size}", sizes, make)


def _add_norm(geo: Geometry, sizes: Sizes) -> Iterator[Case]:
    shape = sizes.batch, sizes.tokens, geo.hidden_size

    def make(i: int) -> tuple:
        r = geo.data.random(i)
        return r(*shape), r(*shape), r(geo.hidden_size), geo.rms_norm_eps

    yield Case(OPS["add_rms_norm"], f"width {geo.hidden_size}", sizes, make)


def _rope(geo: Geometry, sizes: Sizes) -> Iterator[Case]:
    heads, dim = geo.num_attention_heads, geo.qk_rope_head_dim
    # V2 rotates and keeps neighbours; V3 in transformers reads neighbours and writes halves
    keeps = geo.model_type == "deepseek_v2"

    def make(i: int) -> tuple:
        r = geo.data.random(i)
        angle = r(1, 1, sizes.tokens, dim // 2).float() * 100
        cos, sin = (torch.cat((t, t), -1) for t in (angle.cos(), angle.sin()))
        q = r(sizes.batch, sizes.tokens, heads, geo.qk_nope_head_dim + dim)[..., -dim:].transpose(1, 2)
        return q, cos.to(q.dtype), sin.to(q.dtype), True, keeps

    yield Case(OPS["rope"], f"{heads} heads of {dim}", sizes, make)


def _multi_linear(geo: Geometry, sizes: Sizes) -> Iterator[Case]:
    """The first projections of attention, which read one input."""
    hidden, latent = geo.hidden_size, geo.kv_lora_rank + geo.qk_rope_head_dim
    query = geo.query_width if geo.q_lora_rank is None else geo.q_lora_rank

    def make(i: int) -> tuple:
        r = geo.data.random(i)
        weights = [r(width, hidden, scale=hidden**-0.5) for width in (query, latent)]
        return OPS["multi_linear"].bind((r(sizes.rows, hidden), weights, [None, None]))

    yield Case(OPS["multi_linear"], f"{hidden} to {query} and {latent}", sizes, make, witness=_first_rows)


def _gated_mlp(geo: Geometry, sizes: Sizes) -> Iterator[Case]:
    """The MLP of the first layers, and the shared experts."""
    hidden = geo.hidden_size
    for name, inner in (
        ("dense MLP", geo.intermediate_size),
        ("shared experts", geo.n_shared_experts * geo.moe_intermediate_size),
    ):

        def make(i: int, inner=inner) -> tuple:
            r = geo.data.random(i)
            up = [r(inner, hidden, scale=hidden**-0.5) for _ in range(2)]
            args = r(sizes.rows, hidden), *up, r(hidden, inner, scale=inner**-0.5)
            return OPS["gated_mlp"].bind(args)

        yield Case(OPS["gated_mlp"], f"{name} {hidden} x {inner}", sizes, make, witness=_first_rows)


def _dequantize(geo: Geometry, sizes: Sizes) -> Iterator[Case]:
    """The weight of the down projection of the dense MLP, widened as a whole."""
    rows, columns = geo.hidden_size, geo.intermediate_size

    def make(i: int) -> tuple:
        weight, scale = quantize(geo.data.random(i)(rows, columns), FP8Block())
        return OPS["dequantize"].bind((weight, scale, geo.data.dtype))

    def first_blocks(args: tuple) -> tuple[tuple, Callable]:
        weight, scale, *rest = args
        return (weight[:128], scale[:1], *rest), lambda results: [y[:128] for y in results]

    yield Case(OPS["dequantize"], f"{rows} x {columns}", sizes, make, witness=first_blocks)


def _mla_attention(geo: Geometry, sizes: Sizes) -> Iterator[Case]:
    """Decoding over a cache, the prompt itself, or more of a prompt behind a cache."""
    heads, rank = geo.num_attention_heads, geo.kv_lora_rank
    nope, rope, value = geo.qk_nope_head_dim, geo.qk_rope_head_dim, geo.v_head_dim
    new, keys, causal = _lengths(sizes)

    def make(i: int) -> tuple:
        r = geo.data.random(i)
        q = r(sizes.batch, new, heads, nope + rope).transpose(1, 2)
        kv_b = r(heads, nope + value, rank, scale=rank**-0.5)
        args = (
            q[..., :nope], q[..., nope:], r(sizes.batch, keys, rank), r(sizes.batch, keys, rope),
            kv_b[:, :nope], kv_b[:, nope:], _mask(sizes, geo.data.device), (nope + rope) ** -0.5, causal,
        )  # fmt: skip
        return OPS["mla_attention"].bind(args)

    yield Case(OPS["mla_attention"], f"{heads} heads", sizes, make, witness=_some_queries)


def _lengths(sizes: Sizes) -> tuple[int, int, bool]:
    """New tokens, keys they see, and whether these are one prompt."""
    new, keys = sizes.tokens, max(sizes.context, sizes.tokens)
    return new, keys, new > 1 and new == keys


def _mask(sizes: Sizes, device: str) -> torch.Tensor | None:
    """What several new tokens behind a cache may see; a prompt alone is causal, and one token sees all."""
    new, keys, causal = _lengths(sizes)
    if new <= 1 or causal:
        return None
    last = torch.arange(keys - new, keys, device=device)
    return (torch.arange(keys, device=device)[None, :] <= last[:, None])[None, None]


def _attention(geo: Geometry, sizes: Sizes) -> Iterator[Case]:
    """Grouped-query attention as dense models have it; no preset does."""
    heads, kv_heads, width = (4, 2, 16) if geo.hidden_size < 1024 else (32, 8, 128)
    new, keys, causal = _lengths(sizes)

    def make(i: int) -> tuple:
        r = geo.data.random(i)
        q = r(sizes.batch, new, heads, width).transpose(1, 2)
        k, v = (r(sizes.batch, kv_heads, keys, width) for _ in range(2))
        args = q, k, v, _mask(sizes, geo.data.device), width**-0.5, causal
        return OPS["attention"].bind(args)

    yield Case(OPS["attention"], f"{heads} heads on {kv_heads}", sizes, make, witness=_some_rows_of_queries)


def _some_rows_of_queries(args: tuple) -> tuple[tuple, Callable]:
    """The first, middle and last query of the first sequence."""
    q, k, v, mask, scale, is_causal, sinks = args
    rows, mask = _picked(q.shape[2], k.shape[2], mask, is_causal, q.device)
    return (q[:1, :, rows], k[:1], v[:1], mask, scale, False, sinks), lambda results: [
        y[:1, rows] for y in results
    ]


def _picked(
    new: int, keys: int, mask: torch.Tensor | None, is_causal: bool, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The first, middle and last of the new tokens, and what they see of the first sequence."""
    rows = torch.tensor(sorted({0, new // 2, new - 1}), device=device)
    if is_causal:
        return rows, (torch.arange(keys, device=device)[None, :] <= rows[:, None])[None, None]
    return rows, None if mask is None else mask[:1, :, rows]


def _some_queries(args: tuple) -> tuple[tuple, Callable]:
    """The first, middle and last query of the first sequence."""
    q_nope, q_rope, latent, k_rope, w_uk, w_uv, mask, scale, is_causal, *rest = args
    rows, mask = _picked(q_nope.shape[2], latent.shape[1], mask, is_causal, q_nope.device)
    q = q_nope[:1, :, rows], q_rope[:1, :, rows]
    small = *q, latent[:1], k_rope[:1], w_uk, w_uv, mask, scale, False, *rest
    return small, lambda results: [y[:1, rows] for y in results]


def _moe_route(geo: Geometry, sizes: Sizes) -> Iterator[Case]:
    sigmoid = geo.model_type != "deepseek_v2"
    by_group = {"num_groups": geo.n_group, "topk_groups": geo.topk_group}
    rule = {"renormalize": geo.norm_topk_prob, "scale": geo.routed_scaling_factor}
    if geo.n_group > 1:
        rule |= by_group
    if sigmoid:
        rule |= {"scoring": "sigmoid", "group_score": "top2", "outside": 0.0, "eps": 1e-20}

    def make(i: int) -> tuple:
        r = geo.data.random(i)
        bias = r(geo.n_routed_experts).float() * 0.1 if sigmoid else None
        logits = r(sizes.rows, geo.n_routed_experts).float()
        return OPS["moe_route"].bind((logits, geo.num_experts_per_tok), rule | {"bias": bias})

    yield Case(OPS["moe_route"], f"{geo.num_experts_per_tok} of {geo.n_routed_experts}", sizes, make)


def _moe_experts(geo: Geometry, sizes: Sizes) -> Iterator[Case]:
    """The routed experts of one layer. Their weights are far larger than any cache and are made once."""
    hidden, inner, topk = geo.hidden_size, geo.moe_intermediate_size, geo.num_experts_per_tok
    element = torch.empty((), dtype=geo.data.dtype).element_size()
    room = _free_memory(geo.data.device) * _EXPERT_SHARE / (3 * hidden * inner * element)
    experts = max(2 * topk, min(geo.n_routed_experts, int(room)))
    left_out = f"{experts} of the {geo.n_routed_experts} experts, for memory"

    def stacks() -> tuple[torch.Tensor, torch.Tensor]:
        r = geo.data.random(0)
        w13 = r(experts, 2 * inner, hidden, scale=hidden**-0.5)
        return w13, r(experts, hidden, inner, scale=inner**-0.5)

    def make(i: int) -> tuple:
        w13, w2 = geo.data.once(("moe_experts", experts, inner, hidden), stacks)
        r = geo.data.random(i)
        ids = _choices(sizes.rows, topk, experts, i).to(geo.data.device)
        weights = r(sizes.rows, topk).float().softmax(-1)
        return OPS["moe_experts"].bind((r(sizes.rows, hidden), ids, weights, w13, w2))

    name = f"{topk} of {experts} experts {hidden} x {inner}"
    note = left_out if experts < geo.n_routed_experts else ""
    yield Case(OPS["moe_experts"], name, sizes, make, note, witness=_some_tokens)


def _choices(tokens: int, topk: int, experts: int, i: int) -> torch.Tensor:
    """Different random experts for each token; few tokens of neighbouring sets choose no expert twice."""
    if tokens * topk > experts:
        generator = torch.Generator().manual_seed(i)
        return torch.rand(tokens, experts, generator=generator).argsort(-1)[:, :topk]
    laps, turn = divmod(i, experts // (tokens * topk))
    order = torch.randperm(experts, generator=torch.Generator().manual_seed(laps))
    return order[turn * tokens * topk :][: tokens * topk].view(tokens, topk)


def _some_tokens(args: tuple) -> tuple[tuple, Callable]:
    """The first two tokens, and of the experts only theirs."""
    x, ids, weights, w13, w2, w3, b13, b2, b3, *rest = args
    hit, small = ids[:2].unique(return_inverse=True)
    stacks = [None if w is None else w[hit] for w in (w13, w2, w3, b13, b2, b3)]
    return (x[:2], small, weights[:2], *stacks, *rest), lambda results: [y[:2] for y in results]


def _free_memory(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return machine.memory()["available"] or 8 << 30


CASES: dict[str, Callable[[Geometry, Sizes], Iterator[Case]]] = {
    "rms_norm": _norm,
    "add_rms_norm": _add_norm,
    "rope": _rope,
    "multi_linear": _multi_linear,
    "dequantize": _dequantize,
    "gated_mlp": _gated_mlp,
    "mla_attention": _mla_attention,
    "attention": _attention,
    "moe_route": _moe_route,
    "moe_experts": _moe_experts,
}

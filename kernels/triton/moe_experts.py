"""Experts as two grouped GEMMs over choices sorted by expert (see `moe_align`), nothing asked of the device.

hidden[row] = act(gate) * up     gate and up over one tile of x, whose rows are gathered inside the kernel
y[choice]   = weights[choice] * (w2 @ hidden[row] + b2)                                             in float32
out[token]  = shared(x[token]) + sum of y over the token's choices                                   in float32

A choice of no expert (a sentinel) is in no block, and the sum leaves it out. Shared experts are dense: cuBLAS, in x's
dtype. Rows of x, experts and rows of weights may have any strides; weights whose input channels lie next to each other
are read in full width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dsopt.capture import known
from dsopt.kernels.torch.gated_mlp import gated_mlp
from dsopt.kernels.triton.moe_align import align
from dsopt.kernels.triton.operands import refuse_operands
from dsopt.op import Kernel
from dsopt.ops.experts import ACTIVATIONS, gate_and_up
from dsopt.ops.quant import refuse_scales

DTYPES = frozenset({torch.bfloat16, torch.float16, torch.float32})
# one program holds a count of every expert
MAX_EXPERTS = 8192


class Tile(NamedTuple):
    """One program's part of a GEMM: rows (of choices), columns (of outputs), step along the sum."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


class Tiles(NamedTuple):
    """Tiles of the two GEMMs, which share their blocks of rows."""

    gate_up: Tile
    down: Tile


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """Activation of that name, of float32; NaN stays NaN."""
    if ACTIVATION == "silu":
        return x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "swiglu_oai":
        return x / (1.0 + tl.exp(-1.702 * x))
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh(z)) = sigmoid(2 z), z = sqrt(2 / pi) (x + 0.044715 x^3)
        return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    else:
        tl.static_assert(ACTIVATION == "relu" or ACTIVATION == "relu2")
        positive = tl.where(x < 0.0, 0.0, x)
        return positive * positive if ACTIVATION == "relu2" else positive


@triton.jit(do_not_specialize=["choices", "num_blocks"])
def gate_up_kernel(
    x, gate, up, b_gate, b_up, order, block_expert, hidden,
    choices, topk, num_blocks, width, inner, limit,
    x_token, x_k,
    gate_expert, gate_k, gate_n, up_expert, up_k, up_n,
    b_gate_expert, b_gate_n, b_up_expert, b_up_n,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """hidden (rows, inner) = act(x @ gate + b_gate) * (x @ up + b_up), the expert's of each block of rows.

    x (tokens, width), gate and up (experts, width, inner), b_gate and b_up (experts, inner) or None.
    """
    columns = tl.cdiv(inner, BLOCK_N)
    pid = tl.program_id(0)
    block, column = tl.swizzle2d(pid // columns, pid % columns, num_blocks, columns, GROUP)
    expert = tl.load(block_expert + block).to(tl.int64)
    if expert < 0:
        return
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    choice = tl.load(order + row)
    used = choice < choices
    k = tl.arange(0, BLOCK_K)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < inner
    wide_n = n.to(tl.int64)
    x += (choice // topk).to(tl.int64)[:, None] * x_token + k[None, :] * x_k
    gate += expert * gate_expert + k[:, None].to(tl.int64) * gate_k + wide_n[None, :] * gate_n
    if GATED:
        up += expert * up_expert + k[:, None].to(tl.int64) * up_k + wide_n[None, :] * up_n
    g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    u = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, width, BLOCK_K):
        left = k < width - start
        tile = tl.load(x, mask=used[:, None] & left[None, :], other=0.0)
        read = left[:, None] & inside[None, :]
        g = tl.dot(tile, tl.load(gate, mask=read, other=0.0), g, input_precision="ieee")
        if GATED:
            u = tl.dot(tile, tl.load(up, mask=read, other=0.0), u, input_precision="ieee")
            up += BLOCK_K * up_k
        x += BLOCK_K * x_k
        gate += BLOCK_K * gate_k
    if b_gate is not None:
        b = tl.load(b_gate + expert * b_gate_expert + wide_n * b_gate_n, mask=inside, other=0.0)
        g += b.to(tl.float32)[None, :]
    if GATED:
        if b_up is not None:
            b = tl.load(b_up + expert * b_up_expert + wide_n * b_up_n, mask=inside, other=0.0)
            u += b.to(tl.float32)[None, :]
        if limit is not None:
            g = tl.where(g > limit, limit, g)
            u = tl.where(u > limit, limit, tl.where(u < -limit, -limit, u))
        if ACTIVATION == "swiglu_oai":
            u += 1.0
        h = activated(g, ACTIVATION) * u
    else:
        h = activated(g, ACTIVATION)
    at = row.to(tl.int64)[:, None] * inner + n[None, :]
    tl.store(hidden + at, h.to(hidden.dtype.element_ty), mask=inside[None, :])


@triton.jit(do_not_specialize=["choices", "num_blocks"])
def down_kernel(
    hidden, w2, b2, weights, order, block_expert, y,
    choices, num_blocks, inner, width,
    w2_expert, w2_n, w2_k, b2_expert, b2_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y[choice] (choices, width) = weights[choice] * (hidden[row] @ w2.T + b2), the expert's of each block of rows.

    hidden (rows, inner), w2 (experts, width, inner), b2 (experts, width) or None; y in float32.
    """
    columns = tl.cdiv(width, BLOCK_N)
    pid = tl.program_id(0)
    block, column = tl.swizzle2d(pid // columns, pid % columns, num_blocks, columns, GROUP)
    expert = tl.load(block_expert + block).to(tl.int64)
    if expert < 0:
        return
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    choice = tl.load(order + row)
    used = choice < choices
    k = tl.arange(0, BLOCK_K)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < width
    wide_n = n.to(tl.int64)
    hidden += row.to(tl.int64)[:, None] * inner + k[None, :]
    w2 += expert * w2_expert + k[:, None].to(tl.int64) * w2_k + wide_n[None, :] * w2_n
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, inner, BLOCK_K):
        left = k < inner - start
        tile = tl.load(hidden, mask=left[None, :], other=0.0)
        w = tl.load(w2, mask=left[:, None] & inside[None, :], other=0.0)
        sums = tl.dot(tile, w, sums, input_precision="ieee")
        hidden += BLOCK_K
        w2 += BLOCK_K * w2_k
    if b2 is not None:
        b = tl.load(b2 + expert * b2_expert + wide_n * b2_n, mask=inside, other=0.0)
        sums += b.to(tl.float32)[None, :]
    sums *= tl.load(weights + choice, mask=used, other=0.0).to(tl.float32)[:, None]
    at = choice.to(tl.int64)[:, None] * width + n[None, :]
    tl.store(y + at, sums, mask=used[:, None] & inside[None, :])


@triton.jit
def sum_kernel(y, ids, shared, out, topk, num_experts, width, TOPK: tl.constexpr, BLOCK_N: tl.constexpr):
    """out[token] = shared[token] + sum_k y[token, k] over choices of an expert, in float32 and always in one order."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, TOPK)
    inside = n < width
    choice = token * topk + k
    expert = tl.load(ids + choice, mask=k < topk, other=-1)
    written = (expert >= 0) & (expert < num_experts)
    each = tl.load(
        y + choice[:, None] * width + n[None, :], mask=written[:, None] & inside[None, :], other=0.0
    )
    total = tl.sum(each, 0)
    if shared is not None:
        total += tl.load(shared + token * width + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * width + n, total.to(out.dtype.element_ty), mask=inside)


# Tiles by the choices an expert has on average, up to which they serve: few choices read weights, many multiply. None
# of them spills under Triton 3.6 for sm_80, sm_90 or sm_100, and their buffers fit into 99 KB of shared memory.
TILES = {
    2: (
        (16, Tiles(Tile(16, 64, 64, 4, 5), Tile(16, 64, 128, 4, 4))),
        (32, Tiles(Tile(32, 64, 64, 4, 4), Tile(32, 128, 64, 4, 4))),
        (64, Tiles(Tile(64, 64, 64, 4, 4), Tile(64, 128, 64, 4, 4))),
        (None, Tiles(Tile(128, 64, 64, 8, 3), Tile(128, 128, 64, 8, 3))),
    ),
    4: (
        (16, Tiles(Tile(16, 32, 32, 4, 2), Tile(16, 32, 32, 4, 2))),
        (None, Tiles(Tile(64, 32, 32, 4, 2), Tile(64, 32, 32, 4, 2))),
    ),
}
# blocks of rows that are walked down before the next columns, while both are in the L2 cache
GROUP = 8
# values one program sums
SUMMED = 4096


def tiles(choices: int, num_experts: int, itemsize: int) -> Tiles:
    """The tiles for so many choices among all experts, of elements of so many bytes."""
    table = TILES[itemsize]
    return next(t for most, t in table if most is None or choices <= most * num_experts)


def moe_experts(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    w3: torch.Tensor | None = None,
    b13: torch.Tensor | None = None,
    b2: torch.Tensor | None = None,
    b3: torch.Tensor | None = None,
    activation: str = "silu",
    gated: bool = True,
    interleaved: bool = False,
    limit: float | None = None,
    shared_gate: torch.Tensor | None = None,
    shared_up: torch.Tensor | None = None,
    shared_down: torch.Tensor | None = None,
    *_,
    chosen: Tiles | None = None,
) -> torch.Tensor:
    """Arguments and result as in `moe_experts_reference`; chosen: tiles to use instead of those of TILES."""
    num_tokens, topk = ids.shape
    num_experts, width = w2.shape[:2]
    shared = None
    if shared_gate is not None:
        shared = gated_mlp(x, shared_gate, shared_up, shared_down)
    if ids.numel() == 0 or num_experts == 0 or width == 0:
        return x.new_zeros(num_tokens, width) if shared is None else shared
    ids, weights = ids.contiguous(), weights.contiguous()
    use = chosen or tiles(ids.numel(), num_experts, x.element_size())
    with torch.cuda.device_of(x):
        order, block_expert = align(ids, num_experts, use.gate_up.block_m)
        hidden = x.new_empty(order.numel(), w2.shape[2])
        _gate_up(
            x, w13, w3, b13, b3, order, block_expert, hidden,
            topk, activation, gated, interleaved, limit, ids.numel(), use.gate_up,
        )  # fmt: skip
        y = x.new_empty(num_tokens, topk, width, dtype=torch.float32)
        _down(hidden, w2, b2, weights, order, block_expert, y, use.down)
        out = x.new_empty(num_tokens, width)
        padded = triton.next_power_of_2(topk)
        columns = min(max(16, SUMMED // padded), triton.next_power_of_2(width))
        sum_kernel[(num_tokens, triton.cdiv(width, columns))](
            y, ids, shared, out, topk, num_experts, width, TOPK=padded, BLOCK_N=columns
        )
    return out


def _gate_up(
    x, w13, w3, b13, b3, order, block_expert, hidden,
    topk, activation, gated, interleaved, limit, choices, tile,
) -> None:  # fmt: skip
    gate, up, b_gate, b_up = w13.mT, None, b13, None
    if gated:
        gate, up = gate_and_up(gate, None if w3 is None else w3.mT, interleaved)
        if b13 is not None:
            b_gate, b_up = gate_and_up(b13, b3, interleaved)
    inner, blocks = hidden.shape[1], block_expert.numel()
    gate_up_kernel[(blocks * triton.cdiv(inner, tile.block_n),)](
        x, gate, up, b_gate, b_up, order, block_expert, hidden,
        choices, topk, blocks, x.shape[1], inner, limit,
        *x.stride(), *gate.stride(), *_strides(up, 3), *_strides(b_gate, 2), *_strides(b_up, 2),
        ACTIVATION=activation, GATED=gated, **_options(tile),
    )  # fmt: skip


def _down(hidden, w2, b2, weights, order, block_expert, y, tile) -> None:
    inner, blocks, width = hidden.shape[1], block_expert.numel(), w2.shape[1]
    down_kernel[(blocks * triton.cdiv(width, tile.block_n),)](
        hidden, w2, b2, weights, order, block_expert, y,
        weights.numel(), blocks, inner, width, *w2.stride(), *_strides(b2, 2), **_options(tile),
    )  # fmt: skip


def _strides(x: torch.Tensor | None, dims: int) -> tuple[int, ...]:
    return (0,) * dims if x is None else x.stride()


def _options(tile: Tile) -> dict[str, int]:
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP": GROUP,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def _check(
    x, ids, weights, w13, w2, w3=None, b13=None, b2=None, b3=None, activation="silu", gated=True,
    interleaved=False, limit=None, shared_gate=None, shared_up=None, shared_down=None, *scales_and_block,
):  # fmt: skip
    if reason := refuse_scales(*scales_and_block[:-1]):
        return reason
    if ids.dtype not in (torch.int32, torch.int64):
        return f"needs ids of int32 or int64, got {ids.dtype}"
    if activation not in ACTIVATIONS:
        return f"knows activations {', '.join(ACTIVATIONS)}, got {activation}"
    if (x.ndim, w13.ndim, w2.ndim) != (2, 3, 3):
        return f"needs x of 2 dimensions, w13 and w2 of 3, got {x.ndim}, {w13.ndim} and {w2.ndim}"
    num_experts, rows, hidden = *w13.shape[:2], x.shape[1]
    if not known(num_experts <= MAX_EXPERTS):
        return f"needs at most {MAX_EXPERTS} experts, got {num_experts}"
    inner = rows // 2 if gated and w3 is None else rows
    shared_inner = 0 if shared_gate is None else shared_gate.shape[0]
    choices = (x.shape[0], ids.shape[-1])
    # ids and weights are of dtypes of their own
    alone = [refuse_operands(t, {name: (t, choices)}) for name, t in (("ids", ids), ("weights", weights))]
    return next(filter(None, alone), None) or refuse_operands(
        x,
        {
            "w13": (w13, (num_experts, rows, hidden)),
            "w2": (w2, (num_experts, w2.shape[1], inner)),
            "w3": (w3, (num_experts, inner, hidden)),
            "b13": (b13, (num_experts, rows)),
            "b2": (b2, (num_experts, w2.shape[1])),
            "b3": (b3, (num_experts, inner)),
            "shared_gate": (shared_gate, (shared_inner, hidden)),
            "shared_up": (shared_up, (shared_inner, hidden)),
            "shared_down": (shared_down, (w2.shape[1], shared_inner)),
        },
    )


KERNELS = (
    Kernel(
        "moe_experts", "triton", lambda *_: moe_experts, _check, device="cuda", dtypes=DTYPES, priority=30
    ),
)


def ahead_of_time(tensor: Callable) -> Iterator[tuple]:
    """DeepSeek-V2-Lite's and V3's experts at one token and at many, and gpt-oss's kind."""

    def case(tokens, topk, experts, hidden, inner, dtype=torch.bfloat16):
        w13, w2 = tensor(experts, 2 * inner, hidden, dtype=dtype), tensor(experts, hidden, inner, dtype=dtype)
        ids, weights = tensor(tokens, topk, dtype=torch.int64), tensor(tokens, topk, dtype=torch.float32)
        return tensor(tokens, hidden, dtype=dtype), ids, weights, w13, w2

    for tokens in (1, 256, 512, 4096):
        yield case(tokens, 6, 64, 2048, 1408)
    yield case(1, 8, 256, 7168, 2048)
    yield case(8, 8, 256, 7168, 2048)
    yield case(4096, 8, 256, 7168, 2048)
    for tokens in (1, 4096):
        yield case(tokens, 6, 64, 2048, 1408, torch.float32)
    x, ids, weights, w13, w2 = case(64, 4, 32, 2880, 2880)
    bias = tensor(32, 5760), tensor(32, 2880)
    yield x, ids, weights, w13, w2, None, *bias, None, "swiglu_oai", True, True, 7.0

"""Experts for few tokens: only the rows of chosen experts are read, each once, and everything is one kernel.

Choices are grouped by expert. Then hidden = act(gate) * up for blocks of rows of each chosen expert, and
out = sum of weight * (w2 @ hidden) for blocks of rows of the output, in the order of the experts: a sum does not
depend on the number of threads. float32 inside. Many tokens an expert go to ATen's GEMMs.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import prange

from dsopt.kernels.numba.dots import ROWS, rows_dot
from dsopt.kernels.numba.multi_linear import check_weight
from dsopt.kernels.numba.runtime import DTYPES, flat, inner, kernel, nothing, run, widen
from dsopt.kernels.torch.moe_experts import by_expert
from dsopt.op import Kernel

# tokens an expert has, on average, up to which this kernel is faster than widening its weights for ATen's GEMM
# (bfloat16; V2-Lite's widths), or than that GEMM alone (float32)
FEW_TOKENS = {torch.bfloat16: 32, torch.float32: 4}

_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "swiglu_oai")


@inner
def _act(kind, x):
    """Activation number `kind` of _ACTIVATIONS."""
    one, half = np.float32(1), np.float32(0.5)
    if kind == 0:
        return x / (one + math.exp(-x))
    if kind == 1:
        return half * x * (one + math.erf(x * np.float32(0.5**0.5)))
    if kind == 2:
        cubic = x + np.float32(0.044715) * x * x * x
        return half * x * (one + math.tanh(np.float32((2 / math.pi) ** 0.5) * cubic))
    if kind == 5:
        return x / (one + math.exp(np.float32(-1.702) * x))
    x = np.float32(0) if x < 0 else x
    return x if kind == 3 else x * x


@inner
def _group(ids, experts):
    """The choices that name an expert, ordered by it: their places in ids, where each expert's begin, and it."""
    counts = np.zeros(experts, np.int64)
    for e in ids:
        if 0 <= e < experts:
            counts[e] += 1
    expert = np.flatnonzero(counts)
    first = np.zeros(expert.size + 1, np.int64)
    ends = np.zeros(experts, np.int64)
    for slot in range(expert.size):
        ends[expert[slot]] = first[slot]
        first[slot + 1] = first[slot] + counts[expert[slot]]
    choice = np.empty(first[expert.size], np.int64)
    for i in range(ids.size):
        e = ids[i]
        if 0 <= e < experts:
            choice[ends[e]] = i
            ends[e] += 1
    return choice, first, expert


@kernel
def _few(
    x, ids, weights, gate, gate_strides, up, up_strides, down, down_strides,
    b_gate, b_gate_strides, b_up, b_up_strides, b_down, b_down_strides,
    out, topk, experts, width, inner_width, out_width, activation, limit,
):  # fmt: skip
    """out += what the chosen experts give; x and out flat float32, strides those of an expert and of a row."""
    choice, first, expert = _group(ids, experts)
    token = choice // topk
    x_at, hidden_at = token * width, np.arange(choice.size) * inner_width
    hidden = np.empty(choice.size * inner_width, np.float32)
    blocks = (inner_width + ROWS - 1) // ROWS
    for item in prange(expert.size * blocks):
        slot, row = item // blocks, item % blocks * ROWS
        e, rows = expert[slot], min(ROWS, inner_width - row)
        begin, end = first[slot], first[slot + 1]
        g, u = np.empty((end - begin, ROWS), np.float32), np.empty((end - begin, ROWS), np.float32)
        at = e * gate_strides[0] + row * gate_strides[1]
        rows_dot(gate, at, gate_strides[1], rows, x, x_at[begin:end], width, g)
        if up.size:
            at = e * up_strides[0] + row * up_strides[1]
            rows_dot(up, at, up_strides[1], rows, x, x_at[begin:end], width, u)
        for c in range(end - begin):
            for i in range(rows):
                a = g[c, i]
                if b_gate.size:
                    a += widen(b_gate[e * b_gate_strides[0] + (row + i) * b_gate_strides[1]])
                if up.size:
                    b = u[c, i]
                    if b_up.size:
                        b += widen(b_up[e * b_up_strides[0] + (row + i) * b_up_strides[1]])
                    a = limit if a > limit else a
                    b = limit if b > limit else -limit if b < -limit else b
                    a = _act(activation, a) * (b + np.float32(1) if activation == 5 else b)
                else:
                    a = _act(activation, a)
                hidden[(begin + c) * inner_width + row + i] = a
    for block in prange((out_width + ROWS - 1) // ROWS):
        row = block * ROWS
        rows = min(ROWS, out_width - row)
        for slot in range(expert.size):
            e, begin, end = expert[slot], first[slot], first[slot + 1]
            y = np.empty((end - begin, ROWS), np.float32)
            at = e * down_strides[0] + row * down_strides[1]
            rows_dot(down, at, down_strides[1], rows, hidden, hidden_at[begin:end], inner_width, y)
            for c in range(end - begin):
                for i in range(rows):
                    b = np.float32(0)
                    if b_down.size:
                        b = widen(b_down[e * b_down_strides[0] + (row + i) * b_down_strides[1]])
                    out[token[begin + c] * out_width + row + i] += weights[choice[begin + c]] * (y[c, i] + b)


def _operand(x: torch.Tensor | None, dtype: torch.dtype) -> tuple[np.ndarray, tuple[int, int]]:
    """The memory of a weight or bias and its strides by expert and row."""
    return (nothing(dtype), (0, 0)) if x is None else (flat(x), x.stride()[:2])


def add_experts(
    out: torch.Tensor,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor | None,
    down: torch.Tensor,
    b_gate: torch.Tensor | None = None,
    b_up: torch.Tensor | None = None,
    b_down: torch.Tensor | None = None,
    activation: str = "silu",
    limit: float | None = None,
) -> None:
    """out += sum_k weights[:, k] * expert[ids[:, k]](x); out and x float32, (num_tokens, width) both.

    gate and up (num_experts, intermediate, hidden), up None if not gated; down (num_experts, hidden_out,
    intermediate); biases (num_experts, rows). Rows of elements that are neighbours.
    """
    dtype, (experts, inner_width, width) = gate.dtype, gate.shape
    tensors = (gate, up, down, b_gate, b_up, b_down)
    operands = [a for t in tensors for a in _operand(t, dtype)]
    choices = (flat(ids.long().contiguous()), flat(weights.float().contiguous()))
    sizes = (ids.shape[1], experts, width, inner_width, down.shape[1])
    limit = np.float32(math.inf if limit is None else limit)
    work = ids.numel() * inner_width * (2 * width + down.shape[1])
    run(work, _few, flat(x), *choices, *operands, flat(out), *sizes, _ACTIVATIONS.index(activation), limit)


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
) -> torch.Tensor:
    if ids.numel() > FEW_TOKENS[x.dtype] * w13.shape[0]:
        shared = (shared_gate, shared_up, shared_down)
        how = (activation, gated, interleaved, limit)
        return by_expert(x, ids, weights, w13, w2, w3, b13, b2, b3, *how, *shared)
    gate, up, b_gate, b_up = w13, None, b13, None
    if gated:
        gate, up = (w13, w3) if w3 is not None else _halves(w13, interleaved)
        b_gate, b_up = (b13, b3) if w3 is not None or b13 is None else _halves(b13, interleaved)
    wide = x.float().contiguous()
    out = torch.zeros(x.shape[0], w2.shape[1])
    if shared_gate is not None:
        add_mlp(out, wide, shared_gate, shared_up, shared_down)
    if ids.numel():
        add_experts(out, wide, ids, weights, gate, up, w2, b_gate, b_up, b2, activation, limit)
    return out.to(x.dtype)


def _halves(x: torch.Tensor, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate's and up's share of w13 or b13, whose rows are in dimension 1."""
    return (x[:, 0::2], x[:, 1::2]) if interleaved else x.chunk(2, 1)


def add_mlp(
    out: torch.Tensor,
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    *biases: torch.Tensor | None,
    activation: str = "silu",
    limit: float | None = None,
) -> None:
    """out += gated_mlp(x, gate, up, down, *biases); out and x float32, (num_tokens, width) both."""
    ids, weights = torch.zeros(x.shape[0], 1, dtype=torch.int64), torch.ones(x.shape[0], 1)
    one = [
        None if t is None else t.unsqueeze(0) for t in (gate, up, down, *biases, *[None] * (3 - len(biases)))
    ]
    add_experts(out, x, ids, weights, *one, activation, limit)


def _check(x, ids, weights, w13, w2, w3=None, b13=None, b2=None, b3=None, activation="silu", *rest):
    if activation not in _ACTIVATIONS:
        return f"needs an activation of {', '.join(_ACTIVATIONS)}, got {activation}"
    shared = dict(zip(("shared_gate", "shared_up", "shared_down"), rest[3:]))
    operands = {"w13": w13, "w2": w2, "w3": w3, "b13": b13, "b2": b2, "b3": b3, **shared}
    for name, w in operands.items():
        if w is not None and (reason := check_weight(name, w, x)) is not None:
            return reason
    return None


KERNELS = (
    Kernel("moe_experts", "numba", lambda *_: moe_experts, _check, device="cpu", dtypes=DTYPES, priority=10),
)

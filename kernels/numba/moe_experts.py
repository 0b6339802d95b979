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

from dsopt.capture import known
from dsopt.kernels.numba.dots import ROWS, rows_dot
from dsopt.kernels.numba.multi_linear import check_weight
from dsopt.kernels.numba.runtime import DTYPES, flat, inner, kernel, nothing, run, widen
from dsopt.kernels.torch.moe_experts import by_expert
from dsopt.op import Kernel
from dsopt.ops.quant import refuse_scales

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
def _group(ids, experts, topk, width, inner_width):
    """The choices that name an expert, ordered by it.

    Returns which they are of ids, where their tokens begin in x, where their results begin in hidden, and of each
    expert that was chosen where its choices begin and its number.
    """
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
    return choice, choice // topk * width, np.arange(choice.size) * inner_width, first, expert


@inner
def _element(b, strides, e, row):
    """Element `row` of expert e's bias, 0 without one."""
    return widen(b[e * strides[0] + row * strides[1]]) if b.size else np.float32(0)


@inner
def _hidden_rows(
    row, e, x, x_at, gate, gate_strides, up, up_strides, b_gate, b_gate_strides, b_up, b_up_strides,
    hidden, hidden_at, width, inner_width, activation, limit,
):  # fmt: skip
    """Elements row, ..., row + ROWS - 1 of what w2 is given, for all tokens of expert e."""
    rows, count = min(ROWS, inner_width - row), x_at.size
    g, u = np.empty((count, ROWS), np.float32), np.empty((count, ROWS), np.float32)
    at = e * gate_strides[0] + row * gate_strides[1]
    rows_dot(gate, at, gate_strides[1], rows, x, x_at, width, g)
    if up.size:
        at = e * up_strides[0] + row * up_strides[1]
        rows_dot(up, at, up_strides[1], rows, x, x_at, width, u)
    for c in range(count):
        for i in range(rows):
            a = g[c, i] + _element(b_gate, b_gate_strides, e, row + i)
            if up.size:
                b = u[c, i] + _element(b_up, b_up_strides, e, row + i)
                a = limit if a > limit else a
                b = limit if b > limit else -limit if b < -limit else b
                a = _act(activation, a) * (b + np.float32(1) if activation == 5 else b)
            else:
                a = _act(activation, a)
            hidden[hidden_at[c] + row + i] = a


@inner
def _out_rows(
    row, choice, first, expert, weights, hidden, hidden_at, down, strides, bias, bias_strides, out, sizes
):
    """Elements row, ..., row + ROWS - 1 of each token's sum over its experts."""
    topk, inner_width, out_width = sizes
    rows = min(ROWS, out_width - row)
    for slot in range(expert.size):
        e, begin, end = expert[slot], first[slot], first[slot + 1]
        y = np.empty((end - begin, ROWS), np.float32)
        at = e * strides[0] + row * strides[1]
        rows_dot(down, at, strides[1], rows, hidden, hidden_at[begin:end], inner_width, y)
        for c in range(begin, end):
            to, weight = choice[c] // topk * out_width + row, weights[choice[c]]
            for i in range(rows):
                out[to + i] += weight * (y[c - begin, i] + _element(bias, bias_strides, e, row + i))


@kernel
def _few(
    x, ids, weights, gate, gate_strides, up, up_strides, down, down_strides,
    b_gate, b_gate_strides, b_up, b_up_strides, b_down, b_down_strides,
    out, hidden, topk, experts, width, inner_width, out_width, activation, limit,
):  # fmt: skip
    """out += what the chosen experts give; x and out flat float32, strides those of an expert and of a row.

    up is empty if not gated, a bias if there is none; hidden is for its own use.
    """
    choice, x_at, hidden_at, first, expert = _group(ids, experts, topk, width, inner_width)
    blocks = (inner_width + ROWS - 1) // ROWS
    for item in prange(expert.size * blocks):
        slot = item // blocks
        begin, end = first[slot], first[slot + 1]
        _hidden_rows(
            item % blocks * ROWS, expert[slot], x, x_at[begin:end], gate, gate_strides, up, up_strides,
            b_gate, b_gate_strides, b_up, b_up_strides, hidden, hidden_at[begin:end],
            width, inner_width, activation, limit,
        )  # fmt: skip
    sizes = topk, inner_width, out_width
    for block in prange((out_width + ROWS - 1) // ROWS):
        _out_rows(
            block * ROWS, choice, first, expert, weights, hidden, hidden_at, down, down_strides,
            b_down, b_down_strides, out, sizes,
        )  # fmt: skip


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
    hidden = np.empty(ids.numel() * inner_width, np.float32)
    work = ids.numel() * inner_width * (2 * width + down.shape[1])
    how = (_ACTIVATIONS.index(activation), limit)
    run(work, _few, flat(x), *choices, *operands, flat(out), hidden, *sizes, *how)


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


def _check(
    x, ids, weights, w13, w2, w3=None, b13=None, b2=None, b3=None, activation="silu", gated=True,
    interleaved=False, limit=None, shared_gate=None, shared_up=None, shared_down=None, *scales_and_block,
):  # fmt: skip
    if reason := refuse_scales(*scales_and_block[:-1]):
        return reason
    if activation not in _ACTIVATIONS:
        return f"needs an activation of {', '.join(_ACTIVATIONS)}, got {activation}"
    if any(known(a != b) for a, b in zip(ids.shape, weights.shape)):
        return f"needs a weight for each id, got {list(weights.shape)} for {list(ids.shape)}"
    (experts, rows, _), (_, out, inner_width), hidden = w13.shape, w2.shape, x.shape[1]
    wanted = 2 * inner_width if gated and w3 is None else inner_width
    w13_shape, w2_shape, w3_shape = (
        (experts, wanted, hidden),
        (experts, out, inner_width),
        (experts, rows, hidden),
    )
    shapes = {"w13": w13_shape, "w2": w2_shape, "w3": w3_shape}
    shapes |= {"b13": w13_shape[:2], "b2": w2_shape[:2], "b3": w3_shape[:2]}
    operands = [(name, w, shapes[name]) for name, w in zip(shapes, (w13, w2, w3, b13, b2, b3))]
    if shared_gate is not None:
        shared = (shared_gate.shape[0], hidden)
        operands += [("shared_gate", shared_gate, shared), ("shared_up", shared_up, shared)]
        operands += [("shared_down", shared_down, (out, shared_gate.shape[0]))]
    reasons = (check_weight(name, w, x, shape) for name, w, shape in operands if w is not None)
    return next(filter(None, reasons), None)


KERNELS = (
    Kernel("moe_experts", "numba", lambda *_: moe_experts, _check, device="cpu", dtypes=DTYPES, priority=10),
)

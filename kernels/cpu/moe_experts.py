"""Native experts: the weights of each chosen expert are read once, where they lie, however many tokens chose it.

Sums are in float32, beside float32, bfloat16 or float16 weights, and in an order that a token's own choices fix: its
answer does not depend on the batch around it or on the number of threads. What w2 is given is float32, too, but where
the processor has products of bfloat16 it is that beside weights of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dsopt.capture import known
from dsopt.kernels.cpu.fp8 import UNSCALED, refuse_mixed, scales
from dsopt.kernels.cpu.native import CPU, DTYPES, NATIVE, _cpu, dense_rows, plan, rows
from dsopt.op import Kernel

Stack = tuple[int, int, int]

ACTIVATIONS = _cpu.Activation.__members__
UNLIMITED = float("inf")
NOTHING: Stack = (0, 0, 0)
NO_MLPS = ((NOTHING,) * 6, (UNSCALED,) * 3, 0, _cpu.Activation.silu, UNLIMITED)
_NO_CHOICES = (1, 0, 0)


def stack(w: torch.Tensor | None) -> Stack:
    """Address and first two strides of a stack of matrices (rows are dense) or of vectors; zeros for None."""
    return NOTHING if w is None else (w.data_ptr(), *w.stride()[:2])


def matrix(w: torch.Tensor | None) -> Stack:
    """A matrix, or a vector as a matrix of one column, as a stack of one."""
    return NOTHING if w is None else (w.data_ptr(), 0, w.stride(0))


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
    scale13: torch.Tensor | None = None,
    scale2: torch.Tensor | None = None,
    scale3: torch.Tensor | None = None,
    shared_scale_gate: torch.Tensor | None = None,
    shared_scale_up: torch.Tensor | None = None,
    shared_scale_down: torch.Tensor | None = None,
    block: Sequence[int] = (128, 128),
) -> torch.Tensor:
    num_tokens, hidden = x.shape
    num_experts, out_hidden, intermediate = w2.shape
    topk = ids.shape[1]
    if ids.shape != weights.shape or ids.shape[0] != num_tokens:
        raise ValueError(
            f"ids and weights must be ({num_tokens}, topk) both, got {list(ids.shape)} and {list(weights.shape)}"
        )
    x, x_stride = rows(x)
    ids, weights = ids.long(), weights.float()
    out = torch.empty(num_tokens, out_hidden, dtype=x.dtype, device=CPU)
    gate, up, gate_bias, up_bias = stack(w13), stack(w3), stack(b13), stack(b3)
    gate_scale, up_scale = scales(scale13, block), scales(scale3, block)
    if gated and w3 is None:
        gate, up = _halves(gate, w13.element_size(), intermediate, interleaved)
        up_scale = scales(scale13, block, intermediate)
        if b13 is not None:
            gate_bias, up_bias = _halves(gate_bias, b13.element_size(), intermediate, interleaved)
    routed = (
        (gate, up, stack(w2), gate_bias, up_bias, stack(b2)),
        (gate_scale, up_scale, scales(scale2, block)),
        intermediate,
        ACTIVATIONS[activation],
        UNLIMITED if limit is None else limit,
    )
    shared = NO_MLPS
    if shared_gate is not None:
        mats = (matrix(shared_gate), matrix(shared_up), matrix(shared_down))
        shared_scales = tuple(
            scales(s, block) for s in (shared_scale_gate, shared_scale_up, shared_scale_down)
        )
        shared = (
            (*mats, *NO_MLPS[0][3:]), shared_scales, shared_gate.shape[0], _cpu.Activation.silu, UNLIMITED
        )  # fmt: skip
    _cpu.moe_experts(
        (num_tokens, hidden, out_hidden, topk, num_experts),
        x.data_ptr(),
        x_stride,
        stack(ids) if ids.numel() else _NO_CHOICES,
        stack(weights) if ids.numel() else _NO_CHOICES,
        routed,
        shared,
        out.data_ptr(),
        NATIVE[x.dtype],
        scale2 is not None,
    )
    return out


def _halves(both: Stack, item: int, intermediate: int, interleaved: bool) -> tuple[Stack, Stack]:
    """Gate's and up's rows of matrices, or elements of biases, that hold both; item: bytes of an element."""
    address, expert, row = both
    if interleaved:
        return (address, expert, 2 * row), (address + row * item, expert, 2 * row)
    return both, (address + intermediate * row * item, expert, row)


def _check(
    x, ids, weights, w13, w2, w3, b13, b2, b3, activation, gated, interleaved, limit,
    shared_gate, shared_up, shared_down,
    scale13, scale2, scale3, shared_scale_gate, shared_scale_up, shared_scale_down, block,
) -> str | None:  # fmt: skip
    matrices = {
        "w13": (w13, scale13), "w2": (w2, scale2), "w3": (w3, scale3), "shared_gate": (shared_gate, shared_scale_gate),
        "shared_up": (shared_up, shared_scale_up), "shared_down": (shared_down, shared_scale_down),
    }  # fmt: skip
    if reason := refuse_mixed(matrices, block):
        return reason
    if scale13 is not None and gated and w3 is None and (interleaved or w2.shape[-1] % block[0]):
        return "needs the rows of gate and of up in FP8 apart, in blocks of their own"
    if activation not in ACTIVATIONS:
        return f"computes {', '.join(ACTIVATIONS)}, got activation {activation}"
    if x.ndim != 2 or known(x.shape[1] == 0) or w2.ndim != 3:
        return f"needs x of two dimensions with elements and w2 of three, got {list(x.shape)} and {list(w2.shape)}"
    if (
        ids.dtype not in (torch.int64, torch.int32)
        or ids.device.type != "cpu"
        or weights.device.type != "cpu"
    ):
        return f"needs int32 or int64 ids and weights on the CPU, got {ids.dtype} on {ids.device}"
    if limit is not None and limit < 0:
        return f"needs a limit of 0 or more, got {limit}"
    if (not gated and w3 is not None) or (w3 is None and b3 is not None):
        return "takes w3 for gated experts only, and b3 beside w3 only"
    if len({w is None for w in (shared_gate, shared_up, shared_down)}) > 1:
        return "needs all three weights of shared experts, or none"
    num_experts, out_hidden, intermediate = w2.shape
    hidden, rows = x.shape[1], intermediate * (2 if gated and w3 is None else 1)
    wanted = {
        "w13": (w13, (num_experts, rows, hidden)),
        "w2": (w2, (num_experts, out_hidden, intermediate)),
        "w3": (w3, (num_experts, intermediate, hidden)),
        "b13": (b13, (num_experts, rows)),
        "b3": (b3, (num_experts, intermediate)),
        "b2": (b2, (num_experts, out_hidden)),
    }
    if shared_gate is not None:
        inner = shared_gate.shape[0]
        wanted |= {
            "shared_gate": (shared_gate, (inner, hidden)),
            "shared_up": (shared_up, (inner, hidden)),
            "shared_down": (shared_down, (out_hidden, inner)),
        }
    return check_weights(x.dtype, scale2 is not None, wanted)


def check_weights(
    dtype: torch.dtype, fp8: bool, wanted: dict[str, tuple[torch.Tensor | None, tuple[int, ...]]]
) -> str | None:
    """Why weights are not read where they lie, or None: another dtype, device or shape, or rows that are not dense.

    fp8: matrices are in FP8, which has been checked, beside biases of dtype.
    wanted: name -> tensor or None, and the shape it must have; names of biases start with b.
    """
    for name, (w, shape) in wanted.items():
        if w is None:
            continue
        is_bias = name.startswith("b")
        if (w.dtype != dtype and (is_bias or not fp8)) or w.device.type != "cpu":
            return f"needs {name} of x's dtype {dtype} on the CPU, got {w.dtype} on {w.device}"
        if w.ndim != len(shape) or any(known(a != b) for a, b in zip(w.shape, shape, strict=True)):
            return f"needs {name} of shape {list(shape)}, got {list(w.shape)}"
        if not is_bias and not dense_rows(w):
            return f"needs dense rows of {name}, got strides {w.stride()}"
    return None


KERNELS = (
    Kernel(
        "moe_experts",
        "cpu",
        plan(moe_experts),
        _check,
        device="cpu",
        dtypes=DTYPES,
        priority=20,
        records=True,
    ),
)

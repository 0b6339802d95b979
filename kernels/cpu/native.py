"""The native extension, or an ImportError that says how to get it, and how its kernels are handed tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

try:
    from dsopt import _cpu
except ImportError as error:
    raise ImportError(
        "the native CPU kernels are not built; reinstall dsopt where a C++17 compiler and pybind11 are found "
        f"({error})"
    ) from error

__all__ = ["CPU", "DTYPES", "NATIVE", "_cpu", "dense_rows", "empty_like", "plan", "require", "rows", "spread"]

# results lie there whatever the default device is
CPU = torch.device("cpu")
NATIVE = {
    torch.float32: _cpu.Dtype.float32,
    torch.bfloat16: _cpu.Dtype.bfloat16,
    torch.float16: _cpu.Dtype.float16,
}
DTYPES = frozenset(NATIVE)


def plan(fn: Callable) -> Callable[..., Callable]:
    """A kernel's plan that is `fn` whatever the arguments."""

    def planned(*args) -> Callable:
        _cpu.isa()  # a bad DSOPT_ISA is reported here rather than in the middle of a model
        return fn

    return planned


def dense_rows(x: torch.Tensor) -> bool:
    """Whether the elements of a row are neighbours."""
    return x.stride(-1) == 1 or x.shape[-1] == 1


def rows(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """x with the elements of a row next to each other, and the elements from one row to the next."""
    if x.is_contiguous():
        return x, x.shape[-1]
    flat = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    flat = flat if dense_rows(flat) else flat.contiguous()
    return flat, flat.stride(0)


def empty_like(x: torch.Tensor) -> torch.Tensor:
    """A dense tensor of x's shape and dtype, not filled."""
    return torch.empty_like(x) if x.is_contiguous() else torch.empty(*x.shape, dtype=x.dtype, device=CPU)


def spread(x: torch.Tensor, shape: Sequence[int]) -> tuple[int, ...] | None:
    """Strides with which x stands for a tensor of `shape`, or None if it does not broadcast to that."""
    missing = len(shape) - x.ndim
    strides = [0] * missing
    for size, stride, wanted in zip(x.shape, x.stride(), shape[missing:], strict=False):
        if size != wanted and size != 1:
            return None
        strides.append(stride if size == wanted else 0)
    return tuple(strides) if missing >= 0 else None


def require(name: str, got: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Native code trusts its pointers: ValueError for a tensor that it would read beyond or misread."""
    if got.shape != shape or got.dtype != dtype or not got.is_cpu:
        raise ValueError(
            f"{name} must be {list(shape)} of {dtype} on the CPU, "
            f"got {list(got.shape)} of {got.dtype} on {got.device}"
        )

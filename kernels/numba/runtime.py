"""What the Numba kernels share: compilation, threads, and tensors as flat NumPy arrays.

Every tensor goes to compiled code as one flat array over the memory it spans, with its strides as numbers. So
each kernel is compiled once per dtype, whatever the layout, and inner loops run over neighbours in memory.
bfloat16, which Numba does not know, goes as uint16: `widen` and `store` turn it into float32 and back.

Numba's cache looks only at the file a kernel is in: after a change to this file or to `dots`, delete
`kernels/numba/__pycache__`. Where the install cannot be written to, Numba keeps the cache in the user's folder, or
in the one that NUMBA_CACHE_DIR names. Like torch itself, these kernels cannot run in a process forked from one where
they ran.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import numba
import numpy as np
import torch
from numba.extending import overload

DTYPES = frozenset({torch.float32, torch.bfloat16})

_ELEMENTS = {
    torch.float32: (ctypes.c_float, np.dtype(np.float32)),
    torch.int64: (ctypes.c_int64, np.dtype(np.int64)),
    torch.bfloat16: (ctypes.c_uint16, np.dtype(np.uint16)),
}

# sums may be reordered and products fused; NaN, infinity and division stay what IEEE says
FASTMATH = {"reassoc", "contract", "nsz"}

# compiles a function that other compiled functions call
inner = numba.njit(cache=True, fastmath=FASTMATH, error_model="numpy")
# compiles a kernel, at its first call, whose prange loops run on torch's OpenMP threads; the bodies of these loops
# are functions of their own where they are long, because Numba's parallel passes take their time
kernel = numba.njit(cache=True, fastmath=FASTMATH, error_model="numpy", parallel=True, nogil=True)

# multiply-adds below which waking another thread costs more than it saves
SERIAL_WORK = 1 << 15


def widen(x):
    """An element of a flat array as float32; for compiled code."""
    raise NotImplementedError


def store(out, i, x):
    """out[i] = the float32 x, rounded to nearest even; NaN stays NaN. For compiled code."""
    raise NotImplementedError


@overload(widen)
def _widen(x):
    if x == numba.types.uint16:
        return lambda x: np.uint32(np.uint32(x) << 16).view(np.float32)
    return lambda x: x


@overload(store)
def _store(out, i, x):
    if out.dtype != numba.types.uint16:

        def plain(out, i, x):
            out[i] = x

        return plain

    def rounded(out, i, x):
        bits = np.float32(x).view(np.uint32)
        even = np.uint32(bits + np.uint32(0x7FFF) + np.uint32(np.uint32(bits >> 16) & 1))
        out[i] = np.uint16(even >> 16) if x == x else np.uint16(0x7FC0)

    return rounded


def flat(x: torch.Tensor) -> np.ndarray:
    """The memory that x spans, from its first element to its last, as one array; bfloat16 as uint16.

    Element (i, j, ...) of x is at i * x.stride(0) + j * x.stride(1) + ...
    """
    element, dtype = _ELEMENTS[x.dtype]
    span = x.numel()
    if span == 0:
        return np.empty(0, dtype)
    if not x.is_contiguous():
        span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride()))
    # four times as fast as as_strided, view and numpy, which matters beside a row of a norm
    memory = (element * span).from_address(x.data_ptr())
    memory.owner = x  # which lives as long as the array
    return np.frombuffer(memory, dtype)


def nothing(dtype: torch.dtype) -> np.ndarray:
    """Stands for a tensor that is None."""
    return flat(torch.empty(0, dtype=dtype))


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """x, copied if elements of its last dimension are not next to each other."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


@functools.cache
def _most_threads() -> int:
    """Starts Numba's threads; the most there can be."""
    before = torch.get_num_threads()
    most = numba.get_num_threads()
    # Numba's start sets the number of threads of the OpenMP that it shares with torch
    torch.set_num_threads(before)
    return most


def run(work: int, fn: Callable, *args) -> None:
    """Calls a kernel of `work` multiply-adds on as many threads as torch would use, or on one if it is small."""
    most = _most_threads()
    count = 1 if work < SERIAL_WORK else min(most, torch.get_num_threads())
    before = numba.get_num_threads()
    if count == before:
        fn(*args)
        return
    numba.set_num_threads(count)
    try:
        fn(*args)
    finally:
        numba.set_num_threads(before)


def run_rows(work: int, some: Callable, every: Callable, rows: int, *args) -> None:
    """every(rows, *args), a kernel, as `run` calls it; some(0, rows, *args), which does the same, if it is small."""
    if work < SERIAL_WORK:
        some(0, rows, *args)
    else:
        run(work, every, rows, *args)

"""Tensors out of a safetensors file through a memory map, a strip at a time."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from dsopt.checkpoint.files import DTYPES, Stored

# bytes that are mapped into the process at a time: what is read is given back to the system at once
STRIP = 4 << 20


class Mapped:
    """A file mapped for reading. `copy` puts a tensor of it where it is wanted, in the dtype that is wanted."""

    def __init__(self, path: Path, order: str = "sequential"):
        """order: "sequential" or "random", in which tensors are read; the system reads ahead or does not."""
        with open(path, "rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if hasattr(self.map, "madvise"):
            self.map.madvise(mmap.MADV_RANDOM if order == "random" else mmap.MADV_SEQUENTIAL)
        # where what is to be converted or moved is put together
        self.stage = torch.empty(STRIP, dtype=torch.uint8)

    def copy(
        self, stored: Stored, target: torch.Tensor, advance: Callable[[int], None] = lambda count: None
    ) -> None:
        """Copies a tensor to `target`: contiguous, of as many elements, on any device, of any dtype.

        advance: called with the number of bytes of the file after each strip.
        """
        dtype = DTYPES[stored.dtype]
        target = target.view(-1)
        direct = target.dtype == dtype and target.device.type == "cpu"
        step = STRIP // dtype.itemsize
        for first in range(0, target.numel(), step):
            part = target[first : first + step]
            staged = part if direct else self.stage[: len(part) * dtype.itemsize].view(dtype)
            start = stored.start + first * dtype.itemsize
            self._read(start, staged.view(torch.uint8).numpy())
            if not direct:
                part.copy_(staged)
            advance(staged.nbytes)

    def read(self, stored: Stored) -> torch.Tensor:
        """A tensor of the file, in memory of its own."""
        tensor = torch.empty(stored.shape, dtype=DTYPES[stored.dtype])
        self.copy(stored, tensor)
        return tensor

    def _read(self, start: int, into: np.ndarray) -> None:
        np.copyto(into, np.frombuffer(self.map, np.uint8, len(into), start))
        if hasattr(self.map, "madvise"):
            page = start // mmap.PAGESIZE * mmap.PAGESIZE
            self.map.madvise(mmap.MADV_DONTNEED, page, start + len(into) - page)

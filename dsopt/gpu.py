"""The GPU that kernels are chosen for: a tensor's device, or one that a test or a compiler stands in for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch

Capability = tuple[int, int]
# multiprocessors of the largest chip of a generation: A100, H100 and H200, B200, RTX PRO 6000
_MULTIPROCESSORS = {8: 108, 9: 132, 10: 148, 12: 188}
_imitated: ContextVar[Capability | None] = ContextVar("imitated", default=None)


@contextlib.contextmanager
def imitate(capability: Capability) -> Iterator[None]:
    """While it is open, tensors on other devices than GPUs count as on a GPU of this compute capability.

    Raises ValueError for a capability whose chips are not known.
    """
    if capability[0] not in _MULTIPROCESSORS:
        raise ValueError(f"capability must be of major version {[*_MULTIPROCESSORS]}, got {capability}")
    token = _imitated.set(capability)
    try:
        yield
    finally:
        _imitated.reset(token)


def capability(device: torch.device) -> Capability:
    """Compute capability (major, minor) of a GPU, or of the one imitated. ValueError where there is neither."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)
    imitated = _imitated.get()
    if imitated is None:
        raise ValueError(f"needs a GPU, or dsopt.gpu.imitate around it, got device {device}")
    return imitated


def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors of a GPU, or of the largest of the generation imitated."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return _MULTIPROCESSORS[capability(device)[0]]

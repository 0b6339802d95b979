"""Random tensors by the gigabyte, and enough sets of them that no call finds its arguments in a cache."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dsopt.capture import flat, map_tensors
from dsopt.models.presets import BLOCK

# what lies between two uses of one set of arguments, as a multiple of the last-level cache
LAPS = 3
_NO_CACHE_KNOWN = 64 << 20


@dataclass(frozen=True)
class Data:
    """Random tensors of one dtype on one device; `kept` holds those that every set of arguments shares."""

    dtype: torch.dtype
    device: str
    kept: dict[Hashable, Any] = field(default_factory=dict)

    def random(self, seed: int) -> Callable[..., torch.Tensor]:
        """A function of sizes (and scale=) that returns normal random tensors.

        On the CPU large ones repeat one random block, from another place each time: gigabytes then take the time
        of a copy. Nothing that is measured looks at values beyond what they are next to.
        """
        generator = torch.Generator(self.device).manual_seed(seed)

        def sample(*shape: int, scale: float = 1.0) -> torch.Tensor:
            count = math.prod(shape)
            if self.device == "cpu" and count > BLOCK:
                block = self.once("block", lambda: self.random(0)(BLOCK)) * scale
                return _repeated(block, count, seed).view(shape)
            x = torch.randn(shape, generator=generator, device=self.device, dtype=torch.float32)
            return x.mul_(scale).to(self.dtype)

        return sample

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` gives, made at the first call with this key."""
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]

    def copied(self, args: tuple) -> tuple:
        """The same arguments in memory of their own, strides kept."""
        return map_tensors(lambda x: x.clone(), args)


def _repeated(block: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    out = torch.empty(count, dtype=block.dtype)
    rest, position = out, seed * 7919 % len(block)
    while rest.numel():
        taken = min(rest.numel(), len(block) - position)
        rest[:taken] = block[position : position + taken]
        rest, position = rest[taken:], 0
    return out


def cache_bytes(device: str = "cpu") -> int:
    """Size of the last-level cache."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = [_size(p) for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max(sizes, default=_NO_CACHE_KNOWN)


def _size(file: Path) -> int:
    found = re.fullmatch(r"(\d+)([KMG]?)", file.read_text().strip())
    return int(found[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[found[2]] if found else 0


def set_count(touched: int, cache: int, callers: int = 1, limit: int = 20_000) -> int:
    """How many sets of arguments that touch so many bytes each make LAPS caches between two uses of one.

    The count has no factor in common with the number of callers that take turns, so that each meets every set.
    """
    count = 1 if touched > LAPS * cache else min(limit, math.ceil(LAPS * cache / max(1, touched)) + 1)
    while math.gcd(count, callers) > 1:
        count += 1
    return count


class Rotation:
    """Hands out sets of arguments in turns, so that one is used again only when the cache has seen all others.

    make: `make(i)` gives the i-th set; first: set 0, which exists already; touched: bytes that a call of one moves.
    What is cold is the data: the tensors' own sizes and strides, which a model has just looked at, are read before.
    """

    def __init__(self, make: Callable[[int], tuple], first: tuple, touched: int, cache: int, callers: int):
        self.sets = [first, *(make(i) for i in range(1, set_count(touched, cache, callers)))]
        self._turn = itertools.cycle([(args, tensors(args)) for args in self.sets])

    def __call__(self) -> tuple:
        args, described = next(self._turn)
        for x in described:
            x.data_ptr(), x.shape, x.stride()
        return args


def tensors(args: Any) -> list[torch.Tensor]:
    """The tensors among nested arguments."""
    return [x for x in flat(args) if isinstance(x, torch.Tensor)]

"""The key of a graph in the cache: a hash of all that dsopt's result for it depends on, as text."""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import Distribution, PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

import dsopt
from dsopt.capture import expression, storage_key
from dsopt.graphcodec import Refused, described, encode
from dsopt.op import ENTRY_POINT_GROUP, disabled_backends
from dsopt.pipeline import PIPELINE

_STARTED = time.time()


def key_of(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    fakes: Sequence[Any],
    sizes: Sequence[str],
    passes: Sequence[str] | None,
    prefer: Mapping[str, str],
) -> str:
    """The key of a graph of Dynamo's.

    fakes: the inputs as capture sees them; sizes: what is known of symbolic ones; passes and prefer: the options'.
    Raises Refused with the reason for a graph that text does not pin down.
    """
    facts = [
        described(gm.graph),
        _inputs(example_inputs, fakes),
        list(sizes),
        [list(PIPELINE if passes is None else passes), sorted(prefer.items())],
        _modes(),
        _processors(fakes),
        sorted(disabled_backends()),
        _installed(),
        _sources(),
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _inputs(example_inputs: Sequence[Any], fakes: Sequence[Any]) -> list:
    """What passes may see of the inputs: never a tensor's values."""
    plain = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer, torch._subclasses.FakeTensor)
    memory: dict[int, int] = {}
    found: list[Any] = []
    for x, fake in zip(example_inputs, fakes, strict=True):
        if not isinstance(x, torch.Tensor):
            found.append(expression(x) if isinstance(x, (torch.SymInt, torch.SymFloat)) else encode(x, {}))
            continue
        if type(x) not in plain or x.layout is not torch.strided:
            raise Refused(f"an input is a {type(x).__name__} of layout {x.layout}")
        facts = [fake.dtype, fake.device, isinstance(x, torch.nn.Parameter), fake.requires_grad]
        facts += [fake.is_conj(), fake.is_neg(), memory.setdefault(storage_key(fake), len(memory))]
        numbers = [*fake.shape, *fake.stride(), fake.storage_offset()]
        found.append([*map(str, facts), *map(expression, numbers)])
    return found


def _modes() -> list[str]:
    """The switches of PyTorch that tracing may see."""
    facts = torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.get_default_dtype()
    autocast = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]
    return [*map(str, facts), str(autocast), str(torch.get_default_device())]


def _processors(values: Sequence[Any]) -> list[str]:
    """The instruction set of the native kernels, and the GPUs that some tensors are on."""
    try:
        from dsopt import _cpu

        found = [_cpu.isa()]
    except ImportError:
        found = ["no native kernels"]
    devices = {x.device for x in values if isinstance(x, torch.Tensor)}
    for device in sorted(devices, key=str):
        kind = torch.cuda.get_device_properties(device) if device.type == "cuda" else ""
        found.append(f"{device} {kind}")
    return found


@functools.cache
def _installed() -> list[Any]:
    """Versions of all that chooses or makes kernels. Raises Refused where a version does not tell the code."""
    versions = {"torch": f"{torch.__version__} {torch.version.git_version}", "dsopt": dsopt.__version__}
    for name in ("numba", "llvmlite", "triton", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = ""
    offered = []
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        if entry.dist is not None and _is_edited(entry.dist):
            raise Refused(f"{entry.dist.name}, which offers kernels, is installed for development")
        offered.append((entry.name, entry.value, entry.dist.version if entry.dist else ""))
    return [platform.python_version(), platform.machine(), versions, sorted(offered)]


def _is_edited(package: Distribution) -> bool:
    """Whether a package is an editable install, whose version does not tell its code."""
    origin = json.loads(package.read_text("direct_url.json") or "{}")
    return bool(origin.get("dir_info", {}).get("editable"))


@functools.cache
def _sources() -> str:
    """A hash of dsopt's own code. Raises Refused if some of it was changed after this process began to load it."""
    digest = hashlib.sha256()
    for path in _source_files():
        stat = path.stat()
        if stat.st_mtime > _STARTED:
            raise Refused(f"{path.name} was changed after this process had begun")
        # the extension is large, and linking it anew changes its time
        content = path.read_bytes() if path.suffix == ".py" else f"{stat.st_size} {stat.st_mtime_ns}".encode()
        digest.update(f"{path.parent.name}/{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _source_files() -> Iterator[Path]:
    yield from sorted(Path(dsopt.__path__[0]).glob("*.py"))
    yield from sorted(Path(dsopt.__path__[0]).glob("_cpu*"))
    for name in ("ops", "passes", "kernels"):
        for root in importlib.import_module(f"dsopt.{name}").__path__:
            yield from sorted(Path(root).rglob("*.py"))

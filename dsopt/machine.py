"""What a measurement was taken on: processor, memory, devices and versions, as plain data for JSON."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "transformers",
    "numpy",
    "triton",
    "numba",
    "cupy-cuda13x",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
)
# the instruction sets kernels are written for, as /proc/cpuinfo names them
ISA_FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vbmi",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "neon",
    "asimd",
    "bf16",
    "sve",
)


def versions() -> dict[str, str | None]:
    """Python's and each interesting package's version, None where it is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _proc(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def cpu() -> dict[str, Any]:
    """Model name, instruction sets, and the numbers of processors of this machine."""
    info = _proc("/proc/cpuinfo")
    model = re.search(r"^(?:model name|Hardware)\s*:\s*(.+)$", info, re.M)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", info, re.M)
    present = set(flags[1].split()) if flags else set()
    cores = set(re.findall(r"^physical id\s*:\s*(\d+)$.*?^core id\s*:\s*(\d+)$", info, re.M | re.S))
    return {
        "model": model[1] if model else platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "flags": [flag for flag in ISA_FLAGS if flag in present],
        "processors": os.cpu_count(),
        "cores": len(cores) or None,
    }


def memory() -> dict[str, int | None]:
    """Bytes of memory this machine has, and bytes a program may take now; None where it does not say."""
    values = dict(re.findall(r"^(\w+):\s+(\d+) kB$", _proc("/proc/meminfo"), re.M))
    total, available = (int(values[k]) * 1024 if k in values else None for k in ("MemTotal", "MemAvailable"))
    # a container may be allowed less than its host has
    limit = _proc("/sys/fs/cgroup/memory.max").strip()
    used = _proc("/sys/fs/cgroup/memory.current").strip()
    if total and available and limit.isdigit() and used.isdigit() and int(limit) < total:
        total, available = int(limit), min(available, int(limit) - int(used))
    return {"total": total, "available": available}


def gpus() -> list[dict[str, Any]]:
    """Name, memory and architecture of each GPU that this build of PyTorch can use."""
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        arch = getattr(properties, "gcnArchName", None) or f"sm_{properties.major}{properties.minor}"
        found.append({"name": properties.name, "memory": properties.total_memory, "arch": arch})
    return found


def describe() -> dict[str, Any]:
    """All of the above, and the number of threads PyTorch uses."""
    import torch

    return {
        "system": f"{platform.system()} {platform.release()}",
        "cpu": cpu(),
        "threads": torch.get_num_threads(),
        "memory": memory(),
        "gpus": gpus(),
        "versions": versions(),
    }

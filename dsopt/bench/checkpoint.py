"""An FP8 checkpoint from disk to tokens: seconds to load, resident memory, decoding against read bandwidth."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from dsopt import compare
from dsopt.bench import ceilings
from dsopt.bench.counts import nbytes

WARM = 3  # steps before those that count: one compiles, the next record


@dataclass(frozen=True)
class Plan:
    """What is measured. context: tokens in the cache; steps: decode steps of each; layers: at most so many."""

    folder: Path
    context: tuple[int, ...] = (128,)
    steps: int = 32
    threads: int = field(default_factory=torch.get_num_threads)
    layers: int | None = None
    quick: bool = False


def run(plan: Plan, step: Callable[[str, str], None]) -> dict[str, Any]:
    """Loads the checkpoint, compiles the model and decodes; plain data. Raises CheckpointError where it is wrong."""
    import dsopt

    bandwidth = ceilings.measure("cpu", (plan.threads,), plan.quick, step).rate(
        ceilings.BANDWIDTH, plan.threads
    )
    torch.set_num_threads(plan.threads)
    on_disk = sum(path.stat().st_size for path in plan.folder.glob("*.safetensors"))
    step("loading", f"{on_disk / 1e9:.1f} GB")
    before, start = compare.resident("VmRSS"), time.perf_counter()
    model = dsopt.load(plan.folder, layers=plan.layers, progress=False)
    loaded = {
        "bytes_on_disk": on_disk,
        "seconds": time.perf_counter() - start,
        "resident_before": before,
        "resident": compare.resident("VmRSS"),
        "resident_peak": compare.resident("VmHWM"),
    }
    fast = dsopt.compile(model)
    weights = step_bytes(model)
    rows = []
    for cached in plan.context:
        step("decode", f"{cached} cached")
        rows.append(_decode(fast, cached, plan.steps, weights, bandwidth))
    return {
        "layers": model.config.num_hidden_layers,
        "threads": plan.threads,
        "bandwidth": bandwidth,
        "load": loaded,
        "step_bytes": weights,
        "decode": rows,
        "resident": compare.resident("VmRSS"),
        "resident_peak": compare.resident("VmHWM"),
    }


def step_bytes(model: torch.nn.Module) -> int:
    """Bytes of the weights that one token needs: of the experts those chosen, of the embeddings one row."""
    config = model.config.get_text_config()
    table = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    total = 0
    for name, parameter in model.named_parameters():
        if parameter is table and parameter is not head:
            total += nbytes(parameter[0])
        elif ".experts." in name and parameter.ndim == 3:
            total += nbytes(parameter) * config.num_experts_per_tok // len(parameter)
        else:
            total += nbytes(parameter)
    return total


@torch.inference_mode()
def _decode(
    model: Callable, cached: int, steps: int, weights: int, bandwidth: float | None
) -> dict[str, Any]:
    """Steps of one random token each, so that the experts change from step to step."""
    config = model.config.get_text_config()
    cache = compare.filled_cache(config, cached, cached + WARM + steps)
    latents = cached * config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim) * 2
    tokens = compare.random_tokens(config.vocab_size, WARM + steps, seed=cached)
    seconds = []
    for at in range(WARM + steps):
        start = time.perf_counter()
        compare.decode(model, tokens[:, at : at + 1], cache, cached + at)
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[WARM:])
    read = (weights + latents) / median
    return {
        "cached": cached,
        "first_seconds": seconds[0],
        "seconds": median,
        "tokens_per_s": 1 / median,
        "bytes_per_s": read,
        "share": read / bandwidth if bandwidth else None,
    }


def tables(found: dict[str, Any]) -> list[Table]:
    load = found["load"]
    loading = Table(title="Loading", title_justify="left")
    for column in ("on disk", "seconds", "GB/s", "resident", "peak", "peak over disk"):
        loading.add_column(column, justify="right")
    peak = load["resident_peak"] - load["resident_before"]
    loading.add_row(
        f"{load['bytes_on_disk'] / 1e9:.2f} GB",
        f"{load['seconds']:.1f}",
        f"{load['bytes_on_disk'] / load['seconds'] / 1e9:.2f}",
        f"{load['resident'] / 1e9:.2f} GB",
        f"{load['resident_peak'] / 1e9:.2f} GB",
        f"{peak / load['bytes_on_disk']:.2f}x, without the {load['resident_before'] / 1e9:.2f} GB before",
    )
    title = (
        f"Decoding, {found['layers']} layers, {found['threads']} threads; {found['step_bytes'] / 1e9:.2f} GB a token, "
        f"memory reads {found['bandwidth'] / 1e9:.1f} GB/s"
    )
    decoding = Table(title=title, title_justify="left")
    for column in ("cached", "tokens/s", "ms", "GB/s", "of bandwidth", "first step"):
        decoding.add_column(column, justify="right")
    for row in found["decode"]:
        decoding.add_row(
            str(row["cached"]),
            f"{row['tokens_per_s']:.2f}",
            f"{row['seconds'] * 1e3:.1f}",
            f"{row['bytes_per_s'] / 1e9:.1f}",
            f"{row['share']:.0%}",
            f"{row['first_seconds']:.1f} s",
        )
    return [loading, decoding]

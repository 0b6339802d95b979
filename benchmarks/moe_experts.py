"""Time of one expert layer on the CPU: dsopt's kernels beside transformers' own ways, by number of tokens.

    python benchmarks/moe_experts.py                          V2-Lite's experts, 1 to 512 tokens
    python benchmarks/moe_experts.py --geometry r1 --json r1.json

Every call sees other tokens and other experts, whose weights are far larger than any cache; the variants take turns
call by call, and medians are compared. GB/s counts the weights of the experts that were chosen, each once. The
ratio is the best time of PyTorch's own operators (transformers' and the `torch` kernel) over a variant's.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from dsopt import machine
from dsopt.files import write_text
from dsopt.models.presets import fill_random
from dsopt.op import kernels
from dsopt.ops.experts import moe_experts

TRANSFORMERS = ("eager", "grouped_mm", "batched_mm")


@dataclass(frozen=True)
class Geometry:
    """Experts of one layer. num_experts may be fewer than the model has: a token reads topk of them anyway."""

    title: str
    hidden: int
    intermediate: int
    num_experts: int
    topk: int

    @property
    def expert_bytes(self) -> int:
        return 3 * self.hidden * self.intermediate * 2


GEOMETRIES = {
    "v2-lite": Geometry("DeepSeek-V2-Lite", 2048, 1408, 64, 6),
    "r1": Geometry("DeepSeek-R1 (32 of its 256 experts)", 7168, 2048, 32, 8),
}


def experts(geometry: Geometry) -> torch.nn.Module:
    """transformers' experts of that geometry with random bfloat16 weights."""
    from transformers import DeepseekV2Config
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Experts

    config = DeepseekV2Config(
        hidden_size=geometry.hidden,
        moe_intermediate_size=geometry.intermediate,
        n_routed_experts=geometry.num_experts,
    )
    with torch.device("meta"):
        module = DeepseekV2Experts(config).to(torch.bfloat16)
    module = module.to_empty(device="cpu")
    fill_random(module)
    return module


def variants(module: torch.nn.Module, geometry: Geometry) -> dict[str, Callable]:
    """Name -> f(x, ids, weights) for every kernel that accepts bfloat16 here and each of transformers' ways."""
    found = {}
    w13, w2 = module.gate_up_proj, module.down_proj

    def transformers_way(how: str) -> Callable:
        def call(x, ids, weights):
            module.config._experts_implementation = how
            return module(x, ids, weights)

        return call

    for how in TRANSFORMERS:
        found[f"transformers {how}"] = transformers_way(how)
    x, ids, weights = inputs(geometry, 1)
    args = moe_experts.bind((x, ids, weights, w13, w2))
    for kernel in kernels("moe_experts")[0]:
        if kernel.refuses(args) is None:
            fn = kernel.plan(*args)
            found[kernel.label] = lambda x, ids, weights, fn=fn: fn(
                *moe_experts.bind((x, ids, weights, w13, w2))
            )
    return found


def inputs(geometry: Geometry, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random tokens, the experts they choose and the weights of these."""
    scores = torch.rand(tokens, geometry.num_experts)
    weights, ids = scores.topk(geometry.topk)
    return torch.randn(tokens, geometry.hidden).bfloat16(), ids, weights / weights.sum(-1, keepdim=True)


def measure(fns: dict[str, Callable], geometry: Geometry, tokens: int, repeat: int) -> dict[str, Any]:
    """Median seconds of each variant, its GB/s, its ratio, and how much the machine had to do besides."""
    for fn in fns.values():
        fn(*inputs(geometry, tokens))
    seconds: dict[str, list[float]] = {name: [] for name in fns}
    hits = []
    for _ in range(repeat):
        args = inputs(geometry, tokens)
        hits.append(args[1].unique().numel())
        for name, fn in fns.items():
            start = time.perf_counter()
            fn(*args)
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    hit = statistics.mean(hits)
    best = min(time for name, time in medians.items() if name.startswith(("transformers", "torch")))
    return {
        "tokens": tokens,
        "experts_hit": hit,
        "load": os.getloadavg()[0],
        "variants": {
            name: {
                "seconds": median,
                "fastest": min(seconds[name]),
                "gb_per_s": hit * geometry.expert_bytes / median / 1e9,
                "ratio": best / median,
            }
            for name, median in medians.items()
        },
    }


def table(geometry: Geometry, rows: list[dict[str, Any]]) -> Table:
    out = Table(title=f"{geometry.title}, bfloat16, {torch.get_num_threads()} threads: ms (GB/s, ratio)")
    out.add_column("tokens", justify="right")
    names = list(rows[0]["variants"])
    for name in names:
        out.add_column(name, justify="right")
    for row in rows:
        cells = [row["variants"].get(name) for name in names]
        texts = [
            f"{c['seconds'] * 1e3:.1f} ({c['gb_per_s']:.1f}, {c['ratio']:.2f}x)" if c else "" for c in cells
        ]
        out.add_row(str(row["tokens"]), *texts)
    return out


def main(
    geometry: Annotated[str, typer.Option(help=f"One of {', '.join(GEOMETRIES)}.")] = "v2-lite",
    tokens: Annotated[
        str, typer.Option(help="Numbers of tokens, separated by commas.")
    ] = "1,2,4,8,16,64,512",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; PyTorch's default otherwise.")] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Calls of each variant; fewer for many tokens.")] = 11,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write the figures.")
    ] = None,
) -> None:
    if geometry not in GEOMETRIES:
        raise typer.BadParameter(f"unknown geometry {geometry!r}; known: {', '.join(GEOMETRIES)}")
    # Numba imports the package `coverage` if there is one, which coverage.py beside this file is not
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    shape = GEOMETRIES[geometry]
    with torch.inference_mode():
        fns = variants(experts(shape), shape)
        rows = []
        for count in map(int, tokens.split(",")):
            # gathering the weights of every choice takes gigabytes and seconds for more
            taken = {n: f for n, f in fns.items() if count <= 4 or n != "transformers batched_mm"}
            rows.append(measure(taken, shape, count, repeat if count <= 16 else max(3, repeat // 3)))
    Console(width=160).print(table(shape, rows))
    if json_file is not None:
        figures = {"machine": machine.describe(), "geometry": vars(shape), "rows": rows}
        write_text(json_file, json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)

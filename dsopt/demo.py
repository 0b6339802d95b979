"""The show: DeepSeek geometry with random weights in eager, Inductor and dsopt, beside dsopt's targets."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from dsopt import machine
from dsopt.models import presets
from dsopt.progress import Steps

TARGET_LAYERS = 3  # the targets are stated for V2-Lite at three layers
TARGET_CACHED = 4096
# cached tokens -> how many times Inductor's rate decoding is to reach, on every core
OVER_INDUCTOR = {128: 1.5, 2048: 6.0, TARGET_CACHED: 4.0, 8192: 15.0}
PREFILL_OVER_BEST = 1.1


@dataclass(frozen=True)
class Plan:
    """What is measured on one model.

    decode: pairs of cached tokens and repetitions. prefill: tokens, 0 for none; prefill_ways: who runs it.
    buffers: one StaticCache of 16384 and one of 1024, both holding 512. one_thread: decode with one, too.
    cold: first call in a fresh process with empty caches. greedy: cached tokens and steps of the token check.
    """

    preset: str
    layers: int
    decode: tuple[tuple[int, int], ...]
    prefill: int = 0
    prefill_ways: tuple[str, ...] = ("eager", "inductor", "dsopt")
    buffer_ways: tuple[str, ...] = ()
    one_thread: bool = False
    cold: bool = False
    greedy: tuple[int, int] = (512, 8)

    @property
    def name(self) -> str:
        return f"{self.preset}, {self.layers} layers"

    @property
    def title(self) -> str:
        full = presets.PRESETS[self.preset]()["num_hidden_layers"]
        return f"DeepSeek {self.preset} geometry, {self.layers} of {full} layers, bf16"


def layers_within(preset: str, budget: int, limit: int) -> int:
    """Number of layers, at most `limit`, whose weights fit in `budget` bytes."""
    values = presets.PRESETS[preset]()

    def size(layers: int) -> int:
        return presets.weight_bytes(presets.config(values, num_hidden_layers=layers))

    dense = values["first_k_dense_replace"]
    sizes = [size(layers) for layers in (1, dense, dense + 1)]
    first, expert = sizes[0], sizes[2] - sizes[1]
    per_dense = (sizes[1] - first) // max(1, dense - 1)
    fitting = 0
    for layers in range(1, min(limit, values["num_hidden_layers"]) + 1):
        total = first + per_dense * (min(layers, dense) - 1) + expert * max(0, layers - dense)
        fitting = layers if total <= budget else fitting
    return fitting


def plans(quick: bool, layers: int | None) -> list[Plan]:
    """V2-Lite at three layers with every figure, then V2-Lite and V3 as deep as half the free memory is."""
    budget = (machine.memory()["available"] or 8 << 30) // 2
    decode = ((TARGET_CACHED, 3), (128, 5), (2048, 3), (8192, 1 if quick else 2))
    chosen = [
        Plan(
            "v2-lite",
            TARGET_LAYERS,
            decode,
            prefill=512,
            prefill_ways=("eager", "dsopt") if quick else ("eager", "inductor", "dsopt"),
            buffer_ways=("dsopt",) if quick else ("eager", "inductor", "dsopt"),
            one_thread=not quick,
            cold=True,
        )
    ]
    if not quick:
        for preset in ("v2-lite", "v3"):
            depth = layers_within(preset, budget, layers or 1000)
            if depth and (preset, depth) != ("v2-lite", TARGET_LAYERS):
                # one length only: a second one would have Inductor compile all these layers again
                chosen.append(Plan(preset, depth, ((TARGET_CACHED, 1),), greedy=(TARGET_CACHED, 2)))
    return chosen


def measure(plan: Plan, rows: dict[str, Any], step: Callable[..., None]) -> Any:
    """Fills `rows` with one plan's figures as they come, so that an interrupt keeps those before it.

    Returns dsopt's report on the model, None if dsopt could not run it.
    """
    import torch

    import dsopt
    from dsopt import compare

    config = presets.config(presets.PRESETS[plan.preset](), num_hidden_layers=plan.layers)
    rows |= {"title": plan.title, "preset": plan.preset, "layers": plan.layers, "decode": [], "buffers": []}
    rows["weight_bytes"] = presets.weight_bytes(config)
    if plan.cold:
        rows["cold"] = {}
        for way in ("inductor", "dsopt"):
            step(f"{plan.name}: cold start of {way} in a fresh process with empty caches")
            try:
                rows["cold"][way] = compare.cold_start(way, plan.preset, plan.layers, TARGET_CACHED)
            except RuntimeError as error:
                rows["cold"][way] = {"error": str(error)[:160]}

    size = rows["weight_bytes"]

    def filled(done: int) -> None:
        step(f"{plan.name}: filling weights", f"{done / size:.0%} of {size / 2**30:.1f} GiB")

    model = presets.random_model(config, progress=filled)
    comparison = compare.Comparison(model, lambda phase, detail: step(f"{plan.name}: {phase}", detail))
    rows["failed"] = comparison.failed
    for cached, repetitions in plan.decode:
        rows["decode"].append(comparison.decode(cached, repetitions))
    rows["greedy"] = comparison.greedy(*plan.greedy)
    for buffer, repetitions in ((1024, 5), (16384, 1)) if plan.buffer_ways else ():
        rows["buffers"].append(comparison.decode(512, repetitions, buffer, only=plan.buffer_ways))
    if plan.prefill:
        rows["prefill"] = comparison.prefill(plan.prefill, 1, only=plan.prefill_ways)
    if plan.one_thread and (threads := torch.get_num_threads()) > 1:
        torch.set_num_threads(1)
        try:
            rows["decode"].append(comparison.decode(TARGET_CACHED, 1))
        finally:
            torch.set_num_threads(threads)
    if "dsopt" not in comparison.ways:
        return None
    report = dsopt.report(comparison.ways["dsopt"])
    rows["report"] = report.to_dict()
    return report


def _ratio(seconds: dict[str, float], over: str, under: str) -> float | None:
    return seconds[over] / seconds[under] if over in seconds and under in seconds else None


def targets(rows: dict[str, Any]) -> list[dict[str, Any]]:
    """What dsopt promises of V2-Lite at three layers, what was measured, and whether it is kept."""
    found = []

    def add(what: str, value: float | None, sign: str, target: float, unit: str = "x") -> None:
        if value is not None:
            met = value >= target if sign == ">=" else value <= target
            found.append(
                {"what": what, "value": value, "sign": sign, "target": target, "unit": unit, "met": met}
            )

    by_size = {}
    for row in rows.get("decode", []):
        seconds, threads = row["seconds"], row["threads"]
        by_size[row["cached"], threads] = seconds.get("dsopt")
        at = f"decode at {row['cached']} cached, {threads} thread{'s' if threads > 1 else ''}"
        if row["cached"] == TARGET_CACHED:
            add(f"{at}: eager / dsopt", _ratio(seconds, "eager", "dsopt"), ">=", 8)
        if (target := OVER_INDUCTOR.get(row["cached"])) is not None:
            add(f"{at}: Inductor / dsopt", _ratio(seconds, "inductor", "dsopt"), ">=", target)
    for (cached, threads), seconds in by_size.items():
        base = by_size.get((TARGET_CACHED, threads))
        if cached == 2 * TARGET_CACHED and seconds and base:
            add(f"decode at {cached} cached / at {TARGET_CACHED}", seconds / base, "<=", 1.6)
    if len(buffers := [row["seconds"].get("dsopt") for row in rows.get("buffers", [])]) == 2 and all(buffers):
        add("512 cached: StaticCache of 16384 / of 1024", buffers[1] / buffers[0], "<=", 1.3)
    if "dsopt" in (seconds := rows.get("prefill", {}).get("seconds", {})) and len(seconds) > 1:
        best = min(value for way, value in seconds.items() if way != "dsopt")
        what = f"prefill of {rows['prefill']['tokens']}: best other / dsopt"
        add(what, best / seconds["dsopt"], ">=", PREFILL_OVER_BEST)
    cold = {way: row for way, row in rows.get("cold", {}).items() if "error" not in row}
    if "dsopt" in cold:
        limit = (0.1 * rows["weight_bytes"] + 200e6) / 1e6
        add("peak memory of the first decode", cold["dsopt"]["peak_growth"] / 1e6, "<=", limit, " MB")
        if "inductor" in cold:
            share = cold["dsopt"]["compile_s"] / cold["inductor"]["compile_s"]
            add("cold compile: dsopt / Inductor", share, "<=", 1 / 3)
    for row in rows.get("decode", [])[:1]:
        if "dsopt" in row["error"]:
            add(
                f"relative L2 of logits against eager, {row['cached']} cached",
                row["error"]["dsopt"],
                "<=",
                0.02,
                "",
            )
    if "dsopt" in (same := rows.get("greedy", {}).get("same", {})):
        add("greedy tokens equal to eager's", same["dsopt"], ">=", rows["greedy"]["steps"], "")
    return found


def _figures(rows: dict[str, Any]) -> Iterator[tuple[str, dict[str, float], str]]:
    """(what, figure by way, how to write it) for each line of a model's table."""
    for row in [*rows["decode"], *rows["buffers"]]:
        threads = f"{row['threads']} thread{'s' if row['threads'] > 1 else ''}"
        what = f"decode, {row['cached']} cached in {row['buffer']} slots, {threads}"
        yield what, {way: 1 / seconds for way, seconds in row["seconds"].items()}, "{:.2f} tok/s"
    if "prefill" in rows:
        tokens = rows["prefill"]["tokens"]
        rates = {way: tokens / seconds for way, seconds in rows["prefill"]["seconds"].items()}
        yield f"prefill of {tokens}", rates, "{:.1f} tok/s"
    cold = {way: row for way, row in rows.get("cold", {}).items() if "error" not in row}
    if cold:
        yield "cold compile", {way: row["compile_s"] for way, row in cold.items()}, "{:.1f} s"
        peaks = {way: row["peak_growth"] / 1e6 for way, row in cold.items()}
        yield "peak memory of the first decode", peaks, "+{:.0f} MB"
    for row in rows["decode"][:1]:
        yield "relative L2 of its logits against eager", row["error"], "{:.4f}"
    if "greedy" in rows:
        yield f"greedy tokens as eager, of {rows['greedy']['steps']}", rows["greedy"]["same"], "{}"


def model_table(rows: dict[str, Any]) -> Table:
    """One model's figures, a column for each way."""
    title = f"{rows['title']}, {rows['weight_bytes'] / 2**30:.1f} GiB of random weights"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in ("eager", "Inductor", "dsopt", "over eager", "over Inductor"):
        table.add_column(column, justify="right")
    for what, figures, form in _figures(rows):
        cells = [
            form.format(figures[way]) if way in figures else "" for way in ("eager", "inductor", "dsopt")
        ]
        ratios = [_ratio(figures, "dsopt", way) if "tok/s" in form else None for way in ("eager", "inductor")]
        table.add_row(what, *cells, *(f"{r:.1f}x" if r else "" for r in ratios))
    return table


def target_table(found: list[dict[str, Any]]) -> Table:
    """Targets beside what was measured."""
    table = Table(title="Targets, DeepSeek V2-Lite geometry at three layers", title_justify="left")
    for column in ("", "measured", "target", ""):
        table.add_column(column, justify="right" if column in ("measured", "target") else "left")
    for row in found:
        form = "{:.0f}" if "MB" in row["unit"] or (not row["unit"] and row["target"] > 1) else "{:.4f}"
        form = "{:.2f}" if row["unit"] == "x" else form
        measured, target = (form.format(row[key]) + row["unit"] for key in ("value", "target"))
        verdict = "[green]kept[/]" if row["met"] else "[red]missed[/]"
        table.add_row(row["what"], measured, f"{row['sign']} {target}", verdict)
    return table


def show(console: Console, quick: bool = False, layers: int | None = None) -> dict[str, Any]:
    """Runs the demo, prints its tables to the console, and returns its figures as plain data.

    quick: V2-Lite at three layers only, without the slowest figures. layers: at most so many a model.
    An interrupt ends it early with what was measured so far; the result then has `"interrupted": True`.
    """
    from dsopt import compare

    compare.quiet()
    result: dict[str, Any] = {"machine": machine.describe(), "models": [], "targets": []}
    result["started"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    started = time.perf_counter()
    where = result["machine"]
    names = [where["cpu"]["model"], *(gpu["name"] for gpu in where["gpus"])]
    console.print(
        f"{', '.join(names)}; {where['threads']} threads; PyTorch {where['versions']['torch']}, "
        f"transformers {where['versions']['transformers']}"
    )
    try:
        for plan in plans(quick, layers):
            rows: dict[str, Any] = {}
            result["models"].append(rows)
            try:
                with Steps(console) as step:
                    report = measure(plan, rows, step)
            finally:
                _print_model(console, rows, result)
            if report is not None:
                console.print(report)
            del report
            # graphs hold weights in cycles; the next model needs their memory
            _release()
    except KeyboardInterrupt:
        result["interrupted"] = True
        console.print("interrupted: the figures above are those that were finished")
    result["seconds"] = time.perf_counter() - started
    return result


def _print_model(console: Console, rows: dict[str, Any], result: dict[str, Any]) -> None:
    if "weight_bytes" not in rows:
        return
    console.print(model_table(rows))
    for way, error in rows.get("failed", {}).items():
        console.print(f"[red]{way} failed[/] in {error}")
    for way, row in rows.get("cold", {}).items():
        if "error" in row:
            console.print(f"[red]{way} failed[/] in a fresh process: {row['error']}")
    if (rows["preset"], rows["layers"]) == ("v2-lite", TARGET_LAYERS) and (found := targets(rows)):
        result["targets"] = found
        console.print(target_table(found))


def _release() -> None:
    import torch

    torch.compiler.reset()
    gc.collect()

"""Results as tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from dsopt.bench.cases import Sizes
from dsopt.bench.ceilings import BANDWIDTH
from dsopt.bench.overhead import PARTS

HEADING = ("op", "case", "preset", "dtype", "device", "threads")
CASE = (*HEADING, "tokens", "context", "batch")


_UNITS = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6))


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    unit, scale = next((u for u in _UNITS if seconds >= u[1]), _UNITS[-1])
    value = seconds / scale
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"


def same_case(row: dict[str, Any]) -> tuple:
    """What rows that can be compared have in common."""
    return tuple(row[name] for name in CASE)


def size(row: dict[str, Any]) -> str:
    """The size of a case in words."""
    return str(Sizes(row["tokens"], row["context"], row["batch"]))


def rate(row: dict[str, Any]) -> str:
    """Bytes or FLOPs a second, whichever binds."""
    if row["bound"] == "compute":
        return f"{row['flops'] / row['seconds'] / 1e9:.1f} GFLOP/s"
    return f"{row['bytes'] / row['seconds'] / 1e9:.1f} GB/s"


def ratios(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Seconds of the best way of each baseline column among the rows of one case."""
    best: dict[str, float] = {}
    for row in rows:
        if row["column"]:
            best[row["column"]] = min(row["seconds"], best.get(row["column"], row["seconds"]))
    return best


def ceilings_line(found: Sequence[dict[str, Any]]) -> str:
    """The measured ceilings in one line."""
    parts = []
    for what, group in groupby(found, key=lambda c: c["what"]):
        unit = "GB/s" if what == BANDWIDTH else "GFLOP/s"
        values = [
            f"{c['rate'] / 1e9:.0f}" + (f" ({c['threads']} thr)" if c["threads"] else "") for c in group
        ]
        parts.append(f"{what} {', '.join(values)} {unit}")
    return "measured ceilings: " + "; ".join(parts)


def op_tables(rows: Sequence[dict[str, Any]], problems: Sequence[dict[str, Any]]) -> Iterator[Any]:
    """One table for each op, case, preset, dtype and number of threads, and below it who is not in it and why."""

    def heading(row: dict[str, Any]) -> tuple:
        return tuple(row[name] for name in HEADING)

    for head in dict.fromkeys(map(heading, [*rows, *problems])):
        mine = [row for row in rows if heading(row) == head]
        if mine:
            yield _op_table(head, mine)
        yield from _problem_lines([p for p in problems if heading(p) == head], mine)


def _op_table(head: tuple, rows: Sequence[dict[str, Any]]) -> Table:
    op, case, preset, dtype, device, threads = head
    table = plain(f"{op}, {case}: {preset}, {dtype}, {_on(device, threads)}")
    columns = [*dict.fromkeys(row["column"] for row in rows if row["column"])]
    for name in ("", "way"):
        table.add_column(name, no_wrap=True)
    for name in ("time", "rate"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("of ceiling", *(f"over {column}" for column in columns)):
        table.add_column(name, justify="right")
    for _, group in groupby(rows, key=same_case):
        group = sorted(group, key=lambda row: row["seconds"])
        best = ratios(group)
        for i, row in enumerate(group):
            share = f"{row['share']:.0%}" if row["share"] is not None else ""
            over = [f"{best[c] / row['seconds']:.2f}x" if c in best else "" for c in columns]
            cells = [
                size(row) if i == 0 else "",
                row["name"],
                duration(row["seconds"]),
                rate(row),
                share,
                *over,
            ]
            table.add_row(*cells, end_section=i == len(group) - 1, style="" if not row["column"] else "dim")
    return table


def plain(title: str) -> Table:
    """An empty table with a title on the left and a line below its heading."""
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )


def _on(device: str, threads: int) -> str:
    return f"{threads} thread{'s' if threads != 1 else ''}" if threads else device


def _problem_lines(problems: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> Iterator[Text]:
    """One line for each way and reason, with the sizes where it is not so for all."""
    total = len({same_case(p) for p in [*problems, *rows]})
    notes: dict[tuple, list[dict[str, Any]]] = {}
    for problem in problems:
        notes.setdefault((problem["what"], problem["name"], problem["reason"]), []).append(problem)
    for (what, name, reason), found in notes.items():
        where = "" if len(found) == total else f" ({'; '.join(dict.fromkeys(map(size, found)))})"
        style = {"wrong": "bold red", "failed": "red"}.get(what, "dim")
        yield Text(f"  {what}: {name}{where}: {reason}", style=style)


def model_tables(models: Sequence[dict[str, Any]]) -> Iterator[Any]:
    """For each model a table of rates and one of starts; then what a step costs besides kernels."""

    def heading(row: dict[str, Any]) -> tuple:
        return tuple(row[name] for name in ("preset", "layers", "dtype", "device", "threads", "tiny"))

    for head in dict.fromkeys(map(heading, models)):
        mine = [row for row in models if heading(row) == head]
        preset, layers, dtype, device, threads, tiny = head
        on = _on(device, threads)
        title = f"{preset}{' at tiny widths' if tiny else ''}, {layers} layers, {dtype}, {on}"
        if rates := [row for row in mine if "tokens_per_s" in row]:
            yield _rate_table(title, rates)
        if starts := [row for row in mine if "cold" in row]:
            yield _start_table(title, starts)
        if overheads := [row for row in mine if row["what"] == "overhead" and "whole" in row]:
            yield _overhead_table(preset, on, overheads)
        for row in mine:
            for way, reason in row.get("failed", {}).items():
                yield Text(f"  failed: {way}: {reason}", style="red")
            if "error" in row and isinstance(row["error"], str):
                yield Text(f"  failed: {row['what']}: {row['error']}", style="red")


def _rate_table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    table = plain(f"{title}: tokens per second")
    table.add_column("")
    ways = [*dict.fromkeys(way for row in rows for way in row["tokens_per_s"])]
    others = [way for way in ways if way != "dsopt"] if "dsopt" in ways else []
    for name in (*ways, *(f"dsopt over {way}" for way in others)):
        table.add_column(name, justify="right")
    for row in rows:
        found = row["tokens_per_s"]
        what = f"decode, {row['size']} cached" if row["what"] == "decode" else f"prefill of {row['size']}"
        over = [f"{found['dsopt'] / found[w]:.2f}x" if {"dsopt", w} <= set(found) else "" for w in others]
        table.add_row(what, *(f"{found[w]:.2f}" if w in found else "" for w in ways), *over)
    return table


def _start_table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    table = plain(f"{title}: first step of a process")
    for name in ("", "cold", "warm", "of it compiling, cold", "warm", "peak memory, cold", "warm"):
        table.add_column(name, justify="right" if name else "left")
    for row in rows:
        runs = row["cold"], row["warm"]
        seconds = [f"{run[key]:.1f} s" for key in ("first_s", "compile_s") for run in runs]
        peaks = [f"+{run['peak_growth'] / 1e6:.0f} MB" for run in runs]
        table.add_row(row["way"], *seconds, *peaks)
    return table


def _overhead_table(preset: str, on: str, rows: Sequence[dict[str, Any]]) -> Table:
    table = plain(f"{preset} at tiny widths, {on}: ms of a decode step")
    columns = ("whole", *PARTS)
    for name in ("layers", *columns, "computing calls", "views"):
        table.add_column(name, justify="right")
    for row in rows:
        ms = [f"{1e3 * row[name]:.3f}" for name in columns]
        table.add_row(str(row["size"]), *ms, str(row["computing"]), str(row["views"]))
    return table

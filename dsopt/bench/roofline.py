"""The roofline: FLOPs a second over FLOPs a byte, with the measured ceilings and a labelled point for each kernel.

A point under the slope is bound by memory, one under a flat line by arithmetic; its distance from the line is what
is left to gain. Baselines are small grey crosses. Source: Williams, Waterman and Patterson, CACM 52(4), 2009.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from dsopt.bench.ceilings import BANDWIDTH
from dsopt.bench.table import size

# distinguishable for the colour-blind, after Okabe and Ito
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B", "#000000")
LINE_COLOR = "#444444"
_LABEL_ROOM = 11.0  # points between the baselines of two labels


def draw(path: str | Path, document: dict[str, Any], title: str = "") -> int:
    """Writes the roofline of a document's rows as PNG and returns the number of kernels' points.

    Rows whose op counts no FLOPs have no place in it. Raises ValueError if none is left, ImportError with what to
    install where matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("--plot needs matplotlib: pip install 'dsopt[bench]'") from error
    rows = [row for row in document["rows"] if row["flops"] > 0]
    if not rows:
        raise ValueError(
            "nothing to plot: no measured op counts FLOPs (moe_route does not, nor do other packages' ops)"
        )
    figure = Figure(figsize=(12, 7.5), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="GFLOP/s", title=title)
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    _limits(axes, rows, document["ceilings"])
    _ceilings(axes, rows, document["ceilings"])
    kernels = [row for row in rows if not row["column"]]
    _points(axes, kernels, [row for row in rows if row["column"]])
    canvas.draw()  # places of labels are known in points only now
    _labels(axes, kernels)
    out = io.BytesIO()
    canvas.print_png(out)
    Path(path).write_bytes(out.getvalue())
    return len(kernels)


def _x(row: dict[str, Any]) -> float:
    return row["flops"] / row["bytes"]


def _y(row: dict[str, Any]) -> float:
    return row["flops"] / row["seconds"] / 1e9


def _limits(axes: Any, rows: Sequence[dict[str, Any]], ceilings: Sequence[dict[str, Any]]) -> None:
    xs, ys = [_x(row) for row in rows], [_y(row) for row in rows]
    tops = [c["rate"] / 1e9 for c in ceilings if c["what"] != BANDWIDTH]
    axes.set_xlim(min(xs) / 2, max(xs) * 14)
    axes.set_ylim(min(ys) / 2, max(ys + tops) * 2)


def _ceilings(axes: Any, rows: Sequence[dict[str, Any]], ceilings: Sequence[dict[str, Any]]) -> None:
    """The slope of each bandwidth, up to the highest flat line of as many threads, and these lines."""
    low, high = axes.get_xlim()
    used = {row["threads"] for row in rows}
    for count in sorted(used):
        mine = {c["what"]: c["rate"] / 1e9 for c in ceilings if c["threads"] == count}
        bandwidth = mine.pop(BANDWIDTH, None)
        if bandwidth is None or not mine:
            continue
        on = f", {count} thr" if count else ""
        top = max(mine.values()) / bandwidth
        axes.plot([low, top], [low * bandwidth, top * bandwidth], color=LINE_COLOR, linewidth=1.4)
        # left of the middle of what can be seen of the slope, where no point can lie
        middle = (max(low, axes.get_ylim()[0] / bandwidth) * top) ** 0.5
        at, text = (middle * 0.93, middle * bandwidth), f"{bandwidth:.0f} GB/s{on}"
        axes.text(*at, text, ha="right", va="bottom", color=LINE_COLOR, fontsize=9)
        for what, rate in mine.items():
            axes.plot([rate / bandwidth, high], [rate, rate], color=LINE_COLOR, linewidth=1.4)
            text = f" {what} products\n {rate:.0f} GFLOP/s{on}"
            axes.text(
                1, rate, text, transform=axes.get_yaxis_transform(), va="center", color=LINE_COLOR, fontsize=9
            )


def _points(axes: Any, kernels: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> None:
    axes.scatter(
        [_x(r) for r in others], [_y(r) for r in others], s=14, marker="x", color="#999999", linewidths=0.8
    )
    backends = [*dict.fromkeys(row["name"].partition(".")[0] for row in kernels)]
    for backend, color in zip(backends, cycle(COLORS)):
        mine = [row for row in kernels if row["name"].partition(".")[0] == backend]
        axes.scatter([_x(r) for r in mine], [_y(r) for r in mine], s=34, color=color, label=backend, zorder=3)
    if others:
        axes.scatter([], [], s=14, marker="x", color="#999999", label="baselines")
    axes.legend(loc="lower right", framealpha=0.9)


def _labels(axes: Any, kernels: Sequence[dict[str, Any]]) -> None:
    """A label right of each point, at the nearest height where it lies on no other, with a line back to its point."""
    scale = axes.figure.dpi / 72
    taken: list[tuple[float, float, float]] = []
    for row in sorted(kernels, key=_y):
        x, y = (float(v) / scale for v in axes.transData.transform((_x(row), _y(row))))
        text = _name(row, kernels)
        left, right = x + 8, x + 8 + 4.6 * len(text)
        beside = [height for a, b, height in taken if left < b and a < right]
        places = (y + step * sign for step in range(500) for sign in (-1, 1))
        place = next(p for p in places if all(abs(p - height) >= _LABEL_ROOM for height in beside))
        taken.append((left, right, place))
        line = {
            "arrowstyle": "-",
            "color": "#aaaaaa",
            "linewidth": 0.5,
            "shrinkA": 0,
            "shrinkB": 2,
            "relpos": (0, 0.5),
        }
        axes.annotate(
            text, (_x(row), _y(row)), (8, place - y), textcoords="offset points", fontsize=8, va="center",
            arrowprops=line, zorder=4,
        )  # fmt: skip


def _name(row: dict[str, Any], kernels: Sequence[dict[str, Any]]) -> str:
    """The kernel and the size, and what else tells this point from the others."""
    several_ops = len({other["op"] for other in kernels}) > 1
    several_cases = len({other["case"] for other in kernels if other["op"] == row["op"]}) > 1
    name = row["name"] if several_ops else row["name"].partition(".")[0]
    case = re.sub(r" *\d.*", "", row["case"]) if several_cases else ""
    return " ".join(filter(None, (name, case, size(row))))

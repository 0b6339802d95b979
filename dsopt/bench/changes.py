"""Two results side by side: what became faster or slower, and how the machines differ."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.text import Text

from dsopt.bench.table import duration, plain, same_case, size

# free memory differs from run to run and changes nothing
_IGNORED = ("memory.available",)


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[dict[str, Any]]:
    """For each way of a case that both have: `old` and `new` seconds and `ratio`, new over old."""
    before = {(same_case(row), row["name"]): row["seconds"] for row in old["rows"]}
    found = []
    for row in new["rows"]:
        seconds = before.get((same_case(row), row["name"]))
        if seconds is not None:
            found.append({**row, "old": seconds, "new": row["seconds"], "ratio": row["seconds"] / seconds})
    return found


def differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(name, old, new) of each thing that two machines' descriptions say differently."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new and name not in _IGNORED:
        yield name, old, new


def tables(old: dict[str, Any], new: dict[str, Any]) -> Iterator[Any]:
    """A table of the changes, and a line for each difference of the machines."""
    rows = changes(old, new)
    if not rows:
        yield Text("  nothing to compare: the two results have no case in common", style="yellow")
    else:
        table = plain(f"against the result of {old['started']}")
        for column in ("op", "case", "size", "way"):
            table.add_column(column)
        for column in ("old", "new", "new / old"):
            table.add_column(column, justify="right")
        for row in rows:
            labels = row["op"], f"{row['case']}, {row['dtype']}", size(row), row["name"]
            table.add_row(*labels, duration(row["old"]), duration(row["new"]), f"{row['ratio']:.2f}")
        yield table
    for name, was, is_now in differences(old["machine"], new["machine"]):
        yield Text(f"  machines differ: {name}: {was} then, {is_now} now", style="yellow")

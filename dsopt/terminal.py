"""Where the commands' tables, JSON and errors go."""

from __future__ import annotations

import json
from typing import Any

import typer
from rich.console import Console

from dsopt.files import write_text


def console(target: str | None) -> Console:
    """Where tables go: standard output, or standard error when JSON takes standard output."""
    found = Console(stderr=target == "-")
    # a file or a pipe has no width of its own, and the default of 80 folds the tables
    return found if found.is_terminal else Console(stderr=target == "-", width=120)


def write(data: dict[str, Any], target: str | None) -> None:
    """Writes data as JSON to a file, to standard output for "-", nowhere for None."""
    if target == "-":
        print(json.dumps(data, indent=1))
    elif target is not None:
        write_text(target, json.dumps(data, indent=1) + "\n")


def fail(message: str) -> typer.Exit:
    """Tells what is wrong; raise what it returns."""
    Console(stderr=True).print(f"[red]error[/] {message}", highlight=False)
    return typer.Exit(1)

"""What a command is doing, for the one who waits."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


class Steps:
    """Called with a phase and a detail at each step: a live line on a terminal, else one line a phase.

    Where `expect` has told how many parts there are, the line has a bar that `advance` moves.
    """

    def __init__(self, console: Console):
        self.console = console
        self.said: set[str] = set()
        columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
        self.progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.task = self.progress.add_task("starting", total=None)

    def __enter__(self) -> Steps:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def __call__(self, phase: str, detail: str = "") -> None:
        if self.console.is_terminal:
            self.progress.update(self.task, description=f"{phase}, {detail}" if detail else phase)
        elif phase not in self.said:
            self.console.print(f"  {phase}", style="dim", highlight=False, markup=False)
        self.said.add(phase)

    def expect(self, parts: int) -> None:
        self.progress.columns = (BarColumn(20), MofNCompleteColumn(), *self.progress.columns)
        self.progress.update(self.task, total=parts)

    def advance(self) -> None:
        self.progress.advance(self.task)


class Bytes:
    """A bar of bytes done, with speed and time left: on standard error, and only where that is a terminal."""

    def __init__(self, what: str, total: int, shown: bool = True):
        columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
        console = Console(stderr=True)
        shown = shown and console.is_terminal
        self.progress = Progress(*columns, TimeRemainingColumn(), console=console, disable=not shown)
        self.task = self.progress.add_task(what, total=total)

    def __enter__(self) -> Bytes:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def advance(self, count: int) -> None:
        self.progress.advance(self.task, count)

"""What a command is doing, for the one who waits."""

from __future__ import annotations

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class Steps:
    """Called with a line of text at each step: a live line on a terminal, one line a phase elsewhere.

    A step's text is "phase, detail": a log shows the phases, a terminal the details too.
    """

    def __init__(self, console: Console):
        self.console = console
        self.phase = ""
        columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
        self.progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.task = self.progress.add_task("starting", total=None)

    def __enter__(self) -> Steps:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def __call__(self, text: str) -> None:
        if self.console.is_terminal:
            self.progress.update(self.task, description=text)
            return
        phase = text.rpartition(", ")[0] or text
        if phase != self.phase:
            self.console.print(f"  {phase}", style="dim", highlight=False, markup=False)
        self.phase = phase

"""What is wrong with a checkpoint, collected and told at once."""

from __future__ import annotations

from pathlib import Path

SHOWN = 20


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded: the message names each tensor and file, and what is wrong with it."""


class Problems:
    """Gathers what is wrong with the checkpoint in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.found: list[str] = []

    def add(self, problem: str) -> None:
        self.found.append(problem)

    def raise_any(self) -> None:
        """Raises CheckpointError if anything was found: the first 20 problems, and how many more there are."""
        if not self.found:
            return
        lines = self.found[:SHOWN]
        if more := len(self.found) - len(lines):
            lines.append(f"and {more} more")
        raise CheckpointError("\n  ".join([f"{self.folder} cannot be loaded:", *lines]))

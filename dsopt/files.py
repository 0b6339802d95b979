"""Files that are either whole or not there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_text(path: str | Path, text: str) -> None:
    """Writes a file under a temporary name beside it, then renames: an interrupt leaves the old one whole."""
    with replaced(path) as temporary:
        temporary.write_text(text)


@contextmanager
def replaced(path: str | Path) -> Iterator[Path]:
    """A temporary file beside `path` to write to; it becomes `path` at the end, and goes where writing failed."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        yield Path(temporary)
        # mkstemp makes files private; a result is as readable as any other file
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current

"""Files and folders that are either whole or not there."""

from __future__ import annotations

import os
import shutil
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


@contextmanager
def new_folder(path: str | Path, replace: bool = False) -> Iterator[Path]:
    """A folder to write to, beside `path` under a temporary name; renamed to `path` at the end, removed on an error.

    replace: a folder that is there makes way once the new one is whole; otherwise it raises FileExistsError.
    """
    path = Path(path)
    if path.exists() and not replace:
        raise FileExistsError(f"{path} is there already")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        os.chmod(temporary, 0o777 & ~_umask())
        yield temporary
        if path.exists():
            old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
            os.replace(path, old)
            os.replace(temporary, path)
            shutil.rmtree(old)
        else:
            os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise

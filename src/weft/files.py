"""Files and folders that are there whole or not at all, whatever kills the process that writes them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from weft.errors import UsageError

PARTIAL = ".partial"  # how the names of what is being written end


def partial_of(path: Path) -> Path:
    """The neighbour that is written in place of `path` until it is whole."""
    return path.with_name(f".{path.name}{PARTIAL}")


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A neighbour of `path` to write; it is flushed, and takes the name of `path`, once it is written.

    The folder is made where it is missing. A file of that name is replaced.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
        flush_names(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file whole."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name once everything is written; what a killed process left is removed.

    Raises UsageError where `out` holds something already.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists already; name a new folder")
    partial = partial_of(out)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        flush(partial)
        if out.exists():
            out.rmdir()
        os.replace(partial, out)
        flush_names(out.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def flush(folder: Path) -> dict[str, int]:
    """Flush every file below a folder to the disk; their sizes in bytes, by relative name."""
    sizes = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
        sizes[file.relative_to(folder).as_posix()] = file.stat().st_size
    return sizes


def flush_names(folder: Path) -> None:
    """Make the names in a folder durable; not every system can open a folder."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

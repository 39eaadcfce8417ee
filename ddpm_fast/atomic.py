"""Files that are written whole or not at all."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_BESIDE = ".ddpm_fast-{}-{}.tmp"


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a binary file that becomes ``path`` only when the block ends without an exception.

    The bytes go to a hidden file in the same folder, are flushed to the disk, and take the name
    ``path`` in one step, so a reader sees the old file or the new one and never a part of either.
    After any exception, Ctrl-C included, ``path`` is as it was and the hidden file is gone. A
    symbolic link stays one: the file it points to is replaced.

    Args:
        path: The file to write. Its folder must exist.

    Yields:
        A file open for writing, which may also seek and read back.

    Raises:
        OSError: The folder is missing or may not be written to, ``path`` names something that is
            not a regular file, or the disk is full.
    """
    target = Path(path).resolve()
    if target.exists() and not target.is_file():
        raise OSError(f"{path} exists and is not a regular file")
    beside = target.with_name(_BESIDE.format(_mark(target), secrets.token_hex(8)))
    try:
        with open(beside, "x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
    except BaseException as error:
        with suppress(OSError):
            beside.unlink()
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(beside)):
            error.filename = str(path)  # name the file that was asked for, not the hidden one
        raise
    _flush_folder(target.parent)


def remove_leftovers(path: str | os.PathLike[str]) -> None:
    """Remove the hidden files of killed writers of ``path``; none may be writing it now."""
    target = Path(path).resolve()
    for left in target.parent.glob(_BESIDE.format(_mark(target), "*")):
        left.unlink(missing_ok=True)


def remove_all_leftovers(folder: str | os.PathLike[str]) -> None:
    """Remove the hidden files of all killed writers; none may be writing in the folder now."""
    for left in Path(folder).glob(_BESIDE.format("*", "*")):
        left.unlink(missing_ok=True)


def _mark(target: Path) -> str:
    """Stands for the target's name, which may be as long as names can be."""
    return hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]


def _flush_folder(folder: Path) -> None:
    """Make the new name itself survive a power cut, where folders can be flushed."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

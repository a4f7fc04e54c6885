"""Files of this host, or of any storage that fsspec knows."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

BLOCK = 2**20


@dataclass(frozen=True)
class Source:
    """A file to read. size: in bytes. open: whether it is closed afterwards is for whoever gives it to say.

    movable: where it lies on this host, if it is to be moved from there when somebody keeps it.
    """

    name: str
    size: int
    open: Callable[[], AbstractContextManager[BinaryIO]]
    is_file: bool = True  # or a pipe
    movable: str = ""


def source(files: AbstractFileSystem, found: Mapping[str, Any], name: str) -> Source:
    """A file as its file system describes it."""
    path = found["name"]
    # Whoever reads often lets go of Python's lock often, and waits to get it back.
    opened = partial(Path(path).open, "rb", BLOCK) if is_local(files) else partial(files.open, path, "rb")
    return Source(name, found["size"], opened, is_file=found["type"] == "file")


def is_local(files: AbstractFileSystem) -> bool:
    return isinstance(files, LocalFileSystem)


@contextmanager
def replacing(files: AbstractFileSystem, path: str) -> Iterator[BinaryIO]:
    """A file to write, which is at `path` as a whole or not at all, also after a power failure. Raises OSError."""
    folder = path.rpartition("/")[0]
    part = f"{folder}/.{uuid.uuid4().hex}.part"  # processes of other hosts may write the same file
    try:
        with files.open(part, "wb") as file:
            yield file
        if is_local(files):
            sync(Path(part))
            Path(part).replace(path)
            sync(Path(folder))
        else:
            files.mv(part, path)
    except BaseException:
        with suppress(OSError, NotImplementedError):
            files.rm_file(part)
        raise


def sync(target: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name != "posix" and target.is_dir():
        return  # Windows opens no folder
    descriptor = os.open(target, os.O_RDONLY if target.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

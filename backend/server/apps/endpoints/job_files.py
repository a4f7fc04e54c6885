"""Where a job's files are: the upload, and what workers make of it, in a folder of its own below BATCH_DIR."""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import shutil
import time
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from django.conf import settings
from django.core.files import File

from apps.endpoints.csv_file import BatchError

INPUT, HEADER, ERRORS = "input", "header.csv", "errors.csv"
UPLOAD = ".upload"
GZIP_MAGIC = b"\x1f\x8b"
BLOCK = 2**20


def uploads() -> Path:
    """The folder into which uploads are streamed. Made when it is needed; customers are nobody else's business."""
    folder = _root() / "uploads"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def take(upload: File) -> str:
    """Keep an upload in a new folder, whose name is returned. Raises OSError."""
    name = uuid.uuid4().hex
    folder = path(name)
    folder.mkdir(mode=0o700, parents=True)
    try:
        target = folder / INPUT
        if hasattr(upload, "temporary_file_path"):
            shutil.move(upload.temporary_file_path(), target)
        else:
            with target.open("wb") as file:
                upload.seek(0)
                shutil.copyfileobj(upload, file, BLOCK)
        _sync(target)
        _sync(folder)
    except BaseException:
        remove(name)
        raise
    return name


def path(folder: str, *names: str) -> Path:
    return _root().joinpath(folder, *names)


def digest(file: BinaryIO, *more: str) -> str:
    """A SHA-256 of a file and of what was said with it."""
    file.seek(0)
    found = hashlib.sha256("\0".join(more).encode())
    while block := file.read(BLOCK):
        found.update(block)
    return found.hexdigest()


def is_compressed(raw: BinaryIO) -> bool:
    raw.seek(0)
    beginning = raw.read(len(GZIP_MAGIC))
    raw.seek(0)
    return beginning == GZIP_MAGIC


@contextmanager
def unpacked(raw: BinaryIO) -> Iterator[BinaryIO]:
    """The table in a file, whether it is compressed with gzip or not. Raises BatchError while it is read."""
    if not is_compressed(raw):
        yield raw
        return
    try:
        with gzip.open(raw) as table:
            yield table
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise _damaged(error) from None


def unpacked_beginning(data: bytes, most: int) -> bytes:
    """The table in the first bytes of a file, or as much of it as they hold; no more than `most`. Raises BatchError."""
    if not data.startswith(GZIP_MAGIC):
        return data[:most]
    found = b""
    while data and len(found) < most:  # a file may be compressed in several pieces
        piece = zlib.decompressobj(wbits=31)
        try:
            found += piece.decompress(data, most - len(found))
        except zlib.error as error:
            if found:
                break
            raise _damaged(error) from None
        data = piece.unused_data
    return found


def _damaged(error: Exception) -> BatchError:
    return BatchError(f"The file is damaged gzip: {error}. Compress it and send it again.")


@contextmanager
def published(folder: str, name: str) -> Iterator[BinaryIO]:
    """A file to write, which is there as a whole or not at all, also after a power failure. Raises OSError."""
    target = path(folder, name)
    part = target.with_name(f".{name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
        _sync(target.parent)
    finally:
        part.unlink(missing_ok=True)


def remove(folder: str) -> None:
    discard(path(folder))


def discard(found: Path) -> None:
    if found.is_dir():
        shutil.rmtree(found, ignore_errors=True)
    else:
        found.unlink(missing_ok=True)


def older_than(seconds: float) -> Iterator[Path]:
    """The jobs' folders and the uploads that nothing was written to for so long; never anybody else's files."""
    before = time.time() - seconds
    folders = (path for path in _root().glob("*") if re.fullmatch("[0-9a-f]{32}", path.name))
    for found in [*folders, *(_root() / "uploads").glob(f"*{UPLOAD}")]:
        with suppress(FileNotFoundError):
            if found.stat().st_mtime < before:
                yield found


def _root() -> Path:
    return Path(settings.BATCH_DIR)


def _sync(target: Path) -> None:
    if os.name != "posix" and target.is_dir():
        return  # Windows opens no folder
    descriptor = os.open(target, os.O_RDONLY if target.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

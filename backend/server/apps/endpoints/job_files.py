"""Where a job's files are: what was uploaded, and what workers make of it, in a folder of its own below BATCH_DIR.

BATCH_DIR is a folder, or a URL that fsspec understands, such as s3://bucket/batches.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from django.conf import settings
from fsspec.core import url_to_fs

from apps.endpoints import storage
from apps.endpoints.storage import BLOCK, Source

INPUT, HEADER, ERRORS, COLUMNS = "input", "header.csv", "errors.csv", "columns.arrow"
UPLOAD = ".upload"


def uploads() -> Path:
    """The folder of this host into which uploads are streamed; customers are nobody else's business."""
    files, root = _storage()
    folder = Path(root) / "uploads" if storage.is_local(files) else Path(tempfile.gettempdir()) / "retention-uploads"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def take(sources: Sequence[Source]) -> str:
    """Keep files in a new folder, whose name is returned. Raises OSError."""
    files, _ = _storage()
    folder = uuid.uuid4().hex
    if storage.is_local(files):
        Path(_path(folder)).mkdir(mode=0o700, parents=True)
    try:
        files.makedirs(_path(folder, INPUT), exist_ok=True)
        for number, source in enumerate(sources):
            target = _path(folder, INPUT, f"{number:06d}-{_plain(source.name)}")
            if storage.is_local(files) and source.movable:
                shutil.move(source.movable, target)
            else:
                with source.open() as file, files.open(target, "wb") as kept:
                    shutil.copyfileobj(file, kept, BLOCK)
            if storage.is_local(files):
                storage.sync(Path(target))
        if storage.is_local(files):
            storage.sync(Path(_path(folder, INPUT)))
            storage.sync(Path(_path(folder)))
    except BaseException:
        remove(folder)
        raise
    return folder


def _plain(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name).encode()[-200:].decode(errors="ignore")  # file systems count bytes


def inputs(folder: str) -> list[Source]:
    """What was taken, in its order. Raises FileNotFoundError."""
    files, _ = _storage()
    found = sorted(files.ls(_path(folder, INPUT), detail=True), key=lambda each: each["name"])
    if not found:
        raise FileNotFoundError(f"There is no file in {_path(folder, INPUT)}.")
    return [storage.source(files, each, each["name"].rsplit("/", 1)[1].partition("-")[2]) for each in found]


def forget_inputs(folder: str) -> None:
    files, _ = _storage()
    with suppress(OSError):
        files.rm(_path(folder, INPUT), recursive=True)


def digest(sources: Sequence[Source], *more: str) -> str:
    """A SHA-256 of files and of what was said with them."""
    found = hashlib.sha256("\0".join(more).encode())
    for source in sources:
        with source.open() as file:
            while block := file.read(BLOCK):
                found.update(block)
    return found.hexdigest()


def exists(folder: str, name: str) -> bool:
    return _storage()[0].exists(_path(folder, name))


def size(folder: str, name: str) -> int:
    """In bytes. Raises FileNotFoundError."""
    return _storage()[0].size(_path(folder, name))


def opened(folder: str, name: str) -> BinaryIO:
    """A file to read. Raises FileNotFoundError."""
    return _storage()[0].open(_path(folder, name), "rb")


def published(folder: str, name: str) -> AbstractContextManager[BinaryIO]:
    """A file to write, which is there as a whole or not at all. Raises OSError."""
    return storage.replacing(_storage()[0], _path(folder, name))


def remove(folder: str) -> None:
    """Remove a job's files, as far as they are there."""
    files, _ = _storage()
    with suppress(OSError):
        files.rm(_path(folder), recursive=True)


def older_than(seconds: float) -> Iterator[str]:
    """The folders of jobs to which nothing was written for so long, as far as the storage knows."""
    files, root = _storage()
    before = time.time() - seconds
    with suppress(FileNotFoundError):
        for each in files.ls(root, detail=True):
            name = each["name"].rstrip("/").rsplit("/", 1)[-1]
            if re.fullmatch("[0-9a-f]{32}", name) and _written_at(files, each) < before:
                yield name


def _written_at(files: fsspec.AbstractFileSystem, folder: dict[str, Any]) -> float:
    """When a folder was last written to, in seconds; never in the past where nobody knows."""
    if "mtime" in folder:
        return folder["mtime"]
    found = files.find(folder["name"], detail=True).values()
    try:
        return max(files.modified(each["name"]).timestamp() for each in found)
    except (NotImplementedError, KeyError, ValueError):
        return float("inf")


def forget_uploads(seconds: float) -> None:
    """Remove the uploads of this host to which nothing was written for so long."""
    before = time.time() - seconds
    for found in uploads().glob(f"*{UPLOAD}"):
        with suppress(FileNotFoundError):
            if found.stat().st_mtime < before:
                found.unlink()


def _storage() -> tuple[fsspec.AbstractFileSystem, str]:
    # Other hosts write there too, so no list of files is remembered.
    return url_to_fs(str(settings.BATCH_DIR), use_listings_cache=False)


def _path(folder: str, *names: str) -> str:
    return "/".join([_storage()[1].rstrip("/"), folder, *names])

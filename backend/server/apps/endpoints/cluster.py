"""Chunks of a file scored on a Dask cluster, whose workers load the model by its hashes from shared storage.

A worker has the same checkout and versions as the server, and no database: it imports this module and no Django.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from apps.endpoints import storage
from apps.endpoints.csv_file import BatchError, Chunk
from apps.endpoints.scoring import Scored, Scorer
from apps.ml.artifacts import MANIFEST, ArtifactError
from apps.ml.classifier.base import RetentionClassifier

if TYPE_CHECKING:
    from distributed import Client, Future

logger = logging.getLogger(__name__)

ARTIFACTS = "artifacts"
ANSWER_SECONDS = 10  # within which a scheduler answers, if it is there
POLL_SECONDS = 0.5
LOOK_SECONDS = 5  # after so long, look who works
CHUNKS_PER_THREAD = 2  # one is scored while the next travels


class Unreachable(Exception):
    """The scheduler does not answer; the message says which. That may pass."""


# --- The model in storage ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A published classifier. manifest, artifact: the SHA-256 of these files, which are their names in storage.

    storage_url: a folder or a URL of fsspec that all workers reach.
    """

    kind: type[RetentionClassifier]
    version: str
    storage_url: str
    manifest: str
    artifact: str
    schema: str


def publish(classifier: RetentionClassifier, storage_url: str) -> Model:
    """Put a classifier where workers find it, unless it is there. Raises ArtifactError, OSError."""
    run = classifier.run
    return Model(
        kind=type(classifier),
        version=classifier.version,
        storage_url=storage_url,
        manifest=_put(storage_url, (run.folder / MANIFEST).read_bytes()),
        artifact=_put(storage_url, run.read(classifier.filename)),
        schema=classifier.schema.sha256,
    )


def _put(storage_url: str, content: bytes) -> str:
    """The name of a file with this content, which is there as a whole or not at all."""
    name = hashlib.sha256(content).hexdigest()
    files, path = _place(storage_url, name)
    try:
        if files.cat_file(path) == content:
            return name
    except FileNotFoundError:
        files.makedirs(path.rpartition("/")[0], exist_ok=True)
    with storage.replacing(files, path) as file:
        file.write(content)
    return name


def _fetched(storage_url: str, name: str) -> bytes:
    files, path = _place(storage_url, name)
    try:
        content = files.cat_file(path)
    except FileNotFoundError:
        raise ArtifactError(
            f"There is no {path}: BATCH_DIR must be the same storage for the server and here."
        ) from None
    if hashlib.sha256(content).hexdigest() != name:
        raise ArtifactError(f"{path} is not what its name says.")
    return content


def _place(storage_url: str, name: str) -> tuple[AbstractFileSystem, str]:
    files, root = url_to_fs(storage_url)
    return files, f"{root.rstrip('/')}/{ARTIFACTS}/{name}"


# --- On a worker ------------------------------------------------------------------------------------------

_loading = threading.Lock()


@dataclass(frozen=True)
class _Task:
    """Scores a chunk where it is unpickled.

    The scheduler and the workers unpickle what they are sent before they can tell of any failure: a worker without this
    module would wait for ever. So they are sent bytes, and whatever goes wrong with these is the failure of the task.
    """

    model: Model
    chunk: Chunk

    def __reduce__(self) -> tuple[Callable[..., Scored], tuple[Model, Chunk]]:
        return _score, (self.model, self.chunk)


def _score(model: Model, chunk: Chunk) -> Scored:
    with _loading:
        classifier = load(model)
    return Scorer(classifier, chunk.layout).score(chunk)


@lru_cache(maxsize=8)
def load(model: Model) -> RetentionClassifier:
    """The classifier whose files have the hashes that were asked for. Raises ArtifactError, OSError."""
    with TemporaryDirectory() as folder:
        run = Path(folder, model.version)
        run.mkdir()
        for name, digest in ((MANIFEST, model.manifest), (f"{model.kind.algorithm}.joblib", model.artifact)):
            (run / name).write_bytes(_fetched(model.storage_url, digest))
        classifier = model.kind(model.version, folder)
        if (classifier.artifact_sha256, classifier.schema.sha256) != (model.artifact, model.schema):
            raise ArtifactError(f"The manifest of training run {model.version} was replaced while the server ran.")
        classifier.load()
    return classifier


# --- On the server ----------------------------------------------------------------------------------------


def scored(
    address: str, classifier: RetentionClassifier, storage_url: str, chunks: Iterable[Chunk], stay: Callable[[], object]
) -> Iterator[Scored]:
    """What the workers of a cluster make of the chunks, in their order; how many are held depends on its threads alone.

    `stay` is called now and then while nothing comes, and what it raises ends the work. A chunk whose worker is lost
    is scored by another. Raises Unreachable, OSError; BatchError where the workers cannot score.
    """
    with ThreadPoolExecutor(1) as fetching, _connected(address) as client:
        cluster = _Cluster(client, address, stay, fetching)
        model = publish(classifier, storage_url)
        waiting: deque[Future] = deque()
        try:
            for chunk in chunks:
                task = pickle.dumps(_Task(model, chunk))
                waiting.append(client.submit(pickle.loads, task, key=f"score-{uuid.uuid4()}"))
                while len(waiting) > cluster.most_chunks():
                    yield cluster.result(waiting[0])
                    waiting.popleft()
            while waiting:
                yield cluster.result(waiting[0])
                waiting.popleft()
        finally:
            client.cancel(list(waiting))


@contextmanager
def _connected(address: str) -> Iterator[Client]:
    from distributed import Client

    try:
        client = Client(address, timeout=ANSWER_SECONDS, set_as_default=False)
    except (OSError, ImportError, ValueError) as error:
        raise _unreachable(address, error) from None
    try:
        yield client
    finally:
        client.close(timeout=ANSWER_SECONDS)


def _unreachable(address: str, reason: object) -> Unreachable:
    return Unreachable(f"The Dask scheduler at {address} does not answer ({str(reason).rstrip('.')}).")


class _Cluster:
    """The cluster as a job sees it."""

    def __init__(self, client: Client, address: str, stay: Callable[[], object], fetching: Executor):
        self._client = client
        self._address = address
        self._stay = stay
        self._fetching = fetching
        self._threads: int | None = None
        self._looked = float("-inf")

    def most_chunks(self) -> int:
        self._look()
        return CHUNKS_PER_THREAD * (self._threads or 1)

    def result(self, future: Future) -> Scored:
        """What became of a chunk, which is waited for. Raises Unreachable, BatchError, and whatever `stay` raises."""
        from distributed import CancelledError, KilledWorker

        fetched = self._fetching.submit(future.result)  # a fetch that is timed out begins anew, and may never end
        while not wait([fetched], POLL_SECONDS).done:
            self._stay()
            self._look()
        try:
            return fetched.result()
        except CancelledError:
            raise _unreachable(self._address, "the connection was lost") from None
        except KilledWorker:
            raise BatchError(
                "A part of the file ended several workers of the Dask cluster; their logs say how."
            ) from None
        except (ArtifactError, ImportError) as error:
            raise BatchError(f"A worker of the Dask cluster cannot score: {error}") from None

    def _look(self) -> None:
        """Now and then: is the scheduler there, and how many threads work for it? Raises Unreachable."""
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return
        try:
            threads = self._client.sync(self._client.scheduler.ncores, callback_timeout=ANSWER_SECONDS)
        except OSError:  # TimeoutError is one
            raise _unreachable(self._address, f"not within {ANSWER_SECONDS} s") from None
        before, self._threads = self._threads, sum(threads.values())
        self._looked = time.monotonic()
        if self._threads == 0 != before:
            logger.warning("The Dask cluster at %s has no workers; waiting for some.", self._address)

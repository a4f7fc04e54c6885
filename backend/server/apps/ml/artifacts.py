"""One training run on disk: a folder with a manifest and the files that it vouches for.

A run is written whole or not at all, and never changed. Its manifest holds the SHA-256 of every other
file; nothing is unpickled before that hash has been compared.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from datetime import datetime
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from apps.ml.schema import Schema

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FIRST_VERSION = "1.0.0"
HOW_TO_TRAIN = "Train one with `python research/train.py`, then start the server again."
# The libraries whose versions a manifest records. Only scikit-learn must be the same to load a model.
LIBRARIES = ("scikit-learn", "numpy", "pandas", "joblib")

_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
_SEMANTIC_VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)")


class ArtifactError(Exception):
    """A run or a model that cannot be used; the message says why."""


class NoTrainingRun(ArtifactError):
    """The artifacts folder holds no training run yet."""


def default_artifacts_dir() -> Path:
    """`ML_ARTIFACTS_DIR` of the environment, else `research/artifacts` of this repository."""
    named = os.environ.get("ML_ARTIFACTS_DIR")
    return Path(named).expanduser().resolve() if named else Path(__file__).resolve().parents[4] / "research/artifacts"


class TrainingRun:
    """A finished training run. Opening one reads its manifest only.

    Raises ArtifactError when the manifest is missing or damaged.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        try:
            self.manifest: dict[str, Any] = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
            self.version: str = self.manifest["version"]
            self.trained_at = datetime.fromisoformat(self.manifest["trained_at"])
            self.schema = Schema.from_dict(self.manifest["schema"])
            self._sha256: dict[str, str] = {name: file["sha256"] for name, file in self.manifest["files"].items()}
        except FileNotFoundError:
            raise ArtifactError(f"There is no training run in {self.folder}.") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"The manifest of {self.folder} is damaged: {error!r}.") from error

    def __contains__(self, filename: str) -> bool:
        return filename in self._sha256

    def sha256(self, filename: str) -> str:
        """What the manifest says of a file. Raises ArtifactError when it is not part of the run."""
        try:
            return self._sha256[filename]
        except KeyError:
            raise ArtifactError(f"Training run {self.version} has no {filename}.") from None

    def read(self, filename: str) -> bytes:
        """A file's bytes, after their hash was compared with the manifest. Raises ArtifactError."""
        expected = self.sha256(filename)
        try:
            content = (self.folder / filename).read_bytes()
        except OSError as error:
            raise ArtifactError(
                f"{filename} of training run {self.version} cannot be read: {error.strerror}."
            ) from None
        if hashlib.sha256(content).hexdigest() != expected:
            raise ArtifactError(f"{filename} of training run {self.version} is not the file its manifest names.")
        return content

    def load_model(self, filename: str) -> Any:
        """The fitted estimator in a file. Raises ArtifactError if it is not safe or not possible to load."""
        self.require_same_libraries()
        content = self.read(filename)
        import joblib

        try:
            return joblib.load(io.BytesIO(content))
        except Exception as error:  # unpickling runs any class's code, so anything may be raised
            raise ArtifactError(f"{filename} of training run {self.version} cannot be loaded: {error!r}.") from error

    def require_same_libraries(self) -> None:
        """Raise ArtifactError unless scikit-learn is the version that trained; warn of other differences."""
        for library, trained_with in self.manifest.get("libraries", {}).items():
            running = _installed_version(library)
            if running == trained_with:
                continue
            if library == "scikit-learn":
                raise ArtifactError(
                    f"Training run {self.version} was made with scikit-learn {trained_with}, "
                    f"this is {running}: install that version, or train again."
                )
            logger.warning(
                "Training run %s was made with %s %s; this is %s", self.version, library, trained_with, running
            )

    @cached_property
    def training_customers(self) -> frozenset[str]:
        """The keys of the customers whom the models learned from; empty for a table without identifier."""
        filename = self.manifest.get("training_customers")
        return frozenset(self.read(filename).decode().splitlines()) if filename else frozenset()


def training_runs(directory: Path) -> list[TrainingRun]:
    """Every readable run of a folder, oldest first; a damaged one is reported in the log and passed over."""
    runs = []
    for manifest in sorted(Path(directory).glob(f"[!.]*/{MANIFEST}")):
        try:
            runs.append(TrainingRun(manifest.parent))
        except ArtifactError as error:
            logger.error("%s", error)
    return sorted(runs, key=lambda run: run.trained_at)


def newest_run(directory: Path) -> TrainingRun:
    """The run that was trained last. Raises NoTrainingRun."""
    runs = training_runs(directory)
    if not runs:
        raise NoTrainingRun(f"There is no trained model in {directory}. {HOW_TO_TRAIN}")
    return runs[-1]


def open_run(directory: Path, version: str) -> TrainingRun:
    """The run of a version. Raises ArtifactError."""
    check_version(version)
    return TrainingRun(Path(directory) / version)


def next_version(directory: Path) -> str:
    """The next minor version after the highest in a folder (1.4.2 gives 1.5.0); the first is 1.0.0."""
    found = [_SEMANTIC_VERSION.fullmatch(path.name) for path in Path(directory).glob("*")]
    versions = [tuple(map(int, match.groups())) for match in found if match]
    if not versions:
        return FIRST_VERSION
    major, minor, _ = max(versions)
    return f"{major}.{minor + 1}.0"


def check_version(version: str) -> None:
    """Raise ArtifactError unless a version can be the name of a folder."""
    if not _VERSION.fullmatch(version):
        raise ArtifactError(f"{version!r} cannot be a version: use letters, digits, dots and dashes, as in 1.2.0.")


def write_run(directory: Path, version: str, files: Mapping[str, Any], manifest: Mapping[str, Any]) -> TrainingRun:
    """Write a run folder; it appears whole, by one rename, or not at all.

    files: by name; `.joblib` files are dumped, others are text. The manifest is completed with the
    version and, of each file, its SHA-256 and size in bytes. Raises ArtifactError if the version exists.
    """
    check_version(version)
    directory = Path(directory)
    final = directory / version
    if final.exists():
        raise ArtifactError(f"Version {version} exists already in {directory}; choose another with --version.")
    directory.mkdir(parents=True, exist_ok=True)
    working = Path(tempfile.mkdtemp(prefix=f".{version}-", dir=directory))
    try:
        described = {}
        for name, content in files.items():
            data = _dumped(content) if name.endswith(".joblib") else content.encode()
            _write_durably(working / name, data)
            described[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        complete = {"version": version, **manifest, "files": described}
        _write_durably(working / MANIFEST, (json.dumps(complete, indent=2) + "\n").encode())
        working.chmod(0o755)
        try:
            working.rename(final)
        except OSError:
            raise ArtifactError(f"Version {version} was written by another process meanwhile.") from None
    finally:
        shutil.rmtree(working, ignore_errors=True)
    return TrainingRun(final)


def library_versions() -> dict[str, str | None]:
    return {library: _installed_version(library) for library in LIBRARIES}


def _installed_version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def _dumped(value: Any) -> bytes:
    import joblib

    buffer = io.BytesIO()
    joblib.dump(value, buffer, compress=("zlib", 3))
    return buffer.getvalue()


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())

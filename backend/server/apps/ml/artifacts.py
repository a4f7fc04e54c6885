"""One training run on disk: a folder with a manifest and the files that it vouches for.

A run is written whole or not at all, and never changed. Its manifest holds the SHA-256 of every other
file; nothing is unpickled before that hash has been compared.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
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
    """`ML_ARTIFACTS_DIR` of the environment, else `research/artifacts`; relative to the top of this repository."""
    named = os.environ.get("ML_ARTIFACTS_DIR") or "research/artifacts"
    return (Path(__file__).resolve().parents[4] / Path(named).expanduser()).resolve()


class TrainingRun:
    """A finished training run. Opening one reads its manifest only.

    Raises ArtifactError when the manifest is missing or damaged.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        try:
            text = (self.folder / MANIFEST).read_text(encoding="utf-8")
            self.manifest: dict[str, Any] = json.loads(text, parse_float=_finite, parse_constant=_finite)
            _check_kinds(self.manifest)
            self.version: str = self.manifest["version"]
            self.trained_at = datetime.fromisoformat(self.manifest["trained_at"])
            if self.trained_at.tzinfo is None:
                raise ValueError("trained_at has no time zone")
            self.schema = Schema.from_dict(self.manifest["schema"])
            self._sha256: dict[str, str] = {name: file["sha256"] for name, file in self.manifest["files"].items()}
        except FileNotFoundError:
            raise ArtifactError(f"There is no training run in {self.folder}.") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}"  # repr could show the whole file
            raise ArtifactError(f"The manifest of {self.folder} is damaged: {reason}.") from error
        if self.version != self.folder.name:
            raise ArtifactError(
                f"The folder {self.folder} holds version {self.version}; a run's folder is named as its version."
            )

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
        for library, trained_with in {"scikit-learn": None, **self.manifest.get("libraries", {})}.items():
            running = _installed_version(library)
            if library == "scikit-learn" and (running is None or running != trained_with):
                raise ArtifactError(
                    f"Training run {self.version} was made with scikit-learn {trained_with or '(not recorded)'}, "
                    f"this is {running or 'not installed'}: install that version, or train again."
                )
            if running != trained_with:
                logger.warning(
                    "Training run %s was made with %s %s; this is %s", self.version, library, trained_with, running
                )

    @cached_property
    def training_customers(self) -> frozenset[str]:
        """The keys of the customers whom the models learned from; empty for a table without identifier."""
        filename = self.manifest.get("training_customers")
        return frozenset(self.read(filename).decode().splitlines()) if filename else frozenset()


def _check_kinds(manifest: Mapping[str, Any]) -> None:
    """Raise unless what others read of a manifest has the form in which training writes it."""

    def require(value: Any, kind: type | tuple[type, ...], what: str) -> None:
        if not isinstance(value, kind) or isinstance(value, bool):
            raise TypeError(f"{what} is not what it should be")

    require(manifest, dict, "the manifest")
    for name in ("version", "trained_at"):
        require(manifest[name], str, name)
    for name, kind in {"libraries": dict, "metrics": dict, "samples": list}.items():
        require(manifest.get(name, kind()), kind, name)
    require(manifest.get("training_customers"), (str, type(None)), "training_customers")
    for name, file in manifest["files"].items():
        require(file["sha256"], str, f"the hash of {name}")
    for model, scores in manifest.get("metrics", {}).items():
        for metric, score in scores.items():
            require(score["value"], (int, float), f"{metric} of {model}")
    for sample in manifest.get("samples", []):
        require(sample["row"], dict, "a sample")


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
        _sync_folder(working)
        try:
            working.rename(final)
        except OSError:
            if not final.exists():
                raise
            raise ArtifactError(f"Version {version} was written by another process meanwhile.") from None
        _sync_folder(directory)
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


def _sync_folder(path: Path) -> None:
    """Make a folder's entries survive a power cut, where the system knows how (Windows does not)."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is no number")
    return number

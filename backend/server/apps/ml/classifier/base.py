"""What every retention classifier does: check rows, score them, say the answer."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from apps.ml.artifacts import ArtifactError, default_artifacts_dir, newest_run, open_run
from apps.ml.schema import AlignedRows

if TYPE_CHECKING:
    import pandas as pd

THRESHOLD = 0.5


class RetentionClassifier:
    """One trained model of one training run.

    Constructing reads the run's manifest only; the model is loaded when it first scores, or by `load`.

    version: a training run's version, by default the newest run. artifacts_dir: where the runs are, by
    default `ML_ARTIFACTS_DIR` or `research/artifacts`. Raises ArtifactError.
    """

    #: Key of the algorithm: the artifact's file name, and what a database row stores to find this class.
    algorithm = ""

    def __init__(self, version: str | None = None, artifacts_dir: Path | str | None = None):
        directory = Path(artifacts_dir) if artifacts_dir else default_artifacts_dir()
        self.run = open_run(directory, version) if version else newest_run(directory)
        self.version = self.run.version
        self.schema = self.run.schema
        self.filename = f"{self.algorithm}.joblib"
        self.artifact_sha256 = self.run.sha256(self.filename)
        self._model: Any = None
        self._loading = threading.Lock()

    @property
    def title(self) -> str:
        return self.algorithm.replace("_", " ")

    @property
    def metrics(self) -> dict[str, Any]:
        """The held-out scores of this model and, as `baseline`, of always answering the larger class."""
        every = self.run.manifest.get("metrics", {})
        return {**every.get(self.algorithm, {}), "baseline": every.get("baseline", {})}

    def load(self) -> None:
        """Load the model, once, however many threads ask. Raises ArtifactError."""
        with self._loading:
            if self._model is not None:
                return
            model = self.run.load_model(self.filename)
            if list(getattr(model, "classes_", [])) != [0, 1] or not hasattr(model, "predict_proba"):
                raise ArtifactError(f"{self.filename} of training run {self.version} is no two-class classifier.")
            expected = getattr(model, "n_features_in_", None)
            if expected != len(self.schema.columns):
                raise ArtifactError(
                    f"{self.filename} of training run {self.version} was trained on {expected} columns, "
                    f"but the manifest lists {len(self.schema.columns)}."
                )
            if hasattr(model, "n_jobs"):
                model.n_jobs = 1  # several threads would add up the trees in no fixed order
            self._model = model

    def preprocessing(self, input_data: Mapping[str, Any] | Sequence[Mapping[str, Any]] | pd.DataFrame) -> AlignedRows:
        """One customer or many, checked and aligned. Raises InputError."""
        if isinstance(input_data, Mapping):
            return self.schema.align([input_data])
        if hasattr(input_data, "columns"):
            return self.schema.align_table(input_data)
        if isinstance(input_data, Sequence) and not isinstance(input_data, (str, bytes)):
            return self.schema.align(input_data)
        return self.schema.align([input_data])

    def predict(self, input_data: AlignedRows | np.ndarray) -> np.ndarray:
        """(rows, 2) float: the probabilities of leaving and of staying. Raises ArtifactError."""
        matrix = input_data.matrix if isinstance(input_data, AlignedRows) else np.asarray(input_data)
        if not len(matrix):
            return np.empty((0, 2))
        self.load()
        return self._model.predict_proba(matrix)

    def postprocessing(self, prediction: np.ndarray) -> dict[str, Any]:
        """The answer for one row of `predict`: (2,) probabilities, label "1" above 0.5."""
        probability = float(prediction[1])
        return {"probability": probability, "label": "1" if probability > THRESHOLD else "0", "status": "OK"}

    def compute_prediction(
        self, input_data: Mapping[str, Any] | Sequence[Mapping[str, Any]] | pd.DataFrame
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """The answer for one customer (a dict), or a list of them for many (a list or a DataFrame).

        Each is {"probability": float, "label": "1" or "0", "status": "OK"}, with "warnings" when values
        were filled or not recognised. Raises InputError for bad input, ArtifactError for a bad model.
        """
        aligned = self.preprocessing(input_data)
        answers = [self.postprocessing(row) for row in self.predict(aligned)]
        for answer, warnings in zip(answers, aligned.warnings, strict=True):
            if warnings:
                answer["warnings"] = warnings
        return answers[0] if isinstance(input_data, Mapping) else answers

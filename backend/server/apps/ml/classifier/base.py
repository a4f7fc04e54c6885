"""What every retention classifier does: check rows, score them, say the answer."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from apps.ml.artifacts import ArtifactError, default_artifacts_dir, newest_run, open_run
from apps.ml.forest import compile_forest
from apps.ml.schema import AlignedRows, InputError

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

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
        self._predict_proba: Callable[[np.ndarray], np.ndarray] | None = None
        self.is_compiled = False  # whether it is loaded, and answers within microseconds
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
        """Load the model and let it answer, once, however many threads ask. Raises ArtifactError."""
        if self._predict_proba is not None:
            return
        with self._loading:
            if self._predict_proba is not None:
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
            self._predict_proba = self._fastest(model)

    def _fastest(self, model: Any) -> Callable[[np.ndarray], np.ndarray]:
        """The compiled model's `predict_proba` if it answers exactly as the model's own, which else it is.

        The model has answered once then, and is let go of if it is not needed. Raises ArtifactError.
        """
        matrix = self._sample_matrix()
        try:
            expected = model.predict_proba(matrix)
        except Exception as error:
            raise ArtifactError(f"{self.filename} of training run {self.version} cannot answer: {error!r}.") from error
        reason: Any = "its compiled form answered the samples of the training run differently"
        try:
            forest = compile_forest(model)
            if forest is None:
                return model.predict_proba
            if forest.answers(matrix, expected):
                self.is_compiled = True
                return forest.predict_proba
        except Exception as error:  # numba missing, or any trouble of a compiler: none of it needs to stop the model
            reason = repr(error)
        logger.warning(
            "%s of training run %s is answered by scikit-learn, correctly but slowly: %s",
            *(self.filename, self.version, reason),
        )
        return model.predict_proba

    def _sample_matrix(self) -> np.ndarray:
        """The samples of the manifest, if it has any that fit, and a row of nothing but modes."""
        modes = {column.name: column.mode for column in self.schema.columns}
        samples = [sample["row"] for sample in self.run.manifest.get("samples", [])]
        try:
            return self.schema.align([*samples, modes]).matrix
        except InputError:
            return self.schema.align([modes]).matrix

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
        return self._predict_proba(matrix)

    def postprocessing(self, prediction: np.ndarray) -> dict[str, Any]:
        """The answer for one row of `predict`: (2,) probabilities, label "1" above 0.5."""
        return _answer(float(prediction[1]))

    def answers(self, predictions: np.ndarray) -> list[dict[str, Any]]:
        """`postprocessing` for all rows of `predict`."""
        return list(map(_answer, predictions[:, 1].tolist()))

    def labelled(self, predictions: np.ndarray) -> list[tuple[float, str]]:
        """Probability and label, as `postprocessing` says them, for all rows of `predict`."""
        probabilities = predictions[:, 1].tolist()
        return list(zip(probabilities, map(_label, probabilities), strict=True))

    def compute_prediction(
        self, input_data: Mapping[str, Any] | Sequence[Mapping[str, Any]] | pd.DataFrame
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """The answer for one customer (a dict), or a list of them for many (a list or a DataFrame).

        Each is {"probability": float, "label": "1" or "0", "status": "OK"}, with "warnings" when values
        were filled or not recognised. Raises InputError for bad input, ArtifactError for a bad model.
        """
        aligned = self.preprocessing(input_data)
        answers = self.answers(self.predict(aligned))
        for index, warnings in aligned.warnings.items():
            answers[index]["warnings"] = warnings
        return answers[0] if isinstance(input_data, Mapping) else answers


def _answer(probability: float) -> dict[str, Any]:
    return {"probability": probability, "label": _label(probability), "status": "OK"}


def _label(probability: float) -> str:
    return "1" if probability > THRESHOLD else "0"

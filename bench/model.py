"""What every contestant gets: one forest, one customer, and scikit-learn's answer for it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
BACKEND = REPOSITORY / "backend" / "server"
DATA = REPOSITORY / "research" / "data" / "processed.csv"
LIST = 1000


@dataclass(frozen=True)
class Subject:
    """artifacts: the folder of the training run. model: its random forest alone, as joblib dumps it.

    customers: LIST customers by name; matrix: every customer of the table, encoded, (rows, features) float64.
    customer, row, probability: one customer without missing values, by name, encoded, and scikit-learn's answer.
    probabilities: scikit-learn's answers for `customers`.
    """

    artifacts: Path
    model: Path
    customer: dict[str, Any]
    row: list[float]
    probability: float
    customers: list[dict[str, Any]]
    probabilities: list[float]
    matrix: Any


def train(folder: Path, environment: dict[str, str]) -> Subject:
    """Train as the product is trained, on the table that it comes with."""
    import joblib
    import pandas as pd

    from apps.ml import artifacts

    directory = folder / "artifacts"
    subprocess.run(
        [sys.executable, str(REPOSITORY / "research" / "train.py"), "--data", str(DATA)],
        env={**environment, "ML_ARTIFACTS_DIR": str(directory)},
        check=True,
        capture_output=True,
    )
    run = artifacts.newest_run(directory)
    forest = run.load_model("random_forest.joblib")
    model = folder / "model.joblib"
    joblib.dump(forest, model)

    frame = pd.read_csv(DATA, dtype={run.schema.identifier: str}).drop(columns=run.schema.target.name)
    complete = int(frame.notna().all(axis=1).to_numpy().argmax())
    matrix = run.schema.align_table(frame).matrix
    probability = forest.predict_proba(matrix[: max(LIST, complete + 1)])[:, 1].tolist()
    customers = [
        {name: None if pd.isna(value) else value for name, value in row.items()}
        for row in frame.astype(object).to_dict("records")[: max(LIST, complete + 1)]
    ]
    return Subject(
        artifacts=directory,
        model=model,
        customer=customers[complete],
        row=matrix[complete].tolist(),
        probability=probability[complete],
        customers=customers[:LIST],
        probabilities=probability[:LIST],
        matrix=matrix,
    )

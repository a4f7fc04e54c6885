"""prepare.py MODEL FOLDER: save the forest as an MLflow model that answers with probabilities."""

import sys
from pathlib import Path

import joblib
import mlflow.sklearn

mlflow.sklearn.save_model(
    joblib.load(sys.argv[1]),
    str(Path(sys.argv[2]) / "model"),
    pyfunc_predict_fn="predict_proba",
    skops_trusted_types=["sklearn.tree._tree.Tree"],
)

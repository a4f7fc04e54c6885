"""engine.py ENGINE MODEL MATRIX ROWS...: the model alone, without a server, on one thread.

Runs in the environment of its engine and prints JSON: for each number of rows the seconds of one call, and the largest
difference from scikit-learn's probabilities. MODEL is scikit-learn's, as joblib dumps it; for onnxruntime, translated.
MATRIX is a .npy file of customers, of which the first are taken; beside it stand scikit-learn's probabilities, which
the engine scikit-learn writes and the others compare with.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

LEAST_CALLS, LEAST_SECONDS = 3, 0.5

Predict = Callable[[np.ndarray], np.ndarray]


def scikit_learn(model: Path) -> tuple[Predict, type]:
    import joblib

    forest = joblib.load(model)
    forest.n_jobs = 1
    return forest.predict_proba, np.float64


def compiled(model: Path) -> tuple[Predict, type]:
    import joblib

    from apps.ml.forest import compile_forest

    return compile_forest(joblib.load(model)).predict_proba, np.float64


def onnxruntime(model: Path) -> tuple[Predict, type]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return lambda matrix: session.run(["probabilities"], {"customers": matrix})[0], np.float32


ENGINES = {"scikit-learn": scikit_learn, "onnxruntime": onnxruntime, "compiled": compiled}


def seconds_of(predict: Predict, matrix: np.ndarray) -> float:
    """The median of several calls, after one that does not count."""
    predict(matrix[:1000])
    taken: list[float] = []
    while len(taken) < LEAST_CALLS or sum(taken) < LEAST_SECONDS:
        began = time.perf_counter()
        predict(matrix)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def main(engine: str, model: str, file: str, *counts: str) -> None:
    predict, kind = ENGINES[engine](Path(model))
    customers = np.load(file)
    # Each engine gets the type that it works with, so that none has to convert a million rows.
    customers = customers.astype(kind, copy=False)
    expected = Path(file).with_suffix(".scikit-learn.npy")
    measured = {}
    for count in map(int, counts):
        rows = np.ascontiguousarray(customers[:count])
        probability = predict(rows)[:, 1].astype(np.float64)
        if engine == "scikit-learn":
            np.save(expected, probability)
        difference = float(np.abs(probability - np.load(expected)[:count]).max())
        measured[count] = {"seconds": seconds_of(predict, rows), "difference": difference}
    sys.stdout.write(json.dumps(measured) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])

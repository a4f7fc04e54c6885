"""BentoML with the forest from its model store, as its documentation serves scikit-learn, by two workers."""

import os

import bentoml
import numpy as np


@bentoml.service(workers=2)
class Retention:
    stored = bentoml.models.BentoModel("retention:latest")

    def __init__(self) -> None:
        self.model = bentoml.sklearn.load_model(self.stored)

    @bentoml.api(batchable=os.environ["BATCHING"] == "1")
    def predict(self, rows: np.ndarray) -> np.ndarray:
        return self.model.predict_proba(rows)[:, 1]

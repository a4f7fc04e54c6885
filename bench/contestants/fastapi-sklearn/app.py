"""FastAPI with scikit-learn, as its documentation begins: a typed body, and a plain function for blocking work."""

import os

import joblib
import numpy as np
from fastapi import FastAPI
from pydantic import BaseModel

model = joblib.load(os.environ["MODEL"])
app = FastAPI()


class Customers(BaseModel):
    rows: list[list[float]]


@app.post("/predict")
def predict(customers: Customers) -> dict[str, list[float]]:
    return {"probability": model.predict_proba(np.array(customers.rows))[:, 1].tolist()}

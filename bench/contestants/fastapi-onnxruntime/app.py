"""FastAPI with onnxruntime: one thread per worker, since there is a worker for each core."""

import os

import numpy as np
import onnxruntime
from fastapi import FastAPI
from pydantic import BaseModel

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
session = onnxruntime.InferenceSession(os.environ["MODEL"], options, providers=["CPUExecutionProvider"])
app = FastAPI()


class Customers(BaseModel):
    rows: list[list[float]]


@app.post("/predict")
def predict(customers: Customers) -> dict[str, list[float]]:
    rows = np.array(customers.rows, dtype=np.float32)
    return {"probability": session.run(["probabilities"], {"customers": rows})[0][:, 1].tolist()}

"""prepare.py MODEL FOLDER: translate the forest to ONNX, with its probabilities as one array."""

import sys
from pathlib import Path

import joblib
from skl2onnx import to_onnx
from skl2onnx.common.data_types import FloatTensorType

model = joblib.load(sys.argv[1])
translated = to_onnx(
    model,
    initial_types=[("customers", FloatTensorType([None, model.n_features_in_]))],
    options={id(model): {"zipmap": False}},
)
(Path(sys.argv[2]) / "model.onnx").write_bytes(translated.SerializeToString())

"""prepare.py MODEL FOLDER: put the forest into BentoML's model store, which is in BENTOML_HOME."""

import sys

import bentoml
import joblib

bentoml.sklearn.save_model("retention", joblib.load(sys.argv[1]))

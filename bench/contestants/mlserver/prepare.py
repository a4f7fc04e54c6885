"""prepare.py MODEL FOLDER: lay out what `mlserver start FOLDER` reads."""

import json
import shutil
import sys
from pathlib import Path

folder = Path(sys.argv[2])
shutil.copy(sys.argv[1], folder / "model.joblib")
(folder / "settings.json").write_text(json.dumps({"debug": False, "parallel_workers": 2}))
(folder / "model-settings.json").write_text(
    json.dumps(
        {
            "name": "retention",
            "implementation": "mlserver_sklearn.SKLearnModel",
            "parameters": {"uri": "./model.joblib", "version": "1"},
        }
    )
)

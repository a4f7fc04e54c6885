"""A large CSV scored by `manage.py score`, beside the script that one would write instead.

    python bench/batch.py [--rows 1000000] [--rounds 3] [--memory-rows 5000000]

The script reads by pandas, asks the same forest for probabilities, adds two columns and writes by pandas; it is run
with scikit-learn on one core and on all. All take turns, each in a process of its own, timed from its start to its end.
Prints Markdown: seconds, rows per second and the most memory of each, and the ratios within a round; then, in one
thread, where the time of scoring goes, beside pyarrow that only reads the same file. --memory-rows measures the memory
of `score` for another file, of so many rows. Files take 1.5 KB of the temporary folder per row.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from run import machine
from tables import Spread, short, table

REPOSITORY = Path(__file__).resolve().parents[1]
BACKEND = REPOSITORY / "backend" / "server"
FEATURES, INFORMATIVE, TRAINING_ROWS, SEED = 25, 15, 20_000, 0
SCORE, ONE_CORE, ALL_CORES = "manage.py score", "the script, n_jobs=1", "the script, n_jobs=-1"

# Each is run by a Python of its own, as what this process holds in memory would count as theirs.
MAKE = """
import sys
import pandas as pd
from sklearn.datasets import make_classification
rows, training, features, informative, seed = map(int, sys.argv[3:])
matrix, outcome = make_classification(rows + training, features, n_informative=informative, random_state=seed)
table = pd.DataFrame(matrix, columns=[f"feature_{number}" for number in range(features)])
table[:training].assign(IsRetained=outcome[:training]).to_csv(sys.argv[1], index=False)
table[training:].to_csv(sys.argv[2], index=False)
"""
TAKE_MODEL = """
import sys
from pathlib import Path
import joblib
from apps.ml import artifacts
joblib.dump(artifacts.newest_run(Path(sys.argv[1])).load_model("random_forest.joblib"), sys.argv[2])
"""
SCRIPT = """
import sys
import joblib
import pandas as pd
model = joblib.load(sys.argv[1])
model.n_jobs = int(sys.argv[4])
table = pd.read_csv(sys.argv[2])
probability = model.predict_proba(table.to_numpy())[:, 1]
table["probability"] = probability
table["label"] = (probability > 0.5).astype(int)
table.to_csv(sys.argv[3], index=False)
"""
COMPARE = """
import sys
import pandas as pd
answers = ["probability", "label"]
mine, theirs = (pd.read_csv(path, usecols=answers) for path in sys.argv[1:])
assert (mine.label == theirs.label).all()
print((mine.probability - theirs.probability).abs().max())
"""
READ = """
import json, sys, time
from pyarrow import csv
taken = []
for threads in (False, True):
    began = time.perf_counter()
    with csv.open_csv(sys.argv[1], csv.ReadOptions(use_threads=threads, block_size=2**22)) as reader:
        for batch in reader:
            pass
    taken.append(time.perf_counter() - began)
print(json.dumps({"pyarrow, in blocks": taken[0], "pyarrow, in blocks, with threads": taken[1]}))
"""
LAYERS = """
import json, sys, time
import django
django.setup()
from apps.endpoints import batch, csv_file, prediction, scoring
from apps.endpoints.prediction import Wanted
spent = {}
def timed(layer, work, *arguments):
    began = time.perf_counter()
    try:
        return work(*arguments)
    finally:
        spent[layer] = spent.get(layer, 0) + time.perf_counter() - began
with open(sys.argv[1], "rb", 2**20) as file, open(sys.argv[2], "w", encoding="utf-8", newline="") as output:
    source = csv_file.CsvFile(file)
    wanted = Wanted(None, None, None, default_status="production")
    (algorithm,) = prediction.choose("classifier", wanted, in_test=False).algorithms
    classifier = timed("loading the model", prediction.classifier_of, algorithm)
    scorer = scoring.Scorer(classifier, source.layout)
    answered = batch.AnsweredCsv(source.layout)
    chunks = source.chunks(batch.CHUNK_ROWS)
    while chunk := timed("reading lines", next, chunks, None):
        checked = timed("cells to numbers", scorer.check, chunk)
        answers = timed("the forest", scorer.label, checked)
        body = timed("lines with answers", answered.body, checked.records, answers)
        timed("writing", output.write, body)
print(json.dumps(spent))
"""


class Bench:
    """A folder with the table, the model, and a database that serves it."""

    def __init__(self, folder: Path, rows: int):
        self.folder, self.rows = folder, rows
        self.table, self.model = folder / "customers.csv", folder / "model.joblib"
        self.environment = {
            **{name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"},
            "PYTHONPYCACHEPREFIX": str(folder / "compiled"),  # nobody compiles Python's files while time is taken
            "PYTHONPATH": str(BACKEND),
            "DJANGO_SETTINGS_MODULE": "server.settings",
            "DATABASE_URL": f"sqlite:///{folder / 'db.sqlite3'}",
            "ML_ARTIFACTS_DIR": str(folder / "artifacts"),
            "DEBUG": "1",
            "LOG_LEVEL": "WARNING",
        }
        training = folder / "training.csv"
        self.python("-c", MAKE, training, self.table, rows, TRAINING_ROWS, FEATURES, INFORMATIVE, SEED)
        self.python(REPOSITORY / "research" / "train.py", "--data", training)
        self.python("-c", TAKE_MODEL, folder / "artifacts", self.model)
        self.manage("migrate")
        self.manage("register_algorithms")

    def python(self, *arguments: object) -> str:
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, env=self.environment, stdout=subprocess.PIPE, text=True, check=True)
        return done.stdout

    def manage(self, *arguments: object) -> None:
        self.python(BACKEND / "manage.py", *arguments)

    def measured(self, *arguments: object) -> tuple[float, float]:
        """Seconds from the start of a Python to its end, and MiB of memory that it had at most."""
        began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments)], env=self.environment, stdout=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{arguments[0]} ended with {process.returncode}.")
        return time.monotonic() - began, usage.ru_maxrss / 1024

    def score(self, table: Path) -> tuple[float, float]:
        return self.measured(BACKEND / "manage.py", "score", table, table.with_suffix(".scored.csv"), "--log", "none")

    def script(self, jobs: int) -> tuple[float, float]:
        return self.measured("-c", SCRIPT, self.model, self.table, self.folder / f"script{jobs}.csv", jobs)

    def difference(self) -> float:
        return float(self.python("-c", COMPARE, self.table.with_suffix(".scored.csv"), self.folder / "script1.csv"))

    def excerpt(self, rows: int) -> Path:
        """A table of so many rows: those of the other, and again from its beginning."""
        path = self.folder / "excerpt.csv"
        with self.table.open("rb") as source, path.open("wb") as target:
            target.write(next(source))
            target.writelines(itertools.islice(self._lines_again_and_again(), rows))
        return path

    def _lines_again_and_again(self) -> Iterator[bytes]:
        while True:
            with self.table.open("rb") as source:
                next(source)
                yield from source


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-rows", type=int, help="By default none; 5000000 takes ten GB of disk.")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        report(Bench(Path(folder), options.rows), options.rounds, options.memory_rows)


def report(bench: Bench, rounds: int, memory_rows: int | None) -> None:
    bench.score(bench.excerpt(1))  # compiles what is kept on disk
    idle = bench.score(bench.excerpt(1))
    ways = {
        SCORE: lambda: bench.score(bench.table),
        ONE_CORE: lambda: bench.script(1),
        ALL_CORES: lambda: bench.script(-1),
    }
    taken = {way: [] for way in ways}
    for number in range(rounds):
        for way in [*ways][number % len(ways) :] + [*ways][: number % len(ways)]:
            taken[way].append(ways[way]())
    seconds = {way: [each for each, _ in measured] for way, measured in taken.items()}

    rows = []
    for way, measured in taken.items():
        spread = Spread.of(seconds[way])
        ratio = Spread.of(theirs / ours for theirs, ours in zip(seconds[way], seconds[SCORE], strict=True))
        memory = max(peak for _, peak in measured)
        rows.append(
            [way, spread, f"{bench.rows / spread.median:,.0f}", f"{memory:,.0f}", "" if way == SCORE else ratio]
        )
    rows.append(["manage.py score, one row", short(idle[0]), "", f"{idle[1]:,.0f}", ""])
    if memory_rows:
        longer = bench.score(bench.excerpt(memory_rows))
        rows.append([f"manage.py score, {memory_rows:,} rows", short(longer[0]), "", f"{longer[1]:,.0f}", ""])
    sys.stdout.write(f"{machine()}; {rounds} rounds, in turn; median (least to greatest).\n\n")
    sys.stdout.write(
        table([f"{bench.rows:,} rows", "seconds", "rows per second", "MiB at most", "times as long as score"], rows)
    )
    difference = bench.difference()
    sys.stdout.write(f"\nLargest difference from the probabilities of {ONE_CORE}: {difference:.1e}\n\n")

    layers = json.loads(bench.python("-c", LAYERS, bench.table, bench.folder / "layers.csv"))
    limit = json.loads(bench.python("-c", READ, bench.table))
    timed = [
        (name, short(spent))
        for name, spent in [*layers.items(), ("all of these", sum(layers.values())), *limit.items()]
    ]
    sys.stdout.write(table(["in one thread", "seconds"], timed))


if __name__ == "__main__":
    main()

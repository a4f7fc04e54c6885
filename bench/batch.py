"""A large CSV scored by `manage.py score`, logged and not, beside the script that one would write instead.

    python bench/batch.py [--rows 1000000] [--rounds 3] [--memory-rows 5000000]

The script reads by pandas, asks the same forest for probabilities, adds two columns and writes by pandas; it is run
with scikit-learn on one core and on all. `score` also logs each row, into SQLite and, where it is installed, into a
PostgreSQL of its own, which keep what earlier rounds have logged. All take turns, each in a process of its own, timed
from its start to its end. Prints Markdown: seconds, rows per second and the most memory of each, and the ratios within
a round; what the databases take for the same inserts alone; then, in one thread, where the time of scoring goes, beside
pyarrow that only reads the same file; then how long single predictions by HTTP take while a server is idle, and while
its worker scores and logs the file. --memory-rows measures the memory of `score` for another file, of so many rows.
Files take 3 KB of the temporary folder per row, and what is logged another 2 KB in each round.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

from model import BACKEND, REPOSITORY
from processes import Server
from run import machine
from tables import Spread, short, table
from tests import postgresql

FEATURES, INFORMATIVE, TRAINING_ROWS, SEED = 25, 15, 20_000, 0
SCORE, ONE_CORE, ALL_CORES = "manage.py score --log none", "the script, n_jobs=1", "the script, n_jobs=-1"
SQLITE, POSTGRESQL = "manage.py score, logged in SQLite", "manage.py score, logged in PostgreSQL"
CLIENTS, PAUSE, IDLE_SECONDS = 4, 0.02, 10

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

COUNT = """
import django
django.setup()
from apps.endpoints.models import MLRequest
print(MLRequest.objects.count())
"""
SUBMIT = """
import sys
from pathlib import Path
import django
django.setup()
from django.core.files import File
from django.utils import timezone
from apps.endpoints import batch_jobs
from apps.endpoints.prediction import Wanted
path = Path(sys.argv[1])
with path.open("rb") as file:
    wanted = Wanted(default_status="production")
    sources = [batch_jobs.uploaded(File(file, path.name))]
    job, _ = batch_jobs.submit(sources, "classifier", wanted, by="bench", now=timezone.now())
print(job.pk)
"""
# Threads that ask for one customer after the other, with a pause, until a job is finished or so many seconds are over.
ASK = """
import csv, http.client, json, statistics, sys, threading, time
port, table, job, seconds, clients, pause = int(sys.argv[1]), sys.argv[2], sys.argv[3], *map(float, sys.argv[4:])
with open(table) as file:
    row = {name: float(cell) for name, cell in next(csv.DictReader(file)).items()}
waited, is_over, deadline = [], threading.Event(), time.monotonic() + seconds
def asked(connection, method, path, body=None):
    connection.request(method, path, body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    text = answer.read()
    assert answer.status < 300, text
    return json.loads(text)
def client():
    connection = http.client.HTTPConnection("127.0.0.1", port)
    while not is_over.is_set():
        began = time.perf_counter()
        asked(connection, "POST", "/api/v1/classifier/predict", json.dumps(row))
        waited.append((time.perf_counter() - began) * 1000)
        time.sleep(pause)
threads = [threading.Thread(target=client) for _ in range(int(clients))]
for thread in threads:
    thread.start()
state = "running"
while (state not in ("succeeded", "failed", "cancelled")) if job else (time.monotonic() < deadline):
    time.sleep(0.2)
    if job:
        state = asked(http.client.HTTPConnection("127.0.0.1", port), "GET", f"/api/v1/batch-jobs/{job}")["state"]
is_over.set()
for thread in threads:
    thread.join()
assert not job or state == "succeeded", state
print(json.dumps([len(waited), statistics.median(waited), statistics.quantiles(waited, n=100)[98]]))
"""
INSERTS = """
import sys, time
import django
django.setup()
from django.db import connection
from apps.endpoints.batch_jobs import PART_ROWS
from apps.endpoints.models import MLRequest
most = int(sys.argv[1])
name = MLRequest._meta.db_table
with connection.cursor() as cursor:
    cursor.execute("DROP TABLE IF EXISTS again")
    if connection.vendor == "postgresql":
        cursor.execute(f"CREATE TABLE again (LIKE {name} INCLUDING ALL)")
        with cursor.copy(f"COPY (SELECT * FROM {name} LIMIT {most}) TO STDOUT") as copy:
            rows = b"".join(copy).splitlines(keepends=True)
    else:
        cursor.execute("SELECT sql FROM sqlite_master WHERE tbl_name = %s AND sql IS NOT NULL ORDER BY rowid", [name])
        for (sql,) in cursor.fetchall():
            cursor.execute(sql.replace(f'"{name}"', '"again"').replace('INDEX "', 'INDEX "again_'))
        cursor.execute(f"SELECT * FROM {name} LIMIT {most}")
        rows = cursor.fetchall()
    raw = connection.connection
    began = time.perf_counter()
    for begin in range(0, len(rows), PART_ROWS):
        part = rows[begin : begin + PART_ROWS]
        cursor.execute("BEGIN")
        if connection.vendor == "postgresql":
            with cursor.copy("COPY again FROM STDIN") as copy:
                copy.write(b"".join(part))
        else:
            raw.executemany(f"INSERT INTO again VALUES ({', '.join('?' * len(part[0]))})", part)
        cursor.execute("COMMIT")
    print(len(rows) / (time.perf_counter() - began))
    cursor.execute("DROP TABLE again")
"""
INSERTED_ROWS = 200_000


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
            "BATCH_DIR": str(folder / "batches"),
            "DEBUG": "1",
            "LOG_LEVEL": "WARNING",
        }
        training = folder / "training.csv"
        self.python("-c", MAKE, training, self.table, rows, TRAINING_ROWS, FEATURES, INFORMATIVE, SEED)
        self.python(REPOSITORY / "research" / "train.py", "--data", training)
        self.python("-c", TAKE_MODEL, folder / "artifacts", self.model)
        self.prepare_database()

    def prepare_database(self) -> None:
        for command in ("migrate", "register_algorithms"):
            self.python(BACKEND / "manage.py", command)

    def on(self, database_url: str) -> Bench:
        """The same, with another database, which is empty."""
        other = copy.copy(self)
        other.environment = {**self.environment, "DATABASE_URL": database_url}
        other.prepare_database()
        return other

    def python(self, *arguments: object) -> str:
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, env=self.environment, stdout=subprocess.PIPE, text=True, check=True)
        return done.stdout

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

    def score(self, table: Path, log: str = "none") -> tuple[float, float]:
        scored = table.with_suffix(".scored.csv" if log == "none" else ".logged.csv")
        return self.measured(BACKEND / "manage.py", "score", table, scored, "--log", log)

    def waits(self) -> list[list[float]]:
        """Of single predictions, how many there were and the milliseconds of p50 and p99: by an idle server, and by one
        whose worker scores and logs the table."""
        port = postgresql.free_port()
        environment = {**self.environment, "PORT": str(port), "WEB_CONCURRENCY": "1", "BATCH_WORKERS": "1"}
        server = Server([sys.executable, str(BACKEND / "serve.py")], environment, self.folder, self.folder / "log")
        try:
            while not _answers(port):
                if server.has_ended:
                    raise SystemExit(f"The server stopped: {server.last_words()}")
                time.sleep(0.2)
            ask = ["-c", ASK, port, self.table]
            often = [IDLE_SECONDS, CLIENTS, PAUSE]
            self.python(*ask, "", *often)  # the first are slower
            idle = self.python(*ask, "", *often)
            job = self.python("-c", SUBMIT, self.table).strip()
            return [json.loads(idle), json.loads(self.python(*ask, job, *often))]
        finally:
            server.stop()

    def inserts_alone(self) -> float:
        """Rows per second at which a database takes again, into an empty table, what it has logged."""
        return float(self.python("-c", INSERTS, INSERTED_ROWS))

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


def _answers(port: int) -> bool:
    with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=10):
        return True
    return False


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-rows", type=int, help="By default none; 5000000 takes ten GB of disk.")
    options = parser.parse_args(arguments)
    with ExitStack() as stack:
        bench = Bench(Path(stack.enter_context(tempfile.TemporaryDirectory())), options.rows)
        logging = {SQLITE: bench.on(f"sqlite:///{bench.folder / 'logged.sqlite3'}")}
        if postgresql.binaries():
            url = stack.enter_context(postgresql.running(durable=True))
            logging[POSTGRESQL] = bench.on(postgresql.new_database(url))
        report(bench, logging, options.rounds, options.memory_rows)


def report(bench: Bench, logging: dict[str, Bench], rounds: int, memory_rows: int | None) -> None:
    bench.score(bench.excerpt(1))  # compiles what is kept on disk
    idle = bench.score(bench.excerpt(1))
    ways = {
        SCORE: lambda: bench.score(bench.table),
        ONE_CORE: lambda: bench.script(1),
        ALL_CORES: lambda: bench.script(-1),
        **{way: partial(each.score, each.table, "all") for way, each in logging.items()},
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
    rows.append([f"{SCORE}, one row", short(idle[0]), "", f"{idle[1]:,.0f}", ""])
    if memory_rows:
        longer = bench.score(bench.excerpt(memory_rows))
        rows.append([f"{SCORE}, {memory_rows:,} rows", short(longer[0]), "", f"{longer[1]:,.0f}", ""])
    sys.stdout.write(f"{machine()}; {rounds} rounds, in turn; median (least to greatest).\n\n")
    sys.stdout.write(
        table([f"{bench.rows:,} rows", "seconds", "rows per second", "MiB at most", f"times as long as {SCORE}"], rows)
    )
    for way, each in logging.items():
        logged = int(each.python("-c", COUNT))
        if logged != rounds * bench.rows:
            raise SystemExit(f"{way}: {logged:,} rows.")
    alone = {way: Spread.of(each.inserts_alone() for _ in range(rounds)) for way, each in logging.items()}
    sys.stdout.write("\n")
    sys.stdout.write(
        table(
            ["rows per second", "the inserts alone", "the whole job, of these"],
            [
                [way, f"{rate.median:,.0f}", f"{bench.rows / Spread.of(seconds[way]).median / rate.median:.0%}"]
                for way, rate in alone.items()
            ],
        )
    )
    difference = bench.difference()
    sys.stdout.write(f"\nLargest difference from the probabilities of {ONE_CORE}: {difference:.1e}\n\n")

    layers = json.loads(bench.python("-c", LAYERS, bench.table, bench.folder / "layers.csv"))
    limit = json.loads(bench.python("-c", READ, bench.table))
    timed = [
        (name, short(spent))
        for name, spent in [*layers.items(), ("all of these", sum(layers.values())), *limit.items()]
    ]
    sys.stdout.write(table(["in one thread", "seconds"], timed) + "\n")

    waits = []
    for way, each in logging.items():
        idle_server, busy = each.waits()
        waits += [
            [f"{way}: idle", *_shown(idle_server), ""],
            ["with a job", *_shown(busy), short(busy[2] / idle_server[2])],
        ]
    head = ["single predictions", "answers", "p50 in ms", "p99 in ms", "p99, times the idle server's"]
    sys.stdout.write(table(head, waits))


def _shown(waited: list[float]) -> list[str]:
    answers, *milliseconds = waited
    return [f"{answers:,}", *map(short, milliseconds)]


if __name__ == "__main__":
    main()

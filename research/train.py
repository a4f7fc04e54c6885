"""Train the retention models: a CSV of customers in, one run folder of artifacts out.

    python research/train.py
    python research/train.py --data customers.csv --target Churn --positive No --id customerID
    python research/train.py --dask tcp://10.0.0.5:8786

The notebook calls the same functions: `load_table`, `split`, `fit`, `evaluate` and `write_artifacts`, or
`train` for all but the first.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import platform
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import environ
import joblib
import numpy as np
import pandas as pd
from sklearn.ensemble import ExtraTreesClassifier, RandomForestClassifier
from sklearn.model_selection import train_test_split
from sklearn.tree import DecisionTreeClassifier
from tqdm import tqdm

RESEARCH = Path(__file__).resolve().parent
BACKEND = RESEARCH.parent / "backend" / "server"
for _folder in (RESEARCH, BACKEND):
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))
environ.Env.read_env(RESEARCH.parent / ".env")  # where the server finds ML_ARTIFACTS_DIR too

import evaluation  # noqa: E402
from apps.ml import artifacts  # noqa: E402
from apps.ml.schema import (  # noqa: E402
    MISSING_IN_FILES,
    InputError,
    Schema,
    TableError,
    learn_schema,
    outcomes,
    rows_of,
)

DATA = RESEARCH / "data" / "processed.csv"
TARGET = "IsRetained"
SEED = 42
TEST_SHARE = 0.25
FEWEST_ROWS = 20
FEWEST_PER_CLASS = 2
SAMPLES = 5
DELIMITERS = ",;\t"
BASELINE = "baseline"
TRAINING_CUSTOMERS = "training_customers.txt"

# A leaf of 20 customers can say a probability; a leaf of one can only say 0 or 1. In five-fold cross-validation
# on the training part of the CDNOW table, 20 instead of 1 lowers the log loss of the forest from 0.92 to 0.49, of
# the extra trees from 2.09 to 0.49 and of the tree from 0.68 to 0.53, raises every AUC by 0.01 to 0.045, and
# shrinks the files five to twenty-five times. 10 and 50 are within 0.005 for the forests.
SMALLEST_LEAF = 20

#: What is trained: the key is the artifact's name and the server's name for the algorithm. One line per model.
MODELS: dict[str, Callable[[int], Any]] = {
    "random_forest": lambda seed: RandomForestClassifier(100, min_samples_leaf=SMALLEST_LEAF, random_state=seed),
    "extra_trees": lambda seed: ExtraTreesClassifier(100, min_samples_leaf=SMALLEST_LEAF, random_state=seed),
    "decision_tree": lambda seed: DecisionTreeClassifier(
        max_leaf_nodes=100, min_samples_leaf=SMALLEST_LEAF, random_state=seed
    ),
}

# customer_id, id, CustomerId, customerID, userid, customer key; but not paid, Grid or monkey.
_IDENTIFIER_NAME = re.compile(
    r"(^|[^a-z])(id|key)$|(customer|client|user|member|account|subscriber|contact|person)(id|key)$", re.IGNORECASE
)
_IDENTIFIER_IN_CAMEL_CASE = re.compile(r"[a-z0-9](Id|ID|Key)$")

_ROWS_AT_A_TIME = 50_000

CLUSTER_SECONDS = 10  # within which a scheduler answers, if it is there


class ClusterError(Exception):
    """A Dask cluster that cannot train; the message says why."""


@dataclass(frozen=True)
class Table:
    """A training table as it was read. `notes` are sentences for the person who trains."""

    frame: pd.DataFrame
    schema: Schema
    filename: str
    sha256: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Split:
    """A table in two parts that share no customer, encoded as in production.

    schema: learned from the training rows alone. train_rows, test_rows: positions in the table, in its order.
    train_matrix, test_matrix: (rows, features) float64. train_outcome, test_outcome: (rows,) int, 1 is retained.
    test_customers: (rows,) int, equal for rows of one customer.
    """

    schema: Schema
    train_rows: np.ndarray
    test_rows: np.ndarray
    train_matrix: np.ndarray
    test_matrix: np.ndarray
    train_outcome: np.ndarray
    test_outcome: np.ndarray
    test_customers: np.ndarray


@dataclass(frozen=True)
class Fitted:
    """A trained estimator and how long its training took, in seconds."""

    model: Any
    seconds: float

    def probability(self, matrix: np.ndarray) -> np.ndarray:
        """The probability that each customer stays, (rows,) float in [0, 1]."""
        return self.model.predict_proba(matrix)[:, 1]


def load_table(
    path: Path | str,
    target: str = TARGET,
    positive: str | None = None,
    identifier: str | None = None,
    drop: Sequence[str] = (),
) -> Table:
    """Read and check a CSV file: UTF-8, a header, separated by commas, semicolons or tabs.

    positive: the target's value that means "stayed", as text; by default 1, true or yes. identifier: the column
    that names the customer, by default one that plainly does, if there is one; it is read as text. Several rows
    may name the same customer. drop: columns to leave out. What counts as missing, and how a number is read, is as
    in production. Raises TableError with a sentence.
    """
    path = Path(path)
    content = _content(path)
    text = _decoded(content, path.name)
    header, delimiter, missing = _checked_shape(text, path.name)
    if identifier == target:
        raise TableError(f"--id and --target both name {target}; the identifier must be another column.")

    def read(columns: Sequence[str] | None, as_text: Sequence[str]) -> pd.DataFrame:
        try:
            frame = pd.read_csv(
                io.StringIO(text),
                sep=delimiter,
                header=0,
                names=header,  # without the spaces around them, as batches read them
                usecols=columns,
                dtype=dict.fromkeys(as_text, str),
                index_col=False,
                keep_default_na=False,
                na_values=missing,
                low_memory=False,  # else a column may have one type here and another there
            )
        except (ValueError, OverflowError) as error:
            raise TableError(f"{path.name} cannot be read as a table: {error}.") from error
        # pandas leaves "" and the like in a column of whole numbers from 2**63 on, which it reads as text.
        for name, column in frame.select_dtypes("str").items():
            frame[name] = column.mask(column.isin(missing))
        return frame

    notes: list[str] = []
    if identifier is None:
        named = [name for name in header if _names_an_identifier(name) and name not in {target, *drop}]
        identifier = _likely_identifier(read(named, named), notes) if named else None
    frame = read(None, [identifier] if identifier else [])
    schema = learn_schema(frame, target, positive, identifier, drop)
    if len(frame) < FEWEST_ROWS:
        raise TableError(f"{path.name} has {len(frame)} rows; at least {FEWEST_ROWS} are needed to train and to test.")
    return Table(frame, schema, path.name, hashlib.sha256(content).hexdigest(), tuple(notes))


def split(table: Table, seed: int = SEED) -> Split:
    """Three quarters of the customers to train on, one quarter to test on, with equal shares of retained.

    All rows of a customer fall in the same part. Modes and categories are learned from the training rows alone, so
    the test meets missing values and unseen categories exactly as production will. Raises TableError.
    """
    frame, target = table.frame, table.schema.target
    outcome = outcomes(frame, target)
    customer = _customers(frame, table.schema)
    ever_retained = np.zeros(int(customer.max()) + 1, dtype=np.int64)
    np.maximum.at(ever_retained, customer, outcome)
    try:
        _, tested = train_test_split(
            np.arange(len(ever_retained)), test_size=TEST_SHARE, stratify=ever_retained, random_state=seed
        )
    except ValueError as error:
        raise TableError(f"The table has too few customers to split: {error}") from error
    in_test = np.isin(customer, tested)
    train_rows, test_rows = np.flatnonzero(~in_test), np.flatnonzero(in_test)
    for rows, part in [(train_rows, "train on"), (test_rows, "test on")]:
        for value, spelling in [(1, target.positive), (0, target.negative)]:
            count = int((outcome[rows] == value).sum())
            if count < FEWEST_PER_CLASS:
                raise TableError(
                    f"Of the rows to {part}, {count} have {target.name} = {spelling}; at least {FEWEST_PER_CLASS} "
                    "are needed. Add customers of that kind."
                )
    try:
        schema = learn_schema(
            frame.iloc[train_rows], target.name, target.positive, table.schema.identifier, table.schema.dropped
        )
        return Split(
            schema=schema,
            train_rows=train_rows,
            test_rows=test_rows,
            train_matrix=_matrix(schema, frame.iloc[train_rows]),
            test_matrix=_matrix(schema, frame.iloc[test_rows]),
            train_outcome=outcome[train_rows],
            test_outcome=outcome[test_rows],
            test_customers=customer[test_rows],
        )
    except TableError as error:
        raise TableError(f"Among the three quarters of the rows to train on: {error}") from error
    except InputError as error:
        raise TableError(f"The table cannot be encoded: {error}.") from error


def fit(
    parts: Split,
    seed: int = SEED,
    models: Mapping[str, Callable[[int], Any]] = MODELS,
    dask: str | None = None,
) -> dict[str, Fitted]:
    """Train each model on the training part, on all processors. Afterwards each uses one, as the server does.

    dask: the address of a scheduler, on whose cluster the same is trained. Raises ClusterError.
    """
    fitted = {}
    with _on_cluster(dask) if dask else nullcontext():
        for key, make in _progress(models.items(), "Training"):
            started = time.perf_counter()
            model = make(seed)
            parallel = "n_jobs" in model.get_params()
            if parallel:
                model.set_params(n_jobs=-1)
            model.fit(parts.train_matrix, parts.train_outcome)
            if parallel:
                model.set_params(n_jobs=None)
            fitted[key] = Fitted(model, time.perf_counter() - started)
    return fitted


@contextmanager
def _on_cluster(address: str) -> Iterator[None]:
    """What scikit-learn does in parallel is done by the workers of a Dask cluster. Raises ClusterError."""
    try:
        from distributed import CancelledError, Client, KilledWorker
    except ImportError:
        raise ClusterError("--dask needs Dask: pip install -r requirements-dask.txt") from None
    try:
        client = Client(address, timeout=CLUSTER_SECONDS)
    except (OSError, ImportError, ValueError) as error:
        raise ClusterError(f"The Dask scheduler at {address} does not answer ({error}).") from None
    with client:
        versions = client.run(metadata.version, "scikit-learn")
        if not versions:
            raise ClusterError(f"The Dask cluster at {address} has no workers.")
        here = metadata.version("scikit-learn")
        for worker, version in versions.items():
            if version != here:
                raise ClusterError(f"The Dask worker {worker} has scikit-learn {version}, this is {here}.")
        try:
            with joblib.parallel_config(backend="dask"):
                yield
        except (CancelledError, KilledWorker):
            raise ClusterError(f"The Dask cluster at {address} lost a worker while it trained; train again.") from None


def evaluate(
    fitted: Mapping[str, Fitted], parts: Split, seed: int = SEED, resamples: int = evaluation.RESAMPLES
) -> dict[str, dict[str, dict[str, float]]]:
    """Scores on the test part, {model: {metric: {"value", "low", "high"}}}, `baseline` first.

    The baseline gives every customer the training part's share of retained as probability, and so always
    answers the larger class.
    """
    share = parts.train_outcome.mean()
    probabilities = {BASELINE: np.full(len(parts.test_outcome), share)}
    probabilities |= {key: one.probability(parts.test_matrix) for key, one in fitted.items()}
    return {
        key: evaluation.scores(
            probability, parts.test_outcome, seed=seed, resamples=resamples, customers=parts.test_customers
        )
        for key, probability in _progress(probabilities.items(), "Evaluating")
    }


def write_artifacts(
    table: Table,
    parts: Split,
    fitted: Mapping[str, Fitted],
    metrics: Mapping[str, Any],
    *,
    directory: Path,
    version: str,
    seed: int,
    trained_at: datetime,
    seconds: float,
) -> artifacts.TrainingRun:
    """Write the run folder, whole or not at all. Raises ArtifactError or OSError.

    seconds: how long loading, splitting, training and evaluating took.
    """
    schema = parts.schema
    files: dict[str, Any] = {f"{key}.joblib": one.model for key, one in fitted.items()}
    files["train_mode.joblib"] = {column.name: column.mode for column in schema.columns}
    files["encoders.joblib"] = {column.name: list(column.categories) for column in schema.columns if column.categories}
    if schema.identifier:
        keys = dict.fromkeys(table.frame[schema.identifier].iloc[parts.train_rows].str.strip())
        files[TRAINING_CUSTOMERS] = "".join(f"{key}\n" for key in keys)
    manifest = {
        "trained_at": trained_at.isoformat(),
        "seed": seed,
        "python": platform.python_version(),
        "libraries": artifacts.library_versions(),
        "data": {
            "file": table.filename,
            "sha256": table.sha256,
            "rows": len(table.frame),
            "columns": len(table.frame.columns),
        },
        "rows": {"train": len(parts.train_rows), "test": len(parts.test_rows)},
        "schema": schema.as_dict(),
        "target": {
            "name": schema.target.name,
            "positive": schema.target.positive,
            "negative": schema.target.negative,
            "positive_share": float(outcomes(table.frame, schema.target).mean()),
        },
        "training_customers": TRAINING_CUSTOMERS if schema.identifier else None,
        "models": {
            key: {"file": f"{key}.joblib", "parameters": _parameters(one.model), "seconds": one.seconds}
            for key, one in fitted.items()
        },
        "metrics": dict(metrics),
        "samples": _samples(table, parts, fitted),
        "seconds": seconds,
    }
    json.dumps(manifest, allow_nan=False)  # a browser or another language must be able to read it
    return artifacts.write_run(directory, version, files, manifest)


def train(
    table: Table,
    *,
    version: str | None = None,
    seed: int = SEED,
    directory: Path | str | None = None,
    resamples: int = evaluation.RESAMPLES,
    models: Mapping[str, Callable[[int], Any]] = MODELS,
    dask: str | None = None,
) -> artifacts.TrainingRun:
    """Split, fit, evaluate and write one run; returns it, with everything in its manifest.

    version: by default the next minor after the highest. directory: of the runs, by default
    `ML_ARTIFACTS_DIR` or `research/artifacts`. dask: as for `fit`. Raises TableError, ClusterError, ArtifactError or
    OSError.
    """
    started = time.perf_counter()
    directory = Path(directory) if directory else artifacts.default_artifacts_dir()
    version = version or artifacts.next_version(directory)
    artifacts.check_version(version)
    if (directory / version).exists():  # write_run says so too, but only after the training
        raise artifacts.ArtifactError(
            f"Version {version} exists already in {directory}; choose another with --version."
        )
    parts = split(table, seed)
    fitted = fit(parts, seed, models, dask)
    metrics = evaluate(fitted, parts, seed, resamples)
    return write_artifacts(
        table,
        parts,
        fitted,
        metrics,
        directory=directory,
        version=version,
        seed=seed,
        trained_at=datetime.now(UTC),
        seconds=time.perf_counter() - started,
    )


def summary(run: artifacts.TrainingRun) -> str:
    """The scores of a run as lines of text, one per metric, models side by side."""
    metrics, rows = run.manifest["metrics"], run.manifest["rows"]
    lines = [["", *(key.replace("_", " ") for key in metrics)]]
    for name in evaluation.METRICS:
        cells = [
            f"{score['value']:.3f}" if key == BASELINE else "{value:.3f} ({low:.3f}-{high:.3f})".format(**score)
            for key, score in ((key, of_model[name]) for key, of_model in metrics.items())
        ]
        lines.append([name.replace("_", " "), *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    title = f"Scores on {rows['test']:,} held-out rows ({rows['train']:,} trained on), with 95% intervals:"
    return "\n".join([title, "", *table])


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. Returns the exit code: 0, 2 with one sentence when no model can be made, 130 when interrupted."""
    options = _options(argv)
    started = time.perf_counter()
    try:
        if options.if_missing and (runs := artifacts.training_runs(options.artifacts_dir)):
            sys.stdout.write(f"Version {runs[-1].version} is in {options.artifacts_dir} already; nothing to train.\n")
            return 0
        table = load_table(options.data, options.target, options.positive, options.identifier, options.drop)
        for note in table.notes:
            sys.stdout.write(f"{note}\n")
        sys.stdout.write(
            f"Training on {table.filename}: {len(table.frame):,} rows, {len(table.schema.columns)} features.\n"
        )
        sys.stdout.flush()
        run = train(
            table, version=options.version, seed=options.seed, directory=options.artifacts_dir, dask=options.dask
        )
    except (TableError, ClusterError, artifacts.ArtifactError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except OSError as error:
        sys.stderr.write(f"{error.filename or options.artifacts_dir} cannot be used: {error.strerror or error}.\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted; nothing was written.\n")
        return 130
    sys.stdout.write(
        f"\n{summary(run)}\n\n"
        f"Wrote version {run.version} to {run.folder} in {time.perf_counter() - started:.1f} s.\n"
        "Next: register it; a running server answers with it from the next request on, and one that starts does it.\n"
        f"  {_manage()} register_algorithms\n"
        "For customers of another kind, name an endpoint of their own instead:\n"
        f"  {_manage()} register_algorithms --endpoint NAME --version {run.version}\n"
    )
    return 0


def _manage() -> str:
    """How to call the server's commands from here."""
    python, here = Path(sys.executable), Path.cwd()
    if python.is_relative_to(here):
        python = python.relative_to(here)
    manage = BACKEND / "manage.py"
    if manage.is_relative_to(here):
        manage = manage.relative_to(here)
    return shlex.join([str(python), str(manage)])


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the retention models on a CSV file of customers.")
    parser.add_argument("--data", type=Path, metavar="FILE", default=DATA, help="CSV file (default: %(default)s)")
    parser.add_argument("--target", metavar="COL", default=TARGET, help="column to predict (default: %(default)s)")
    parser.add_argument("--positive", metavar="VALUE", help="the target's value of customers who stayed (default: 1)")
    parser.add_argument(
        "--id", metavar="COL", dest="identifier", help="column that names the customer (default: found)"
    )
    parser.add_argument("--drop", metavar="COL,COL", type=_names, default=[], help="columns to leave out, as leaks")
    parser.add_argument("--version", help="name of this run (default: the next minor version)")
    parser.add_argument(
        "--seed", type=_seed, default=SEED, help="of split, models and intervals (default: %(default)s)"
    )
    parser.add_argument(
        "--artifacts-dir",
        type=Path,
        metavar="DIR",
        default=artifacts.default_artifacts_dir(),
        help="where runs are written (default: %(default)s)",
    )
    parser.add_argument(
        "--dask", metavar="ADDRESS", help="train on the Dask cluster of this scheduler, tcp://HOST:PORT"
    )
    parser.add_argument("--if-missing", action="store_true", help="do nothing if there is a run already")
    return parser.parse_args(argv)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 0 to {2**32 - 1}")
    return int(text)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        remedy = "make it with `python research/prepare_data.py`" if path == DATA else "name one with --data"
        raise TableError(f"There is no file {path}; {remedy}.") from None
    except OSError as error:
        raise TableError(f"{path} cannot be read: {error.strerror}.") from None


def _decoded(content: bytes, filename: str) -> str:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise TableError(f"{filename} is not UTF-8 in line {line}; save it as CSV UTF-8.") from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise TableError(f"{filename} holds a NUL character in line {line}; save it as plain CSV.")
    return text


def _checked_shape(text: str, filename: str) -> tuple[list[str], str, list[str]]:
    """The header, the delimiter, and every spelling of "missing" in the file. Raises TableError."""
    lines = io.StringIO(text, newline="")
    try:
        first = next((line for line in lines if line.strip()), "")
        delimiter = max(DELIMITERS, key=lambda mark: len(next(csv.reader([first], delimiter=mark), [])))
        lines.seek(0)
        reader = csv.reader(lines, delimiter=delimiter)
        filled = (row for row in reader if "".join(row).strip() or len(row) > 1)
        header = next(filled, None)
        if header is None:
            raise TableError(f"{filename} is empty.")
        header = [name.strip() for name in header]
        _check_names(header)
        missing = set(MISSING_IN_FILES)
        count = 0
        for count, row in enumerate(filled, start=1):  # noqa: B007
            if len(row) != len(header):
                raise TableError(
                    f"{filename} has {len(row)} fields in line {reader.line_num}, but {len(header)} columns; "
                    "correct that line."
                )
            # In production a cell is stripped before it is looked up, so " " is missing there.
            missing.update(cell for cell in row if cell.strip() in MISSING_IN_FILES)
    except csv.Error as error:
        raise TableError(f"{filename} cannot be read as a table: {error}.") from error
    if not count:
        raise TableError(f"{filename} has a header and no rows.")
    return header, delimiter, sorted(missing)


def _check_names(header: Sequence[str]) -> None:
    for position, name in enumerate(header, start=1):
        if not name:
            raise TableError(f"Column {position} has no name; give it one in the header, or delete the column.")
        if header.index(name) != position - 1:
            raise TableError(f"Two columns are named {name}; rename or delete one of them.")


def _names_an_identifier(name: str) -> bool:
    return bool(_IDENTIFIER_NAME.search(name) or _IDENTIFIER_IN_CAMEL_CASE.search(name))


def _likely_identifier(candidates: pd.DataFrame, notes: list[str]) -> str | None:
    """The first column that has a different value in every row. Adds a note on what was decided."""
    for name, column in candidates.items():
        if column.notna().all() and column.str.strip().is_unique:
            notes.append(
                f"{name} names the customer: every row has another value. (Not so? Name the column with --id.)"
            )
            return str(name)
    for name in candidates:
        notes.append(f"{name} is taken for a feature: its values repeat or are missing. Is it the customer? Say --id.")
    return None


def _customers(frame: pd.DataFrame, schema: Schema) -> np.ndarray:
    """Who each row is of, (rows,) int from 0; without an identifier each row is a customer. Raises TableError."""
    name = schema.identifier
    if name is None:
        return np.arange(len(frame))
    keys = []
    for row, value in enumerate(rows_of(frame[[name]]), start=1):
        try:
            key = schema.customer_key(value)
        except ValueError as error:
            raise TableError(f"Row {row}: {error}.") from error
        if not key:
            raise TableError(f"The identifier {name} is missing in row {row}; fill it in, or remove that row.")
        if len(key.splitlines()) > 1:
            raise TableError(f"The identifier {name} has a line break in row {row}; remove it.")
        keys.append(key)
    return pd.factorize(np.array(keys, dtype=object))[0]


def _matrix(schema: Schema, frame: pd.DataFrame) -> np.ndarray:
    """The features of a table as the model sees them in production, (rows, features) float64. Raises InputError."""
    features = frame[list(schema.names)]
    starts = range(0, len(features), _ROWS_AT_A_TIME)
    blocks = (features.iloc[start : start + _ROWS_AT_A_TIME] for start in starts)
    encoded = [schema.align_table(block).matrix for block in _progress(blocks, "Encoding", len(starts))]
    return np.concatenate(encoded)


def _samples(table: Table, parts: Split, fitted: Mapping[str, Fitted]) -> list[dict[str, Any]]:
    """A few held-out rows and their probabilities, the first with a missing value among them if there is one."""
    features = table.frame[list(parts.schema.names)].iloc[parts.test_rows]
    incomplete = np.flatnonzero(features.isna().any(axis=1))[:1]
    chosen = sorted(list(dict.fromkeys([*incomplete.tolist(), *range(len(features))]))[:SAMPLES])
    probabilities = {key: one.probability(parts.test_matrix[chosen]) for key, one in fitted.items()}
    return [
        {"row": row, "probabilities": {key: float(column[index]) for key, column in probabilities.items()}}
        for index, row in enumerate(rows_of(features.iloc[chosen]))
    ]


def _parameters(model: Any) -> dict[str, Any]:
    return {
        name: value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)
        for name, value in model.get_params().items()
    }


def _progress(items: Iterable[Any], what: str, total: int | None = None) -> Iterable[Any]:
    """A bar on stderr, if that is a terminal."""
    return tqdm(items, desc=what, total=total, disable=None, leave=False)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a column's name may not fit a Windows code page
    sys.exit(main())

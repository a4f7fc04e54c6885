"""Who may import whom, and what server code may not know."""

from __future__ import annotations

import ast
import csv
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import BACKEND, REPOSITORY

APPS = BACKEND / "apps"
RESEARCH = REPOSITORY / "research"


def own_sources() -> Iterator[Path]:
    """The server's Python files, without tests and generated migrations."""
    for path in sorted([*APPS.rglob("*.py"), *(BACKEND / "server").rglob("*.py"), BACKEND / "manage.py"]):
        if not {"tests", "migrations"} & set(path.parts):
            yield path


def check_imports(backend: Path) -> subprocess.CompletedProcess:
    """Run the contracts of pyproject.toml on a copy of the server or on the server itself."""
    lint = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(sys.argv[1], no_cache=True))"
    return subprocess.run(
        [sys.executable, "-c", lint, str(REPOSITORY / "pyproject.toml")],
        cwd=backend,
        env={**os.environ, "PYTHONPATH": str(backend)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.whole
def test_each_module_imports_only_what_it_may():
    checked = check_imports(BACKEND)

    assert checked.returncode == 0, checked.stdout


@pytest.mark.whole
@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("apps/ml/schema.py", "import apps.ml.registry"),
        ("apps/ml/classifier/base.py", "import django.conf"),
        ("apps/endpoints/models.py", "import apps.endpoints.lifecycle"),
        ("apps/endpoints/views.py", "import server.settings"),
    ],
)
def test_an_import_against_the_rules_is_found(tmp_path, module, forbidden):
    backend = Path(shutil.copytree(BACKEND, tmp_path / "server", ignore=shutil.ignore_patterns("*.sqlite3*", "tests")))
    with (backend / module).open("a") as source:
        source.write(f"\n{forbidden}\n")

    checked = check_imports(backend)

    assert checked.returncode == 1
    assert "BROKEN" in checked.stdout


def test_every_module_has_its_place_in_the_rules():
    contracts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    placed = {module.strip() for layer in layers for module in layer.split("|")}

    for path in own_sources():
        module = ".".join(path.relative_to(BACKEND).with_suffix("").parts)
        if (path.name == "__init__.py" and not path.read_text().strip()) or path.name == "manage.py":
            continue
        above = {".".join(module.split(".")[:length]) for length in range(1, module.count(".") + 2)}
        assert above & placed, f"{module} is new: give it a place among the layers in pyproject.toml"


def imported_by(path: Path) -> set[str]:
    """All that a file imports, wherever in it, with the modules that it is imported from."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_the_server_needs_nothing_of_research_bench_or_tests():
    elsewhere = {path.stem for folder in (RESEARCH, REPOSITORY / "bench") for path in folder.glob("*.py")}
    assert {"train", "contestants"} <= elsewhere
    elsewhere |= {"research", "bench", "tests", "conftest", "pytest"}

    found = {str(path): {name.split(".")[0] for name in imported_by(path)} & elsewhere for path in own_sources()}

    assert not {path: names for path, names in found.items() if names}


def test_research_uses_only_what_needs_no_django():
    contracts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (plain,) = [tuple(contract["source_modules"]) for contract in contracts if contract["type"] == "forbidden"]

    found = {path.name: imported_by(path) for path in RESEARCH.glob("*.py")}
    of_the_server = {path: {name for name in names if name.startswith("apps.")} for path, names in found.items()}

    assert "apps.endpoints.statistics" in of_the_server["peeking.py"]
    assert not {path: names for path, names in of_the_server.items() if not all(n.startswith(plain) for n in names)}


def test_no_column_of_the_default_data_is_written_in_server_code():
    with (RESEARCH / "data/processed.csv").open(encoding="utf-8") as file:
        columns = next(csv.reader(file))
    assert "IsRetained" in columns
    # Every column name but plain English words, which may stand for something else.
    named = re.compile("|".join(rf"\b{re.escape(name)}\b" for name in columns if not name.istitle()))

    pages = [path for kind in ("*.html", "*.js") for path in APPS.rglob(kind)]
    found = {str(path): named.findall(path.read_text(encoding="utf-8")) for path in [*own_sources(), *pages]}

    assert not {path: names for path, names in found.items() if names}

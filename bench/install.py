"""An environment for each contestant, in bench/environments; made once, and again when its requirements change."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

CONTESTANTS = Path(__file__).with_name("contestants")
ENVIRONMENTS = Path(__file__).with_name("environments")
SECONDS = 1200
OF_THE_PRODUCT = {
    *("Django", "djangorestframework", "django-rest-knox", "uvicorn", "uvloop"),
    *("numba", "numpy", "psycopg", "scikit-learn"),
}


class Unavailable(Exception):
    """A contestant that cannot take part; the message says why."""


def requirements(name: str) -> Path:
    return CONTESTANTS / name / "requirements.txt"


def versions(file: Path) -> str:
    """What a file of requirements pins, as a phrase; of the product's only what answers a prediction."""
    pins = re.findall(r"^([\w.-]+)(?:\[\w+\])?==([\w.]+)", file.read_text(), re.MULTILINE)
    if file.parent.parent != CONTESTANTS:
        pins = [(package, version) for package, version in pins if package in OF_THE_PRODUCT]
    return ", ".join(f"{package} {version}" for package, version in pins)


def programs(name: str) -> Path:
    """The bin folder of a contestant's environment. Raises Unavailable."""
    folder, wanted = ENVIRONMENTS / name, requirements(name)
    installed = folder / "installed.txt"
    if not installed.exists() or installed.read_text() != wanted.read_text():
        sys.stdout.write(f"Installing {name} ...\n")
        sys.stdout.flush()
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(exist_ok=True)
        for command in _commands(folder, wanted):
            try:
                made = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
            except subprocess.TimeoutExpired:
                raise Unavailable(f"its installation took more than {SECONDS // 60} minutes") from None
            if made.returncode:
                raise Unavailable(f"it cannot be installed: {(made.stderr.strip() or 'no reason given')[-500:]}")
        installed.write_text(wanted.read_text())
    return folder / "bin"


def _commands(folder: Path, wanted: Path) -> list[list[str]]:
    """Compiled at once: else the first start would take longer than every later one."""
    python = str(folder / "bin" / "python")
    uv = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if uv:
        install = [uv, "pip", "install", "--quiet", "--compile-bytecode", "--python", python, "-r", str(wanted)]
        return [[uv, "venv", "--quiet", "--python", sys.executable, str(folder)], install]
    return [
        [sys.executable, "-m", "venv", str(folder)],
        [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(wanted)],
    ]

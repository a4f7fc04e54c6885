"""The layers are looked up by name in the product, and so have to move with it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("options", "layer", "stored"),
    [
        (["--requests", "10"], "recording, if token and status still hold: one commit", "60 requests were stored"),
        (["--requests", "1", "--list"], "recording, all in one transaction", "6,000 requests were stored"),
    ],
)
def test_each_layer_is_timed_and_every_answer_stored(options: list[str], layer: str, stored: str):
    command = [sys.executable, str(BENCH / "layers.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)

    assert done.returncode == 0, done.stderr
    _, _, *lines = (line.strip("| ") for line in done.stdout.splitlines() if line.startswith("|"))
    times = {name: float(time) for name, time in (line.split(" | ") for line in lines)}
    assert times[layer] > 0
    assert "the line in the log" in times
    assert sum(times.values()) == pytest.approx(2 * times["all of it"], abs=len(times))
    assert stored in done.stdout

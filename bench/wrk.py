"""One run of wrk, the program that makes the load."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

HOW_TO_GET = "wrk, which makes the load, is not installed; get it with: apt-get install wrk"
SCRIPT = Path(__file__).with_name("post.lua")
# A slow server under 64 connections may take seconds, which is no error.
PATIENCE = 30


@dataclass(frozen=True)
class Load:
    """What wrk counted. answers: complete responses. refused: those of them with a status above 399.

    broken: connections that failed and answers that never came. p50, p99: milliseconds, of complete responses.
    """

    answers: int
    refused: int
    broken: int
    seconds: float
    p50: float
    p99: float

    @property
    def good(self) -> int:
        return self.answers - self.refused

    @property
    def rate(self) -> float:
        """Good answers per second."""
        return self.good / self.seconds

    @property
    def errors(self) -> int:
        return self.refused + self.broken


def is_installed() -> bool:
    return shutil.which("wrk") is not None


def parse(output: str) -> Load:
    """Read the line that post.lua prints among wrk's own."""
    (line,) = [line for line in output.splitlines() if line.startswith('{"answers"')]
    return Load(**json.loads(line))


def load(url: str, headers: Mapping[str, str], body: Path, connections: int, seconds: int) -> Load:
    """Post a file for some seconds over so many connections. One thread of wrk makes more load than 64 need."""
    command = ["wrk", "-t", "1", "-c", str(connections), "-d", f"{seconds}s", "--timeout", f"{PATIENCE}s"]
    for name, value in headers.items():
        command += ["-H", f"{name}: {value}"]
    command += ["-s", str(SCRIPT), url, "--", str(body)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 2 * PATIENCE, check=True)
    return parse(finished.stdout)

"""A server and all processes that it starts: their memory, their work, their end. Linux only, as /proc is."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


class Server:
    """A started command. `log` is the file that it writes to."""

    def __init__(self, command: list[str], environment: Mapping[str, str], folder: Path, log: Path):
        self.log = log
        self.began = time.monotonic()
        self._seen: dict[int, str] = {}
        with log.open("ab") as output:
            # Apart from the terminal, so that Ctrl-C reaches this program first and the servers by `stop`.
            self.process = subprocess.Popen(
                command,
                env=dict(environment),
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    @property
    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def last_words(self) -> str:
        """The end of the log, in which servers say why they stopped."""
        lines = self.log.read_text(errors="replace").strip().splitlines() or ["(an empty log)"]
        return lines[-1]

    def tree(self) -> dict[int, str]:
        """Every living process below the command, itself included, with the time at which it began."""
        parents, began = {}, {}
        for folder in Path("/proc").glob("[0-9]*"):
            fields = _stat(int(folder.name))
            if fields:
                parents[int(folder.name)], began[int(folder.name)] = int(fields[1]), fields[19]
        found = {self.process.pid} & parents.keys()
        while below := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= below
        living = {pid: began[pid] for pid in found}
        self._seen |= living
        return living

    def memory(self) -> int:
        """Bytes of all processes, pages that several share counted once (PSS)."""
        total = 0
        for pid in self.tree():
            with suppress(OSError):
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
                total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
        return total

    def _worked(self) -> float:
        """Seconds of processor time of all processes up to now."""
        every = [_stat(pid) for pid in self.tree()]
        return sum(int(fields[11]) + int(fields[12]) for fields in every if fields) / TICKS

    def rest(self, at_most: float = 10) -> None:
        """Wait until requests that wrk has given up are computed, so that they do not slow down the next server."""
        deadline = time.monotonic() + at_most
        before = self._worked()
        while time.monotonic() < deadline:
            time.sleep(0.1)
            now = self._worked()
            if now - before <= 2 / TICKS:
                return
            before = now

    def stop(self, patience: float = 5) -> None:
        """End every process that was ever seen, also those that left their parent, or that do not listen."""
        self.tree()
        self.process.terminate()
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and self._alive():
            self.process.poll()
            time.sleep(0.05)
        for pid in self._alive():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def _alive(self) -> list[int]:
        """Those that still run; a number that a newer process has got is none of them."""
        return [pid for pid, began in self._seen.items() if (fields := _stat(pid)) and fields[19] == began]


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third, the state, on; none if the process has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
    return [] if fields[0] == "Z" else fields

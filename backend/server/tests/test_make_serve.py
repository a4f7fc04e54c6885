"""The first of the two commands, from a fresh clone; and the long way for people without make.

One clone is installed for all of these tests, which is why they run on one worker of pytest.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests

from tests import processes
from tests.postgresql import free_port
from tests.processes import REPOSITORY, outside_world

pytestmark = [pytest.mark.whole, pytest.mark.xdist_group("make")]

# What each command does first.
INSTALL = ["environment", ".venv/runtime"]
INSTALLING = "Installing what the server needs"


def copy_repository(to: Path) -> Path:
    """What git would clone, were everything committed."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in listed.stdout.split("\0"):
        if name and (REPOSITORY / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, to / name)
    return to


def make(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess:
    """A command that ends by itself; `stdout` has both streams."""
    return subprocess.run(
        ["make", *arguments],
        cwd=folder,
        env={**outside_world(), **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )


@dataclass
class Started:
    """A command that goes on until it is told to end, in a process group of its own as a terminal has it."""

    process: subprocess.Popen
    port: int
    log: Path
    seconds: float = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def is_gone(self, within: float = 15) -> bool:
        """Whether every process of the group has ended in time."""
        deadline = time.monotonic() + within
        while time.monotonic() < deadline:
            self.process.poll()
            try:
                os.killpg(self.process.pid, 0)
            except ProcessLookupError:
                return True
            time.sleep(0.05)
        return False

    def get(self, path: str) -> requests.Response:
        return requests.get(self.url + path, timeout=30)


@contextmanager
def started(command: list[str], cwd: Path, log: Path, port: int, **env: str) -> Iterator[Started]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**outside_world(), **env},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    running = Started(process, port, log)
    try:
        yield running
    finally:
        running.signal(signal.SIGINT) if process.poll() is None else None
        if not running.is_gone():
            running.signal(signal.SIGKILL)
        process.wait()


@contextmanager
def serving(folder: Path, log: Path, **env: str) -> Iterator[Started]:
    """`make serve` on a free port, ready, and with its addresses printed."""
    port, began = free_port(), time.monotonic()
    with started(["make", "serve", f"PORT={port}"], folder, log, port, **env) as running:
        processes.wait_until_answered(f"{running.url}/readyz", running.process, log, seconds=300)
        running.seconds = time.monotonic() - began
        # Another process than the one that prints may be the first to be ready.
        wait_for(lambda: "Ready?" in log.read_text())
        yield running


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh clone, in a folder with a space in its name."""
    return copy_repository(tmp_path_factory.mktemp("make") / "fresh clone")


@pytest.fixture(scope="session")
def first_start(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What `make serve` says from a fresh clone until Ctrl-C."""
    log = tmp_path_factory.mktemp("first start") / "log"
    with serving(clone, log, PATH=path_without("uv")) as running:
        with socket.create_connection(("127.0.0.1", running.port)) as slow_client:
            slow_client.sendall(b"POST /api/v1/classifier/predict HTTP/1.1\r\nHost: localhost\r\n")
            time.sleep(0.5)
            running.signal(signal.SIGINT)
            assert running.is_gone(within=20)  # less than what a graceful end waits
        with pytest.raises(requests.ConnectionError):
            running.get("/livez")
    return log.read_text()


@pytest.fixture
def installed(clone: Path, first_start: str) -> Path:
    """The clone after its first start."""
    return clone


@pytest.fixture(scope="session")
def second_start(clone: Path, first_start: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    with serving(clone, tmp_path_factory.mktemp("second start") / "log") as running:
        yield running


def path_without(program: str) -> str:
    folders = os.environ["PATH"].split(os.pathsep)
    return os.pathsep.join(folder for folder in folders if not (Path(folder) / program).exists())


@pytest.fixture(scope="session")
def with_uv(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment with uv on its PATH."""
    folder = tmp_path_factory.mktemp("uv")
    (folder / "uv").symlink_to(Path(sys.executable).with_name("uv").resolve(strict=True))
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def state(url: str) -> dict[str, object]:
    """What a server has and says; not when it came about, and not what it logged."""
    customers = [{}, {"RecencyDays": 3}, {"RecencyDays": 250}]
    predict = f"{url}/api/v1/classifier/predict"
    algorithms = requests.get(f"{url}/api/v1/mlalgorithms", timeout=30).json()
    history = requests.get(f"{url}/api/v1/mlalgorithmstatuses", timeout=30).json()
    answers = [
        requests.post(f"{predict}?algorithm={algorithm['name']}", json=customers, timeout=30).json()
        for algorithm in algorithms
    ]
    return {
        "endpoints": requests.get(f"{url}/api/v1/endpoints", timeout=30).json(),
        "algorithms": algorithms,
        "history": history,
        "answers": answers,
    }


def timeless(value: object) -> object:
    """Without times and the ids of requests."""
    if isinstance(value, list):
        return [timeless(item) for item in value]
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in {"created_at", "request_id"}}
    return value


# --- The first start ------------------------------------------------------------------------------------------------
def test_the_first_start_says_what_it_does_how_long_that_takes_and_where_to_look(first_start):
    said = [
        "Creating the environment in .venv ...",
        f"{INSTALLING} (a minute or two the first time) ...",
        "Preparing the database ...",
        "they are trained now: about ten seconds) ...",
        "Training on processed.csv",
        "Starting the server and loading the models (some seconds) ...",
        "Serving on http://127.0.0.1:",
    ]
    positions = [first_start.find(line) for line in said]
    assert -1 not in positions, dict(zip(said, positions, strict=True))
    assert positions == sorted(positions)


def test_ctrl_c_ends_it_quietly(first_start):  # and the fixture proves that nothing is left
    assert "Traceback" not in first_start
    assert "WARNING" not in first_start
    said = [line for line in first_start.splitlines() if line and "[requests]" not in line]
    assert said[-1].lstrip().startswith("Ready?")  # the last of the addresses, and nothing after it


# --- A second start -------------------------------------------------------------------------------------------------
def test_a_second_start_neither_installs_nor_trains_again(second_start):
    said = second_start.log.read_text()
    assert INSTALLING not in said
    assert "nothing to train" in said
    assert second_start.seconds < 60  # some seconds on a machine that does nothing else


def test_every_address_that_is_printed_answers_once(second_start):
    addresses = re.findall(r"http://127\.0\.0\.1:\d+\S*", second_start.log.read_text())
    assert [address.removeprefix(second_start.url) for address in addresses] == ["", "/api/docs", "/admin/", "/readyz"]
    for address in addresses:
        assert requests.get(address, timeout=30).status_code == 200


def test_static_files_are_served(second_start):
    page = second_start.get("/admin/login/").text
    files = re.findall(r'(?:href|src)="(/static/[^"]+)"', page)
    assert any(file.endswith(".css") for file in files)
    assert {file: second_start.get(file).status_code for file in files} == dict.fromkeys(files, 200)


def test_a_body_that_is_too_large_is_refused_so_that_the_sender_sees_it(second_start):
    class Endless:
        """Far more than the limit; the server must read on for a while, or the sender sees a reset only."""

        def __len__(self) -> int:
            return 200 * 2**20

        def read(self, size: int) -> bytes:
            return b" " * size

    response = requests.post(second_start.url + "/api/v1/classifier/predict", data=Endless(), timeout=60)
    assert response.status_code == 413
    assert "209,715,200 bytes" in response.json()["message"]


def test_a_worker_that_dies_is_replaced_and_the_addresses_are_not_printed_again(second_start):
    (first,) = children(second_start.process.pid)
    before = children(first)
    os.kill(before[0], signal.SIGKILL)
    wait_for(lambda: len(set(children(first)) - set(before)) == 1)
    time.sleep(0.1)
    for _ in range(20):
        assert second_start.get("/livez").status_code == 200
    assert second_start.log.read_text().count("Serving on") == 1


def test_a_closed_terminal_ends_it_too(installed, tmp_path):
    with serving(installed, tmp_path / "log") as running:
        running.signal(signal.SIGHUP)
        assert running.is_gone()
    assert "Traceback" not in running.log.read_text()


# --- Refusals -------------------------------------------------------------------------------------------------------
def sentences(done: subprocess.CompletedProcess) -> list[str]:
    """What a failed command says, without make's own line."""
    assert done.returncode != 0, done.stdout
    return [line for line in done.stdout.splitlines() if not line.startswith("make: ***")]


def test_a_busy_port_is_refused_in_one_sentence(installed, second_start):
    assert sentences(make(installed, "serve", f"PORT={second_start.port}")) == [
        f"Port {second_start.port} is in use by another program. Choose another: make serve PORT=8080"
    ]


@pytest.mark.parametrize("port", ["eighty", "0", "65536", "-1", "", "1;2"])
def test_what_is_no_port_is_refused_in_one_sentence(installed, port):
    (sentence,) = sentences(make(installed, "serve", f"PORT={port}"))
    assert sentence.startswith(f"PORT={port} is no port")


def test_an_old_python_is_refused_in_one_sentence_before_anything_is_made(tmp_path):
    old = tmp_path / "python3"
    old.write_text(
        "#!/bin/sh\n"
        '[ "$1" = --version ] && echo Python 3.9.2 && exit\n'
        f'exec "{sys.executable}" -c "import sys; sys.version_info = (3, 9, 2); exec(sys.argv[1])" "$2"\n'
    )
    old.chmod(0o755)
    clone = copy_repository(tmp_path / "clone")
    for python in (old, tmp_path / "python4"):
        (sentence,) = sentences(make(clone, "serve", f"PYTHON3={python}"))
        assert sentence.startswith("Python 3.11 or newer is needed, and ")
        assert sentence.endswith("make serve PYTHON3=python3.12")
    assert "Python 3.9.2" in sentences(make(clone, "serve", f"PYTHON3={old}"))[0]
    assert not (clone / ".venv").exists()


def test_an_environment_that_is_there_needs_no_other_python(installed):
    assert make(installed, *INSTALL, "PYTHON3=/nowhere/python3").returncode == 0


# --- The environment ------------------------------------------------------------------------------------------------
def test_a_failed_installation_says_so_and_is_tried_again(installed):
    requirements = installed / "requirements.txt"
    wanted = requirements.read_text()
    requirements.write_text(f"{wanted}no-such-package-anywhere==0\n")
    try:
        for _ in range(2):
            said = sentences(make(installed, "serve", f"PORT={free_port()}", PATH=path_without("uv"), PIP_NO_INDEX="1"))
            assert said[0].startswith(INSTALLING)
            assert "no-such-package-anywhere" in "\n".join(said)
            assert said[-1] == "The installation failed; the lines above say why. The same command tries again."
    finally:
        requirements.write_text(wanted)

    done = make(installed, *INSTALL, PATH=path_without("uv"), PIP_NO_INDEX="1")
    assert (done.returncode, done.stdout.startswith(INSTALLING)) == (0, True)
    assert INSTALLING not in make(installed, *INSTALL).stdout


def test_an_interrupted_installation_is_begun_anew_and_uv_is_used_where_it_is(clone, tmp_path, with_uv):
    clone = copy_repository(tmp_path / "clone")
    with started(["make", *INSTALL], clone, tmp_path / "log", 0, PATH=path_without("uv")) as installing:
        wait_for(lambda: INSTALLING in installing.log.read_text())
        time.sleep(1)
        installing.signal(signal.SIGINT)
        assert installing.is_gone()
    assert not (clone / ".venv/runtime").exists()

    again = make(clone, "train", "ARGS=--help", **with_uv)
    anew = again.stdout.splitlines()[:3]
    assert anew[0].startswith("The environment in .venv was left unfinished")
    assert anew[2].startswith(INSTALLING)
    assert (again.returncode, "usage: train.py" in again.stdout) == (0, True)
    assert "uv = " in (clone / ".venv/pyvenv.cfg").read_text()

    # Its Python is replaced by another, as an upgrade of the system does.
    (clone / ".venv/lib").rename(clone / ".venv/lib-of-another-python")
    (clone / ".venv/lib").mkdir()
    done = make(clone, *INSTALL, **with_uv)
    assert (done.returncode, done.stdout.splitlines()[:3]) == (0, anew)

    # Its Python is gone altogether.
    (clone / ".venv/bin/python").unlink()
    (clone / ".venv/bin/python").symlink_to("/nowhere/python3")
    done = make(clone, *INSTALL, **with_uv)
    assert (done.returncode, done.stdout.splitlines()[:3]) == (0, anew)

    # And now without uv, where pip has to be had first.
    time.sleep(0.1)  # or its time would be the same as of what is installed
    (clone / "requirements.txt").touch()
    done = make(clone, *INSTALL, PATH=path_without("uv"), PIP_NO_INDEX="1")
    assert (done.returncode, done.stdout.startswith(INSTALLING)) == (0, True)

    assert make(clone, "clean").returncode == 0
    assert not (clone / ".venv").exists()
    assert not (clone / "research/artifacts").exists()
    assert not list((clone / "backend/server").glob("*.sqlite3*"))


# --- The long way ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def long_way(clone: Path, first_start: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second clone, trained and migrated by hand, in the environment of the first."""
    by_hand = copy_repository(tmp_path_factory.mktemp("by hand") / "clone")
    (by_hand / ".venv").symlink_to(clone / ".venv")
    for command, folder in [("research/train.py", "."), ("manage.py migrate", "backend/server")]:
        subprocess.run(
            [by_hand / ".venv/bin/python", *command.split()],
            cwd=by_hand / folder,
            env=outside_world(),
            check=True,
            capture_output=True,
        )
    return by_hand


@pytest.mark.parametrize("reloader", [[], ["--noreload"]], ids=["reloading", "not reloading"])
def test_the_long_way_ends_in_the_same_state(long_way, second_start, tmp_path, reloader):
    port, log = free_port(), tmp_path / "log"
    command = [str(long_way / ".venv/bin/python"), "manage.py", "runserver", str(port), *reloader]
    with started(command, long_way / "backend/server", log, port) as running:
        processes.wait_until_answered(f"{running.url}/readyz", running.process, log)
        assert timeless(state(running.url)) == timeless(state(second_start.url))
        running.signal(signal.SIGINT)
        assert running.is_gone()
    assert "Traceback" not in log.read_text()


# --- Help -----------------------------------------------------------------------------------------------------------
def test_help_names_targets_that_exist(clone):
    said = make(clone).stdout
    targets = re.findall(r"^make ([a-z-]+)", said, re.MULTILINE)
    assert {"serve", "test", "admin", "train", "lint", "clean"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", (clone / "Makefile").read_text(), re.MULTILINE), target


def children(pid: int) -> list[int]:
    with suppress(FileNotFoundError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def wait_for(condition, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)

"""What several modules of tests with real processes need."""

from __future__ import annotations

import pytest

from tests import processes


@pytest.fixture
def database(tmp_path):
    """A place for an SQLite file."""
    return tmp_path / "d.sqlite3"


@pytest.fixture
def env(database, trained):
    """For processes of the product, with their tables made in that file."""
    env = processes.environment(f"sqlite:///{database}", trained, DEBUG="1", LOG_LEVEL="WARNING")
    processes.manage("migrate", env=env)
    return env

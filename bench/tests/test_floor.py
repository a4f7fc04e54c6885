"""The floor runs on this product's own server, and so has to move with it."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import pytest

import contestants
from processes import Server
from tests import postgresql


@pytest.mark.parametrize("path", ["drf", "django"])
def test_the_floor_gives_back_what_it_is_sent(tmp_path: Path, path: str):
    port = postgresql.free_port()
    with ExitStack() as stack:
        launch = contestants.floor(stack, None, tmp_path, port)
        server = Server(launch.command, launch.environment, launch.folder, tmp_path / "log")
        stack.callback(server.stop)
        request = urllib.request.Request(f"http://127.0.0.1:{port}/{path}", b'{"Orders":3}', contestants.JSON)
        deadline = time.monotonic() + 30
        while True:
            try:
                with urllib.request.urlopen(request, timeout=30) as response:
                    assert json.load(response) == {"Orders": 3}
                return
            except urllib.error.HTTPError:
                raise
            except OSError:  # it has not begun yet
                assert time.monotonic() < deadline and not server.has_ended, server.last_words()
                time.sleep(0.05)

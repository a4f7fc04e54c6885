"""Where the time of one prediction goes: the application alone, without a server, in one thread, on SQLite.

    python bench/layers.py [--list] [--requests N]

Production settings: a token is checked, a line is logged (to a file), a row is committed. Each layer is timed where it
is called; what remains is what lies between them. Prints a Markdown table of microseconds per customer, of the round
that was the median of five by all of it, so that the layers add up.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import run
from run import contestants

ROUNDS = 5


def _application(launch: contestants.Launch) -> Callable[..., Any]:
    """The WSGI application, with the models loaded, under the environment of a launch."""
    os.environ.clear()
    os.environ.update(launch.environment, DJANGO_SETTINGS_MODULE="server.settings")
    from server.wsgi import application

    return application


def _timed(spent: Counter[str], layer: str, owner: Any, name: str) -> None:
    function = getattr(owner, name)

    def timed(*arguments: Any, **named: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*arguments, **named)
        finally:
            spent[layer] += time.perf_counter() - began

    setattr(owner, name, timed)


def _time_layers(spent: Counter[str]) -> None:
    from apps.endpoints import json_text, prediction, views
    from apps.endpoints.journal import Journal
    from apps.ml.registry import MLRegistry
    from server import logs

    _timed(spent, "who asks: the token's hash", views, "known_token")
    _timed(spent, "the body, from JSON", json_text, "loads")
    _timed(spent, "what served last", MLRegistry, "known")
    _timed(spent, "checking, encoding, the forest", prediction, "_scored")
    _timed(spent, "recording, if token and status still hold: one commit", Journal, "record_if")
    _timed(spent, "recording, all in one transaction", Journal, "record")
    _timed(spent, "the answer, to JSON", json_text, "dumps")
    _timed(spent, "the line in the log", logs, "request")


def _environ(launch: contestants.Launch, body: bytes) -> dict[str, Any]:
    path, _, query = contestants.PREDICT.partition("?")
    return {
        "REQUEST_METHOD": "POST",
        "PATH_INFO": path,
        "QUERY_STRING": query,
        "CONTENT_TYPE": "application/json",
        "CONTENT_LENGTH": str(len(body)),
        "HTTP_AUTHORIZATION": launch.headers["Authorization"],
        "HTTP_HOST": "127.0.0.1",
        "REMOTE_ADDR": "127.0.0.1",
        "SERVER_NAME": "127.0.0.1",
        "SERVER_PORT": "80",
        "wsgi.url_scheme": "http",
        "wsgi.input": io.BytesIO(body),
    }


def _ask(application: Callable[..., Any], launch: contestants.Launch, body: bytes) -> None:
    statuses: list[str] = []
    answer = b"".join(application(_environ(launch, body), lambda status, headers: statuses.append(status)))
    if statuses != ["200 OK"]:
        sys.exit(f"It answered {statuses}: {answer!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help=f"{run.model.LIST:,} customers in each request")
    parser.add_argument("--requests", type=int, help="of a round (default: 3000, or 100 lists)")
    asked = parser.parse_args()
    requests = asked.requests or (100 if asked.list else 3000)
    with ExitStack() as stack:
        folder = stack.enter_context(run.working_folder())
        subject = run.model.train(folder, contestants.clean_environment())
        launch = contestants.on_sqlite(stack, subject, folder, 0)
        body = json.dumps(subject.customers if asked.list else subject.customer).encode()
        customers = requests * (len(subject.customers) if asked.list else 1)
        sys.stderr = stack.enter_context((folder / "log").open("w"))
        application = _application(launch)

        def measure() -> float:
            """Microseconds per customer."""
            began = time.perf_counter()
            for _ in range(requests):
                _ask(application, launch, body)
            return (time.perf_counter() - began) / customers * 1e6

        first = measure()
        spent: Counter[str] = Counter()
        _time_layers(spent)
        rounds: list[dict[str, float]] = []
        for _ in range(ROUNDS):
            spent.clear()
            whole = measure()
            layers = {layer: seconds / customers * 1e6 for layer, seconds in spent.items()}
            rounds.append({**layers, "what lies between them": whole - sum(layers.values()), "all of it": whole})
        stored = launch.stored()
    digits = 1 if asked.list else 0
    middle = sorted(rounds, key=lambda each: each["all of it"])[ROUNDS // 2]
    lines = [f"| {layer} | {microseconds:.{digits}f} |" for layer, microseconds in middle.items()]
    run.say("\n".join(["| layer | µs |", "| --- | ---: |", *lines]))
    run.say(f"In the first round it took {first:.{digits}f} µs; at the end {stored:,} requests were stored.")


if __name__ == "__main__":
    main()

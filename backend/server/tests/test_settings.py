"""Settings come from the environment, are documented in .env.example, and refuse nonsense in one sentence."""

from __future__ import annotations

import ast
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.db import OperationalError, transaction
from django.db.utils import ConnectionHandler
from hypothesis import given
from hypothesis import strategies as st

from apps.endpoints.models import Status
from server import environment
from tests import processes
from tests.processes import BACKEND, REPOSITORY, manage

EXAMPLE = REPOSITORY / ".env.example"
READERS = [BACKEND / name for name in ("server/settings.py", "server/serving.py", "apps/ml/artifacts.py")]
PRODUCTION = {
    "DEBUG": "0",
    "SECRET_KEY": "a-long-and-random-key-of-67-characters-0123456789-abcdefghijklmnopq",
    "ALLOWED_HOSTS": "retention.example.com",
}
SHOW = (
    "import json; from django.conf import settings;"
    "names = [n for n in dir(settings) if n.isupper() and n != 'UNFOLD'];"
    "print(json.dumps({n: getattr(settings, n) for n in names}, default=str))"
)


def bare(**settings: str) -> dict[str, str]:
    """An environment that says nothing but these settings."""
    return {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": str(BACKEND),
        "DJANGO_SETTINGS_MODULE": "server.settings",
        **settings,
    }


def settings_of(env: dict[str, str], cwd: Path = BACKEND) -> dict[str, object]:
    done = subprocess.run([sys.executable, "-c", SHOW], env=env, cwd=cwd, capture_output=True, text=True, check=True)
    return json.loads(re.sub(r" at 0x[0-9a-f]+", "", done.stdout))


def names_read_by(source: Path) -> set[str]:
    """The environment variables that a file reads, as in `env.text("NAME")` or `os.environ["NAME"]`."""
    readers = {"env", "os.environ", "environ", "os.getenv"}
    names = set()
    for node in ast.walk(ast.parse(source.read_text())):
        match node:
            case ast.Call(func=ast.Attribute(value=reader), args=[ast.Constant(value=str(name)), *_]) if (
                ast.unparse(reader) in readers
            ):
                names.add(name)
            case ast.Call(func=function, args=[ast.Constant(value=str(name)), *_]) if ast.unparse(function) in readers:
                names.add(name)
            case ast.Subscript(value=reader, slice=ast.Constant(value=str(name))) if ast.unparse(reader) in readers:
                names.add(name)
    return names - {"DJANGO_SETTINGS_MODULE"}


def documented() -> dict[str, str]:
    return dict(re.findall(r"^# ([A-Z_]+)=(.*)$", EXAMPLE.read_text(), re.MULTILINE))


# --- .env.example ---------------------------------------------------------------------------------------------------
def test_every_setting_that_is_read_is_documented_and_the_other_way_round():
    read = {path.name: names_read_by(path) for path in READERS}

    assert all(read.values()), read
    assert set().union(*read.values()) == set(documented())


def test_no_other_file_reads_the_environment():
    sources = [path for folder in ("server", "apps") for path in (BACKEND / folder).rglob("*.py")]
    reading = {path for path in sources if re.search(r"os\.environ|getenv|environ\.Env", path.read_text())}

    # wsgi.py only says where the settings are.
    assert reading == {
        BACKEND / "server/wsgi.py",
        BACKEND / "server/asgi.py",
        BACKEND / "server/environment.py",
        READERS[0],
        READERS[2],
    }


def test_each_documented_setting_has_a_comment_above_it():
    lines = EXAMPLE.read_text().splitlines()
    settings = [index for index, line in enumerate(lines) if re.match(r"# [A-Z_]+=", line)]

    for index in settings:
        above = next(line for line in reversed(lines[:index]) if not re.match(r"# [A-Z_]+=", line))
        assert re.match(r"# [A-Z0-9a-z]", above), lines[index]


@pytest.mark.whole
def test_the_documented_defaults_are_the_defaults():
    with_example = settings_of(bare(**{name: value for name, value in documented().items() if value}))

    assert with_example == settings_of(bare())


@pytest.mark.whole
def test_a_dotenv_file_is_read_and_the_environment_has_the_last_word(tmp_path):
    backend = tmp_path / "backend/server"
    for folder in ("server", "apps"):
        shutil.copytree(BACKEND / folder, backend / folder, ignore=shutil.ignore_patterns("tests", "__pycache__"))
    (tmp_path / ".env").write_text(
        "MAX_BODY_BYTES=123\nTIME_ZONE=Europe/Berlin\nDATABASE_URL=sqlite:///data/r.sqlite3\n"
    )
    env = {**bare(TIME_ZONE="Asia/Tokyo"), "PYTHONPATH": str(backend)}

    settings = settings_of(env, cwd=backend)

    assert settings["MAX_BODY_BYTES"] == 123
    assert settings["TIME_ZONE"] == "Asia/Tokyo"
    assert settings["DATABASES"]["default"]["NAME"] == str(tmp_path / "data/r.sqlite3")


@pytest.mark.whole
def test_training_writes_to_the_folder_that_a_dotenv_file_gives_the_server(tmp_path, customers_csv):
    ignored = shutil.ignore_patterns("tests", "__pycache__", "*.ipynb", "artifacts", "data")
    shutil.copytree(REPOSITORY / "research", tmp_path / "research", ignore=ignored)
    shutil.copytree(BACKEND / "apps", tmp_path / "backend/server/apps", ignore=ignored)
    (tmp_path / ".env").write_text("ML_ARTIFACTS_DIR=models\n")
    command = [sys.executable, str(tmp_path / "research/train.py"), "--data", str(customers_csv)]

    subprocess.run(command, env={"PATH": "/usr/bin:/bin"}, cwd="/", check=True, capture_output=True)

    assert (tmp_path / "models/1.0.0/manifest.json").is_file()


def refusal_of(env: dict[str, str]) -> str:
    """Why the settings cannot be read in an environment that says nothing else."""
    with pytest.MonkeyPatch.context() as patch:
        for name in documented():
            patch.delenv(name, raising=False)
        for name, value in env.items():
            patch.setenv(name, value)
        with pytest.raises(ImproperlyConfigured) as error:
            runpy.run_path(str(READERS[0]), run_name="settings_once_more")
    return str(error.value)


# --- Nonsense is refused --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("DEBUG", "maybe", "must be 1 or 0"),
        ("MAX_BODY_BYTES", "abc", "must be a whole number"),
        ("BATCH_MAX_BYTES", "-5", "must be a whole number of 1 or more"),
        ("PREDICT_DEFAULT_STATUS", "foo", "must be one of testing, staging, production"),
        ("PREDICT_DEFAULT_STATUS", "retired", "must be one of"),
        ("LOG_LEVEL", "loud", "must be one of DEBUG, INFO"),
        ("LOG_FORMAT", "xml", "must be one of console, json"),
        ("SQLITE_SYNCHRONOUS", "OFF", "must be one of NORMAL"),
        ("TIME_ZONE", "Mars/Olympus", "such as Europe/Berlin"),
        ("TIME_ZONE", "/etc/passwd", "such as Europe/Berlin"),
        ("SECURE_HSTS_SECONDS", "1 year", "must be a whole number of 0 or more"),
        ("BATCH_DIR", "nowhere://x/batches", "Protocol not known: nowhere"),
        ("BATCH_DIR", "s3://bucket/batches", "Install s3fs"),
        ("DASK_SCHEDULER", "10.0.0.5", "must be like tcp://10.0.0.5:8786"),
        ("DATABASE_URL", "nonsense", "must be like sqlite:///file.sqlite3, postgresql://"),
        ("DATABASE_URL", "postgress://u:secret@h/db", "must be like"),
        ("DATABASE_URL", "sqlite://file.sqlite3", "three slashes"),
        ("DATABASE_URL", "postgresql://u:secret@h:port/db", "cannot be read"),
        ("DATABASE_URL", "postgresql://u:secret/2@h:5432/db", "%2F for /"),
        ("DATABASE_URL", "postgresql://u:secret[@h:5432/db", "cannot be read"),
        ("DATABASE_URL", "postgresql://u:secret@h:5432", "names no database"),
    ],
)
def test_a_bad_value_is_refused_with_one_sentence(name, value, words):
    refusal = refusal_of({name: value})

    assert refusal.startswith(name) and "\n" not in refusal
    assert words in refusal
    assert "secret" not in refusal


def test_a_cluster_needs_dask(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)  # as if it were not installed

    refusal = refusal_of({"DASK_SCHEDULER": "tcp://10.0.0.5:8786"})

    assert refusal == "DASK_SCHEDULER needs Dask: pip install -r requirements-dask.txt"


@pytest.mark.parametrize("key", ["", "development-only-and-refused-without-debug", "of-31-characters-0123456789-abc"])
def test_production_needs_a_secret_key_of_its_own(key):
    refusal = refusal_of({"DEBUG": "0", "SECRET_KEY": key})

    assert refusal.startswith("SECRET_KEY is required when DEBUG is off, with at least 32 characters. Make one with: ")


@pytest.mark.whole
def test_a_command_says_that_sentence_and_no_more():
    refused = manage("migrate", env=bare(DEBUG="maybe"), check=False)

    assert refused.returncode == 1
    assert refused.stderr == "DEBUG must be 1 or 0, not 'maybe'.\n"


@given(value=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_whatever_a_number_or_flag_is_set_to_it_is_read_or_refused_by_name(value):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOME_SETTING", value)
        for read, default in ((environment.number, 7), (environment.flag, True), (environment.time_zone, "UTC")):
            try:
                read("SOME_SETTING", default)
            except ImproperlyConfigured as error:
                assert str(error).startswith("SOME_SETTING must be")


def test_an_empty_value_is_the_same_as_none(monkeypatch):
    monkeypatch.setenv("SOME_SETTING", " ")

    assert environment.number("SOME_SETTING", default=7) == 7
    assert environment.flag("SOME_SETTING", default=True) is True
    assert environment.words("SOME_SETTING") == []


def test_a_secret_that_begins_with_a_dollar_sign_is_taken_as_it_is(monkeypatch):
    monkeypatch.setenv("SOME_SETTING", "$ecret$")

    assert environment.text("SOME_SETTING") == "$ecret$"


def test_a_list_is_separated_by_commas_and_may_have_blanks(monkeypatch):
    monkeypatch.setenv("SOME_SETTING", "one.example, two.example,,")

    assert environment.words("SOME_SETTING") == ["one.example", "two.example"]


def test_the_statuses_that_may_be_the_default_are_those_that_a_person_can_set():
    source = (BACKEND / "server/settings.py").read_text()
    (choices,) = re.findall(r'PREDICT_DEFAULT_STATUS", "testing", choices=(\(.*?\))', source)

    assert set(ast.literal_eval(choices)) == set(Status.values) - {Status.RETIRED, Status.AB_TESTING}


# --- The database ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("sqlite:///data/r.sqlite3", str(REPOSITORY / "data/r.sqlite3")),
        ("sqlite:////srv/r.sqlite3", "/srv/r.sqlite3"),
        ("sqlite://:memory:", ":memory:"),
        ("", "/default.sqlite3"),
    ],
)
def test_the_file_of_an_sqlite_url_does_not_depend_on_the_working_directory(monkeypatch, tmp_path, url, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATABASE_URL", url)

    described = environment.database("DATABASE_URL", default=Path("/default.sqlite3"))

    assert described["ENGINE"] == "django.db.backends.sqlite3"
    assert described["NAME"] == name


@pytest.mark.parametrize(
    ("url", "threshold"),
    [
        ("postgresql://u:p@h/db", sys.maxsize),
        ("postgresql://u:p@h/db?prepare_threshold=0", 0),
        ("postgresql://u:p@h/db?DISABLE_SERVER_SIDE_CURSORS=True", None),
        ("mysql://u:p@h/db", None),
    ],
)
def test_statements_are_prepared_on_postgresql_unless_a_pooler_is_in_between(url, threshold):
    (database,) = settings_of(bare(DATABASE_URL=url))["DATABASES"].values()

    assert database.get("OPTIONS", {}).get("prepare_threshold") == threshold


PATIENCE = """
import json, socket, sys
from django.db import connection
connection.ensure_connection()
with socket.fromfd(connection.connection.fileno(), socket.AF_INET, socket.SOCK_STREAM) as tcp:
    names = ["TCP_USER_TIMEOUT", "TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT"]
    json.dump([tcp.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in names], sys.stdout)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="others have no such timeout")
@pytest.mark.parametrize(
    ("query", "patience"), [("", [30_000, 15, 5, 3]), ("?tcp_user_timeout=5000&keepalives_idle=60", [5_000, 60, 5, 3])]
)
def test_postgresql_is_not_waited_for_when_its_host_is_gone(postgresql_url, tmp_path, query, patience):
    env = processes.environment(postgresql_url + "/postgres" + query, tmp_path)

    assert json.loads(manage("shell", "--no-imports", "-c", PATIENCE, env=env).stdout) == patience


@pytest.mark.parametrize(
    ("url", "engine"), [("postgres", "postgresql"), ("postgresql", "postgresql"), ("mysql", "mysql")]
)
def test_a_database_server_is_described_by_its_url(monkeypatch, url, engine):
    monkeypatch.setenv(
        "DATABASE_URL", f"{url}://ann:p%23%40ss@db.example:6543/retention?CONN_MAX_AGE=5&connect_timeout=3"
    )

    described = environment.database("DATABASE_URL", default=Path("unused"))

    assert described == {
        "ENGINE": f"django.db.backends.{engine}",
        "NAME": "retention",
        "USER": "ann",
        "PASSWORD": "p#@ss",
        "HOST": "db.example",
        "PORT": 6543,
        "CONN_MAX_AGE": 5,
        "OPTIONS": {"connect_timeout": 3},
    }


@pytest.fixture
def on_file(tmp_path) -> ConnectionHandler:
    """Two connections to an SQLite file, as the settings describe them; the other one does not wait for locks."""
    described = {**settings_of(bare())["DATABASES"]["default"], "NAME": str(tmp_path / "live.sqlite3")}
    impatient = {**described, "OPTIONS": {**described["OPTIONS"], "timeout": 0}}
    opened = ConnectionHandler({"default": described, "other": impatient})
    yield opened
    opened.close_all()


@pytest.mark.whole
def test_an_sqlite_connection_writes_ahead_waits_for_locks_and_is_durable_enough(on_file, django_db_blocker):
    with django_db_blocker.unblock(), on_file["default"].cursor() as cursor:
        found = {
            pragma: cursor.execute(f"PRAGMA {pragma}").fetchone()[0]
            for pragma in ("journal_mode", "busy_timeout", "synchronous", "foreign_keys", "wal_autocheckpoint")
        }

    assert found == {
        "journal_mode": "wal",
        "busy_timeout": 20_000,
        "synchronous": 1,
        "foreign_keys": 1,
        "wal_autocheckpoint": 40_000,
    }


@pytest.mark.whole
def test_an_sqlite_transaction_takes_the_write_lock_when_it_begins(on_file, django_db_blocker, monkeypatch):
    monkeypatch.setattr(transaction, "get_connection", lambda using: on_file[using])
    with django_db_blocker.unblock():
        on_file["default"].cursor().execute("CREATE TABLE t (n)")
        with transaction.atomic("default"):
            on_file["default"].cursor().execute("SELECT * FROM t")
            with pytest.raises(OperationalError, match="locked"), on_file["other"].cursor() as cursor:
                cursor.execute("INSERT INTO t VALUES (1)")
            on_file["other"].cursor().execute("SELECT * FROM t")  # readers do not wait


# --- Production -----------------------------------------------------------------------------------------------------
@pytest.mark.whole
def test_the_deployment_check_is_clean_in_production():
    checked = manage("check", "--deploy", "--fail-level", "WARNING", env=bare(**PRODUCTION), check=False)

    assert checked.returncode == 0, checked.stderr
    assert "no issues (0 silenced)" in checked.stdout


@pytest.mark.whole
def test_the_deployment_check_is_light():
    """Checks and migrations load neither scikit-learn nor pandas."""
    script = (
        "import sys, django; django.setup(); from django.core.management import call_command; call_command('check');"
        "sys.exit(' '.join({'sklearn', 'pandas', 'numba'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], env=bare(), capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr


@pytest.mark.whole
def test_in_development_allowed_hosts_are_this_machines_whatever_is_said():
    assert settings_of(bare(DEBUG="1", ALLOWED_HOSTS="*"))["ALLOWED_HOSTS"] == []
    assert settings_of(bare(**PRODUCTION))["ALLOWED_HOSTS"] == ["retention.example.com"]


@pytest.mark.whole
def test_production_is_closed_by_default_and_each_part_can_be_set():
    closed = settings_of(bare(**PRODUCTION))
    opened = settings_of(
        bare(
            **PRODUCTION,
            SECURE_SSL_REDIRECT="0",
            SECURE_HSTS_SECONDS="0",
            SECURE_COOKIES="0",
            BEHIND_TLS_PROXY="1",
            LOG_FORMAT="console",
        )
    )

    assert closed["SECURE_SSL_REDIRECT"] and closed["SESSION_COOKIE_SECURE"] and closed["CSRF_COOKIE_SECURE"]
    assert closed["SECURE_HSTS_SECONDS"] == 365 * 24 * 3600
    assert closed["SECURE_PROXY_SSL_HEADER"] is None
    assert closed["LOG_FORMAT"] == "json"
    assert not opened["SECURE_SSL_REDIRECT"] and not opened["SESSION_COOKIE_SECURE"]
    assert opened["SECURE_PROXY_SSL_HEADER"] == ["HTTP_X_FORWARDED_PROTO", "https"]
    assert opened["LOG_FORMAT"] == "console"

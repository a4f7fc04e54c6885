"""Settings come from the environment; a value that makes no sense is refused by a sentence that names it.

An empty value is the same as none. Relative paths count from the top of the repository.
"""

from __future__ import annotations

import importlib.util
import os
import re
import zoneinfo
from collections.abc import Collection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import environ
from django.core.exceptions import ImproperlyConfigured

REPOSITORY = Path(__file__).resolve().parents[3]
_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}
_DATABASES = {"sqlite", "postgres", "postgresql", "mysql"}


def text(name: str, default: str = "", choices: Collection[str] = ()) -> str:
    value = os.environ.get(name, "").strip() or default
    if choices and value not in choices:
        raise ImproperlyConfigured(f"{name} must be one of {', '.join(choices)}, not {value!r}.")
    return value


def flag(name: str, default: bool) -> bool:
    value = text(name).lower()
    if value and value not in _TRUE | _FALSE:
        raise ImproperlyConfigured(f"{name} must be 1 or 0, not {value!r}.")
    return value in _TRUE if value else default


def number(name: str, default: int, least: int = 1) -> int:
    value = text(name, str(default))
    if not value.isdecimal() or int(value) < least:
        raise ImproperlyConfigured(f"{name} must be a whole number of {least} or more, not {value!r}.")
    return int(value)


def words(name: str) -> list[str]:
    """A list that is separated by commas."""
    return [word.strip() for word in text(name).split(",") if word.strip()]


def path(name: str, default: Path) -> Path:
    return (REPOSITORY / Path(text(name, str(default))).expanduser()).resolve()


def folder_or_url(name: str, default: Path) -> str:
    """A folder, or a URL of one that fsspec understands."""
    value = text(name)
    if "://" not in value:
        return str(path(name, default))
    import fsspec

    try:
        fsspec.get_filesystem_class(value.rpartition("::")[2].partition("://")[0])
    except (ImportError, ValueError) as error:
        raise ImproperlyConfigured(f"{name}: {error}.") from None
    return value


def time_zone(name: str, default: str) -> str:
    value = text(name, default)
    try:
        zoneinfo.ZoneInfo(value)
    except (KeyError, ValueError, OSError):
        raise ImproperlyConfigured(f"{name} must be a time zone such as Europe/Berlin, not {value!r}.") from None
    return value


def dask(name: str) -> str:
    """The address of a Dask scheduler, or ""."""
    value = text(name)
    if value and not re.fullmatch(r"(tcp|tls)://.+:[0-9]+", value):
        raise ImproperlyConfigured(f"{name} must be like tcp://10.0.0.5:8786, not {value!r}.")
    if value and importlib.util.find_spec("distributed") is None:
        raise ImproperlyConfigured(f"{name} needs Dask: pip install -r requirements-dask.txt")
    return value


def database(name: str, default: Path) -> dict[str, Any]:
    """Django's description of the database that a URL names. The messages keep the URL's password to themselves."""
    url = text(name)
    if not url:
        return {"ENGINE": "django.db.backends.sqlite3", "NAME": str(default)}
    try:
        parts = urlsplit(url)
        if parts.scheme not in _DATABASES:
            raise ImproperlyConfigured(
                f"{name} must be like sqlite:///file.sqlite3, postgresql://user:password@host:5432/name "
                "or mysql://user:password@host:3306/name."
            )
        if parts.scheme == "sqlite" and parts.netloc and url != "sqlite://:memory:":
            raise ImproperlyConfigured(f"{name}: a file is named after three slashes, as in sqlite:///file.sqlite3.")
        described = environ.Env.db_url_config(url)
    except ValueError:
        raise ImproperlyConfigured(
            f"{name} cannot be read; in its password, write special characters as %-codes, such as %2F for /."
        ) from None
    if not described["NAME"]:
        raise ImproperlyConfigured(f"{name} names no database; it stands after the last slash.")
    if parts.scheme == "sqlite" and described["NAME"] != ":memory:":
        described["NAME"] = str((REPOSITORY / Path(described["NAME"]).expanduser()).resolve())
    return {key: value for key, value in described.items() if value != ""}

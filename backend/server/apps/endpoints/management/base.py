from __future__ import annotations

import getpass
import os
from typing import Any

from django.core.management.base import BaseCommand as DjangoCommand
from django.core.management.base import CommandError
from django.db import OperationalError, ProgrammingError


class BaseCommand(DjangoCommand):
    """A command that says in a sentence when the database is not ready."""

    def execute(self, *args: Any, **options: Any) -> str | None:
        try:
            return super().execute(*args, **options)
        except (OperationalError, ProgrammingError) as error:
            raise CommandError(
                f"The database does not answer as it should: {str(error).strip()}. "
                "If it is new, prepare it with `python manage.py migrate`."
            ) from error


def who() -> str:
    """The user of this machine who runs the command."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run under a number that has no name
        return str(os.getuid())

from __future__ import annotations

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

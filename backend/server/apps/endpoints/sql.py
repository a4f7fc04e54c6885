"""Queries of the ORM that are compiled once, for the paths on which compiling would cost more than answering."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from django.db import DEFAULT_DB_ALIAS, InterfaceError, OperationalError, connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models import QuerySet

_PLACEHOLDER = "\x00the value asked for"


class Prepared:
    """A query with one text parameter.

    build: the queryset for a value of the parameter, ended by `values_list`. Its SQL may depend on the
    database, not on the value.
    """

    def __init__(self, build: Callable[[str], QuerySet]):
        self._build = build

    @cached_property
    def _compiled(self) -> tuple[Any, str, tuple[Any, ...], dict[int, Any]]:
        compiler = self._build(_PLACEHOLDER).query.get_compiler(DEFAULT_DB_ALIAS)
        sql, parameters = compiler.as_sql()
        converters = compiler.get_converters([expression for expression, *_ in compiler.select])
        return compiler, sql, tuple(parameters), converters

    def first(self, value: str) -> list[Any] | None:
        """The first row for a value, None when there is none.

        A kept connection may have died since it was used last. Django would ask it whether it lives, which costs as
        much as asking what is to be known; so that is asked, and if it fails, once more on a new connection.
        """
        database = connections[DEFAULT_DB_ALIAS]
        database.health_check_done = True
        try:
            return self._ask(value, database)
        except (OperationalError, InterfaceError):
            if database.in_atomic_block:
                raise
            database.close()
            return self._ask(value, database)

    def _ask(self, value: str, database: BaseDatabaseWrapper) -> list[Any] | None:
        compiler, sql, parameters, converters = self._compiled
        with database.cursor() as cursor:
            cursor.execute(sql, [value if parameter == _PLACEHOLDER else parameter for parameter in parameters])
            row = cursor.fetchone()
        if row is None:
            return None
        return next(iter(compiler.apply_converters([row], converters))) if converters else list(row)

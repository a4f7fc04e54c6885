"""A model field of our own."""

from __future__ import annotations

import json
from typing import Any

from django.db import models
from django.db.backends.base.base import BaseDatabaseWrapper


class JSONTextField(models.JSONField):
    """JSON that the database keeps as the text that it is, for a table that grows by every answer.

    To parse each row into a form of its own costs PostgreSQL as much as all else that it does for the row, and SQLite
    a quarter, and nothing that was logged is searched for by what is in it. Who wants to can: `input_data::jsonb ->
    'Age'` on PostgreSQL, `json_extract(input_data, '$.Age')` on SQLite, `Cast("input_data", JSONField())` in the ORM.
    """

    def get_internal_type(self) -> str:
        return "TextField"

    def get_transform(self, name: str) -> None:
        """No `input_data__Age`, which a JSONField offers: it would work on SQLite only."""

    def get_lookup(self, name: str) -> type[models.Lookup] | None:
        """Nor any other search: the same JSON may be spelled as another text."""
        return super().get_lookup(name) if name == "isnull" else None

    def get_db_prep_value(self, value: Any, connection: BaseDatabaseWrapper, prepared: bool = False) -> Any:
        return None if value is None else json.dumps(value, cls=self.encoder)

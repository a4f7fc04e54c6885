from __future__ import annotations

from datetime import timedelta
from typing import Any

from django.contrib.auth import get_user_model
from django.core.exceptions import ValidationError
from django.core.management.base import CommandError, CommandParser
from django.db import transaction
from knox.models import AuthToken

from apps.endpoints.management.base import BaseCommand

MAX_DAYS = 36_500


class Command(BaseCommand):
    help = "Make a token for a user of the API. It is shown once, and stored as a hash."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("username")
        parser.add_argument("--days", type=int, help="For how long it is valid; without end unless given.")
        parser.add_argument("--create-user", action="store_true", help="Create the user, who has no password.")

    def handle(self, *, username: str, days: int | None, create_user: bool, **options: Any) -> None:
        if days is not None and not 1 <= days <= MAX_DAYS:
            raise CommandError(f"--days must be from 1 to {MAX_DAYS:,}, not {days}.")
        with transaction.atomic():
            user = self._user(username, create_user)
            token, secret = AuthToken.objects.create(user, expiry=timedelta(days=days) if days else None)
        until = f"until {token.expiry:%Y-%m-%d %H:%M} UTC" if token.expiry else "until it is deleted in the admin"
        self.stderr.write(f"Token of {username}, valid {until}. It is shown only now; send it with every call as")
        self.stderr.write("Authorization: Token ...")
        self.stdout.write(secret)

    def _user(self, username: str, create: bool) -> Any:
        users = get_user_model().objects
        user = users.filter(username=username).first()
        if user is None and create:
            try:
                get_user_model()(username=username).clean_fields(exclude=["password"])
            except ValidationError as error:
                raise CommandError(" ".join(error.messages)) from None
            return users.create_user(username)
        if user is None:
            raise CommandError(f"There is no user {username}; --create-user makes one, as does the admin.")
        if not user.is_active:
            raise CommandError(f"The user {username} is not active, so a token would be refused.")
        return user

from __future__ import annotations

import secrets
import sys
from getpass import getpass
from typing import Any

from django.contrib.auth import get_user_model
from django.contrib.auth.models import AbstractUser
from django.contrib.auth.password_validation import validate_password
from django.core.exceptions import ValidationError
from django.core.management.base import CommandError, CommandParser

from apps.endpoints.management.base import BaseCommand


class Command(BaseCommand):
    help = "Create the first user of the admin pages. Changes nothing if there is a superuser already."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--username", default="admin")
        parser.add_argument("--email", default="")
        parser.add_argument(
            "--random-password",
            action="store_true",
            help="Print a random password once instead of asking for one; so it is without a terminal.",
        )

    def handle(self, *, username: str, email: str, random_password: bool, **options: Any) -> None:
        users = get_user_model().objects
        existing = users.filter(is_superuser=True).order_by("pk").first()
        if existing:
            self.stdout.write(
                f"There is a superuser already: {existing.get_username()}. Nothing was changed. "
                f"A forgotten password is replaced with `python manage.py changepassword {existing.get_username()}`."
            )
            return
        user = get_user_model()(username=username, email=email)
        try:
            user.clean_fields(exclude=["password"])
            user.validate_unique()
        except ValidationError as error:
            problems = [f"--{field}: {' '.join(messages)}" for field, messages in error.message_dict.items()]
            raise CommandError(" ".join(problems)) from None
        asks = sys.stdin.isatty() and not random_password
        password = self._ask(user) if asks else secrets.token_urlsafe(15)
        users.create_superuser(username, email, password)
        self.stdout.write(f"The superuser {username} is created; log in at /admin/.")
        if not asks:
            self.stdout.write(f"Its password, shown only now: {password}")

    def _ask(self, user: AbstractUser) -> str:
        while True:
            try:
                password = getpass(f"Password for {user.get_username()}: ")
                validate_password(password, user)
                if getpass("The same again: ") == password:
                    return password
                self.stderr.write("The two passwords differ; once more.")
            except ValidationError as error:
                self.stderr.write(" ".join(error.messages))
            except (KeyboardInterrupt, EOFError):
                raise CommandError("No user was created.") from None

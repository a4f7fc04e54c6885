"""Who asks, and what they may do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import knox.auth
from django.conf import settings
from django.contrib.auth import get_user_model
from django.db import DEFAULT_DB_ALIAS
from django.utils import timezone
from django.utils.functional import SimpleLazyObject
from drf_spectacular.extensions import OpenApiAuthenticationExtension
from knox.crypto import hash_token
from knox.models import AuthToken
from knox.settings import knox_settings
from rest_framework.exceptions import AuthenticationFailed, NotAuthenticated
from rest_framework.permissions import SAFE_METHODS, BasePermission

from apps.endpoints.sql import Prepared

if TYPE_CHECKING:
    from rest_framework.request import Request
    from rest_framework.views import APIView


# What a call may need to know of its user, in the order of the model's fields; the rest is read when it is asked for.
_USER_FIELDS = [
    field.attname
    for field in get_user_model()._meta.concrete_fields
    if field.primary_key or field.attname in {get_user_model().USERNAME_FIELD, "is_active", "is_superuser"}
]
_token = Prepared(
    lambda digest: AuthToken.objects.filter(digest=digest).values_list(
        "expiry", *(f"user__{name}" for name in _USER_FIELDS)
    )
)
_KEYWORD = knox_settings.AUTH_HEADER_PREFIX.lower()
_IS_ACTIVE = _USER_FIELDS.index("is_active")


class _Known:
    """The tokens, by their hashes, that were good when they were last looked up."""

    MOST = 10_000  # of 128 characters each

    def __init__(self) -> None:
        self._digests: set[str] = set()

    def __contains__(self, digest: str) -> bool:
        return digest in self._digests

    def discard(self, digest: str) -> None:
        self._digests.discard(digest)

    def add(self, digest: str) -> None:
        if len(self._digests) >= self.MOST:
            self._digests.clear()
        self._digests.add(digest)


_known = _Known()


def known_token(authorization: str) -> str | None:
    """The hash of the token in an Authorization header, if it was good when it was last looked up."""
    token = _token_in(authorization)
    digest = token and hash_token(token)
    return digest if digest in _known else None


def _token_in(authorization: str) -> str | None:
    words = authorization.split()
    return words[1] if len(words) == 2 and words[0].lower() == _KEYWORD else None


class TokenAuthentication(knox.auth.TokenAuthentication):
    """Knox's tokens, found by their hash: one query, and never a write (knox itself tidies up at every request)."""

    def authenticate(self, request: Request) -> tuple[Any, None] | None:
        # request.headers, where knox looks, first copies them all.
        token = _token_in(request.META.get("HTTP_AUTHORIZATION", ""))
        if token is not None:
            return self.authenticate_credentials(token.encode("latin-1"))
        return super().authenticate(request)

    def authenticate_credentials(self, token: bytes) -> tuple[Any, None]:
        digest = hash_token(token.decode("latin-1"))
        found = _token.first(digest)
        _known.discard(digest)
        if found is None:
            raise AuthenticationFailed("This token is not known.")
        expiry, *user = found
        if expiry and expiry <= timezone.now():
            raise AuthenticationFailed("This token has expired.")
        if not user[_IS_ACTIVE]:
            raise AuthenticationFailed("The user of this token is inactive.")
        _known.add(digest)
        # Most calls never ask who it is.
        return SimpleLazyObject(lambda: get_user_model().from_db(DEFAULT_DB_ALIAS, _USER_FIELDS, user)), None


class TokenScheme(OpenApiAuthenticationExtension):
    target_class = TokenAuthentication
    name = "token"

    def get_security_definition(self, auto_schema: Any) -> dict[str, str]:
        return {
            "type": "apiKey",
            "in": "header",
            "name": "Authorization",
            "description": "The word Token, a space, and the token. In development none is needed.",
        }

    def get_security_requirement(self, auto_schema: Any) -> list[dict[str, list[str]]]:
        return [{self.name: []}, *([{}] if settings.DEBUG else [])]


class TokenUnlessDebug(BasePermission):
    """Open in development (which answers this machine only); else a token is needed."""

    def has_permission(self, request: Request, view: APIView) -> bool:
        if settings.DEBUG or request.user is not None:
            return True
        raise NotAuthenticated("A token is needed: send the header `Authorization: Token ...`.")


class WritesNeed(BasePermission):
    """Besides a token, writing needs the model permission that the subclass names."""

    permission = ""

    @property
    def message(self) -> str:
        return f"Your user lacks the permission {self.permission}; an administrator can grant it."

    def has_permission(self, request: Request, view: APIView) -> bool:
        if request.method in SAFE_METHODS or (settings.DEBUG and not request.user):
            return True
        return bool(request.user and request.user.has_perm(self.permission))


class WritesNeedStatusPermission(WritesNeed):
    permission = "endpoints.add_mlalgorithmstatus"


class WritesNeedABTestPermission(WritesNeed):
    permission = "endpoints.add_abtest"

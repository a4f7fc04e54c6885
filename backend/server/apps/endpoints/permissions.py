from __future__ import annotations

from typing import TYPE_CHECKING

from django.conf import settings
from rest_framework.permissions import SAFE_METHODS, BasePermission

if TYPE_CHECKING:
    from rest_framework.request import Request
    from rest_framework.views import APIView


class TokenUnlessDebug(BasePermission):
    """Open in development (which answers this machine only); else a token is needed."""

    def has_permission(self, request: Request, view: APIView) -> bool:
        return settings.DEBUG or bool(request.user and request.user.is_active)


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

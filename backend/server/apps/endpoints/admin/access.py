"""Users, what they may do, and the tokens with which they call the API."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from django import forms
from django.contrib import admin, messages
from django.contrib.auth import get_user_model
from django.contrib.auth.admin import GroupAdmin as DjangoGroupAdmin
from django.contrib.auth.admin import UserAdmin as DjangoUserAdmin
from django.contrib.auth.models import Group
from django.core.exceptions import ValidationError
from django.db.models import ForeignKey
from django.http import HttpRequest, HttpResponse
from django.utils import timezone
from knox.models import AuthToken, get_digest_token
from knox.settings import CONSTANTS
from unfold.admin import ModelAdmin
from unfold.forms import AdminPasswordChangeForm, UserChangeForm, UserCreationForm

from apps.endpoints.admin.history import HistoryAdmin

User = get_user_model()

admin.site.unregister(User)
admin.site.unregister(Group)
admin.site.unregister(AuthToken)


@admin.register(User)
class UserAdmin(DjangoUserAdmin, ModelAdmin):
    form = UserChangeForm
    add_form = UserCreationForm
    change_password_form = AdminPasswordChangeForm
    compressed_fields = False


@admin.register(Group)
class GroupAdmin(DjangoGroupAdmin, ModelAdmin):
    compressed_fields = False


class TokenForm(forms.ModelForm):
    def clean_expiry(self) -> datetime | None:
        expiry = self.cleaned_data["expiry"]
        if expiry and expiry <= timezone.now():
            raise ValidationError("This is past; choose a later time, or leave it empty for a token without end.")
        return expiry


@admin.register(AuthToken)
class AuthTokenAdmin(HistoryAdmin):
    """Only a superuser makes tokens: whoever makes one can act as its user."""

    actions = ()
    add_button = "Make the token"
    list_display = ("user", "key_prefix", "created", "expiry")
    list_display_links = None
    list_select_related = ("user",)
    ordering = ("-created",)
    search_fields = ("user__username",)
    form = TokenForm
    fields = ("user", "expiry")

    def has_module_permission(self, request: HttpRequest) -> bool:
        return request.user.is_superuser

    def has_view_permission(self, request: HttpRequest, obj: AuthToken | None = None) -> bool:
        return request.user.is_superuser

    def has_add_permission(self, request: HttpRequest) -> bool:
        return request.user.is_superuser

    def has_delete_permission(self, request: HttpRequest, obj: AuthToken | None = None) -> bool:
        return request.user.is_superuser

    def formfield_for_foreignkey(self, db_field: ForeignKey, request: HttpRequest, **kwargs: Any) -> forms.Field:
        kwargs["queryset"] = User.objects.filter(is_active=True).order_by("username")
        return super().formfield_for_foreignkey(db_field, request, **kwargs)

    def save_model(self, request: HttpRequest, obj: AuthToken, form: forms.ModelForm, change: bool) -> None:
        obj.digest, token = get_digest_token()
        obj.token_key = token[: CONSTANTS.TOKEN_KEY_LENGTH]
        super().save_model(request, obj, form, change)
        messages.warning(
            request, f"The token of {obj.user}, shown only this once: {token} (send it as Authorization: Token ...)"
        )

    def response_add(self, request: HttpRequest, obj: AuthToken, post_url_continue: str | None = None) -> HttpResponse:
        return self.response_post_save_add(request, obj)

    def get_deleted_objects(
        self, objs: Iterable[AuthToken], request: HttpRequest
    ) -> tuple[list[str], dict[str, int], set[str], list[str]]:
        # A token's own name is its digest, 128 characters long.
        named = [f"{self.key_prefix(token)} of {token.user}" for token in objs]
        return named, {"tokens": len(named)}, set(), []

    @admin.display(description="Starts with")
    def key_prefix(self, token: AuthToken) -> str:
        return f"{token.token_key[:8]}…"

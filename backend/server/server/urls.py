from django.conf import settings
from django.contrib import admin
from django.contrib.auth.decorators import user_passes_test
from django.urls import include, path
from django.views.generic import RedirectView
from drf_spectacular.views import SpectacularJSONAPIView, SpectacularSwaggerView
from rest_framework.authentication import SessionAuthentication

from apps.endpoints import urls as endpoints
from apps.endpoints.permissions import TokenAuthentication, TokenUnlessDebug

# The description shows customers of the trained table as examples, so it is as closed as the API itself.
# Whoever is logged in to the admin may read it too: a browser sends no token when it opens a page.
schema = SpectacularJSONAPIView.as_view(
    authentication_classes=[TokenAuthentication, SessionAuthentication], permission_classes=[TokenUnlessDebug]
)
docs = user_passes_test(lambda user: settings.DEBUG or user.is_active, login_url="admin:login")(
    SpectacularSwaggerView.as_view(url_name="schema", authentication_classes=[], permission_classes=[])
)

urlpatterns = [
    endpoints.predict,
    path(endpoints.PREFIX, include(endpoints)),
    path("", RedirectView.as_view(url="/api/docs")),
    path("admin", RedirectView.as_view(url="/admin/")),
    path("admin/", admin.site.urls),
    path("api/schema", schema, name="schema"),
    path("api/docs", docs, name="docs"),
]

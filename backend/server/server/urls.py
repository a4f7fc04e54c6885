from django.contrib import admin
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect, JsonResponse
from django.urls import include, path
from django.views import defaults
from drf_spectacular.views import SpectacularAPIView, SpectacularSwaggerView

from server import health


def _json_for_api(request: HttpRequest) -> bool:
    return not request.path.startswith("/admin/")


def not_found(request: HttpRequest, exception: Exception) -> HttpResponse:
    if _json_for_api(request):
        message = f"There is nothing at {request.path}. The API is described at /api/docs."
        return JsonResponse({"status": "Error", "message": message}, status=404)
    return defaults.page_not_found(request, exception)


def bad_request(request: HttpRequest, exception: Exception) -> HttpResponse:
    if _json_for_api(request):
        return JsonResponse({"status": "Error", "message": "The request is malformed."}, status=400)
    return defaults.bad_request(request, exception)


def server_error(request: HttpRequest) -> HttpResponse:
    if _json_for_api(request):
        message = "The server failed; the log says why."
        return JsonResponse({"status": "Error", "message": message}, status=500)
    return defaults.server_error(request)


handler400, handler404, handler500 = bad_request, not_found, server_error

urlpatterns = [
    path("", lambda request: HttpResponseRedirect("/api/docs")),
    path("admin/", admin.site.urls),
    path("livez", health.livez),
    path("readyz", health.readyz),
    path("api/v1/", include("apps.endpoints.urls")),
    path("api/schema", SpectacularAPIView.as_view(), name="schema"),
    path("api/docs", SpectacularSwaggerView.as_view(url_name="schema"), name="docs"),
]

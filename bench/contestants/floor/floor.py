"""What Django and DRF cost when they do nothing but give JSON back."""

import json

from django.core.wsgi import get_wsgi_application
from django.http import JsonResponse
from django.urls import path

application = get_wsgi_application()

from rest_framework.response import Response  # noqa: E402 (needs the application)
from rest_framework.views import APIView  # noqa: E402


def echo(request):
    return JsonResponse(json.loads(request.body))


class Echo(APIView):
    def post(self, request):
        return Response(request.data)


urlpatterns = [path("django", echo), path("drf", Echo.as_view())]

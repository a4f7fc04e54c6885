"""What Django and DRF cost when they do nothing but give JSON back, on the event loop, where the product predicts."""

import json

import django
from django.core.handlers.wsgi import WSGIHandler
from django.http import JsonResponse
from django.urls import path

from server.bridge import Bridge

django.setup(set_prefix=False)


class Handler(WSGIHandler):
    async def answer_on_loop(self, environ, start_response, read):
        await read()
        return b"".join(self(environ, start_response))


application = Bridge(Handler(), threads=1)

from rest_framework.response import Response  # noqa: E402 (needs the application)
from rest_framework.views import APIView  # noqa: E402


def echo(request):
    return JsonResponse(json.loads(request.body))


class Echo(APIView):
    def post(self, request):
        return Response(request.data)


urlpatterns = [path("django", echo), path("drf", Echo.as_view())]

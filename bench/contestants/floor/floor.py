"""What Django and DRF cost when they do nothing but give JSON back, on the event loop, where the product predicts."""

import json

import django
from django.core.handlers.wsgi import WSGIHandler
from django.http import JsonResponse
from django.urls import path

from server.bridge import Bridge
from server.handler import Passed, as_sent

django.setup(set_prefix=False)


class Handler(WSGIHandler):
    async def answer_on_loop(self, environ, read):
        await read()
        told = []
        body = b"".join(self(environ, lambda *head: told.append(head)))
        ((status, headers),) = told
        if status != "200 OK":
            raise ValueError(f"{environ['PATH_INFO']} was answered with {status}.")
        return Passed(None, None, "", headers, as_sent(headers)), body


application = Bridge(Handler(), threads=1)

from rest_framework.response import Response  # noqa: E402 (needs the application)
from rest_framework.views import APIView  # noqa: E402


def echo(request):
    return JsonResponse(json.loads(request.body))


class Echo(APIView):
    def post(self, request):
        return Response(request.data)


urlpatterns = [path("django", echo), path("drf", Echo.as_view())]

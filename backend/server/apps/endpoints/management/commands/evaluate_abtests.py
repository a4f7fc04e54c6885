from __future__ import annotations

from typing import Any

from django.utils import timezone

from apps.endpoints import abtests
from apps.endpoints.management.base import BaseCommand, who
from apps.endpoints.models import ABTest


class Command(BaseCommand):
    help = (
        "Say of each running A/B test what the evidence says. Those that it settles are stopped, if their plan has "
        "auto_apply. For cron."
    )

    def handle(self, **options: Any) -> None:
        running = ABTest.objects.running().select_related("parent_mlalgorithm_1", "parent_mlalgorithm_2")
        for test in running.order_by("pk"):
            judgement, ended_now = abtests.evaluate(test, by=who(), now=timezone.now())
            said = " ".join([judgement.sentence, *judgement.warnings])
            stopped = " The test is stopped." if ended_now else ""
            self.stdout.write(f"{test.pk}, {test}: {judgement.verdict}. {said}{stopped}")

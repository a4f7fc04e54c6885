"""What is served, to whom, and what became of it."""

from __future__ import annotations

import secrets
from datetime import datetime, timedelta
from typing import Any

from django.core.validators import MaxValueValidator, MinValueValidator, RegexValidator
from django.db import models
from django.db.models import Max, OuterRef, Q, Subquery
from django.db.models.functions import Now
from django.utils import timezone

from apps.endpoints.fields import JSONTextField
from apps.ml.schema import MAX_KEY_LENGTH

ENDPOINT_NAME = r"[A-Za-z0-9][A-Za-z0-9_-]*"
FEEDBACK_LABELS = ("1", "0")
MOST_DAYS = 3_650
MOST_CUSTOMERS = 999_999_999


class Status(models.TextChoices):
    TESTING = "testing"
    STAGING = "staging"
    PRODUCTION = "production"
    AB_TESTING = "ab_testing", "A/B testing"
    RETIRED = "retired"


class Endpoint(models.Model):
    """A question that is answered at /api/v1/{name}/predict, by whichever of its algorithms is asked for."""

    name = models.CharField(max_length=128, unique=True, validators=[RegexValidator(f"^{ENDPOINT_NAME}$")])
    owner = models.CharField(max_length=128)
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    maturity_days = models.PositiveIntegerField(
        default=0,
        help_text="How old an answer is before its outcome counts in A/B tests that say nothing else.",
        validators=[MaxValueValidator(MOST_DAYS)],
    )

    def __str__(self) -> str:
        return self.name


class AlgorithmQuerySet(models.QuerySet["MLAlgorithm"]):
    def with_current_status(self) -> AlgorithmQuerySet:
        """Annotate `current_status`, the status that is active now."""
        active = MLAlgorithmStatus.objects.active().filter(parent_mlalgorithm=OuterRef("pk"))
        return self.annotate(current_status=Subquery(active.values("status")[:1]))


class MLAlgorithm(models.Model):
    """A trained model, registered: where its artifact is and which hashes it had at that moment."""

    name = models.CharField(max_length=128)
    description = models.TextField(blank=True)
    code = models.TextField(blank=True)
    version = models.CharField(max_length=64)
    owner = models.CharField(max_length=128)
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    parent_endpoint = models.ForeignKey(
        Endpoint, on_delete=models.PROTECT, related_name="algorithms", verbose_name="endpoint"
    )

    key = models.CharField(max_length=64, help_text="Which class answers for it, e.g. random_forest.")
    artifact = models.CharField(max_length=160, help_text="Its file, below the artifacts folder.")
    artifact_sha256 = models.CharField(max_length=64)
    schema_sha256 = models.CharField(max_length=64)
    metrics = models.JSONField(default=dict, blank=True, help_text="Scores on the customers held out of training.")
    target = models.JSONField(
        default=dict, help_text="The target column, and how the training table spells its values."
    )

    objects = AlgorithmQuerySet.as_manager()

    class Meta:
        verbose_name = "algorithm"
        constraints = [
            models.UniqueConstraint(
                fields=["parent_endpoint", "name", "version"], name="one_algorithm_per_endpoint_name_and_version"
            ),
        ]

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    def outcome_label(self, value: Any) -> str | None:
        """The label, "1" or "0", that an outcome means; None when it is neither label nor a target value.

        "1" and "0" are always the labels, also where the training table spells its own values so.
        """
        text = str(value).strip()
        if text in FEEDBACK_LABELS:
            return text
        spellings = {self.target.get("positive", "").lower(): "1", self.target.get("negative", "").lower(): "0"}
        return spellings.get(text.lower()) if text else None


class StatusQuerySet(models.QuerySet["MLAlgorithmStatus"]):
    def active(self) -> StatusQuerySet:
        return self.filter(active=True)

    def served(self) -> StatusQuerySet:
        """The active statuses of algorithms that answer requests."""
        return self.active().exclude(status=Status.RETIRED)


class MLAlgorithmStatus(models.Model):
    """One step in an algorithm's life. Steps are added, never edited; the active one holds now."""

    status = models.CharField(max_length=16, choices=Status)
    active = models.BooleanField(default=True)
    created_by = models.CharField(max_length=150)
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    reason = models.TextField(blank=True, editable=False, help_text="Why, where whoever did it had to say so.")
    is_rollback = models.BooleanField(
        default=False, editable=False, help_text="Given back to a former production algorithm."
    )
    parent_mlalgorithm = models.ForeignKey(
        MLAlgorithm, on_delete=models.PROTECT, related_name="statuses", verbose_name="algorithm"
    )
    # The algorithm's endpoint, once more: only a column of this table can carry the second constraint.
    parent_endpoint = models.ForeignKey(Endpoint, on_delete=models.PROTECT, related_name="+", editable=False)

    objects = StatusQuerySet.as_manager()

    class Meta:
        verbose_name = "status"
        verbose_name_plural = "status history"
        constraints = [
            models.UniqueConstraint(
                fields=["parent_mlalgorithm"], condition=Q(active=True), name="one_active_status_per_algorithm"
            ),
            models.UniqueConstraint(
                fields=["parent_endpoint"],
                condition=Q(active=True, status=Status.PRODUCTION),
                name="one_production_algorithm_per_endpoint",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.parent_mlalgorithm}: {self.get_status_display()}"


class ABTestQuerySet(models.QuerySet["ABTest"]):
    def running(self) -> ABTestQuerySet:
        return self.filter(ended_at=None)

    def moment_after_counts(self, now: datetime) -> datetime:
        """Now, or just after the moment up to which the end of any of these tests counts."""
        counted = self.aggregate(newest=Max("counted_until"))["newest"]
        return now if counted is None else max(now, counted + timedelta(microseconds=1))


def new_salt() -> str:
    return secrets.token_hex(16)


class ABTest(models.Model):
    """Two algorithms of one endpoint, compared on what became of the customers they answered for.

    What is planned here is fixed for the life of the test: who is in which arm, and when a verdict may fall.
    """

    class Design(models.TextChoices):
        SPLIT = "split", "split: each customer is answered by one of the two"
        SHADOW = "shadow", "shadow: the champion answers everyone, the challenger scores the same unseen"

    class Policy(models.TextChoices):
        EVIDENCE = "evidence", "evidence: production moves only to a challenger that is shown to be better"
        ACCURACY = "accuracy", "accuracy: the more accurate goes to production, however small the difference"

    title = models.CharField(max_length=200)
    created_by = models.CharField(max_length=150)
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    ended_at = models.DateTimeField(null=True, blank=True, editable=False)
    # What is told once somebody counts, to end the test, is dated after this.
    counted_until = models.DateTimeField(null=True, editable=False)
    summary = models.TextField(blank=True, editable=False)
    parent_mlalgorithm_1 = models.ForeignKey(
        MLAlgorithm, on_delete=models.PROTECT, related_name="+", verbose_name="first algorithm"
    )
    parent_mlalgorithm_2 = models.ForeignKey(
        MLAlgorithm, on_delete=models.PROTECT, related_name="+", verbose_name="second algorithm"
    )
    parent_endpoint = models.ForeignKey(
        Endpoint, on_delete=models.PROTECT, related_name="abtests", editable=False, verbose_name="endpoint"
    )
    champion = models.ForeignKey(
        MLAlgorithm,
        on_delete=models.PROTECT,
        related_name="+",
        null=True,
        blank=True,
        editable=False,
        help_text="Which of the two held production when the test began, if either did.",
    )

    design = models.CharField(max_length=8, choices=Design, default=Design.SPLIT)
    policy = models.CharField(max_length=8, choices=Policy, default=Policy.ACCURACY)
    weight = models.FloatField(
        default=0.5,
        verbose_name="challenger's share",
        help_text="Of the customers, between 0 and 1. A shadow's challenger scores all of them.",
        validators=[MinValueValidator(0.001), MaxValueValidator(0.999)],
    )
    salt = models.CharField(max_length=32, default=new_salt, editable=False)
    alpha = models.FloatField(
        default=0.05,
        help_text="How likely, at most, a challenger that is no better may be promoted.",
        validators=[MinValueValidator(1e-6), MaxValueValidator(0.5)],
    )
    minimum_labelled = models.PositiveIntegerField(
        default=100,
        help_text="Customers with a known outcome, by arm, before any verdict; of a shadow, in all.",
        validators=[MinValueValidator(1), MaxValueValidator(MOST_CUSTOMERS)],
    )
    horizon_days = models.PositiveIntegerField(
        null=True,
        blank=True,
        help_text="Days after which a verdict falls.",
        validators=[MinValueValidator(1), MaxValueValidator(MOST_DAYS)],
    )
    horizon_labelled = models.PositiveIntegerField(
        null=True,
        blank=True,
        help_text="Customers with a known outcome, after which a verdict falls.",
        validators=[MinValueValidator(1), MaxValueValidator(MOST_CUSTOMERS)],
    )
    maturity_days = models.PositiveIntegerField(
        default=0,
        help_text="How old an answer is before its outcome counts.",
        validators=[MaxValueValidator(MOST_DAYS)],
    )
    promote_to = models.CharField(
        max_length=16,
        choices=[(status, status.label) for status in (Status.STAGING, Status.PRODUCTION)],
        default=Status.STAGING,
        help_text="Where a winner goes by the evidence if neither of the two held production.",
    )
    auto_apply = models.BooleanField(default=False, help_text="Whether evaluate_abtests stops it once it is settled.")
    guardrail_error_rate = models.FloatField(
        null=True,
        blank=True,
        default=0.05,
        help_text="Which share of the challenger's answers may fail.",
        validators=[MinValueValidator(0), MaxValueValidator(1)],
    )
    guardrail_latency_p99_ms = models.FloatField(
        null=True,
        blank=True,
        help_text="Of the challenger, in milliseconds.",
        validators=[MinValueValidator(0.001), MaxValueValidator(1e9)],
    )
    guardrail_label_shift = models.FloatField(
        null=True,
        blank=True,
        help_text="How far the challenger's share of label 1 may be from the champion's, between 0 and 1.",
        validators=[MinValueValidator(0), MaxValueValidator(1)],
    )

    objects = ABTestQuerySet.as_manager()

    class Meta:
        verbose_name = "A/B test"
        constraints = [
            models.UniqueConstraint(
                fields=["parent_endpoint"], condition=Q(ended_at=None), name="one_running_test_per_endpoint"
            ),
            models.CheckConstraint(
                condition=~Q(parent_mlalgorithm_1=models.F("parent_mlalgorithm_2")), name="two_different_algorithms"
            ),
            models.CheckConstraint(condition=Q(weight__gt=0, weight__lt=1), name="both_arms_get_customers"),
            models.CheckConstraint(condition=Q(alpha__gt=0, alpha__lt=1), name="alpha_is_a_probability"),
        ]

    def __str__(self) -> str:
        return self.title

    @property
    def arm_ids(self) -> tuple[int, int]:
        return self.parent_mlalgorithm_1_id, self.parent_mlalgorithm_2_id

    @property
    def arms(self) -> tuple[MLAlgorithm, MLAlgorithm]:
        """The champion, which keeps its place unless the other is better, and the challenger."""
        first, second = self.parent_mlalgorithm_1, self.parent_mlalgorithm_2
        return (second, first) if self.champion_id == second.pk else (first, second)


HAS_CUSTOMER_KEY = ~Q(customer_key="")


class RequestQuerySet(models.QuerySet["MLRequest"]):
    # SQLite uses a partial index only where the query repeats its condition word for word.
    def labelled(self) -> RequestQuerySet:
        return self.filter(feedback__isnull=False)

    def of_customer(self, key: str) -> RequestQuerySet:
        return self.filter(HAS_CUSTOMER_KEY, customer_key=key)

    def since(self, moment: datetime) -> RequestQuerySet:
        return self.filter(created_at__gte=moment)


class MLRequest(models.Model):
    """One customer asked about: the question, the answer, and later the outcome."""

    input_data = JSONTextField(editable=False)
    full_response = JSONTextField(editable=False)
    response = models.CharField("label", max_length=16, editable=False)
    probability = models.FloatField(editable=False)
    feedback = models.CharField(
        max_length=16, null=True, blank=True, choices=[(label, label) for label in FEEDBACK_LABELS]
    )
    # When the outcome was told first; corrections leave it. Evidence accumulates in this order.
    labelled_at = models.DateTimeField(null=True, editable=False)
    acted_on = models.BooleanField(
        null=True, editable=False, help_text="Whether something was done for the customer because of the answer."
    )
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    latency_ms = models.FloatField(editable=False, help_text="From the parsed call to the scored answer.")
    customer_key = models.CharField(max_length=MAX_KEY_LENGTH, blank=True, editable=False)
    # On PostgreSQL triggers stand for both foreign keys (migration 0010).
    parent_mlalgorithm = models.ForeignKey(
        MLAlgorithm,
        on_delete=models.PROTECT,
        related_name="requests",
        editable=False,
        db_index=False,
        verbose_name="algorithm",
    )
    abtest = models.ForeignKey(
        ABTest,
        on_delete=models.PROTECT,
        related_name="requests",
        null=True,
        editable=False,
        db_index=False,
        verbose_name="A/B test",
    )

    objects = RequestQuerySet.as_manager()

    class Meta:
        verbose_name = "request"
        indexes = [
            models.Index(fields=["created_at"], name="request_by_time"),
            # Holds all that counting an algorithm's requests and right answers reads.
            models.Index(
                fields=["parent_mlalgorithm", "created_at", "feedback", "response"], name="request_by_algorithm"
            ),
            # An algorithm's newest requests, however many others came since.
            models.Index(fields=["parent_mlalgorithm", "id"], name="request_newest_by_algorithm"),
            models.Index(fields=["customer_key"], condition=HAS_CUSTOMER_KEY, name="request_by_customer"),
            models.Index(
                fields=["abtest", "parent_mlalgorithm", "feedback", "response"],
                condition=Q(abtest__isnull=False),
                name="request_by_abtest",
            ),
            # What a shadow has not scored yet.
            models.Index(fields=["abtest", "id"], condition=Q(abtest__isnull=False), name="request_newest_by_abtest"),
            models.Index(fields=["id"], condition=Q(feedback__isnull=False), name="request_labelled"),
        ]

    def __str__(self) -> str:
        return f"request {self.pk}"


class FeedbackChange(models.Model):
    """An outcome as it was told, or corrected: who said what, when."""

    request = models.ForeignKey(MLRequest, on_delete=models.CASCADE, related_name="feedback_changes")
    previous = models.CharField(max_length=16, null=True)
    feedback = models.CharField(max_length=16)
    acted_on = models.BooleanField(null=True)
    created_by = models.CharField(max_length=150)
    created_at = models.DateTimeField(default=timezone.now)

    def __str__(self) -> str:
        return f"{self.previous or 'unknown'} to {self.feedback}"


class ShadowAnswer(models.Model):
    """What the challenger of a shadow test says of a request that the champion answered; or why it could not.

    Of a split test, why the champion answered in its place.
    """

    request = models.OneToOneField(MLRequest, on_delete=models.CASCADE, primary_key=True, related_name="shadow")
    abtest = models.ForeignKey(ABTest, on_delete=models.PROTECT, related_name="shadow_answers", db_index=False)
    response = models.CharField(max_length=16, null=True)
    probability = models.FloatField(null=True)
    latency_ms = models.FloatField()
    failure = models.TextField(blank=True)
    created_at = models.DateTimeField(default=timezone.now)

    class Meta:
        indexes = [models.Index(fields=["abtest", "request"], name="shadow_by_abtest")]

    def __str__(self) -> str:
        return f"{self.response or 'failure'} for request {self.request_id}"


class KeptReport(models.Model):
    """What was counted last of a large A/B test, for whoever looks next: see kept_reports."""

    abtest = models.OneToOneField(ABTest, on_delete=models.CASCADE, primary_key=True, related_name="kept_report")
    # When a worker last began to count, and whether the test had ended by then.
    begun_at = models.DateTimeField(null=True)
    begun_after_end = models.BooleanField(default=False)
    # When the count began whose result is kept, how long it took, and what it gave.
    counted_at = models.DateTimeField(null=True)
    seconds = models.FloatField(default=0)
    document = models.JSONField(null=True)
    format = models.PositiveSmallIntegerField(null=True)

    class Meta:
        default_permissions = ()

    def __str__(self) -> str:
        return f"report of {self.abtest}"


class Decision(models.Model):
    """How a test ended: the verdict, what it rests on, and what was done. The database refuses changes."""

    class Verdict(models.TextChoices):
        ROLLBACK = "ROLLBACK"
        INVALID = "INVALID"
        HOLD = "HOLD"
        PROMOTE = "PROMOTE"
        KEEP = "KEEP"
        CONTINUE = "CONTINUE"

    abtest = models.OneToOneField(ABTest, on_delete=models.PROTECT, related_name="decision", verbose_name="A/B test")
    verdict = models.CharField(max_length=8, choices=Verdict)
    sentence = models.TextField()
    policy = models.CharField(max_length=8, choices=ABTest.Policy)
    evidence = models.JSONField(help_text="Counts, statistic, interval, p and the versions that computed them.")
    promoted = models.ForeignKey(MLAlgorithm, on_delete=models.PROTECT, null=True, related_name="+")
    promoted_to = models.CharField(max_length=16, choices=Status, blank=True)
    forced = models.BooleanField(default=False, help_text="A person overruled the verdict.")
    reason = models.TextField(blank=True)
    decided_by = models.CharField(max_length=150)
    decided_at = models.DateTimeField()

    def __str__(self) -> str:
        return f"{self.verdict} of {self.abtest}"


class BatchJobQuerySet(models.QuerySet["BatchJob"]):
    def unfinished(self) -> BatchJobQuerySet:
        return self.filter(state__in=BatchJob.UNFINISHED)

    def free(self) -> BatchJobQuerySet:
        """What a worker may take: nobody's, and those whose worker has not been heard of for too long."""
        return self.unfinished().filter(Q(lease_until=None) | Q(lease_until__lt=Now()))


class BatchJob(models.Model):
    """A file of customers that workers score: who asked for what, how far it is, and whose turn it is."""

    class State(models.TextChoices):
        QUEUED = "queued"
        CHECKING = "checking"
        SCORING = "scoring"
        SUCCEEDED = "succeeded"
        FAILED = "failed"
        CANCELLED = "cancelled"

    class OnError(models.TextChoices):
        FAIL = "fail"
        SKIP = "skip"

    class Log(models.TextChoices):
        ALL = "all"
        NONE = "none"

    class Format(models.TextChoices):
        CSV = "csv"
        PARQUET = "parquet"

    UNFINISHED = (State.QUEUED, State.CHECKING, State.SCORING)

    state = models.CharField(max_length=16, choices=State, default=State.QUEUED)
    problem = models.TextField(blank=True, help_text="Why it failed.")
    parent_mlalgorithm = models.ForeignKey(
        MLAlgorithm, on_delete=models.PROTECT, related_name="batch_jobs", verbose_name="algorithm"
    )
    created_by = models.CharField(max_length=150)
    created_at = models.DateTimeField(default=timezone.now)
    started_at = models.DateTimeField(null=True)
    finished_at = models.DateTimeField(null=True)

    file_name = models.CharField(max_length=255, help_text="As the client named it.")
    file_bytes = models.BigIntegerField()
    on_error = models.CharField(max_length=8, choices=OnError, default=OnError.FAIL)
    log = models.CharField(max_length=8, choices=Log, default=Log.ALL)
    result_format = models.CharField(
        max_length=8, choices=Format, default=Format.CSV, help_text="Of the result, unless another is asked for."
    )
    folder = models.CharField(max_length=64, blank=True, help_text="Below BATCH_DIR; empty when its files are gone.")
    # Of a client that may send a file twice and mean it once. The digest tells whether it is the same file.
    idempotency_key = models.CharField(max_length=200, blank=True)
    digest = models.CharField(max_length=64, blank=True)

    checked_at = models.DateTimeField(null=True, help_text="When every row had been looked at, and scoring began.")
    rows_total = models.BigIntegerField(null=True, help_text="Known when it is checked.")
    rows_refused = models.BigIntegerField(default=0)
    rows_read = models.BigIntegerField(default=0, help_text="In order to be scored.")
    rows_scored = models.BigIntegerField(default=0)
    bytes_read = models.BigIntegerField(default=0, help_text="Of the file, in the present step.")
    histogram = models.JSONField(default=list, help_text="How many probabilities lie in each twentieth from 0 to 1.")

    lease_until = models.DateTimeField(null=True, help_text="Until when the job is its worker's, unless it renews it.")
    turn = models.PositiveIntegerField(default=0, help_text="How often a worker has taken it.")
    fruitless_turns = models.PositiveIntegerField(default=0, help_text="How many of them since the last progress.")

    objects = BatchJobQuerySet.as_manager()

    class Meta:
        verbose_name = "batch job"
        constraints = [
            models.UniqueConstraint(
                fields=["created_by", "idempotency_key"],
                condition=~Q(idempotency_key=""),
                name="one_batch_job_per_idempotency_key",
            ),
        ]
        indexes = [
            models.Index(
                fields=["id"], condition=Q(state__in=["queued", "checking", "scoring"]), name="batch_job_unfinished"
            ),
        ]

    def __str__(self) -> str:
        return f"batch job {self.pk}"

    @property
    def is_finished(self) -> bool:
        return self.state not in self.UNFINISHED

    def download_name(self, what: str, form: str = Format.CSV) -> str:
        """shop.csv.gz becomes shop-scored.csv."""
        stem = self.file_name.removesuffix(".gz").removesuffix(".csv").removesuffix(".parquet") or "customers"
        return f"{stem}-{what}.{form}"


class BatchPart(models.Model):
    """A stretch of a job's rows that is done: its answers are in the file named, and logged if that was asked for.

    This row is what makes it so: it is committed together with the logged requests, when the file is in its place.
    """

    job = models.ForeignKey(BatchJob, on_delete=models.CASCADE, related_name="parts")
    number = models.PositiveIntegerField()
    file = models.CharField(max_length=64)

    class Meta:
        constraints = [models.UniqueConstraint(fields=["job", "number"], name="each_batch_part_once")]

    def __str__(self) -> str:
        return f"part {self.number} of job {self.job_id}"

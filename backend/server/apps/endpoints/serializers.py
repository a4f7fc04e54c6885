from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

from django.db import models
from django.utils import timezone
from drf_spectacular.utils import extend_schema_field
from rest_framework import serializers

from apps.endpoints import batch_jobs, outcomes, parameters, tables
from apps.endpoints.evidence import EVERYONE, UNTREATED
from apps.endpoints.models import (
    MOST_CUSTOMERS,
    MOST_DAYS,
    ABTest,
    BatchJob,
    Decision,
    Endpoint,
    MLAlgorithm,
    MLAlgorithmStatus,
    MLRequest,
    Status,
)
from apps.endpoints.prediction import Wanted
from apps.endpoints.replay import MOST_AT_ONCE
from apps.ml.registry import DEFAULT_ENDPOINT
from apps.ml.schema import spelled

ANONYMOUS = "anonymous"
MAX_IDEMPOTENCY_KEY = 200
MAX_REASON = 2_000
# A larger file is not held in memory, which takes ten times as much.
MOST_BYTES_AT_ONCE = 20 * 2**20


class OneOfField(serializers.ChoiceField):
    """Names the choices when it refuses another."""

    def __init__(self, choices: Any, **kwargs: Any):
        super().__init__(choices, **kwargs)
        self.error_messages["invalid_choice"] = f"Expected one of {', '.join(map(str, self.choices))}."


# Of a field that names an algorithm by its id.
AN_ALGORITHM = {
    "pk_field": serializers.IntegerField(),
    "error_messages": {"does_not_exist": "There is no algorithm {pk_value}; /api/v1/mlalgorithms lists them."},
}


class NothingElse(serializers.Serializer):
    """Refuses what it has no field for."""

    def to_internal_value(self, data: Any) -> Any:
        writable = [name for name, field in self.fields.items() if not field.read_only]
        if isinstance(data, Mapping) and (wrong := parameters.unknown(data, self.fields, writable)):
            raise serializers.ValidationError(wrong)
        return super().to_internal_value(data)


class EndpointSerializer(serializers.ModelSerializer):
    class Meta:
        model = Endpoint
        fields = ["id", "name", "owner", "created_at"]
        read_only_fields = fields


class MLAlgorithmSerializer(serializers.ModelSerializer):
    current_status = serializers.ChoiceField(Status.choices, read_only=True)

    class Meta:
        model = MLAlgorithm
        fields = [
            *("id", "name", "key", "description", "code", "version", "owner", "created_at", "parent_endpoint"),
            *("current_status", "artifact", "artifact_sha256", "metrics"),
        ]
        read_only_fields = fields


class CreatedByField(serializers.CharField):
    """Who asks: the token's user where there is one, else what the body says."""

    def __init__(self, **kwargs: Any):
        super().__init__(max_length=150, required=False, default=ANONYMOUS, **kwargs)

    def run_validation(self, data: Any = serializers.empty) -> str:
        user = self.context["request"].user if "request" in self.context else None
        return user.get_username() if user else super().run_validation(data)


class ReasonField(serializers.CharField):
    """Why somebody did it, for those who read the history."""

    def __init__(self, **kwargs: Any):
        super().__init__(max_length=MAX_REASON, required=False, default="", allow_blank=True, **kwargs)


class MLAlgorithmStatusSerializer(NothingElse, serializers.ModelSerializer):
    status = serializers.CharField(max_length=128, help_text="testing, staging, production or retired")
    created_by = CreatedByField()
    reason = ReasonField()

    class Meta:
        model = MLAlgorithmStatus
        fields = [
            *("id", "status", "active", "created_by", "created_at", "reason", "is_rollback"),
            "parent_mlalgorithm",
        ]
        read_only_fields = ["id", "active", "created_at", "is_rollback"]
        extra_kwargs = {"parent_mlalgorithm": AN_ALGORITHM}
        validators: list[object] = []  # `lifecycle` judges, under a lock


class RollbackSerializer(NothingElse):
    """Who gives production back, and why."""

    reason = ReasonField()
    created_by = CreatedByField()


class MLRequestSerializer(serializers.ModelSerializer):
    class Meta:
        model = MLRequest
        fields = [
            *("id", "input_data", "full_response", "response", "probability", "feedback", "customer_key"),
            *("labelled_at", "acted_on", "latency_ms", "created_at", "parent_mlalgorithm", "abtest"),
        ]
        read_only_fields = fields


@extend_schema_field({"oneOf": [{"type": "string"}, {"type": "integer"}, {"type": "boolean"}]})
class OutcomeField(serializers.Field):
    """An outcome as the client spells it; which spellings there are depends on the algorithm's training table."""

    def to_internal_value(self, data: Any) -> str:
        if isinstance(data, (str, int, float)):
            return spelled(data)
        raise serializers.ValidationError('Expected "1" or "0".')


@extend_schema_field({"oneOf": [{"type": "boolean"}, {"type": "string"}, {"type": "integer"}], "nullable": True})
class ActedOnField(serializers.Field):
    """Whether something was done for the customer because of the answer; null or empty leaves what is known."""

    def __init__(self, **kwargs: Any):
        super().__init__(required=False, allow_null=True, default=None, **kwargs)

    def to_internal_value(self, data: Any) -> bool | None:
        try:
            return outcomes.read_acted_on(data)
        except outcomes.BadValue as error:
            raise serializers.ValidationError(str(error)) from None


class FeedbackSerializer(serializers.Serializer):
    """What may be written to a logged request. Other fields may be sent back as they were read."""

    feedback = OutcomeField()
    acted_on = ActedOnField()

    def validate(self, attrs: dict[str, Any]) -> dict[str, Any]:
        current = self.context["current"]
        changed = [
            name
            for name, value in self.initial_data.items()
            if name not in self.fields
            and (name not in current if self.context["is_form"] else current.get(name) != value)
        ]
        if changed:
            raise serializers.ValidationError(
                dict.fromkeys(changed, "Only feedback and acted_on can be written; leave this field out or as it was.")
            )
        return attrs


class OutcomeSerializer(serializers.Serializer):
    """One outcome of many; `outcomes.read` judges it."""

    request_id = serializers.IntegerField(required=False, min_value=1, max_value=10**18 - 1)
    customer_key = serializers.CharField(
        required=False, help_text="In place of request_id: the customer's latest request before outcome_at."
    )
    outcome_at = serializers.DateTimeField(
        required=False, help_text="A date, and so its first moment, or a date and time; by default now."
    )
    window_days = serializers.IntegerField(
        required=False, min_value=1, max_value=outcomes.MOST_WINDOW_DAYS, help_text="How far back to look."
    )
    outcome = OutcomeField(help_text="Or `feedback`, which is another name of it.")
    acted_on = ActedOnField()


class HowOutcomesSerializer(NothingElse):
    """What holds for all outcomes that name customers."""

    endpoint = serializers.CharField(required=False, help_text="To which the requests belong; by default any.")
    window_days = serializers.CharField(
        default=str(outcomes.DEFAULT_WINDOW_DAYS), help_text="Where a line has none: how far back to look."
    )

    def validate_endpoint(self, name: str) -> Endpoint:
        endpoint = Endpoint.objects.filter(name=name).first()
        if endpoint is None:
            names = ", ".join(Endpoint.objects.order_by("id").values_list("name", flat=True)[:20])
            raise serializers.ValidationError(f"There is no endpoint {name[:60]!r}; there are: {names or 'none'}.")
        return endpoint

    def validate_window_days(self, days: str) -> int:
        try:
            return outcomes.read_window_days(days)
        except outcomes.BadValue as error:
            raise serializers.ValidationError(str(error)) from None

    def how(self) -> dict[str, Any]:
        """For `feedback.record_rows`. Raises ValidationError."""
        self.is_valid(raise_exception=True)
        return {name: self.validated_data[name] for name in ("endpoint", "window_days") if name in self.validated_data}


class OutcomesFileSerializer(HowOutcomesSerializer):
    file = serializers.FileField(
        allow_empty_file=True,
        help_text="A CSV whose header has outcome (or feedback), request_id or customer_key, and if they are told "
        "outcome_at, window_days and acted_on.",
    )


class RecordedSerializer(serializers.Serializer):
    lines = serializers.IntegerField()
    recorded = serializers.IntegerField(help_text="Requests whose outcome was not known.")
    corrected = serializers.IntegerField(help_text="Requests whose outcome, or acted_on, was another.")
    unchanged = serializers.IntegerField(help_text="Lines that say what was known.")
    message = serializers.CharField()


class DecisionSerializer(serializers.ModelSerializer):
    promoted_to = serializers.CharField(read_only=True, help_text="The status that it got; empty if nobody got one.")

    class Meta:
        model = Decision
        fields = [
            *("verdict", "sentence", "policy", "promoted", "promoted_to", "forced", "reason", "decided_by"),
            *("decided_at", "evidence"),
        ]
        read_only_fields = fields


@extend_schema_field({"type": "string", "example": "30 days, 4000 customers"})
class HorizonField(serializers.Field):
    """When a verdict falls at the latest: after days, after customers with a known outcome, or whichever is first."""

    default_error_messages = {
        "invalid": 'Expected days, customers with a known outcome, or both, as in "30 days, 4000 customers".'
    }
    UNITS = {"day": "horizon_days", "customer": "horizon_labelled"}

    def get_attribute(self, test: ABTest) -> ABTest:
        return test

    def to_representation(self, test: ABTest) -> str | None:
        counts = [(getattr(test, field), unit) for unit, field in self.UNITS.items()]
        return ", ".join(f"{count} {unit}{'s' * (count > 1)}" for count, unit in counts if count) or None

    def to_internal_value(self, data: Any) -> dict[str, int]:
        if not isinstance(data, str):
            self.fail("invalid")
        horizon: dict[str, int] = {}
        for part in data.split(","):
            match = re.fullmatch(r"\s*([0-9]{1,9})\s*(day|customer)s?\s*", part)
            if match is None or self.UNITS[match[2]] in horizon:
                self.fail("invalid")
            count, name = int(match[1]), self.UNITS[match[2]]
            for validate in ABTest._meta.get_field(name).validators:
                validate(count)
            horizon[name] = count
        return horizon


def is_finite(value: float) -> None:
    if not math.isfinite(value):
        raise serializers.ValidationError("Expected a finite number.")


class PlanField(serializers.FloatField):
    default_validators = [is_finite]


class ABTestSerializer(NothingElse, serializers.ModelSerializer):
    """Two algorithms, and the plan by which they are compared, which is fixed for the life of the test."""

    created_by = CreatedByField()
    horizon = HorizonField(required=False, allow_null=True)
    champion = serializers.SerializerMethodField(help_text="Keeps its place unless the challenger is better.")
    challenger = serializers.SerializerMethodField()
    decision = DecisionSerializer(read_only=True, allow_null=True, help_text="How it ended, and why.")
    serializer_field_mapping = {**serializers.ModelSerializer.serializer_field_mapping, models.FloatField: PlanField}
    serializer_choice_field = OneOfField

    class Meta:
        model = ABTest
        fields = [
            *("id", "title", "created_by", "created_at", "ended_at", "summary"),
            *("parent_mlalgorithm_1", "parent_mlalgorithm_2", "champion", "challenger"),
            *("design", "policy", "weight", "alpha", "minimum_labelled", "horizon", "maturity_days"),
            *("promote_to", "auto_apply"),
            *("guardrail_error_rate", "guardrail_latency_p99_ms", "guardrail_label_shift", "decision"),
        ]
        read_only_fields = ["id", "created_at", "ended_at", "summary"]
        extra_kwargs = {"parent_mlalgorithm_1": AN_ALGORITHM, "parent_mlalgorithm_2": AN_ALGORITHM}
        validators: list[object] = []  # `abtests` judges, under a lock

    def get_champion(self, test: ABTest) -> int:
        return test.arms[0].pk

    def get_challenger(self, test: ABTest) -> int:
        return test.arms[1].pk

    def validate(self, attrs: dict[str, Any]) -> dict[str, Any]:
        horizon = attrs.pop("horizon", None) or {}
        return {**attrs, **horizon}


class Share(serializers.FloatField):
    """Between 0 and 1; null when there is nothing to divide by."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_null=True, **kwargs)


class IntervalField(serializers.ListField):
    def __init__(self, **kwargs: Any):
        super().__init__(child=serializers.FloatField(), allow_null=True, min_length=2, max_length=2, **kwargs)


class OfBothField(serializers.ListField):
    """The champion's, then the challenger's."""

    def __init__(self, child: serializers.Field, **kwargs: Any):
        super().__init__(child=child, min_length=2, max_length=2, **kwargs)


class ReportDecisionSerializer(serializers.Serializer):
    verdict = serializers.ChoiceField(Decision.Verdict.choices)
    sentence = serializers.CharField()
    warnings = serializers.ListField(child=serializers.CharField())


class TreatmentSerializer(serializers.Serializer):
    labelled = serializers.IntegerField()
    accuracy = Share()


class LatencySerializer(serializers.Serializer):
    p50 = serializers.FloatField(required=False)
    p95 = serializers.FloatField(required=False)
    p99 = serializers.FloatField(required=False)


class CalibrationSerializer(serializers.Serializer):
    mean_probability = serializers.FloatField()
    stayed = serializers.FloatField(help_text="Which share of these customers stayed.")
    customers = serializers.IntegerField()


class ArmSerializer(serializers.Serializer):
    algorithm = serializers.IntegerField()
    name = serializers.CharField()
    requests = serializers.IntegerField(help_text="Answered; by a shadow's challenger scored.")
    failures = serializers.IntegerField(help_text="Requests that the challenger could not score.")
    customers = serializers.IntegerField()
    labelled = serializers.IntegerField(help_text="Customers whose outcome is known and counts.")
    label_rate = Share()
    accuracy = Share(help_text="On the customers on whom the verdict rests.")
    accuracy_interval = IntervalField(help_text="Wilson's, for a single look.")
    treated = TreatmentSerializer()
    untreated = TreatmentSerializer()
    positive_share = Share(help_text="Of label 1.")
    mean_probability = Share()
    brier = Share()
    roc_auc = Share()
    latency_ms = LatencySerializer()
    calibration = CalibrationSerializer(many=True)


class ComparisonSerializer(serializers.Serializer):
    estimate = serializers.FloatField(allow_null=True, help_text="The challenger's accuracy less the champion's.")
    interval = IntervalField(help_text="Anytime-valid: it holds however often one looks.")
    p = serializers.FloatField(help_text="Anytime-valid.")
    more_labels = serializers.IntegerField(
        allow_null=True, help_text="About how many more would settle it; null when it is settled, or nobody can say."
    )


class SingleLookSerializer(serializers.Serializer):
    p = serializers.FloatField(required=False, help_text="McNemar's, of a shadow.")
    interval = IntervalField(required=False, help_text="Newcombe's, of a split.")


class DifferenceSerializer(ComparisonSerializer):
    single_look = SingleLookSerializer(help_text="What would hold if nobody looked more than once.")


class SampleRatioSerializer(serializers.Serializer):
    customers = OfBothField(serializers.IntegerField())
    planned = OfBothField(serializers.FloatField())
    p = serializers.FloatField(help_text="Anytime-valid.")
    single_look_p = serializers.FloatField(allow_null=True)


class LabelRateSerializer(serializers.Serializer):
    label_rates = OfBothField(Share())
    p = serializers.FloatField()


class ChecksSerializer(serializers.Serializer):
    sample_ratio = SampleRatioSerializer(allow_null=True, help_text="Whether the arms got customers as planned.")
    label_rate = LabelRateSerializer(allow_null=True)


class PairsSerializer(serializers.Serializer):
    both = serializers.IntegerField()
    only_champion = serializers.IntegerField()
    only_challenger = serializers.IntegerField()
    neither = serializers.IntegerField()


class DaySerializer(serializers.Serializer):
    """What had accumulated by the end of a day (UTC)."""

    day = serializers.DateField()
    customers = OfBothField(serializers.IntegerField())
    labelled = OfBothField(serializers.IntegerField())
    accuracy = OfBothField(Share())
    difference = ComparisonSerializer()


class ReportQuerySerializer(NothingElse):
    fresh = serializers.BooleanField(
        default=False, help_text="Count anew. Without it the report of a large test may be as of some minutes ago."
    )


class ReportSerializer(serializers.Serializer):
    abtest = serializers.IntegerField()
    title = serializers.CharField()
    design = serializers.ChoiceField(ABTest.Design.choices)
    policy = serializers.ChoiceField(ABTest.Policy.choices)
    alpha = serializers.FloatField(help_text="Intervals hold with a certainty of 1 - alpha.")
    as_of = serializers.DateTimeField()
    ended_at = serializers.DateTimeField(allow_null=True)
    summary = serializers.CharField(help_text="How it was ended; empty while it runs.")
    decision = ReportDecisionSerializer(help_text="What the evidence says; how a test was ended is told by the test.")
    judged_on = serializers.ChoiceField([EVERYONE, UNTREATED])
    treated_share = serializers.FloatField()
    champion = ArmSerializer()
    challenger = ArmSerializer()
    difference = DifferenceSerializer()
    checks = ChecksSerializer()
    pairs = PairsSerializer(allow_null=True, help_text="Of a shadow: customers by who was right.")
    waiting = serializers.IntegerField(help_text="Requests that a shadow's challenger has not scored yet.")
    days = DaySerializer(many=True)


class StopSerializer(NothingElse):
    """How to end a test. Empty: as its policy says."""

    force = serializers.BooleanField(default=False, help_text="Overrule the policy; needs a reason.")
    reason = serializers.CharField(default="", allow_blank=True, max_length=2_000)
    promote = OneOfField(
        ["champion", "challenger"], default="", help_text="With force: by default whichever the policy would not."
    )


class PlanQuerySerializer(NothingElse):
    """What an A/B test would have to show. `planning` says what cannot be."""

    baseline = PlanField(help_text="The champion's accuracy, such as 0.8.")
    lift = PlanField(help_text="How much more accurate the challenger is; 0.02 for two points.")
    disagreement = PlanField(
        required=False, help_text="The share of customers whom only one of the two gets right; without it, no shadow."
    )
    alpha = PlanField(default=0.05, help_text="How likely, at most, a false alarm may be.")
    power = PlanField(default=0.8, help_text="How likely the lift is shown.")
    per_day = PlanField(required=False, help_text="Customers whose outcome becomes known; without it, no days.")
    weight = PlanField(default=0.5, help_text="The challenger's share of a split's customers.")


class NeedSerializer(serializers.Serializer):
    labelled = serializers.IntegerField(help_text="Customers whose outcome is known, in all.")
    champion = serializers.IntegerField(allow_null=True, help_text="Of them, of a split.")
    challenger = serializers.IntegerField(allow_null=True, help_text="Of them, of a split.")
    days = serializers.IntegerField(allow_null=True)


class DesignNeedsSerializer(serializers.Serializer):
    fixed_sample = NeedSerializer(help_text="With one look, when all these are known, and none before.")
    anytime_valid = NeedSerializer(help_text="However often someone looks, as decisions are made here.")
    anytime_valid_median = NeedSerializer(help_text="By then half of the tests have shown it, and may end.")


class PlanSerializer(serializers.Serializer):
    message = serializers.CharField()
    split = DesignNeedsSerializer()
    shadow = DesignNeedsSerializer(allow_null=True)


class StoppedABTestSerializer(ABTestSerializer):
    message = serializers.CharField(read_only=True, help_text="Whether this call stopped it, and the summary.")

    class Meta(ABTestSerializer.Meta):
        fields = [*ABTestSerializer.Meta.fields, "message"]


class ReplaySerializer(NothingElse):
    """Which algorithms to compare on which logged requests."""

    challenger = serializers.IntegerField(min_value=1, max_value=2**63 - 1, help_text="An algorithm's id.")
    champion = serializers.IntegerField(
        min_value=1,
        max_value=2**63 - 1,
        required=False,
        help_text="Whose answers are looked at: by default the production algorithm's, or a running test's champion's.",
    )
    since = serializers.DateTimeField(required=False, help_text="When the champion answered, at the earliest.")
    until = serializers.DateTimeField(required=False, help_text="Before when the champion answered.")
    alpha = PlanField(default=0.05, min_value=1e-6, max_value=0.5)
    minimum_labelled = serializers.IntegerField(default=100, min_value=1, max_value=MOST_CUSTOMERS)
    maturity_days = serializers.IntegerField(
        required=False, min_value=0, max_value=MOST_DAYS, help_text="By default the endpoint's."
    )
    most = serializers.IntegerField(
        default=MOST_AT_ONCE,
        min_value=1,
        max_value=MOST_AT_ONCE,
        help_text="Labelled requests, the newest first. `manage.py replay` has no limit.",
    )


class ReplayedArmSerializer(serializers.Serializer):
    """One algorithm on the customers that are compared."""

    id = serializers.IntegerField()
    algorithm = serializers.CharField()
    version = serializers.CharField()
    correct = serializers.IntegerField()
    accuracy = serializers.FloatField()
    low = serializers.FloatField(help_text="Of Wilson's interval of the accuracy.")
    high = serializers.FloatField()


class LeftOutSerializer(serializers.Serializer):
    immature = serializers.IntegerField(help_text="Younger than the maturity period.")
    trained_on = serializers.IntegerField(help_text="By whom the challenger may have learned.")
    repeated = serializers.IntegerField(help_text="Of customers who count by another request.")
    failures = serializers.IntegerField(help_text="Which the challenger could not score.")


class TrainingSerializer(serializers.Serializer):
    known_by = serializers.ChoiceField(
        ["customer key", "time"], help_text="How it is known whom the challenger was trained on."
    )
    cutoff = serializers.DateTimeField(help_text="When it was trained.")
    data_sha256 = serializers.CharField(allow_null=True, help_text="Of the table that it was trained on.")


class ReplayedDifferenceSerializer(serializers.Serializer):
    estimate = serializers.FloatField(help_text="The challenger's accuracy minus the champion's.")
    low = serializers.FloatField(help_text="Of its anytime-valid interval.")
    high = serializers.FloatField()
    p = serializers.FloatField(help_text="Of this look alone.")


class ReplayedSerializer(serializers.Serializer):
    """What a challenger would have been worth."""

    champion = ReplayedArmSerializer()
    challenger = ReplayedArmSerializer()
    considered = serializers.IntegerField(help_text="Labelled requests that were looked at.")
    left_out = LeftOutSerializer(help_text="How many of them do not count, and why.")
    compared = serializers.IntegerField(help_text="Customers on whom both are judged.")
    training = TrainingSerializer()
    pairs = PairsSerializer()
    difference = ReplayedDifferenceSerializer()
    p = serializers.FloatField(help_text="Anytime-valid.")
    alpha = serializers.FloatField()
    verdict = serializers.ChoiceField(Decision.Verdict.choices)
    sentence = serializers.CharField()


@extend_schema_field({"type": "string", "enum": [status.value for status in Status if status != Status.RETIRED]})
class ServedStatusField(serializers.CharField):
    """A status by which an algorithm can be asked for; `prediction` says which there are when it is none."""


class WantedSerializer(NothingElse):
    """Which algorithm answers."""

    status = ServedStatusField(
        required=False, max_length=128, help_text="By default the setting PREDICT_DEFAULT_STATUS."
    )
    version = serializers.CharField(required=False, max_length=128)
    algorithm = serializers.CharField(
        required=False, max_length=128, help_text="Its name or key, such as random_forest."
    )

    def wanted(self) -> Wanted:
        self.is_valid(raise_exception=True)
        return Wanted(*(self.validated_data.get(name) for name in ("status", "version", "algorithm")))


class BatchSerializer(WantedSerializer):
    """A file of customers, and which algorithm answers."""

    file = serializers.FileField(
        allow_empty_file=True, help_text="A CSV with a header line, one in gzip, or Parquet; the last two become a job."
    )
    endpoint = serializers.CharField(default=DEFAULT_ENDPOINT, max_length=128)
    status = ServedStatusField(required=False, max_length=128, help_text="By default production.")
    format = OneOfField(
        ["json", "csv", "parquet"],
        default="",
        help_text="Of an answer that comes at once by default json, and of a job's result the file's own; "
        "parquet: a job, however small.",
    )
    mode = OneOfField(["auto", "async"], default="auto", help_text="async: a job, however small.")
    on_error = OneOfField(
        BatchJob.OnError.values, default=BatchJob.OnError.FAIL.value, help_text="skip: score the other rows."
    )
    log = OneOfField(
        BatchJob.Log.values, default=BatchJob.Log.ALL.value, help_text="none: log no requests, and so get no feedback."
    )

    def wanted(self) -> Wanted:
        return replace(super().wanted(), default_status=Status.PRODUCTION)

    def validate(self, attrs: dict[str, Any]) -> dict[str, Any]:
        """Adds what the headers say, and `as_job`: whether nobody expects the answer at once."""
        headers = self.context["headers"]
        key = headers.get("Idempotency-Key", "").strip()
        if len(key) > MAX_IDEMPOTENCY_KEY:
            raise serializers.ValidationError(
                {"Idempotency-Key": f"This header is longer than {MAX_IDEMPOTENCY_KEY} characters."}
            )
        preferences = {word.strip().lower() for word in re.split("[,;]", headers.get("Prefer", ""))}
        prefers_job = "respond-async" in preferences
        file = attrs["file"]
        is_more_than_plain = (
            key
            or attrs["on_error"] != BatchJob.OnError.FAIL
            or attrs["log"] != BatchJob.Log.ALL
            or file.size > MOST_BYTES_AT_ONCE
            or not tables.is_plain_csv(file)
            or attrs["format"] == BatchJob.Format.PARQUET
        )
        as_job = bool(prefers_job or attrs["mode"] == "async" or is_more_than_plain)
        return {**attrs, "idempotency_key": key, "prefers_job": prefers_job, "as_job": as_job}


class BatchJobSerializer(serializers.ModelSerializer):
    algorithm = serializers.CharField(source="parent_mlalgorithm.name", read_only=True)
    version = serializers.CharField(source="parent_mlalgorithm.version", read_only=True)
    rows_per_second = serializers.SerializerMethodField(help_text="In the present step; in the end, of the scoring.")
    seconds_left = serializers.SerializerMethodField(help_text="Of the present step; null when nobody can say.")
    expires_at = serializers.SerializerMethodField(help_text="When the result goes.")

    class Meta:
        model = BatchJob
        fields = [
            *("id", "state", "problem", "algorithm", "version", "parent_mlalgorithm", "created_by", "created_at"),
            *("started_at", "finished_at", "file_name", "file_bytes", "on_error", "log", "result_format"),
            *("rows_total", "rows_read", "rows_scored", "rows_refused", "rows_per_second", "seconds_left"),
            *("histogram", "expires_at"),
        ]
        read_only_fields = fields

    def get_rows_per_second(self, job: BatchJob) -> float | None:
        rate = batch_jobs.pace(job, timezone.now()).rows_per_second
        return rate and round(rate, 1)

    def get_seconds_left(self, job: BatchJob) -> float | None:
        left = batch_jobs.pace(job, timezone.now()).seconds_left
        return left and round(left, 1)

    def get_expires_at(self, job: BatchJob) -> datetime | None:
        return batch_jobs.expires_at(job)


class BatchErrorSerializer(serializers.Serializer):
    line = serializers.IntegerField(help_text="The header is line 1; of Parquet, line 2 is the first row.")
    column = serializers.CharField()
    value = serializers.CharField()
    reason = serializers.CharField()


class BatchErrorsSerializer(serializers.Serializer):
    rows_refused = serializers.IntegerField()
    errors = BatchErrorSerializer(many=True)


class AnswerSerializer(serializers.Serializer):
    """How likely the customer stays, and who says so."""

    probability = serializers.FloatField(help_text="That the customer stays, 0 to 1.")
    label = serializers.ChoiceField(["1", "0"], help_text='"1" (stays) above 0.5.')
    status = serializers.ChoiceField(["OK"])
    request_id = serializers.IntegerField(help_text="Send the outcome to /mlrequests/{request_id} later.")
    algorithm = serializers.CharField()
    version = serializers.CharField()
    warnings = serializers.ListField(child=serializers.CharField(), required=False)


class BatchPredictionSerializer(serializers.Serializer):
    probability = serializers.FloatField()
    label = serializers.ChoiceField(["1", "0"])
    status = serializers.ChoiceField(["OK"])
    warnings = serializers.ListField(child=serializers.CharField(), required=False)


class BatchAnswerSerializer(serializers.Serializer):
    id = serializers.IntegerField(help_text="Of the logged request.")
    prediction = BatchPredictionSerializer()


class ProblemSerializer(serializers.Serializer):
    field = serializers.CharField(allow_null=True)
    message = serializers.CharField()
    row = serializers.IntegerField(required=False, help_text="Counted from 1 in the list that was sent.")
    line = serializers.IntegerField(required=False, help_text="Counted from 1 in the file; the header is line 1.")


class ErrorSerializer(serializers.Serializer):
    status = serializers.ChoiceField(["Error"])
    message = serializers.CharField()
    errors = ProblemSerializer(many=True, required=False)

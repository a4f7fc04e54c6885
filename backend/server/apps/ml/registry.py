"""Database rows and the loaded classifiers that answer for them.

The registry is empty when imported. The WSGI start-up, a command or a test fills it on purpose; any
process can `get` a row's classifier without having filled it.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from django.conf import settings
from django.db.models import Case, F, FilteredRelation, OuterRef, Q, Subquery, When
from django.utils import timezone

from apps.endpoints import lifecycle
from apps.endpoints.models import Endpoint, MLAlgorithm, MLAlgorithmStatus
from apps.endpoints.sql import Prepared
from apps.ml.artifacts import ArtifactError, TrainingRun, newest_run, open_run
from apps.ml.classifier.base import RetentionClassifier
from apps.ml.classifier.decision_tree import DecisionTreeClassifier
from apps.ml.classifier.extra_trees import ExtraTreesClassifier
from apps.ml.classifier.random_forest import RandomForestClassifier
from apps.ml.forest import prepare

logger = logging.getLogger(__name__)

DEFAULT_ENDPOINT = "classifier"

# Each algorithm's class, and the status it starts with on an endpoint's first training run.
ALGORITHMS: list[tuple[type[RetentionClassifier], str]] = [
    (RandomForestClassifier, "production"),
    (ExtraTreesClassifier, "staging"),
    (DecisionTreeClassifier, "testing"),
]


# An endpoint's id, and the newest step in the life of any of its algorithms.
_newest_step = Prepared(
    lambda name: Endpoint.objects.filter(name=name).values_list(
        "pk",
        Subquery(MLAlgorithmStatus.objects.filter(parent_endpoint=OuterRef("pk")).order_by("-pk").values("pk")[:1]),
    )
)

# As ABTest.arms says it.
_CHALLENGER = Case(
    When(running__champion=F("running__parent_mlalgorithm_2"), then=F("running__parent_mlalgorithm_1")),
    default=F("running__parent_mlalgorithm_2"),
)


@dataclass(frozen=True, eq=False)
class Served:
    """What an endpoint served after a step in the life of its algorithms."""

    endpoint_id: int
    newest_step: int | None
    statuses: Sequence[MLAlgorithmStatus]
    algorithm_ids: frozenset[int]


class MLRegistry:
    """`endpoints` maps an algorithm's id to the classifier that answers for it."""

    def __init__(self) -> None:
        self.endpoints: dict[int, RetentionClassifier] = {}
        self._served: dict[str, Served] = {}
        self._endpoint_of: dict[int, int] = {}
        self._filling = threading.Lock()

    def add_algorithm(
        self,
        endpoint_name: str,
        algorithm_object: RetentionClassifier,
        algorithm_name: str,
        algorithm_status: str,
        algorithm_version: str,
        owner: str,
        algorithm_description: str,
        algorithm_code: str,
    ) -> MLAlgorithm:
        """Create the algorithm's rows if they are not there, and keep its object. Safe in many processes at once."""
        target = algorithm_object.schema.target
        algorithm = lifecycle.register(
            endpoint_name,
            algorithm_name,
            algorithm_version,
            status=algorithm_status,
            owner=owner,
            now=timezone.now(),
            description=algorithm_description,
            code=algorithm_code,
            key=algorithm_object.algorithm,
            artifact=f"{algorithm_object.version}/{algorithm_object.filename}",
            artifact_sha256=algorithm_object.artifact_sha256,
            schema_sha256=algorithm_object.schema.sha256,
            metrics=algorithm_object.metrics,
            target={"name": target.name, "positive": target.positive, "negative": target.negative},
        )
        self._keep(algorithm, algorithm_object)
        return algorithm

    def register_run(
        self, endpoint_name: str = DEFAULT_ENDPOINT, version: str | None = None, owner: str = "retention team"
    ) -> list[MLAlgorithm]:
        """Register every known algorithm of a training run, by default the newest. Raises ArtifactError."""
        directory = Path(settings.ML_ARTIFACTS_DIR)
        run: TrainingRun = open_run(directory, version) if version else newest_run(directory)
        return [
            self.add_algorithm(
                endpoint_name,
                classifier := classifier_class(run.version, directory),
                classifier.title,
                first_status,
                run.version,
                owner,
                inspect.getdoc(classifier_class) or "",
                inspect.getsource(classifier_class),
            )
            for classifier_class, first_status in ALGORITHMS
            if f"{classifier_class.algorithm}.joblib" in run
        ]

    def register_newest_run(self) -> list[MLAlgorithm]:
        """Register the newest run on the default endpoint, unless it belongs, or seems to belong, to another one."""
        run = newest_run(Path(settings.ML_ARTIFACTS_DIR))
        target = run.schema.target.name
        neighbours = MLAlgorithm.objects.filter(parent_endpoint__name=DEFAULT_ENDPOINT)
        if neighbours.exists() and not neighbours.filter(target__name=target).exists():
            logger.warning(
                "Training run %s predicts %s, as no algorithm of endpoint %s does, and is left out. Register it with "
                "`python manage.py register_algorithms --endpoint NAME --version %s`.",
                *(run.version, target, DEFAULT_ENDPOINT, run.version),
            )
            return []
        registered = MLAlgorithm.objects.filter(artifact__startswith=f"{run.version}/")
        if registered.exclude(parent_endpoint__name=DEFAULT_ENDPOINT).exists():
            return []
        return self.register_run(version=run.version)

    def served(self, endpoint_name: str) -> Sequence[MLAlgorithmStatus]:
        """The active statuses of what an endpoint serves, each with what a running test has planned for its traffic.

        They are read again only when the endpoint's history has grown. Whatever changes who answers, the start and
        the end of a test included, adds a status under the endpoint's lock; so its newest id tells whether what
        this process knows still holds, and one cheap query asks for it anew each time. Not to be called within a
        transaction that changes statuses: if it is rolled back, its ids may come again.
        """
        found = _newest_step.first(endpoint_name)
        if found is None:
            return ()
        endpoint_id, newest_step = found
        known = self.known(endpoint_name)
        if known and (known.endpoint_id, known.newest_step) == (endpoint_id, newest_step):
            return known.statuses
        # One query, hence one moment: a test that starts or stops meanwhile is seen whole or not at all.
        running = FilteredRelation("parent_endpoint__abtests", condition=Q(parent_endpoint__abtests__ended_at=None))
        statuses = tuple(
            MLAlgorithmStatus.objects.served()
            .filter(parent_endpoint=endpoint_id)
            .annotate(
                running=running,
                test_id=F("running__pk"),
                champion_id=F("running__champion"),
                challenger_id=_CHALLENGER,
                test_design=F("running__design"),
                test_salt=F("running__salt"),
                test_weight=F("running__weight"),
            )
            .select_related("parent_mlalgorithm")
            .order_by("parent_mlalgorithm_id")
        )
        algorithm_ids = frozenset(status.parent_mlalgorithm_id for status in statuses)
        self._served[endpoint_name] = Served(endpoint_id, newest_step, statuses, algorithm_ids)
        self.unload_all_but(endpoint_id, algorithm_ids)
        return statuses

    def known(self, endpoint_name: str) -> Served | None:
        """What the endpoint served when `served` last asked, without asking whether that still holds."""
        known = self._served.get(endpoint_name)
        if known:
            # A request that was chosen before a retirement may have loaded the retired one again.
            self.unload_all_but(known.endpoint_id, known.algorithm_ids)
        return known

    def get(self, algorithm: MLAlgorithm) -> RetentionClassifier:
        """The loaded classifier of a row. Raises ArtifactError when it is not what was registered."""
        classifier = self.endpoints.get(algorithm.pk)
        if classifier is None:
            with self._filling:
                classifier = self.endpoints.get(algorithm.pk) or self._construct(algorithm)
                self._keep(algorithm, classifier)
        try:
            _load(classifier, algorithm)
        except ArtifactError:
            self.endpoints.pop(algorithm.pk, None)  # so that a repaired run is found without a restart
            raise
        return classifier

    def check(self, algorithm: MLAlgorithm) -> None:
        """Load a row's artifact anew, as another process would have to. Raises ArtifactError."""
        _load(self._construct(algorithm), algorithm)

    def warm(self) -> dict[MLAlgorithm, ArtifactError]:
        """Load all that is served; a model that cannot be loaded stops nothing but itself, and is returned.

        What a model that comes later needs is compiled now too, so that no request waits for it.
        """
        prepare()
        failures = {}
        for status in MLAlgorithmStatus.objects.served().select_related("parent_mlalgorithm"):
            try:
                self.get(status.parent_mlalgorithm)
            except ArtifactError as error:
                failures[status.parent_mlalgorithm] = error
                logger.error("%s is not available: %s", status.parent_mlalgorithm, error)
        return failures

    def unload_all_but(self, endpoint_id: int, served: Iterable[int]) -> None:
        """Let go of an endpoint's classifiers that are served no longer."""
        for algorithm_id, endpoint in list(self._endpoint_of.items()):  # a copy: other threads load meanwhile
            if endpoint == endpoint_id and algorithm_id not in served:
                self.endpoints.pop(algorithm_id, None)
                self._endpoint_of.pop(algorithm_id, None)

    def clear(self) -> None:
        self.endpoints.clear()
        self._served.clear()
        self._endpoint_of.clear()

    def _keep(self, algorithm: MLAlgorithm, classifier: RetentionClassifier) -> None:
        self.endpoints[algorithm.pk] = classifier
        self._endpoint_of[algorithm.pk] = algorithm.parent_endpoint_id

    def _construct(self, algorithm: MLAlgorithm) -> RetentionClassifier:
        for classifier_class, _ in ALGORITHMS:
            if classifier_class.algorithm == algorithm.key:
                return classifier_class(algorithm.artifact.split("/")[0], settings.ML_ARTIFACTS_DIR)
        raise ArtifactError(f"No class answers for {algorithm.key!r}; is its line missing in apps/ml/registry.py?")


def _load(classifier: RetentionClassifier, algorithm: MLAlgorithm) -> None:
    registered = (algorithm.artifact_sha256, algorithm.schema_sha256)
    if (classifier.artifact_sha256, classifier.schema.sha256) != registered:
        raise ArtifactError(
            f"The artifact of {algorithm} is not the one that was registered: "
            "restore it, or retire the algorithm and register a new version."
        )
    classifier.load()


registry = MLRegistry()

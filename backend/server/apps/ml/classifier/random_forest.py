from apps.ml.classifier.base import RetentionClassifier


class RandomForestClassifier(RetentionClassifier):
    """A forest of trees, each grown on a resample of the customers."""

    algorithm = "random_forest"

from apps.ml.classifier.base import RetentionClassifier


class DecisionTreeClassifier(RetentionClassifier):
    """A single tree of at most 100 leaves, small enough to read."""

    algorithm = "decision_tree"

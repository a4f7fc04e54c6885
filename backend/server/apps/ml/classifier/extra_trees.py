from apps.ml.classifier.base import RetentionClassifier


class ExtraTreesClassifier(RetentionClassifier):
    """Extremely randomised trees: as accurate as the forest, faster to train."""

    algorithm = "extra_trees"

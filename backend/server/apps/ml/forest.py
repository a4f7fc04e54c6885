"""Trees and forests of scikit-learn as flat arrays that compiled code walks: the same answers to the last bit.

scikit-learn spends milliseconds on one row before it reaches the trees, which take microseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np

# Feature and child of a node share this many bits; a forest that needs more of them is stored in wide nodes.
_LINK_BITS = 32


class CompiledForest:
    """A fitted two-class tree or forest, without scikit-learn. Safe to use from many threads.

    Constructing it compiles all the code that answering takes, or loads it from numba's cache; a call never
    compiles. Raises ImportError where numba is not installed.

    trees: fitted scikit-learn trees, in the order in which their answers are added.
    accepts_missing: whether a NaN is walked as scikit-learn walks it, or refused.
    """

    def __init__(self, trees: Sequence[Any], features: int, accepts_missing: bool):
        from apps.ml import kernels

        self.features = features
        self.accepts_missing = accepts_missing
        self._lanes = kernels.LANES
        # Kernels that walk several trees abreast walk an empty one where there are no more: one leaf of no value.
        nodes = sum(tree.tree_.node_count for tree in trees) + 1
        thresholds = np.full(nodes, np.inf)
        feature_of = np.zeros(nodes, dtype=np.uint64)
        left_child = np.arange(nodes, dtype=np.uint64)
        values = np.zeros((nodes, 2))
        missing_goes_right = np.zeros(nodes, dtype=np.uint8)
        roots = np.full(-(-len(trees) // self._lanes) * self._lanes, nodes - 1, dtype=np.uint64)
        root = 0
        for index, tree in enumerate(trees):
            roots[index] = root
            arrays = tree.tree_
            position = root + _siblings_adjacent(arrays.children_left, arrays.children_right)
            values[position] = arrays.value[:, 0, :]
            splits = np.flatnonzero(arrays.children_left >= 0)
            at = position[splits]
            thresholds[at] = arrays.threshold[splits]
            feature_of[at] = arrays.feature[splits]
            left_child[at] = position[arrays.children_left[splits]]
            missing_goes_right[at] = arrays.missing_go_to_left[splits] == 0
            root += arrays.node_count

        bits = (nodes - 1).bit_length()
        self.wide = (features - 1).bit_length() + bits > _LINK_BITS
        links = feature_of << np.uint64(bits) | left_child
        if not self.wide:
            thresholds, links = _rounded_down(thresholds), links.astype(np.uint32)
        # One buffer, so that a node's threshold and link come with the same cache line.
        words = np.empty((nodes, 2), dtype=links.dtype)
        words[:, 0], words[:, 1] = thresholds.view(links.dtype), links
        words = words.ravel()
        self._forest = (words.view(thresholds.dtype), words, bits, roots, values.ravel(), len(trees))
        self._missing_goes_right = missing_goes_right
        self._kernels = kernels.compiled(self.wide)

    def predict_proba(self, matrix: np.ndarray) -> np.ndarray:
        """(rows, 2) float64: bit for bit what the estimator's `predict_proba` gives with `n_jobs=1`.

        matrix: (rows, features) numbers, compared in single precision, of any type and layout. No rows give
        no answers. Raises ValueError where scikit-learn does: another number of features, infinity or what
        becomes infinite in single precision, and NaN where the estimator accepts none.
        """
        matrix = np.asarray(matrix)
        if matrix.ndim != 2 or matrix.shape[1] != self.features:
            raise ValueError(f"{self.features} features are expected, but the matrix is of shape {matrix.shape}.")
        if matrix.dtype != np.float64:  # straight to single precision, as scikit-learn: rounding twice may differ
            matrix = matrix.astype(np.float32).astype(np.float64)
        if not matrix.flags.carray:
            matrix = np.array(matrix, order="C")
        rows = len(matrix)
        answers = np.empty((rows, 2))
        kernel = self._kernels.few if rows < self._lanes else self._kernels.many
        if kernel(matrix, *self._forest, answers):
            self._answer_incomplete(matrix, answers)
        return answers

    def _answer_incomplete(self, matrix: np.ndarray, answers: np.ndarray) -> None:
        missing = np.isnan(matrix).any(axis=1)
        with np.errstate(over="ignore"):
            if np.isinf(matrix.astype(np.float32)).any():
                raise ValueError("Input X contains infinity or a value too large for dtype('float32').")
        if not self.accepts_missing:
            raise ValueError("Input X contains NaN.")
        of_missing = np.empty((int(missing.sum()), 2))
        self._kernels.incomplete(matrix[missing], *self._forest, self._missing_goes_right, of_missing)
        answers[missing] = of_missing
        answers[~missing] = self.predict_proba(matrix[~missing])

    def answers(self, matrix: np.ndarray, expected: np.ndarray) -> bool:
        """Whether some rows get exactly these answers, each alone and all among many."""
        alone = [self.predict_proba(matrix[index : index + 1]) for index in range(len(matrix))]
        many = max(len(matrix), self._lanes)
        among_many = self.predict_proba(np.resize(matrix, (many, self.features)))
        return (
            np.concatenate(alone).tobytes() == expected.tobytes()
            and among_many.tobytes() == np.resize(expected, (many, 2)).tobytes()
        )


def prepare() -> None:
    """Compile what answers for all but the very largest forests; loading a model says why, where that cannot be."""
    with suppress(Exception):
        from apps.ml import kernels

        kernels.compiled(wide=False)


def compile_forest(estimator: Any) -> CompiledForest | None:
    """A fitted tree or forest of scikit-learn, compiled; None for any other estimator, and for any but two classes."""
    from sklearn import ensemble, tree
    from sklearn.utils import get_tags

    single = (tree.DecisionTreeClassifier, tree.ExtraTreeClassifier)
    # Only these very classes: a subclass may answer differently.
    if type(estimator) in single:
        trees = [estimator]
    elif type(estimator) in (ensemble.RandomForestClassifier, ensemble.ExtraTreesClassifier):
        trees = getattr(estimator, "estimators_", [])
    else:
        return None
    if not trees or getattr(estimator, "n_outputs_", None) != 1 or estimator.n_classes_ != 2:
        return None
    if not all(type(one) in single for one in trees):
        return None
    return CompiledForest(trees, estimator.n_features_in_, get_tags(trees[0]).input_tags.allow_nan)


def _siblings_adjacent(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(nodes,) int: a position for each node of a tree, level by level from 0, right children after left ones."""
    position = np.zeros(len(left), dtype=np.int64)
    level = np.zeros(1, dtype=np.int64)
    taken = 1
    while len(level := level[left[level] >= 0]):
        level = np.column_stack([left[level], right[level]]).ravel()
        position[level] = np.arange(taken, taken + len(level))
        taken += len(level)
    return position


def _rounded_down(thresholds: np.ndarray) -> np.ndarray:
    """The largest float32 that is no larger: the same single-precision numbers lie above it."""
    with np.errstate(over="ignore"):
        rounded = thresholds.astype(np.float32)
    above = rounded > thresholds
    rounded[above] = np.nextafter(rounded[above], np.float32(-np.inf))
    return rounded

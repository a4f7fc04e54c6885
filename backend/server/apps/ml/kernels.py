"""The loops that walk a compiled forest, and how they become machine code. The only module that imports numba.

Nodes are two words each: the threshold, read as a float, and the link, read as an unsigned integer: the feature
above `bits` bits of the left child's index. The right child follows the left one. A leaf's threshold is infinite
and its left child is the leaf itself, so that walking on from a leaf stays there and no step needs a branch.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numba
import numpy as np
from numba import types

logger = logging.getLogger(__name__)

# How many walks are under way at once, so that while one waits for memory the others go on. The kernel spells them out.
LANES = 8
# After how many steps the walks look whether all have arrived.
_STEPS = 4
# How many rows pass through one tree before the next is fetched, which matters for large trees; and how many
# numbers these rows may have between them, as they are to stay in the cache too.
_BLOCK_ROWS = 4096
_BLOCK_FEATURES = 2**16

_compiling = threading.Lock()


class Kernels(NamedTuple):
    """Each takes (matrix, thresholds, links, bits, roots, values, trees, ..., out) and fills out, (rows, 2).

    matrix: (rows, features) float64. roots: (trees,) and up to LANES - 1 more, of empty trees. values: two per node.
    `few` and `many` give up and return True when a number is not finite in single precision; `incomplete` takes NaN.
    """

    few: Callable[..., bool]
    many: Callable[..., bool]
    incomplete: Callable[..., None]


def compiled(wide: bool) -> Kernels:
    """The kernels for nodes of 16 bytes (`wide`) or of 8, compiled once or taken from numba's cache on disk."""
    with _compiling:  # several classifiers may be loaded at once
        return _compiled(wide)


@cache
def _compiled(wide: bool) -> Kernels:
    try:
        return _compile(wide, cached=True)
    except Exception as error:  # no folder to write to, a full disk, a torn file: numba raises what it meets
        logger.warning("Compiled code cannot be kept on disk, so every start compiles it again: %r", error)
        return _compile(wide, cached=False)


def _compile(wide: bool, cached: bool) -> Kernels:
    # With explicit signatures numba compiles here and now, and never again in a call.
    threshold, link = (types.float64, types.uint64) if wide else (types.float32, types.uint32)
    matrix, values = types.float64[:, ::1], types.float64[::1]
    forest = (matrix, threshold[::1], link[::1], types.int64, types.uint64[::1], values, types.int64)
    walk = types.boolean(*forest, matrix)
    walk_incomplete = types.void(*forest, types.uint8[::1], matrix)
    return Kernels(
        # A thread that lets go of the GIL for microseconds waits milliseconds to get it back from a busy one.
        few=numba.njit(walk, nogil=False, cache=cached)(_few),
        many=numba.njit(walk, nogil=True, cache=cached)(_many),
        incomplete=numba.njit(walk_incomplete, nogil=True, cache=cached)(_incomplete),
    )


@numba.njit
def _next(node, x, row, thresholds, links, bits):
    """The child of a node to which a row goes; x holds the rows one after the other, from `row` on this one."""
    link = np.uint64(links[2 * node + 1])
    left = link & ((np.uint64(1) << bits) - np.uint64(1))
    return left + np.uint64(x[row + (link >> bits)] > thresholds[2 * node])


@numba.njit
def _is_leaf(node, links, bits):
    return np.uint64(links[2 * node + 1]) & ((np.uint64(1) << bits) - np.uint64(1)) == node


@numba.njit
def _walk(matrix, thresholds, links, bits, roots, values, trees, lane_tree, lane_row, out):
    """Lane k walks the tree k * lane_tree and the row k * lane_row further on than the first."""
    bits = np.uint64(bits)
    rows, features = matrix.shape
    tree_step = LANES if lane_tree else 1
    row_step = LANES if lane_row else 1
    most = min(_BLOCK_ROWS, max(LANES, _BLOCK_FEATURES // features // LANES * LANES))
    block = min(most, (max(rows, 1) + row_step - 1) // row_step * row_step)
    x = np.zeros(block * features, np.float32)
    sums = np.empty((block, 2))
    across = np.uint64(features * lane_row)
    for start in range(0, rows, block):
        size = min(block, rows - start)
        check = np.float32(0)
        for row in range(size):
            for feature in range(features):
                number = np.float32(matrix[start + row, feature])
                x[row * features + feature] = number
                check += number * np.float32(0)
        if check != 0:  # it is NaN, as infinity times zero is
            return True
        sums[:] = 0
        for tree in range(0, trees, tree_step):
            for row in range(0, size, row_step):
                a = roots[tree]
                b = roots[tree + lane_tree]
                c = roots[tree + 2 * lane_tree]
                d = roots[tree + 3 * lane_tree]
                e = roots[tree + 4 * lane_tree]
                f = roots[tree + 5 * lane_tree]
                g = roots[tree + 6 * lane_tree]
                h = roots[tree + 7 * lane_tree]
                xa = np.uint64(row * features)
                xb = xa + across
                xc = xb + across
                xd = xc + across
                xe = xd + across
                xf = xe + across
                xg = xf + across
                xh = xg + across
                while True:
                    for _ in range(_STEPS):
                        a = _next(a, x, xa, thresholds, links, bits)
                        b = _next(b, x, xb, thresholds, links, bits)
                        c = _next(c, x, xc, thresholds, links, bits)
                        d = _next(d, x, xd, thresholds, links, bits)
                        e = _next(e, x, xe, thresholds, links, bits)
                        f = _next(f, x, xf, thresholds, links, bits)
                        g = _next(g, x, xg, thresholds, links, bits)
                        h = _next(h, x, xh, thresholds, links, bits)
                    if (
                        _is_leaf(a, links, bits)
                        and _is_leaf(b, links, bits)
                        and _is_leaf(c, links, bits)
                        and _is_leaf(d, links, bits)
                        and _is_leaf(e, links, bits)
                        and _is_leaf(f, links, bits)
                        and _is_leaf(g, links, bits)
                        and _is_leaf(h, links, bits)
                    ):
                        break
                # In the order of the trees, as scikit-learn adds them: another order rounds differently.
                at = row
                for leaf in (a, b, c, d, e, f, g, h):
                    sums[at, 0] += values[2 * leaf]
                    sums[at, 1] += values[2 * leaf + 1]
                    at += lane_row
        for row in range(size):
            out[start + row, 0] = sums[row, 0] / trees
            out[start + row, 1] = sums[row, 1] / trees
    return False


def _few(matrix, thresholds, links, bits, roots, values, trees, out):
    """Several trees abreast."""
    return _walk(matrix, thresholds, links, bits, roots, values, trees, 1, 0, out)


def _many(matrix, thresholds, links, bits, roots, values, trees, out):
    """Several rows abreast, a block of rows per tree."""
    return _walk(matrix, thresholds, links, bits, roots, values, trees, 0, 1, out)


def _incomplete(matrix, thresholds, links, bits, roots, values, trees, missing_goes_right, out):
    """One row and one tree after the other; asking for NaN at every step would slow the others down by a third."""
    bits = np.uint64(bits)
    for row in range(matrix.shape[0]):
        left, right = 0.0, 0.0
        for tree in range(trees):
            node = roots[tree]
            while not _is_leaf(node, links, bits):
                link = np.uint64(links[2 * node + 1])
                child = link & ((np.uint64(1) << bits) - np.uint64(1))
                number = np.float32(matrix[row, link >> bits])
                goes_right = missing_goes_right[node] == 1 if np.isnan(number) else number > thresholds[2 * node]
                node = child + np.uint64(goes_right)
            left += values[2 * node]
            right += values[2 * node + 1]
        out[row, 0] = left / trees
        out[row, 1] = right / trees

"""Which points of a plane are inside a polygon."""

from __future__ import annotations

import numpy as np


def in_polygon(points: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Mask `(n,)` of the points inside a closed polygon, by the even-odd rule (Shimrat 1962, Communications of the ACM 5, 434).

    Of two polygons that share an edge, a point on that edge is in exactly one. A polygon that crosses itself leaves out what it
    encloses twice. Points are sorted once, so that each edge is compared only with those at its height: a million points take as long as
    their sorting, whatever the number of edges of a simple polygon.

    Parameters
    ----------
    points : `(n, 2)`
        (x, y); a point with a NaN is outside.
    corners : `(m, 2)`
        (x, y) of the corners in order; the last is joined to the first.
    """
    corners = np.asarray(corners, np.float64)
    inside = np.zeros(len(points), bool)
    near = np.flatnonzero(((points >= corners.min(0)) & (points <= corners.max(0))).all(1))
    near = near[np.argsort(points[near, 1], kind="stable")]
    x, y = points[near].astype(np.float64).T
    odd = np.zeros(len(near), bool)
    for (xa, ya), (xb, yb) in zip(corners.tolist(), np.roll(corners, -1, 0).tolist()):
        if ya == yb:
            continue
        # always from the lower end, so that both polygons of a shared edge round alike
        (xa, ya), (xb, yb) = sorted([(xa, ya), (xb, yb)], key=lambda end: end[1])
        level = slice(*np.searchsorted(y, (ya, yb)))
        odd[level] ^= x[level] < xa + (y[level] - ya) * ((xb - xa) / (yb - ya))
    inside[near] = odd
    return inside

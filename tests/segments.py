"""Compares the segments of two results."""

import numpy as np


def assert_same_segments(ours, theirs, least=1):
    """Checks label maps and segments, which may differ in a few pixels; there must be at least `least` segments."""
    assert (ours.label_map == theirs.label_map).mean() > 0.999
    np.testing.assert_allclose(theirs.confidence, ours.confidence, atol=1e-3)
    key = lambda segment: (segment.category, segment.instance)
    pairs = list(zip(sorted(ours.segments, key=key), sorted(theirs.segments, key=key), strict=True))
    assert len(pairs) >= least
    for own, other in pairs:
        assert key(own) == key(other) and own.isthing == other.isthing and other.mask.sum() == other.area
        assert abs(own.score - other.score) < 1e-4
        assert (own.mask & other.mask).sum() >= 0.99 * (own.mask | other.mask).sum()
    areas = [segment.area for segment in theirs.segments]
    assert areas == sorted(areas, reverse=True)

"""Texts that share their beginnings, against Flax's tower applied to each of them in full."""

import jax
import numpy as np
import pytest

from ovseg_jax.towers import shared_text
from ovseg_jax.towers.packed_text import stacked
from ovseg_jax.towers.shared_text import encode_trees, trees
from tests.towers.test_packed_text import END, START, build

# One text begins another, two are equal, some have a beginning in common, and one has nothing but its ends.
PHRASES = [[3, 4, 5], [3, 4], [7], [3, 4, 5], [3, 9, 5, 6, 1, 2, 8, 8], [7, 3, 4], [], [3, 4, 5, 6]]


def rows(phrases):
    ids = np.zeros((len(phrases), 20), np.int32)
    for row, phrase in zip(ids, phrases, strict=True):
        row[: len(phrase) + 2] = [START, *phrase, END]
    return ids, np.array([len(phrase) + 2 for phrase in phrases])


@pytest.mark.parametrize(("size", "most"), [(64, 16), (20, 16), (20, 1)])
@pytest.mark.parametrize("layers", [1, 3])
def test_trees_of_texts_equal_the_tower(size, most, layers, monkeypatch):
    monkeypatch.setattr(shared_text, "SIZE", size)
    monkeypatch.setattr(shared_text, "MOST", most)
    tower, params = build(layers, activation="quick_gelu")
    ids, length = rows(PHRASES)
    valid = np.arange(ids.shape[1]) < length[:, None]
    want = jax.jit(tower.apply)({"params": params}, ids, valid).pooled
    found = np.full(want.shape, np.nan, np.float32)
    encode = jax.jit(lambda given: encode_trees(tower, stacked(params), given))
    groups = list(trees(ids, length))
    for given, numbers in groups:
        found[numbers] = np.asarray(encode(given))[given.last >= 0]
    np.testing.assert_allclose(found, want, atol=1e-5)
    assert len(groups) == (1 if most == 16 else 2) and sum(len(numbers) for _, numbers in groups) == 8


def test_common_beginnings_are_computed_once():
    """Three names in two templates: [SOS] once, each template's two tokens once, then names and ends."""
    ids, length = rows([[t, t + 1, name, 9] for t in (1, 5) for name in (20, 21, 22)])
    ((given, _),) = trees(ids, length)
    assert given.ids.shape == (1, 128)
    assert given.last.max() + 1 == 1 + 2 * 2 + 6 * 3 and (given.last >= 0).sum() == 6


def test_a_tower_with_adapters_is_refused_by_trees():
    tower, params = build()
    ((given, _),) = trees(*rows([[1]]))
    with pytest.raises(ValueError, match="adapter"):
        encode_trees(tower.clone(adapter=lambda *a, **k: None), stacked(params), given)

"""Panoptic and instance segments of the exported PyTorch model against those of `decisions.rules`, on drawn scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ovseg_jax.decisions import maps
from ovseg_jax.decisions.rules import decision_of
from ovseg_jax.inference.result import Result
from ovseg_jax.vocab.classes import ClassList
from tests.extras import require
from tests.segments import assert_same_segments

SIZE, GRID = (150, 97), (20, 16)
CLASSES = ClassList(
    (("dog", "hound"), ("sky",), ("cat",), ("grass", "lawn")), (1, 2, 3, 4), (True, False, True, False)
)


def blobs(rng, n):
    """Mask logits [n h w] of rectangles, some of which overlap, with noise; one is empty and two are alike."""
    masks = rng.normal(-6, 1, (n, *GRID))
    for k in range(n - 1):
        top, left = rng.integers(0, GRID[0] - 5), rng.integers(0, GRID[1] - 5)
        masks[k, top : top + rng.integers(4, 10), left : left + rng.integers(4, 8)] += 10
    masks[1] = masks[0]
    return masks.astype(np.float32)


@pytest.mark.parametrize("void", [True, False])
def test_segments_are_those_of_the_rules(void):
    torch = require("torch")
    from ovseg_jax.torch import decisions
    from ovseg_jax.torch.layers import class_scores
    from ovseg_jax.torch.segmenter import Segmentation

    frame = maps.frame(SIZE, GRID, (160, 128), jnp.array([155, 123]), jnp.array(SIZE))
    rows, columns = (torch.from_numpy(np.array(x)) for x in (frame.rows, frame.columns))
    owner, n = CLASSES.flat()[1], 12
    asked = (
        dict(type="panoptic", object_threshold=0.1, overlap_threshold=0.4),
        dict(type="instances", top=9),
    )
    merged = 0
    for decision in asked:
        decide = jax.jit(decision_of(decision))
        for seed in range(6):
            rng = np.random.default_rng(seed)
            weights = rng.uniform(0, 1, (len(owner), n)).astype(np.float32)
            nothing = rng.uniform(0, 1.3, n).astype(np.float32) if void else None
            masks = blobs(rng, n)
            layers = maps.Layers(
                jnp.asarray(weights),
                jnp.asarray(masks),
                None if nothing is None else jnp.asarray(nothing),
                True,
            )
            found = decide(layers, frame, maps.vocabulary_of(CLASSES), jnp.ones((1, len(owner)), bool))
            found = jax.tree.map(lambda x: np.asarray(x)[0], found)
            ours = Result.of(np.zeros((*SIZE, 3), np.uint8), CLASSES, *found)
            scored = decisions.Scored(
                class_scores(torch.from_numpy(weights), torch.from_numpy(owner).long()),
                None if nothing is None else torch.from_numpy(nothing),
                torch.tensor(CLASSES.isthing),
                torch.from_numpy(masks),
                rows,
                columns,
            )
            theirs = Segmentation(CLASSES, *decisions.decision_of(decision)(scored))
            assert_same_segments(ours, theirs, 3)
            stuff = [segment.category for segment in theirs.segments if not segment.isthing]
            assert len(stuff) == len({*stuff}) and (decision["type"] == "panoptic" or not stuff)
            merged += len(stuff)
    assert merged

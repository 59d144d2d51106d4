"""The towers that a config of a CLIP-shaped pair can name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from ovseg_jax.errors import UserError
from ovseg_jax.models.eva import PRESETS, Eva
from ovseg_jax.towers.clip import Clip, image_tower
from ovseg_jax.vocab.words import WordList

EVA = dict(
    name="eva02_clip_b16", patch=8, grid=2, width=16, depth=1, heads=2, hidden=24, embed_dim=12, rope_grid=2
)
TEXT = dict(name="clip", width=16, layers=1, heads=2, embed_dim=12, length=8)


def test_an_image_tower_of_eva_clip():
    assert image_tower(ConfigDict(dict(name="eva02_clip_l14")), jnp.float32) == Eva(
        **PRESETS["eva02_clip_l14"]
    )
    clip = Clip(ConfigDict(dict(image=EVA, text=TEXT, image_size=16, tokenizer="words")), WordList(["cat"]))
    assert clip.dim == 12 and clip.image.swiglu
    shapes = jax.eval_shape(clip.init, jax.random.key(0))
    weights = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.1, leaf.dtype), shapes)
    found = jax.jit(clip.embed_image)(weights, np.zeros((2, 16, 16, 3), np.uint8))
    np.testing.assert_allclose(np.linalg.norm(found, axis=-1), 1, rtol=1e-5)


@pytest.mark.parametrize(
    "image,expected",
    [
        (EVA | dict(embed_dim=10), "images have embeddings of 10 numbers, but texts of 12"),
        (EVA | dict(adapter="x"), "towers.image of 'eva02_clip_b16' has no key 'adapter'"),
        (dict(name="eva03"), "towers.image.name='eva03' is not one of .*eva02_clip_b16"),
    ],
)
def test_towers_that_do_not_fit(image, expected):
    with pytest.raises(UserError, match=expected):
        Clip(ConfigDict(dict(image=image, text=TEXT, image_size=16, tokenizer="words")), WordList(["cat"]))

"""The towers that a config of a CLIP-shaped pair can name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from ovseg_jax.errors import UserError
from ovseg_jax.models.convpass import with_convpass
from ovseg_jax.models.eva import PRESETS, Eva
from ovseg_jax.towers.clip import Clip, image_tower, write_towers
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


def test_towers_of_a_run_under_new_adapters(tmp_path):
    config = ConfigDict(dict(image=EVA, text=TEXT, image_size=16, tokenizer="words"))
    plain = Clip(config, WordList(["cat"]))
    weights = jax.tree.map(lambda x: np.full(x.shape, 0.1), jax.eval_shape(plain.init, jax.random.key(0)))
    write_towers(epath.Path(tmp_path) / "towers", config, weights)
    adapted = Clip(ConfigDict({**config.to_dict(), "init": str(tmp_path)}), WordList(["cat"]))
    adapted.image = with_convpass(adapted.image)
    assert flatten_dict(adapted.pretrained()).keys() == flatten_dict(weights).keys()
    assert flatten_dict(adapted.init(jax.random.key(0))).keys() > flatten_dict(weights).keys()


@pytest.mark.parametrize("dense", [dict(name="vit", depth=1, pool="cls"), {}])
def test_embeddings_and_patches_come_from_one_pass(dense):
    vit = dict(patch=8, width=16, heads=2, mlp_dim=24, grid=(2, 2), embed_dim=12)
    image = vit | dense if dense else EVA
    clip = Clip(ConfigDict(dict(image=image, text=TEXT, image_size=16, tokenizer="words")), WordList(["cat"]))
    clip.check_patches("value")
    weights = clip.init(jax.random.key(0))
    pixels = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3)), jnp.uint8)
    for last in ("value", ""):
        pooled, patches = jax.jit(clip.embed_both, static_argnums=2)(weights, pixels, last)
        np.testing.assert_allclose(pooled, jax.jit(clip.embed_image)(weights, pixels), atol=1e-5)
        assert patches.shape == (2, 2, 3, 12)
        only = jax.jit(clip.embed_patches, static_argnums=2)(weights, pixels, last)
        np.testing.assert_allclose(patches, only, atol=1e-5)

"""The PyTorch EVA towers beside the Flax ones, with the same parameters."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from ovseg_jax.errors import UserError
from ovseg_jax.models.eva import PRESETS, Eva
from tests import reference
from tests.extras import require
from tests.models import twin

TINY: dict[str, Any] = dict(patch=8, grid=4, width=32, depth=2, heads=2, hidden=43, embed_dim=12, taps=(0, 1))
# One larger than the table in one direction and smaller in the other.
SIZES = [(32, 32), (56, 24)]


def build(preset, **fields):
    """A small tower with the options of a published one, and its twin."""
    from ovseg_jax.torch.eva import Eva as TorchEva

    options = PRESETS[preset] | TINY | fields
    return Eva(**options), TorchEva(**options)


def images(height, width):
    return np.random.default_rng(0).normal(size=(2, height, width, 3)).astype(np.float32)


@pytest.mark.parametrize("preset", ["eva02_clip_b16", "eva02_clip_e14", "eva01_clip_g14"])
def test_equals_flax(preset):
    torch = require("torch")
    module, theirs = build(preset)
    # Into a first norm so small that its epsilon shows.
    variables = twin.draw(module, images(32, 32), small="(embedding|cls|pos_embedding)")
    twin.load(theirs, variables)
    for size in SIZES:
        x = images(*size)
        with torch.no_grad():
            found = theirs(reference.torch_images(x))
        twin.assert_tower_agrees(f"{preset} {size}", found, module.apply(variables, jnp.asarray(x)))


def test_the_defaults_and_published_models_have_the_same_shapes():
    torch = require("torch")
    from ovseg_jax.torch.eva import Eva as TorchEva

    for fields in ({}, *PRESETS.values()):
        fields = fields | dict(depth=1)  # All blocks are alike.
        side = fields.get("patch", 16)
        with torch.device("meta"):
            theirs = TorchEva(**fields)
        twin.assert_same_shapes(Eva(**fields), theirs, jnp.zeros((1, side, side, 3)))


def test_bfloat16():
    torch = require("torch")
    module, theirs = build("eva02_clip_b16")
    x = images(40, 24)
    twin.load(theirs, twin.draw(module, x))
    with torch.no_grad():
        expected = theirs(reference.torch_images(x)).pooled
        found = theirs.bfloat16()(reference.torch_images(x)).pooled
    assert found.dtype == torch.bfloat16
    assert reference.relative_error(found.float().numpy(), expected.numpy()) < 0.05


def test_an_image_that_patches_do_not_tile_is_an_error():
    require("torch")
    _, theirs = build("eva01_clip_g14")
    with pytest.raises(UserError, match="an image of 32 x 36 pixels cannot be cut into patches of 8 x 8"):
        theirs(reference.torch_images(images(32, 36)))


def test_export():
    require("torch")
    twin.assert_exports(build("eva02_clip_b16", depth=1, taps=())[1], reference.torch_images(images(56, 24)))

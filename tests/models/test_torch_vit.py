"""The PyTorch ViT beside the Flax one, with the same parameters."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from ovseg_jax.errors import UserError
from ovseg_jax.models.vit import PRESETS, ViT
from tests import reference
from tests.extras import require
from tests.models import twin

TINY: dict[str, Any] = dict(patch=8, width=32, depth=2, heads=2, mlp_dim=48, grid=(4, 4), epsilon=0.1)
# Options of each kind of published model, and those that none has.
KINDS: dict[str, dict[str, Any]] = {
    "dino_vits8": dict(taps=(0, 1)),
    "clip_vitb32": dict(embed_dim=12, taps=(1,)),
    "openclip_vith14": dict(embed_dim=12, resize="antialias"),
    "siglip_vitb16": dict(grid=(5, 3)),
    "mae_vitb16": dict(cls="plain", pool="mean", embed_dim=12),
}
# One larger than the table in one direction and smaller in the other.
SIZES = [(32, 32), (56, 24)]


def build(preset, **fields):
    """A small tower with the options of a published one, and its twin."""
    from ovseg_jax.torch.vit import ViT as TorchViT

    options = PRESETS[preset] | TINY | fields
    return ViT(**options), TorchViT(**options)


def images(height, width):
    return np.random.default_rng(0).normal(size=(2, height, width, 3)).astype(np.float32)


@pytest.mark.parametrize("preset", KINDS)
def test_equals_flax(preset):
    torch = require("torch")
    module, theirs = build(preset, **KINDS[preset])
    variables = twin.draw(module, images(32, 32))
    twin.load(theirs, variables)
    for size in SIZES:
        x = images(*size)
        with torch.no_grad():
            found = theirs(reference.torch_images(x))
        twin.assert_tower_agrees(f"{preset} {size}", found, module.apply(variables, jnp.asarray(x)))


@pytest.mark.parametrize("preset", KINDS)
def test_padding_is_seen_by_neither(preset):
    torch = require("torch")
    module, theirs = build(preset, **KINDS[preset])
    x, inside = images(32, 32), np.ones((2, 4, 4), bool)
    variables = twin.draw(module, x)
    twin.load(theirs, variables)
    inside[0, 2:], inside[1, :, 3:] = False, False
    with torch.no_grad():
        found = theirs(reference.torch_images(x), inside=torch.from_numpy(inside))
    expected = module.apply(variables, jnp.asarray(x), inside=jnp.asarray(inside))
    twin.assert_tower_agrees(f"{preset} inside", found, expected)


def test_the_defaults_and_published_models_have_the_same_shapes():
    torch = require("torch")
    from ovseg_jax.torch.vit import ViT as TorchViT

    for fields in ({}, *PRESETS.values()):
        fields = fields | dict(depth=1)  # All blocks are alike.
        side = fields.get("patch", 16)
        with torch.device("meta"):
            theirs = TorchViT(**fields)
        twin.assert_same_shapes(ViT(**fields), theirs, jnp.zeros((1, side, side, 3)))


def test_bfloat16():
    torch = require("torch")
    module, theirs = build("clip_vitb32", embed_dim=12)
    x = images(40, 24)
    twin.load(theirs, twin.draw(module, x))
    with torch.no_grad():
        expected = theirs(reference.torch_images(x)).pooled
        found = theirs.bfloat16()(reference.torch_images(x)).pooled
    assert found.dtype == torch.bfloat16
    assert reference.relative_error(found.float().numpy(), expected.numpy()) < 0.05


def test_an_image_that_patches_do_not_tile_is_an_error():
    require("torch")
    _, theirs = build("dino_vits8")
    with pytest.raises(UserError, match="an image of 32 x 36 pixels cannot be cut into patches of 8 x 8"):
        theirs(reference.torch_images(images(32, 36)))


@pytest.mark.parametrize("preset", ["openclip_vith14", "siglip_vitb16"])
def test_export(preset):
    require("torch")
    twin.assert_exports(build(preset, depth=1)[1], reference.torch_images(images(56, 24)))

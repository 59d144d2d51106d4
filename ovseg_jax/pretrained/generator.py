"""Published weights of the frozen tower in a generator of pseudo-masks."""

from typing import Any

import jax
import jax.numpy as jnp

from ovseg_jax.errors import UserError
from ovseg_jax.models.pseudo_masks import PseudoMaskGenerator, TowerTokens
from ovseg_jax.pretrained.load import load


def generator_weights(generator: PseudoMaskGenerator, init: str) -> dict[str, Any]:
    """Returns a generator's variables; {} for colours, which need none.

    Args:
      generator: the generator.
      init: see `pretrained.load.load`.

    Raises:
      UserError: the weights are not named or cannot be read.
    """
    if not isinstance(generator.features, TowerTokens):
        return {}
    if not init:
        raise UserError(
            "pseudo-masks with features='tower' need backbone.init, the weights: a folder or a name on the hub"
        )
    side = generator.features.stride
    image = jnp.zeros((1, side, side, 3), jnp.uint8)
    shapes = jax.eval_shape(generator.features.init, jax.random.key(0), image, jnp.full((1, 2), side))
    pixels = generator.features.mean, generator.features.std
    return {"params": {"features": load(init, generator.features, shapes, pixels=pixels)["params"]}}

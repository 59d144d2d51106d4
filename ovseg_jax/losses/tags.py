"""The tag loss of papers/003, eq. 3: a smooth L1 distance between features and the embeddings of their tags."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ovseg_jax.kernels.unit import unit

Reduction = Literal["sum", "mean"]
REDUCTIONS: tuple[Reduction, ...] = ("sum", "mean")


def tag_loss(
    features: Float[Array, "*n d"],
    tags: Float[Array, "*n t d"],
    valid: Bool[Array, "*n t"],
    reduction: Reduction = "sum",
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the sum over images or boxes of the mean distance to their tags, and the number of those with a tag.

    The distance of two unit vectors is the smooth L1 loss (Faster R-CNN; β = 1) of their difference, summed or averaged
    over its D numbers. If no number differs by more than 1, the sum is 1 - cos, whatever D is; the mean is D times
    smaller, so that at the paper's loss weights of 1 it would hardly count beside the caption losses. The paper states
    neither which of the two it takes nor whether vectors are normalised: the sum of unit vectors is ours.

    Args:
      features: of images or boxes, of any length.
      tags: the embeddings of the tags of each, of any length.
      valid: False for unused tags, and for those of padding.
      reduction: over the D numbers.
    """
    import optax  # as in `losses.matching`

    each = optax.huber_loss(unit(features)[..., None, :], unit(tags), delta=1.0)
    distance = each.sum(-1) if reduction == "sum" else each.mean(-1)
    count = valid.sum(-1)
    mean = jnp.where(valid, distance, 0).sum(-1) / jnp.maximum(count, 1)
    return mean.sum(), (count > 0).sum().astype(jnp.float32)

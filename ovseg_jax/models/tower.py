"""The output of image towers made of transformer blocks."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class TowerOutput(NamedTuple):
    """The output of an image tower.

    Attributes:
      pooled: the embedding of the whole image, as in the published model.
      tokens: the patch tokens after the final norm, as a map, without a class token.
      taps: block number (from 0) -> its patch tokens, for the requested blocks.
    """

    pooled: Float[Array, "b e"]
    tokens: Float[Array, "b h w d"]
    taps: Mapping[int, Float[Array, "b h w d"]]


def project(params: Mapping[str, Any], tokens: Float[Array, "b h w d"]) -> Float[Array, "b h w e"]:
    """Projects patch tokens into the space of `pooled` by the tower's `head`, in the dtype of `tokens`.

    Args:
      params: parameters of a `ViT` that pools its class token, or of an `Eva`; a ViT may have no head.
      tokens: tokens of that tower after the final norm.
    """
    if "head" not in params:
        return tokens
    head = params["head"]
    out = tokens @ jnp.asarray(head["kernel"], tokens.dtype)
    return out + jnp.asarray(head["bias"], tokens.dtype) if "bias" in head else out

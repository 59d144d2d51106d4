"""The output of image towers made of transformer blocks."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


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


def visible(inside: Bool[Array, "b h w"] | None, front: int, count: int) -> Bool[Array, "b n"] | None:
    """Returns the tokens that may be attended to: all but those of patches that are not `inside` of the image.

    Args:
      inside: the patches with a part of the image; None for all.
      front: the number of class tokens before them.
      count: the number of all tokens, those after the patches included.
    """
    if inside is None:
        return None
    patches = inside.reshape(inside.shape[0], -1)
    rest = count - front - patches.shape[1]
    return jnp.pad(patches, ((0, 0), (front, rest)), constant_values=True)


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

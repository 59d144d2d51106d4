"""What an image tower made of transformer blocks gives back."""

from collections.abc import Mapping
from typing import NamedTuple

from jaxtyping import Array, Float


class TowerOutput(NamedTuple):
    """Every resolution of a tower's view of an image.

    Attributes:
      pooled: the embedding of the whole image, as the published model gives it.
      tokens: the patch tokens behind the final norm, in their places; no class token.
      taps: block number (from 0) -> its patch tokens, for the blocks that were asked for.
    """

    pooled: Float[Array, "b e"]
    tokens: Float[Array, "b h w d"]
    taps: Mapping[int, Float[Array, "b h w d"]]

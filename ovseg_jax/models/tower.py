"""The output of image towers made of transformer blocks."""

from collections.abc import Mapping
from typing import NamedTuple

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

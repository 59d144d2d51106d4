"""The output of image towers made of transformer blocks, see `ovseg_jax/models/tower.py`."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from ovseg_jax.errors import UserError


class TowerOutput(NamedTuple):
    """The output of an image tower.

    Attributes:
      pooled: [b e], the embedding of the whole image, as in the published model.
      tokens: [b d h w], the patch tokens after the final norm, without a class token.
      taps: block number (from 0) -> its patch tokens, for the requested blocks.
    """

    pooled: Tensor
    tokens: Tensor
    taps: dict[int, Tensor]


def count_patches(image: Tensor, patch: int) -> tuple[int, int]:
    """Returns rows and columns of patches of images [b c h w].

    Raises:
      UserError: a side is not a multiple of the patch.
    """
    height, width = image.shape[2:]
    if height % patch or width % patch:
        raise UserError(
            f"an image of {height} x {width} pixels cannot be cut into patches of {patch} x {patch}: "
            f"resize or pad it to multiples of {patch}"
        )
    return height // patch, width // patch


def places(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Returns the last rows * columns tokens of [b n d], those of the patches, as a map [b d rows columns]."""
    rows, columns = grid
    return tokens[:, tokens.shape[1] - rows * columns :].transpose(1, 2).unflatten(2, grid)


def visible(inside: Tensor | None, front: int) -> Tensor | None:
    """Returns the tokens [b n] that may be attended to: all but patches that are not `inside` [b rows columns]."""
    return None if inside is None else F.pad(inside.flatten(1), (front, 0), value=True)

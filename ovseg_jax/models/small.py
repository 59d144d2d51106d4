"""A small backbone for images of 64 to 128 pixels, which trains from scratch on a CPU in minutes.

Its time is that of its 3x3 convolutions, so all but the stem's first run at stride 4 or coarser: images are
folded by space-to-depth, which loses no pixel. XLA runs a CPU convolution on one thread: to use two cores, give
each a virtual device and half of the batch.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from ovseg_jax.errors import UserError
from ovseg_jax.models.norm import GroupNorm

STEMS = ("full", "light", "patch")


def space_to_depth(x: Float[Array, "b h w c"], size: int) -> Float[Array, "b h2 w2 d"]:
    """Folds each size x size square of pixels into channels, row by row; zeros fill an incomplete square."""
    b, h, w, c = x.shape
    x = jnp.pad(x, ((0, 0), (0, -h % size), (0, -w % size), (0, 0)))
    h, w = x.shape[1] // size, x.shape[2] // size
    x = x.reshape(b, h, size, w, size, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h, w, size * size * c)


class ConvNorm(nn.Module):
    """A convolution without bias, then group norm."""

    features: int
    size: int = 3
    stride: int = 1
    scale_init: float = 1.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        """Maps [b h w c] to [b ceil(h/stride) ceil(w/stride) features]."""
        kernel = (self.size, self.size)
        x = nn.Conv(self.features, kernel, self.stride, use_bias=False, dtype=self.dtype, name="conv")(x)
        return GroupNorm(scale_init=self.scale_init, dtype=self.dtype, name="norm")(x)


class ResidualBlock(nn.Module):
    """A residual block of two 3x3 convolutions; the second norm starts at 0.3, so the block near identity."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Maps [b h w c] to the same shape; c = features."""
        y = nn.relu(ConvNorm(self.features, dtype=self.dtype, name="conv1")(x))
        y = ConvNorm(self.features, scale_init=0.3, dtype=self.dtype, name="conv2")(y)
        return nn.relu(x + y)


class SmallBackbone(nn.Module):
    """A small backbone: a stem, then per level a strided convolution and residual blocks.

    Attributes:
      width: channels at stride 4, a multiple of 16; 1.5, 2 and 3 times as many at strides 8, 16 and 32.
      levels: 1 to 4 maps, from `c2` on; three suit images of 64 to 96 pixels.
      blocks: residual blocks per level.
      stem: how stride 4 is reached. "full": twice space-to-depth by 2 and a 3x3 convolution; "light": the
        second one is 1x1 (about a quarter less time for the whole backbone); "patch": one space-to-depth by
        4 and one 3x3 convolution (about a third less).
      dtype: compute type; parameters are float32.
    """

    width: int = 48
    levels: int = 3
    blocks: int = 1
    stem: str = "full"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"], train: bool = False) -> dict[str, Float[Array, "b _ _ _"]]:
        """Computes the pyramid.

        Args:
          x: normalised images.
          train: no effect; the argument belongs to the interface of backbones.

        Returns:
          `c2`, `c3`, ... (as many as `levels`): [b ceil(h/s) ceil(w/s) c] at strides s = 4, 8, 16, 32.

        Raises:
          UserError: the width, the number of levels or the stem is invalid.
        """
        if self.width < 16 or self.width % 16:
            raise UserError(f"small backbone: width is {self.width}, but must be a multiple of 16.")
        if not 1 <= self.levels <= 4:
            raise UserError(f"small backbone: levels is {self.levels}, but must be 1 to 4.")
        if self.stem not in STEMS:
            raise UserError(f"small backbone: stem={self.stem!r} is not one of {', '.join(STEMS)}.")

        w = self.width
        x = x.astype(self.dtype)
        if self.stem == "patch":
            x = nn.relu(ConvNorm(w, dtype=self.dtype, name="stem1")(space_to_depth(x, 4)))
        else:
            x = nn.relu(ConvNorm(w // 2, dtype=self.dtype, name="stem1")(space_to_depth(x, 2)))
            size = 3 if self.stem == "full" else 1
            x = nn.relu(ConvNorm(w, size, dtype=self.dtype, name="stem2")(space_to_depth(x, 2)))

        features = {}
        for level, channels in enumerate((w, w * 3 // 2, w * 2, w * 3)[: self.levels], start=2):
            if level > 2:
                x = nn.relu(ConvNorm(channels, stride=2, dtype=self.dtype, name=f"down{level}")(x))
            for i in range(self.blocks):
                x = ResidualBlock(channels, dtype=self.dtype, name=f"level{level}_{i}")(x)
            features[f"c{level}"] = x
        return features

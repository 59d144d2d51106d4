"""A plain transformer as a backbone: the simple feature pyramid of ViTDet.

Li et al., Exploring Plain Vision Transformer Backbones for Object Detection, 2022, section 3.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

LEVELS = range(2, 6)


class TowerPyramid(nn.Module):
    """A pyramid of maps at strides of about 4, 8, 16 and 32, each computed from a tower's last map.

    Finer maps come from learned upsampling by 2, which halves the channels, with a norm and a GELU between two such
    steps; coarser maps from max pooling. The stride of 14x14 patches counts as 16: their finest map has a cell for each
    3.5 pixels.

    Attributes:
      tower: a `ViT` or `Eva`.
      dtype: compute type; parameters are float32.
    """

    tower: Any
    dtype: Any = jnp.float32

    def __call__(
        self, x: Float[Array, "b h w 3"], train: bool = False
    ) -> dict[str, Float[Array, "b _h _w _c"]]:
        """Computes `c2` to `c5` of normalised images, whose sides are multiples of the tower's patch.

        Raises:
          UserError: a side is not a multiple of the patch.
        """
        return self.of_tokens(self.tower(x, train).tokens)

    @nn.compact
    def of_tokens(self, tokens: Float[Array, "b h w d"]) -> dict[str, Float[Array, "b _h _w _c"]]:
        """Computes `c2` to `c5` of the tower's last map."""
        own = level_of(self.tower.patch)
        return {f"c{level}": self._level(tokens, level, own) for level in LEVELS}

    def _level(self, x: Array, level: int, own: int) -> Array:
        if level > own:
            side = (2 ** (level - own),) * 2
            return nn.max_pool(x, side, side, padding="SAME")
        for i in range(own - level):
            if i:
                x = nn.gelu(nn.LayerNorm(1e-6, self.dtype, name=f"norm_c{level}_{i}")(x), approximate=False)
            b, h, w, c = x.shape
            # A transposed convolution of 2x2 with stride 2 is a dense layer to four pixels.
            x = nn.Dense(2 * c, dtype=self.dtype, name=f"up_c{level}_{i}")(x)
            x = x.reshape(b, h, w, 2, 2, c // 2).swapaxes(2, 3).reshape(b, 2 * h, 2 * w, c // 2)
        return x


def level_of(patch: int) -> int:
    """Returns the level of the pyramid with the stride nearest to a patch: 8 -> 3, 14 and 16 -> 4, 32 -> 5."""
    return min(LEVELS, key=lambda level: abs(2**level - patch))

"""A plain transformer as a backbone: a pyramid from four of its blocks, as BEiT and MAE segment with UPerNet.

Bao et al., BEiT, 2022; He et al., Masked Autoencoders, 2022; P-Seg+ (papers/002, C.2) takes blocks 4, 6, 8 and 12.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from ovseg_jax.errors import UserError
from ovseg_jax.models.resnet import make_norm

LEVELS = ("c2", "c3", "c4", "c5")


class Upsampling(nn.Module):
    """A transposed convolution of 2x2 with stride 2: every pixel becomes four.

    Attributes:
      features: channels of the result.
      dtype: compute type; parameters are float32.
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        """Maps [b h w c] to [b 2h 2w features]."""
        b, h, w, c = x.shape
        init = nn.initializers.lecun_normal(in_axis=-1, out_axis=-2)
        kernel = self.param("kernel", init, (2, 2, self.features, c)).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        y = jnp.einsum("bhwc,uvdc->bhuwvd", x.astype(self.dtype), kernel)
        return y.reshape(b, 2 * h, 2 * w, self.features) + bias


class TapPyramid(nn.Module):
    """A pyramid of maps, the finest from the first of a ViT's four taps, the coarsest from the last.

    The taps are not normalised. With the stride s of the patches, the strides are s/4 (two transposed convolutions,
    with a batch norm and a GELU between them), s/2 (one), s, and 2s (max pooling), each of the ViT's width.

    Attributes:
      tower: a `ViT` with four `taps`.
      norm: see `resnet.make_norm`.
      dtype: compute type; parameters are float32.
    """

    tower: Any
    norm: str = "batch"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w 3"], train: bool = False
    ) -> dict[str, Float[Array, "b _h _w c"]]:
        """Computes `c2` to `c5` of normalised images, whose sides are multiples of the tower's patch.

        Raises:
          UserError: a side is not a multiple of the patch, or there are not four taps.
        """
        if len(self.tower.taps) != len(LEVELS):
            raise UserError(f"taps={tuple(self.tower.taps)} of a pyramid are not four blocks of the ViT")
        tapped = self.tower(x, train).taps
        c2, c3, c4, c5 = (tapped[i] for i in self.tower.taps)
        up = lambda name: Upsampling(self.tower.width, self.dtype, name=name)
        norm = make_norm(self.norm, train, self.dtype)
        c2 = up("up_c2_1")(nn.gelu(norm("norm_c2")(up("up_c2_0")(c2)), approximate=False))
        # A last odd row or column is dropped, as in the references.
        return dict(zip(LEVELS, (c2, up("up_c3")(c3), c4, nn.max_pool(c5, (2, 2), (2, 2))), strict=True))

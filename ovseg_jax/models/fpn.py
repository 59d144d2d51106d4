"""The feature pyramid, its fusion at the finest level, and convolutional heads."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ovseg_jax.models.norm import GroupNorm


def resize(x: Float[Array, "b h w c"], size: tuple[int, ...], method: str = "bilinear") -> Array:
    """Resizes to `size` = (height, width) with half-pixel centres; returns x itself if nothing changes."""
    if x.shape[1:3] == tuple(size):
        return x
    return jax.image.resize(x, (x.shape[0], *size, x.shape[3]), method).astype(x.dtype)


class FusedPyramid(nn.Module):
    """An FPN over c2..c5 whose levels are upsampled to c2's resolution and summed (papers/004, 4.1; MuST).

    Attributes:
      width: channels of every level (640 in the paper).
      output_conv: whether each merged level has FPN's 3x3 convolution.
    """

    width: int
    output_conv: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: Mapping[str, Float[Array, "b _h _w _c"]]) -> Float[Array, "b h w d"]:
        """Fuses a backbone's maps, keyed "c2".."c5" (coarser ones may be absent)."""
        levels = sorted(features)
        size = features[levels[0]].shape[1:3]
        top: Array | None = None
        fused: Array | None = None
        for name in reversed(levels):
            x = nn.Conv(self.width, (1, 1), dtype=self.dtype, name=f"lateral_{name}")(features[name])
            top = x if top is None else x + resize(top, x.shape[1:3], "nearest")
            out = top
            if self.output_conv:
                out = nn.Conv(self.width, (3, 3), dtype=self.dtype, name=f"output_{name}")(top)
            out = resize(out, size)
            fused = out if fused is None else fused + out
        assert fused is not None
        return fused


class ConvHead(nn.Module):
    """A head of a dense layer and 3x3 convolutions (papers/004, 4.1: one fc, three of width 640), for F_s and F_z.

    The paper does not name normalisation and activation. Ours are GroupNorm with 8 groups and ReLU between the layers;
    the last layer is linear.
    """

    width: int
    convs: int = 3
    features: int | None = None
    """Channels of the last layer, if they differ from `width` (for a text space of another size)."""
    groups: int = 8
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        """Computes F_s or F_z from fused features."""
        x = nn.Dense(self.width, dtype=self.dtype, name="fc")(x)
        for i in range(self.convs):
            x = nn.relu(GroupNorm(self.groups, dtype=self.dtype, name=f"norm_{i}")(x))
            last = i == self.convs - 1
            width = (self.features or self.width) if last else self.width
            x = nn.Conv(width, (3, 3), dtype=self.dtype, name=f"conv_{i}")(x)
        return x

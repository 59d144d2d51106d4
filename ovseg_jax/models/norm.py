"""Normalisation layers."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class GroupNorm(nn.Module):
    """Group normalisation (Wu and He 2018) as one multiply-add per pixel.

    Mean, variance, scale and bias are first combined into a factor and an offset [b c], so the image is read once for
    its moments and once for the result; the forward pass of `nn.GroupNorm` takes two to three times as long on a CPU.
    Moments are float32.

    Attributes:
      groups: number of groups; divides the channels.
      scale_init: initial scale.
      epsilon: added to the variance.
      dtype: type of the result.
    """

    groups: int = 8
    scale_init: float = 1.0
    epsilon: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], valid: Bool[Array, "b h w"] | None = None
    ) -> Float[Array, "b h w c"]:
        """Normalises each group of channels over height and width; only `valid` pixels count for the moments."""
        b, c = x.shape[0], x.shape[-1]
        scale = self.param("scale", nn.initializers.constant(self.scale_init), (c,))
        bias = self.param("bias", nn.initializers.zeros, (c,))
        x32 = x.astype(jnp.float32)

        def group_mean(per_channel: jax.Array) -> jax.Array:
            grouped = per_channel.reshape(b, self.groups, c // self.groups).mean(-1, keepdims=True)
            return jnp.broadcast_to(grouped, (b, self.groups, c // self.groups)).reshape(b, c)

        def pixel_mean(y: jax.Array) -> jax.Array:
            if valid is None:
                return y.mean((1, 2))
            count = jnp.maximum(valid.sum((1, 2)), 1)
            return jnp.where(valid[..., None], y, 0).sum((1, 2)) / count[:, None]

        mean = group_mean(pixel_mean(x32))
        variance = group_mean(pixel_mean(x32 * x32)) - mean * mean
        # Rounding can make a constant image's variance negative.
        factor = scale * jax.lax.rsqrt(jnp.maximum(variance, 0.0) + self.epsilon)
        offset = bias - mean * factor
        return (x32 * factor[:, None, None] + offset[:, None, None]).astype(self.dtype)

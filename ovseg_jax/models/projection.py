"""The projection of image and text features into their common space, as in GroupViT and P-Seg."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float


class Projection(nn.Module):
    """An MLP of two layers: dense, batch normalisation, ReLU, dense (GroupViT's `ProjectMLP`).

    Attributes:
      features: channels of the result.
      hidden: channels inside; published for GroupViT: 4096.
      norm: whether the hidden channels are normalised over the batch.
      dtype: compute type; statistics and parameters are float32.
    """

    features: int = 256
    hidden: int = 4096
    norm: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*n d"], train: bool = False) -> Float[Array, "*n e"]:
        """Maps each vector; in training with the statistics of the whole batch, over all devices."""
        x = nn.Dense(self.hidden, dtype=self.dtype, name="Dense_0")(x)
        if self.norm:
            x = nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, dtype=self.dtype, name="norm")(x)
        return nn.Dense(self.features, dtype=self.dtype, name="Dense_1")(nn.relu(x))

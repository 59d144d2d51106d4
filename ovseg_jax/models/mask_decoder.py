"""Mask decoders, which compute one query per proposal from image features."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ovseg_jax.models.transformer import attend


class RegionDecoder(nn.Module):
    """OpenSeg's region-image cross-attention (papers/004, fig. 6 and appendix C).

    T blocks, each a cross-attention from the queries to the position-augmented image features and an MLP, both
    pre-norm and residual. There is no self-attention among queries: the paper found that it does not help.

    Attributes:
      num_queries: N (128 in the paper).
      layers: T (3 in the paper).
      heads: attention heads (ours; with 1, attention and masks use the same dot product).
      mlp_ratio: width of the MLP over that of the queries (ours).
    """

    num_queries: int
    layers: int = 3
    heads: int = 1
    mlp_ratio: int = 2
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: Float[Array, "b p d"], valid: Bool[Array, "b p"]) -> Float[Array, "b n d"]:
        """Computes the queries after T blocks from features at P pixels, of which `valid` are not padding."""
        b, _, d = features.shape
        keys = nn.LayerNorm(dtype=self.dtype, name="image_norm")(features)
        init = self.param("queries", nn.initializers.normal(0.5), (self.num_queries, d))
        q = jnp.broadcast_to(init.astype(self.dtype), (b, self.num_queries, d))
        for t in range(self.layers):
            x = nn.LayerNorm(dtype=self.dtype, name=f"query_norm_{t}")(q)
            q = q + self._attend(t, x, keys, valid)
            x = nn.LayerNorm(dtype=self.dtype, name=f"mlp_norm_{t}")(q)
            x = nn.relu(nn.Dense(self.mlp_ratio * d, dtype=self.dtype, name=f"mlp_in_{t}")(x))
            q = q + nn.Dense(d, dtype=self.dtype, name=f"mlp_out_{t}")(x)
        return nn.Dense(d, dtype=self.dtype, name="mask_query")(
            nn.LayerNorm(dtype=self.dtype, name="out_norm")(q)
        )

    def _attend(self, t: int, queries: Array, keys: Array, valid: Array) -> Array:
        def layer(name: str, shape: Any, **options: Any) -> nn.DenseGeneral:
            return nn.DenseGeneral(shape, dtype=self.dtype, name=f"{name}_{t}", **options)

        return attend(layer, self.heads, queries, keys, mask=valid[:, None, None, :])

"""P-Seg's image network: MaskFormer without its classifier, and mask features in the space of the texts."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from ovseg_jax.kernels.unit import unit
from ovseg_jax.models.maskformer import MaskFormerNet, cells_inside
from ovseg_jax.models.projection import Projection


class PSegFeatures(NamedTuple):
    """The outputs of the network; embeddings are not normalised.

    Attributes:
      mask_logits: [B L N h w], of all layers with deep supervision, else of the last one.
      regions: [B N D], an embedding of each mask.
      image: [B D], the embedding of the mean of the mask features.
      pixels: [B h w D], an embedding of each pixel.
    """

    mask_logits: Float[Array, "b l n h w"]
    regions: Float[Array, "b n d"]
    image: Float[Array, "b d"]
    pixels: Float[Array, "b h w d"]


class PSegNet(nn.Module):
    """P-Seg's network (papers/002, 3.2, 3.3 and C.1).

    The feature of a mask is its query after the decoder (3.2), in a projection of two layers (3.3.2). The embedding of
    a pixel is the sum of those of the masks, weighted by the masks (ours).

    Attributes:
      net: the MaskFormer.
      embed_dim: D of the text space (256).
      projection_hidden: channels inside of the projection of mask features.
      projection_norm: whether it has batch normalisation.
    """

    net: MaskFormerNet
    embed_dim: int = 256
    projection_hidden: int = 256
    projection_norm: bool = False

    @nn.compact
    def __call__(
        self, image: UInt8[Array, "b s t 3"], image_size: Int[Array, "b 2"], train: bool = False
    ) -> PSegFeatures:
        """Encodes images that fill `image_size` (height, width) of their canvas."""
        out = self.net(image, image_size, train)
        logits = out.mask_logits[:, -1]
        masks = jax.nn.sigmoid(logits) * cells_inside(image_size, logits.shape[2:], "c2")[:, None]
        queries = out.queries[:, -1].astype(jnp.float32)
        project = Projection(
            self.embed_dim, self.projection_hidden, self.projection_norm, self.net.dtype, name="projection"
        )
        # The mean comes first: it is what the paper's pseudocode contrasts, and what batch statistics are of.
        mean = project(queries.mean(1), train).astype(jnp.float32)
        regions = project(queries, False).astype(jnp.float32)
        pixels = jnp.einsum("bnhw,bnd->bhwd", masks, unit(regions))
        return PSegFeatures(out.mask_logits, regions, mean, pixels)

"""P-Seg's image network: MaskFormer without its classifier, and mask features in the space of the texts."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from ovseg_jax.errors import UserError
from ovseg_jax.kernels.unit import unit
from ovseg_jax.models.fpn import ConvHead, FusedPyramid
from ovseg_jax.models.maskformer import MaskFormerNet, cells_inside
from ovseg_jax.models.projection import Projection

FEATURES = ("query", "pooled")


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

    Attributes:
      net: the MaskFormer.
      embed_dim: D of the text space (256).
      features: what a mask's feature is. "query": its query after the decoder (3.2), in a projection of two layers
        (3.3.2); a pixel's embedding is the sum of those of the masks, weighted by the masks (ours). "pooled" (ours):
        the sum of pixel embeddings under the mask, which come from a pyramid and a head of 3x3 convolutions of their
        own, as in OpenSeg; there is no further projection.
      projection_hidden: channels inside of the projection, for "query".
      projection_norm: whether it has batch normalisation, for "query".
      head_convs: 3x3 convolutions of the head, for "pooled".
      detach_masks: whether to stop the gradient of the texts' loss to the masks, for "pooled".
    """

    net: MaskFormerNet
    embed_dim: int = 256
    features: str = "query"
    projection_hidden: int = 256
    projection_norm: bool = False
    head_convs: int = 1
    detach_masks: bool = True

    @nn.compact
    def __call__(
        self, image: UInt8[Array, "b s t 3"], image_size: Int[Array, "b 2"], train: bool = False
    ) -> PSegFeatures:
        """Encodes images that fill `image_size` (height, width) of their canvas.

        Raises:
          UserError: `features` is unknown.
        """
        out = self.net(image, image_size, train)
        logits = out.mask_logits[:, -1]
        masks = jax.nn.sigmoid(logits) * cells_inside(image_size, logits.shape[2:], "c2")[:, None]
        if self.features == "query":
            queries = out.queries[:, -1].astype(jnp.float32)
            project = Projection(
                self.embed_dim,
                self.projection_hidden,
                self.projection_norm,
                self.net.dtype,
                name="projection",
            )
            # The mean comes first: it is what the paper's pseudocode contrasts, and what batch statistics are of.
            mean = project(queries.mean(1), train).astype(jnp.float32)
            regions = project(queries, False).astype(jnp.float32)
            pixels = jnp.einsum("bnhw,bnd->bhwd", masks, unit(regions))
            return PSegFeatures(out.mask_logits, regions, mean, pixels)
        if self.features != "pooled":
            raise UserError(f"model.features={self.features!r} is not one of {', '.join(FEATURES)}")
        fused = FusedPyramid(self.net.width, False, self.net.dtype, name="pyramid")(out.maps)
        head = ConvHead(self.net.width, self.head_convs, self.embed_dim, dtype=self.net.dtype, name="head")
        pixels = head(fused).astype(jnp.float32)
        masks = jax.lax.stop_gradient(masks) if self.detach_masks else masks
        regions = jnp.einsum("bnhw,bhwd->bnd", masks, pixels)
        return PSegFeatures(out.mask_logits, regions, unit(regions).mean(1), pixels)

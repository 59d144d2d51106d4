"""P-Seg's image network: MaskFormer without its classifier, and mask features in the space of the texts; baselines."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from ovseg_jax.errors import UserError
from ovseg_jax.kernels.unit import unit
from ovseg_jax.models.groupvit import SHARPNESS, GroupVitImage
from ovseg_jax.models.maskformer import MaskFormerNet, cells_inside
from ovseg_jax.models.openseg import normalise
from ovseg_jax.models.projection import Projection
from ovseg_jax.models.pseudo_masks import PseudoMaskGenerator
from ovseg_jax.models.vit import ViT

# A pseudo-mask has this logit inside, and its negative outside.
CERTAIN = 10.0


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


class SegmentViT(nn.Module):
    """A ViT whose tokens are pooled in each pseudo-mask: baseline 2 of papers/002, 4.1. It learns no masks.

    The embedding of a mask is the mean of the final tokens in it, where a token counts by the share of its patch that
    the mask covers; that of the image is the mean over its masks. Both go through the projection that P-Seg has (ours).

    Attributes:
      tower: the ViT.
      generator: the pseudo-masks; a tower in it is never trained.
      mean, std: normalisation of pixels.
      embed_dim, projection_hidden, projection_norm: see `PSegNet`.
      dtype: compute type.
    """

    tower: ViT
    generator: PseudoMaskGenerator
    mean: tuple[float, ...]
    std: tuple[float, ...]
    embed_dim: int = 256
    projection_hidden: int = 256
    projection_norm: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, image: UInt8[Array, "b s t 3"], image_size: Int[Array, "b 2"], train: bool = False
    ) -> PSegFeatures:
        """Encodes images that fill `image_size` (height, width) of their canvas; an empty mask has zeros.

        Raises:
          UserError: patches of the tower are not a multiple of the masks' cells.
        """
        cells, rest = divmod(self.tower.patch, self.generator.mask_stride)
        if rest:
            raise UserError(
                f"patches of {self.tower.patch} pixels are not a multiple of mask_stride={self.generator.mask_stride}"
            )
        masks, valid = self.generator(image, image_size)
        x = normalise(image, image_size, self.mean, self.std, self.dtype)
        tokens = self.tower(x, train).tokens.astype(jnp.float32)
        b, h, w, _ = tokens.shape
        share = (masks > 0).reshape(b, -1, h, cells, w, cells).mean((3, 5))
        pooled = jnp.einsum("bkhw,bhwd->bkd", share, tokens)
        pooled = pooled / jnp.maximum(share.sum((2, 3)), 1e-6)[..., None]
        project = Projection(
            self.embed_dim, self.projection_hidden, self.projection_norm, self.dtype, name="projection"
        )
        mean = project(pooled.sum(1) / jnp.maximum(valid.sum(1), 1)[:, None], train).astype(jnp.float32)
        regions = jnp.where(valid[..., None], project(pooled, False).astype(jnp.float32), 0)
        logits = jnp.where(masks > 0, CERTAIN, -CERTAIN)
        pixels = jnp.einsum("bnhw,bnd->bhwd", masks / 255, unit(regions))
        return PSegFeatures(logits[:, None], regions, mean, pixels)


class GroupingNet(nn.Module):
    """GroupViT's image side (papers/002's main baseline), whose masks are its groups. It learns no masks from masks.

    Attributes:
      groups: the image side.
      mean, std: normalisation of pixels.
    """

    groups: GroupVitImage
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def embed_dim(self) -> int:
        """D of the text space."""
        return self.groups.embed_dim

    @nn.compact
    def __call__(
        self, image: UInt8[Array, "b s t 3"], image_size: Int[Array, "b 2"], train: bool = False
    ) -> PSegFeatures:
        """Encodes images that fill `image_size` (height, width) of their canvas; draws, see `GroupVitImage`."""
        x = normalise(image, image_size, self.mean, self.std, self.groups.dtype)
        out = self.groups(x, train)
        regions = out.groups.astype(jnp.float32)
        pixels = jnp.einsum("bnhw,bnd->bhwd", out.assignment, unit(regions))
        logits = SHARPNESS * (out.assignment - 0.5)
        return PSegFeatures(logits[:, None], regions, out.pooled.astype(jnp.float32), pixels)

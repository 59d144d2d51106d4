"""OpenSeg's image network: backbone, fused pyramid, F_s and F_z, proposals and their embeddings."""

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from ovseg_jax.models.fpn import ConvHead, FusedPyramid, resize
from ovseg_jax.models.mask_decoder import RegionDecoder
from ovseg_jax.models.remat import rematerialise

LEVELS = ("c2", "c3", "c4", "c5")


class OpenSegFeatures(NamedTuple):
    """The outputs of the network.

    Attributes:
      mask_logits: [B N h w], None without a mask decoder.
      region_sum: [B N D], F_z summed under each mask within the image, None without a mask decoder.
      pixel_embed: [B h w D], F_z.
    """

    mask_logits: Float[Array, "b n h w"] | None
    region_sum: Float[Array, "b n d"] | None
    pixel_embed: Float[Array, "b h w d"]


def normalise(
    image: UInt8[Array, "b s t 3"],
    image_size: Int[Array, "b 2"],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: jnp.dtype = jnp.float32,
) -> Float[Array, "b s t 3"]:
    """Computes `(x/255 - mean) / std`, and zero outside each image's own (height, width)."""
    x = (image.astype(jnp.float32) / 255 - jnp.array(mean)) / jnp.array(std)
    return jnp.where(inside(image_size, image.shape[1:3])[..., None], x, 0).astype(dtype)


def inside(
    image_size: Int[Array, "b 2"], shape: tuple[int, ...], stride: tuple[float, float] = (1, 1)
) -> Bool[Array, "b h w"]:
    """Tells which cells of a grid, each `stride` pixels of the canvas, begin within each image's (height, width)."""
    rows = jnp.arange(shape[0])[None, :] * stride[0] < image_size[:, :1]
    cols = jnp.arange(shape[1])[None, :] * stride[1] < image_size[:, 1:]
    return rows[:, :, None] & cols[:, None, :]


class OpenSegNet(nn.Module):
    """OpenSeg's network (papers/004, 3.1, 3.2, 4.1).

    The paper does not state: normalisation and activation in the heads (`ConvHead`), heads, MLP width and norms of the
    decoder, and the initial values of queries and positions. These choices are ours, like those marked below.

    Attributes:
      backbone: a module that maps [B S S 3] to {"c2": ..., "c5": ...}.
      mean, std: normalisation of pixels in [0, 1].
      width: channels of pyramid and heads (640).
      embed_dim: D of the text space; F_z's last layer has this many channels.
      num_queries: N proposals (128); 0 for a per-pixel network without masks (LSeg+ of 4.3).
      decoder_layers, decoder_heads: see `RegionDecoder` (3; ours: 1).
      head_convs: 3x3 convolutions of each head (3).
      pyramid_output_conv: see `FusedPyramid`.
      position_grid: side of the learnable position embedding, resized to the feature map (ours).
      mask_scale: factor on the mask logits (ours; 1 is the plain dot product of 3.1).
      mask_bias: initial value of a learned bias of the mask logits (ours); None for none, as in 3.1.
      detach_masks: whether to stop the grounding loss's gradient to the masks (ours, not in the paper; helps short
        runs).
      remat: what the backward pass recomputes in pyramid, heads and decoder, see `rematerialise`.
    """

    backbone: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    width: int = 640
    embed_dim: int = 640
    num_queries: int = 128
    decoder_layers: int = 3
    decoder_heads: int = 1
    head_convs: int = 3
    pyramid_output_conv: bool = True
    position_grid: int = 16
    mask_scale: float = 1.0
    mask_bias: float | None = None
    detach_masks: bool = False
    remat: str = "none"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, image: UInt8[Array, "b s t 3"], image_size: Int[Array, "b 2"], train: bool = False
    ) -> OpenSegFeatures:
        """Encodes images that fill `image_size` (height, width) of their canvas."""
        x = normalise(image, image_size, self.mean, self.std, self.dtype)
        features = {k: v for k, v in self.backbone(x, train=train).items() if k in LEVELS}
        again = partial(rematerialise, policy=self.remat)
        pyramid = again(FusedPyramid)(self.width, self.pyramid_output_conv, self.dtype, name="pyramid")
        fused = pyramid(features)
        conv_head = again(ConvHead)
        head = lambda name, out: conv_head(self.width, self.head_convs, out, dtype=self.dtype, name=name)(
            fused
        )
        f_z = head("head_z", self.embed_dim).astype(jnp.float32)
        if not self.num_queries:
            return OpenSegFeatures(None, None, f_z)

        f_s = head("head_s", self.width)
        grid = (self.position_grid, self.position_grid, self.width)
        position = self.param("position", nn.initializers.normal(0.1), grid)
        f_s = f_s + resize(position[None].astype(f_s.dtype), f_s.shape[1:3])
        b, h, w, d = f_s.shape
        flat = f_s.reshape(b, h * w, d)
        stride = (image.shape[1] / h, image.shape[2] / w)
        valid = inside(image_size, (h, w), stride).reshape(b, h * w)
        queries = again(RegionDecoder)(
            self.num_queries, self.decoder_layers, self.decoder_heads, dtype=self.dtype, name="decoder"
        )(flat, valid)
        logits = jnp.einsum("bnd,bpd->bnp", queries, flat, preferred_element_type=jnp.float32)
        logits = logits * self.mask_scale
        if self.mask_bias is not None:
            logits = logits + self.param("mask_bias", nn.initializers.constant(self.mask_bias), ())
        masks = jax.nn.sigmoid(logits) * valid[:, None, :]
        if self.detach_masks:
            masks = jax.lax.stop_gradient(masks)
        region_sum = jnp.einsum("bnp,bpd->bnd", masks, f_z.reshape(b, h * w, -1))
        return OpenSegFeatures(logits.reshape(b, -1, h, w), region_sum, f_z)

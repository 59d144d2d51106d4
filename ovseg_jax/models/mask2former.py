"""Mask2Former (Cheng et al. 2022): a backbone, a pixel decoder of deformable attention, and masked attention.

`Mask2FormerHead` is all that follows a backbone, for any maps "c2" to "c5": it predicts masks and has no classifier.
For each of its predictions it returns the normalised queries, the embeddings of the masks and the mask features, so
that a classifier by words may be put on it, as FC-CLIP does. `Mask2FormerNet` puts a backbone in front of it; with
`models.maskformer.MaskFormer` and a `QueryClassifier` it is the whole Mask2Former.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from ovseg_jax.errors import UserError
from ovseg_jax.kernels.resize import resize_within
from ovseg_jax.models.deformable import DeformablePixelDecoder, PixelFeatures, cell_counts
from ovseg_jax.models.maskformer import (
    DecoderLayer,
    cells_inside,
    mask_embedder,
    mask_logits,
    sine_positions,
)
from ovseg_jax.models.openseg import LEVELS, normalise
from ovseg_jax.models.remat import rematerialise


class Mask2FormerOutput(NamedTuple):
    """The outputs of the network, for L predictions: of the learned queries and after each layer, or the last one.

    Attributes:
      queries: [B L N D], normalised outputs of the decoder; the last layer is the last entry.
      embeddings: [B L N C], the embeddings of the masks.
      mask_logits: [B L N h w], their products with the mask features, float32. Under `jit` they cost nothing where
        nobody reads them.
      pixels: [B h w C], the mask features.
    """

    queries: Float[Array, "b l n d"]
    embeddings: Float[Array, "b l n c"]
    mask_logits: Float[Array, "b l n h w"]
    pixels: Float[Array, "b h w c"]


class MaskedDecoder(nn.Module):
    """Mask2Former's decoder (3.2.1): cross-attention within each query's last mask, then self-attention and MLP.

    Layers attend to one map each, in turn from the coarsest. A query whose mask is empty attends to the whole image.

    Attributes:
      num_queries: N.
      width: D, channels of the maps and queries.
      mask_dim: C, channels of the mask features.
      layers: number of layers.
      heads: attention heads.
      ffn: channels inside the MLPs.
      remat: what the backward pass recomputes in each layer, see `rematerialise`.
      dtype: compute type; mask logits are float32.
    """

    num_queries: int = 100
    width: int = 256
    mask_dim: int = 256
    layers: int = 9
    heads: int = 8
    ffn: int = 2048
    remat: str = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, features: PixelFeatures, image_size: Int[Array, "b 2"], train: bool = False, deep: bool = False
    ) -> Mask2FormerOutput:
        """Predicts masks.

        Args:
          features: the outputs of the pixel decoder.
          image_size: height and width of each image in pixels of the canvas.
          train: whether dropout is on; there is none.
          deep: whether to return the predictions of the learned queries and of all layers, not only the last.
        """
        levels, pixels = sorted(features.maps, reverse=True), features.pixels.astype(self.dtype)
        b, finest = pixels.shape[0], f"c{int(min(features.maps)[1:]) - 1}"
        whole = cell_counts(image_size, pixels.shape[1:3], finest)
        embedding = self.param("level_embedding", nn.initializers.normal(1.0), (len(levels), self.width))
        keys, values, valid, small = [], [], [], []
        for i, level in enumerate(levels):
            x = features.maps[level]
            shape: tuple[int, int] = x.shape[1:3]  # type: ignore[assignment]
            inside = cells_inside(image_size, shape, level)
            value = x.reshape(b, -1, self.width).astype(self.dtype) + embedding[i].astype(self.dtype)
            values.append(value)
            position = sine_positions(inside, self.width).reshape(value.shape)
            keys.append(value + position.astype(self.dtype))
            valid.append(inside.reshape(b, 1, -1))
            # Logits are linear in the pixels, so that masks are resized with the pixels, once for all layers.
            count = cell_counts(image_size, shape, level)
            resized = resize_within(features.pixels.astype(jnp.float32), shape, whole, count)
            small.append(jax.lax.stop_gradient(resized).reshape(b, -1, self.mask_dim))

        def learned(name: str) -> Array:
            init = self.param(name, nn.initializers.normal(1.0), (self.num_queries, self.width))
            return jnp.broadcast_to(init.astype(self.dtype), (b, *init.shape))

        queries, position = learned("query_features"), learned("query_positions")
        norm = nn.LayerNorm(1e-5, dtype=self.dtype, name="norm")
        embed = mask_embedder(self.width, self.mask_dim, self.dtype)
        layer_type = rematerialise(DecoderLayer, self.remat, static_argnums=(6,))
        normed = [norm(queries)]
        embedded = [embed(normed[0])]
        for i in range(self.layers):
            at = i % len(levels)
            logits = jnp.einsum(
                "bnc,bpc->bnp", jax.lax.stop_gradient(embedded[-1]).astype(jnp.float32), small[at]
            )
            open_ = (logits >= 0) & valid[at]
            open_ = jnp.where(open_.any(-1, keepdims=True), open_, valid[at])
            layer = layer_type(self.heads, self.ffn, 0.0, self.dtype, cross_first=True, name=f"layer_{i}")
            queries = layer(queries, position, keys[at], values[at], open_, train)
            normed.append(norm(queries))
            embedded.append(embed(normed[-1]))
        first = 0 if deep else -1
        stacked, embeddings = jnp.stack(normed[first:], 1), jnp.stack(embedded[first:], 1)
        return Mask2FormerOutput(stacked, embeddings, mask_logits(embeddings, pixels), pixels)


class Mask2FormerHead(nn.Module):
    """Pixel decoder and decoder of Mask2Former, for the maps of any backbone.

    Attributes:
      num_queries: N (100; FC-CLIP: 250).
      width: D, channels of all maps and queries, a multiple of 32 and of the heads.
      mask_dim: C, channels of the mask features.
      layers: layers of the decoder.
      heads: attention heads of both decoders.
      ffn: channels inside the decoder's MLPs.
      encoder_layers: layers of the pixel decoder.
      encoder_ffn: channels inside its MLPs.
      encoder_points: its points of each head and level.
      remat: what the backward pass recomputes in each layer, see `rematerialise`.
      dtype: compute type of the decoder; the pixel decoder is float32, as in the authors' code.
    """

    num_queries: int = 100
    width: int = 256
    mask_dim: int = 256
    layers: int = 9
    heads: int = 8
    ffn: int = 2048
    encoder_layers: int = 6
    encoder_ffn: int = 1024
    encoder_points: int = 4
    remat: str = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        features: Mapping[str, Float[Array, "b _h _w _c"]],
        image_size: Int[Array, "b 2"],
        train: bool = False,
        deep: bool = False,
    ) -> Mask2FormerOutput:
        """Predicts masks from a backbone's maps; for the arguments see both decoders."""
        pixel_decoder = DeformablePixelDecoder(
            self.width,
            self.mask_dim,
            self.encoder_layers,
            self.heads,
            self.encoder_points,
            self.encoder_ffn,
            remat=self.remat,
            name="pixel_decoder",
        )
        decoder = MaskedDecoder(
            self.num_queries,
            self.width,
            self.mask_dim,
            self.layers,
            self.heads,
            self.ffn,
            self.remat,
            self.dtype,
            name="decoder",
        )
        return decoder(pixel_decoder(features, image_size), image_size, train, deep)


class Mask2FormerNet(nn.Module):
    """Mask2Former's network without its classifier.

    Padding of the canvas has no influence on the head.

    Attributes:
      backbone: a module that maps [B S S 3] to {"c2": ..., "c5": ...}.
      mean: of the backbone's pixels in [0, 1].
      std: of the same.
      head: everything behind the backbone.
      deep_supervision: whether training returns all predictions.
      dtype: compute type of the image.
    """

    backbone: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    head: Mask2FormerHead
    deep_supervision: bool = True
    dtype: Any = jnp.float32

    def __call__(
        self, image: UInt8[Array, "b s t 3"], image_size: Int[Array, "b 2"], train: bool = False
    ) -> Mask2FormerOutput:
        """Encodes images that fill `image_size` (height, width) of their canvas.

        Raises:
          UserError: the sizes of the head do not fit each other, see `DeformablePixelDecoder`.
        """
        if self.head.layers < 1:
            raise UserError(f"Mask2Former: layers={self.head.layers} must be at least 1")
        x = normalise(image, image_size, self.mean, self.std, jnp.dtype(self.dtype))
        features = {k: v for k, v in self.backbone(x, train=train).items() if k in LEVELS}
        return self.head(features, image_size, train, self.deep_supervision and train)

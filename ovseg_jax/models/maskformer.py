"""MaskFormer (Cheng et al. 2021): a backbone, an FPN pixel decoder, DETR's decoder, and a mask for each query.

The network predicts masks alone; `MaskFormer` adds class logits. P-Seg uses the masks without classes (papers/002).
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from ovseg_jax.errors import UserError
from ovseg_jax.kernels.unit import unit
from ovseg_jax.models.norm import GroupNorm
from ovseg_jax.models.openseg import LEVELS, inside, normalise
from ovseg_jax.models.remat import rematerialise
from ovseg_jax.models.transformer import Attention, Style

# Uniform with the variance 1 / fan-in, and Xavier's, as in the authors' code; of PyTorch's linear layers, a third.
conv_init = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")
linear_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
xavier_init = nn.initializers.xavier_uniform()

_DETR = Style("", "", ("", ""), ("", ""), xavier_init)  # its layers name their parts themselves


class MaskFormerOutput(NamedTuple):
    """The outputs of the network, for L decoder layers: all with deep supervision, otherwise the last one.

    Attributes:
      queries: [B L N D], normalised outputs of the decoder; the last layer is the last entry.
      mask_logits: [B L N h w] at stride 4.
      pixels: [B h w C], the mask features.
    """

    queries: Float[Array, "b l n d"]
    mask_logits: Float[Array, "b l n h w"]
    pixels: Float[Array, "b h w c"]


def cells_inside(image_size: Int[Array, "b 2"], shape: tuple[int, ...], level: str) -> Bool[Array, "b h w"]:
    """Tells which cells of a backbone's map `level` ("c2" has the stride 4) begin within each image."""
    stride = float(2 ** int(level[1:]))
    return inside(image_size, shape, (stride, stride))


def sine_positions(valid: Bool[Array, "b h w"], channels: int) -> Float[Array, "b h w c"]:
    """Computes DETR's normalised sine embedding: rows in the first half of the channels, then columns.

    Rows and columns of an image's valid cells, counted from 1, are scaled to (0, 2π]; wavelengths have the base 10,000.

    Args:
      valid: the cells of each image: a rectangle at the top left.
      channels: a multiple of 4.
    """
    half = channels // 2
    wavelength = 10_000 ** (2 * (np.arange(half) // 2) / half)

    def axis(length: int, count: Array) -> Array:
        place = jnp.arange(1, length + 1) / (jnp.maximum(count, 1)[:, None] + 1e-6) * (2 * np.pi)
        angle = place[..., None] / wavelength
        return jnp.where(np.arange(half) % 2 == 0, jnp.sin(angle), jnp.cos(angle))

    b, h, w = valid.shape
    rows = axis(h, valid.any(2).sum(1))[:, :, None]
    columns = axis(w, valid.any(1).sum(1))[:, None]
    shape = (b, h, w, half)
    return jnp.concatenate([jnp.broadcast_to(rows, shape), jnp.broadcast_to(columns, shape)], -1)


class PixelDecoder(nn.Module):
    """An FPN, MaskFormer's pixel decoder without a transformer: from the coarsest map, add a finer one and convolve.

    Cells outside of the images are zero for the convolutions and do not count for the norms.

    Attributes:
      width: channels of all levels, a multiple of `groups`.
      mask_dim: channels of the mask features.
      groups: of the group norms.
      dtype: compute type.
    """

    width: int = 256
    mask_dim: int = 256
    groups: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, features: Mapping[str, Float[Array, "b _h _w _c"]], image_size: Int[Array, "b 2"]
    ) -> Float[Array, "b h w c"]:
        """Computes the mask features from a backbone's maps, "c2" to "c5"; coarse ones may be absent."""

        def conv(channels: int, size: int, name: str, bias: bool = False) -> nn.Conv:
            return nn.Conv(
                channels, (size, size), use_bias=bias, dtype=self.dtype, kernel_init=conv_init, name=name
            )

        def norm(name: str) -> GroupNorm:
            return GroupNorm(self.groups, epsilon=1e-5, dtype=self.dtype, name=name)

        x: Array | None = None
        for level in sorted(features, reverse=True):
            finer = features[level].astype(self.dtype)
            valid = cells_inside(image_size, finer.shape[1:3], level)
            if x is not None:
                finer = norm(f"lateral_norm_{level}")(conv(self.width, 1, f"lateral_{level}")(finer), valid)
                # Nearest: a map of ceil(n / 2) cells belongs to one of n.
                finer = finer + x.repeat(2, 1).repeat(2, 2)[:, : finer.shape[1], : finer.shape[2]]
            x = conv(self.width, 3, f"output_{level}")(jnp.where(valid[..., None], finer, 0))
            x = nn.relu(norm(f"output_norm_{level}")(x, valid))
        assert x is not None
        return conv(self.mask_dim, 3, "mask_features", bias=True)(jnp.where(valid[..., None], x, 0))


class DecoderLayer(nn.Module):
    """A post-norm layer of DETR's decoder (Carion et al. 2020): self-attention, cross-attention, MLP.

    Mask2Former's begins with the cross-attention.

    Attributes:
      heads: attention heads; divides the width.
      ffn: channels inside the MLP.
      dropout: rate after each branch and inside the MLP. The authors' code also drops attention weights.
      dtype: compute type.
      cross_first: whether the cross-attention precedes the self-attention.
    """

    heads: int
    ffn: int
    dropout: float
    dtype: Any = jnp.float32
    cross_first: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n d"],
        position: Float[Array, "b n d"],
        keys: Float[Array, "b p d"],
        values: Float[Array, "b p d"],
        valid: Bool[Array, "b p"] | Bool[Array, "b n p"],
        train: bool,
    ) -> Float[Array, "b n d"]:
        """Maps queries to queries.

        Args:
          x: the queries.
          position: added to queries, and to keys of the self-attention.
          keys: the image's features with their positions.
          values: the image's features.
          valid: False outside of the image, or for each query where it does not attend.
          train: whether dropout is on (needs the rng `dropout`).
        """

        def drop(y: Array) -> Array:
            return nn.Dropout(self.dropout, deterministic=not train)(y) if self.dropout else y

        def add(x: Array, y: Array, name: str) -> Array:
            return nn.LayerNorm(1e-5, dtype=self.dtype, name=name)(x + drop(y))

        def attention(name: str) -> Attention:
            return Attention(self.heads, _DETR, dtype=self.dtype, name=name)

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, dtype=self.dtype, kernel_init=xavier_init, name=name)

        def to_queries(x: Array) -> Array:
            placed = x + position
            return add(x, attention("self_attention")(placed, x, keys=placed), "self_norm")

        def to_image(x: Array) -> Array:
            return add(x, attention("cross_attention")(x + position, values, valid, keys=keys), "cross_norm")

        x = to_queries(to_image(x)) if self.cross_first else to_image(to_queries(x))
        return add(x, dense(x.shape[-1], "mlp_out")(drop(nn.relu(dense(self.ffn, "mlp_in")(x)))), "mlp_norm")


def mask_embedder(width: int, mask_dim: int, dtype: Any) -> Callable[[Array], Array]:
    """Creates the MLP from queries to mask embeddings, as layers of the calling module."""
    dense = partial(nn.Dense, dtype=dtype, kernel_init=linear_init)
    layers = [dense((width, width, mask_dim)[i], name=f"mask_mlp_{i}") for i in range(3)]
    return lambda x: layers[2](nn.relu(layers[1](nn.relu(layers[0](x)))))


def mask_logits(
    embeddings: Float[Array, "b l n c"], pixels: Float[Array, "b h w c"]
) -> Float[Array, "b l n h w"]:
    """Computes the logits of masks, the products of their embeddings with the mask features, in float32."""
    return jnp.einsum("blnc,bhwc->blnhw", embeddings, pixels, preferred_element_type=jnp.float32)


class MaskFormerNet(nn.Module):
    """MaskFormer's network without its classifier (Cheng et al. 2021, 3.3 and 4.1; P-Seg, papers/002, 3.2).

    Padding of the canvas has no influence on pixel decoder, decoder and masks.

    Attributes:
      backbone: a module that maps [B S S 3] to {"c2": ..., "c5": ...}.
      mean: of the backbone's pixels in [0, 1].
      std: of the same.
      num_queries: N (100; P-Seg: 64).
      width: D, channels of pyramid and decoder, a multiple of 32.
      mask_dim: C, channels of the mask features.
      layers: layers of the decoder.
      heads: attention heads.
      ffn: channels inside the decoder's MLPs.
      dropout: rate in the decoder.
      deep_supervision: whether all layers are returned.
      remat: what the backward pass recomputes in pyramid and decoder, see `rematerialise`.
      dtype: compute type; mask logits are float32.
    """

    backbone: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_queries: int = 100
    width: int = 256
    mask_dim: int = 256
    layers: int = 6
    heads: int = 8
    ffn: int = 2048
    dropout: float = 0.1
    deep_supervision: bool = False
    remat: str = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, image: UInt8[Array, "b s t 3"], image_size: Int[Array, "b 2"], train: bool = False
    ) -> MaskFormerOutput:
        """Encodes images that fill `image_size` (height, width) of their canvas.

        Raises:
          UserError: the width is not a multiple of 32 and of the heads, or there is no layer.
        """
        if self.width % 32 or self.width % self.heads or self.layers < 1:
            raise UserError(
                f"MaskFormer: width={self.width} must be a multiple of 32 and of heads={self.heads}, and "
                f"layers={self.layers} at least 1"
            )
        x = normalise(image, image_size, self.mean, self.std, jnp.dtype(self.dtype))
        features = {k: v for k, v in self.backbone(x, train=train).items() if k in LEVELS}
        decoder = rematerialise(PixelDecoder, self.remat)(
            self.width, self.mask_dim, dtype=self.dtype, name="pixel_decoder"
        )
        pixels = decoder(features, image_size)
        top = max(features)
        b, h, w, _ = features[top].shape
        valid = cells_inside(image_size, (h, w), top)
        values = nn.Dense(self.width, dtype=self.dtype, kernel_init=conv_init, name="input_projection")(
            features[top].reshape(b, h * w, -1)
        )
        keys = values + sine_positions(valid, self.width).reshape(b, h * w, -1).astype(self.dtype)
        init = self.param("queries", nn.initializers.normal(1.0), (self.num_queries, self.width))
        position = jnp.broadcast_to(init.astype(self.dtype), (b, *init.shape))
        layer_type = rematerialise(DecoderLayer, self.remat, static_argnums=(6,))
        norm = nn.LayerNorm(1e-5, dtype=self.dtype, name="decoder_norm")
        queries, outputs = jnp.zeros_like(position), []
        for i in range(self.layers):
            layer = layer_type(self.heads, self.ffn, self.dropout, self.dtype, name=f"layer_{i}")
            queries = layer(queries, position, keys, values, valid.reshape(b, h * w), train)
            if self.deep_supervision or i == self.layers - 1:
                outputs.append(norm(queries))
        stacked = jnp.stack(outputs, 1)
        embeddings = mask_embedder(self.width, self.mask_dim, self.dtype)(stacked)
        return MaskFormerOutput(stacked, mask_logits(embeddings, pixels), pixels)


class QueryClassifier(nn.Module):
    """A linear classifier of queries into K classes, and "no object" as the last one; logits are float32."""

    classes: int

    @nn.compact
    def __call__(self, queries: Float[Array, "b l n d"]) -> Float[Array, "b l n k"]:
        """Returns logits of the K + 1 classes."""
        return nn.Dense(self.classes + 1, kernel_init=linear_init, name="dense")(queries.astype(jnp.float32))


class QueryEmbedding(nn.Module):
    """Unit embeddings of queries in a text space, by an MLP of two layers, and of "no object" (ZSSeg, Xu et al. 2021).

    Attributes:
      dim: D of the text space (512, CLIP's).
      hidden: channels inside of the MLP (1024).
    """

    dim: int = 512
    hidden: int = 1024

    @nn.compact
    def __call__(
        self, queries: Float[Array, "b l n c"]
    ) -> tuple[Float[Array, "b l n d"], Float[Array, " d"]]:
        """Returns the embeddings, and the learned vector of "no object"."""
        dense = partial(nn.Dense, kernel_init=linear_init)
        x = nn.relu(dense(self.hidden, name="embed_0")(queries.astype(jnp.float32)))
        void = self.param("void", nn.initializers.normal(self.dim**-0.5), (self.dim,))
        return unit(dense(self.dim, name="embed_1")(x)), unit(void)


class MaskFormer(nn.Module):
    """The whole MaskFormer, in the arrangement of published weights: the network and its classifier."""

    net: Any  # a MaskFormerNet, or a Mask2FormerNet
    classifier: QueryClassifier | QueryEmbedding

    def __call__(
        self, image: UInt8[Array, "b s t 3"], image_size: Int[Array, "b 2"], train: bool = False
    ) -> tuple[Any, Any]:
        """Returns the network's outputs and those of the classifier for its queries."""
        out = self.net(image, image_size, train)
        return out, self.classifier(out.queries)

"""Mask2Former's pixel decoder: multi-scale deformable attention (Zhu et al. 2020, 4.1) and one level of an FPN.

Attention is gathers and sums of plain XLA, without a custom operator, and is differentiable in all inputs.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ovseg_jax.errors import UserError
from ovseg_jax.kernels.bilinear import corners, take
from ovseg_jax.kernels.resize import resize_within
from ovseg_jax.models.maskformer import cells_inside, conv_init, sine_positions, xavier_init
from ovseg_jax.models.norm import GroupNorm
from ovseg_jax.models.remat import rematerialise

Shape = tuple[int, int]


class PixelFeatures(NamedTuple):
    """The outputs of the pixel decoder.

    Attributes:
      pixels: [B h w C], the mask features, at the stride of the backbone's finest map.
      maps: {"c3": [B h w D], "c4": ..., "c5": ...}, the maps that a decoder attends to.
    """

    pixels: Float[Array, "b h w c"]
    maps: dict[str, Float[Array, "b _h _w d"]]


def cell_counts(image_size: Int[Array, "b 2"], shape: tuple[int, ...], level: str) -> Int[Array, "b 2"]:
    """Counts the rows and columns of a backbone's map that begin within each image, see `cells_inside`."""
    stride = 2 ** int(level[1:])
    return jnp.minimum(-(-image_size // stride), jnp.array(shape))


def deformable(
    values: Float[Array, "b s h d"],
    places: Float[Array, "b q h l k 2"],
    weights: Float[Array, "b q h l k"],
    shapes: Sequence[Shape],
    counts: Int[Array, "b l 2"],
) -> Float[Array, "b q hd"]:
    """Sums values at places, bilinearly sampled, by their weights: multi-scale deformable attention.

    Args:
      values: the cells of all levels, one level after the other, in reading order, with H heads.
      places: K points of each query, head and level, as (x, y) in cells; the centre of the first cell is (0, 0).
      weights: the weight of each point.
      shapes: rows and columns of each level.
      counts: rows and columns of the image's cells in each level; those outside count as zero.

    Returns:
      The sums, with the heads side by side.
    """
    b, _, heads, d = values.shape
    numbers, shares, start = [], [], 0
    for level, (rows, columns) in enumerate(shapes):
        count = counts[:, level, ::-1][:, None, None, None]
        number, share = corners(places[..., level, :, :], count, columns)
        numbers.append(number + start)
        shares.append(share * weights[..., level, :, None])
        start += rows * columns
    by_point = lambda x: jnp.concatenate(x, 3).transpose(3, 0, 2, 1, 4)  # [l*k b h q 4]
    own = jnp.swapaxes(values, 1, 2)

    # One point at a time: the values of all together are many times the inputs, forward and backward.
    @jax.checkpoint
    def add(total: Array, point: tuple[Array, Array]) -> tuple[Array, None]:
        number, share = point
        for i in range(4):
            total = total + take(own, number[..., i]) * share[..., i, None]
        return total, None

    zeros = jnp.zeros((b, heads, places.shape[1], d))
    total, _ = jax.lax.scan(add, zeros, (by_point(numbers), by_point(shares)))
    return jnp.swapaxes(total, 1, 2).reshape(b, -1, heads * d).astype(values.dtype)


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention with its parameters (Zhu et al. 2020, eq. 3).

    Attributes:
      heads: attention heads; divides the width.
      points: K sampled points of each head and level.
      dtype: compute type.
    """

    heads: int
    points: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        queries: Float[Array, "b q d"],
        values: Float[Array, "b s d"],
        reference: Float[Array, "b q 2"],
        shapes: Sequence[Shape],
        counts: Int[Array, "b l 2"],
    ) -> Float[Array, "b q d"]:
        """Attends from each query to points around its own place in all levels.

        Args:
          queries: one for each place.
          values: see `deformable`.
          reference: (x, y) of each query, as shares of the image's width and height.
          shapes: see `deformable`.
          counts: see `deformable`.
        """
        b, q, width = queries.shape
        split = (b, q, self.heads, len(shapes), self.points)

        def dense(features: int, name: str, **options: Any) -> nn.Dense:
            return nn.Dense(features, dtype=self.dtype, name=name, **{"kernel_init": xavier_init, **options})

        count, zeros = math.prod(split[2:]), nn.initializers.zeros
        offsets = dense(2 * count, "offsets", kernel_init=zeros, bias_init=self._directions)(queries)
        weights = dense(count, "weights", kernel_init=zeros)(queries).astype(jnp.float32)
        weights = jax.nn.softmax(weights.reshape(b, q, self.heads, -1)).reshape(split)
        own = reference[:, :, None] * counts[:, None, :, ::-1]  # [b q l 2]
        places = own[:, :, None, :, None] - 0.5 + offsets.reshape(*split, 2).astype(jnp.float32)
        heads = dense(width, "value")(values).reshape(b, -1, self.heads, width // self.heads)
        return dense(width, "out")(deformable(heads, places, weights, shapes, counts))

    def _directions(self, key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        """Returns the initial offsets: head h has direction 2π h / heads, point k is on ring k + 1 (authors' code)."""
        del key
        angle = np.arange(self.heads) * (2 * np.pi / self.heads)
        direction = np.stack([np.cos(angle), np.sin(angle)], -1)
        direction = direction / np.abs(direction).max(-1, keepdims=True)
        ring = np.arange(1, self.points + 1)
        levels = shape[0] // (2 * self.heads * self.points)
        grid = np.broadcast_to(direction[:, None, None] * ring[:, None], (self.heads, levels, self.points, 2))
        return jnp.asarray(grid.reshape(shape), dtype)


class DeformableLayer(nn.Module):
    """A post-norm layer of the encoder: deformable self-attention and an MLP."""

    heads: int
    points: int
    ffn: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b s d"],
        position: Float[Array, "b s d"],
        reference: Float[Array, "b s 2"],
        shapes: Sequence[Shape],
        counts: Int[Array, "b l 2"],
    ) -> Float[Array, "b s d"]:
        """Maps the cells of all levels; for the arguments see `DeformableAttention`."""

        def add(y: Array, name: str) -> Array:
            return nn.LayerNorm(1e-5, dtype=self.dtype, name=name)(x + y)

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, dtype=self.dtype, kernel_init=xavier_init, name=name)

        attention = DeformableAttention(self.heads, self.points, self.dtype, name="attention")
        x = add(attention(x + position, x, reference, shapes, counts), "attention_norm")
        return add(dense(x.shape[-1], "mlp_out")(nn.relu(dense(self.ffn, "mlp_in")(x))), "mlp_norm")


class DeformablePixelDecoder(nn.Module):
    """Mask2Former's pixel decoder (Cheng et al. 2022, 3.2.2 and 4.1).

    The coarse maps, all but the finest, are projected and attend to each other; the finest, by one level of an FPN,
    gives the mask features. Cells outside of the images have no influence.

    Attributes:
      width: D, channels of all levels, a multiple of `groups` and of `heads`.
      mask_dim: C, channels of the mask features.
      layers: layers of the encoder.
      heads: its attention heads.
      points: points of each head and level.
      ffn: channels inside its MLPs.
      groups: of the group norms.
      remat: what the backward pass recomputes in each layer of the encoder, see `rematerialise`.
      dtype: compute type; float32 in the authors' code, whatever the type of the other parts.
    """

    width: int = 256
    mask_dim: int = 256
    layers: int = 6
    heads: int = 8
    points: int = 4
    ffn: int = 1024
    groups: int = 32
    remat: str = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, features: Mapping[str, Float[Array, "b _h _w _c"]], image_size: Int[Array, "b 2"]
    ) -> PixelFeatures:
        """Maps a backbone's maps, keyed "c2" to "c5"; coarse ones may be absent.

        Raises:
          UserError: there are fewer than two maps, or the width is no multiple of groups and heads.
        """
        if len(features) < 2:
            raise UserError("Mask2Former's pixel decoder needs a backbone with at least two maps")
        if self.width % self.groups or self.width % self.heads:
            raise UserError(
                f"Mask2Former: width={self.width} must be a multiple of {self.groups} and of heads={self.heads}"
            )

        def conv(channels: int, size: int, name: str, bias: bool = True, init: Any = conv_init) -> nn.Conv:
            return nn.Conv(
                channels, (size, size), use_bias=bias, dtype=self.dtype, kernel_init=init, name=name
            )

        def norm(name: str) -> GroupNorm:
            return GroupNorm(self.groups, epsilon=1e-5, dtype=self.dtype, name=name)

        finest, *coarse = sorted(features)
        levels = coarse[::-1]
        shapes: list[Shape] = [features[level].shape[1:3] for level in levels]  # type: ignore[misc]
        counts = [cell_counts(image_size, *item) for item in zip(shapes, levels, strict=True)]
        embedding = self.param("level_embedding", nn.initializers.normal(1.0), (len(levels), self.width))
        tokens, positions, places = [], [], []
        for i, level in enumerate(levels):
            x, valid = features[level].astype(self.dtype), cells_inside(image_size, shapes[i], level)
            x = conv(self.width, 1, f"input_{level}", init=xavier_init)(x)
            tokens.append(norm(f"input_norm_{level}")(x, valid))
            positions.append(sine_positions(valid, self.width) + embedding[i])
            grid = jnp.stack(jnp.meshgrid(*map(jnp.arange, shapes[i][::-1])), -1)  # [h w 2], (x, y)
            places.append((grid + 0.5) / jnp.maximum(counts[i][:, None, None, ::-1], 1))
        flat = lambda maps: jnp.concatenate([m.reshape(m.shape[0], -1, m.shape[-1]) for m in maps], 1)
        x, position = flat(tokens), flat(positions).astype(self.dtype)
        layer_type = rematerialise(DeformableLayer, self.remat, static_argnums=(4,))
        for i in range(self.layers):
            layer = layer_type(self.heads, self.points, self.ffn, self.dtype, name=f"layer_{i}")
            x = layer(x, position, flat(places), tuple(shapes), jnp.stack(counts, 1))
        maps, start = {}, 0
        for level, (h, w) in zip(levels, shapes, strict=True):
            maps[level] = x[:, start : start + h * w].reshape(x.shape[0], h, w, self.width)
            start += h * w
        y = features[finest].astype(self.dtype)
        shape, valid = y.shape[1:3], cells_inside(image_size, y.shape[1:3], finest)
        y = norm(f"lateral_norm_{finest}")(conv(self.width, 1, f"lateral_{finest}", bias=False)(y), valid)
        count = cell_counts(image_size, shape, finest)
        y = y + resize_within(maps[levels[-1]], shape, counts[-1], count)  # type: ignore[arg-type]
        y = conv(self.width, 3, f"output_{finest}", bias=False)(jnp.where(valid[..., None], y, 0))
        y = nn.relu(norm(f"output_norm_{finest}")(y, valid))
        return PixelFeatures(conv(self.mask_dim, 1, "mask_features")(y), maps)

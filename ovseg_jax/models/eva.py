"""Image towers of EVA-CLIP (Sun et al. 2023): EVA-01-CLIP g/14 (Fang et al. 2022) and EVA-02-CLIP (Fang et al. 2023).

A Vision Transformer with a class token and a table of positions. EVA-02 B and L add to it a rotary embedding in two
dimensions, a SwiGLU MLP, and a norm inside attention and MLP; E normalises the result of each branch (residual
post-norm) where the others normalise its input. Queries and values have biases, keys have none.

Parameters: `embedding`, `cls`, `pos_embedding` [1 1+grid*grid c] with the class token's row first, `blocks_{i}` with
`norm1`, `attn/{query,key,value,inner_norm,out}`, `norm2`, `mlp/{gate,fc1,norm,fc2}`, then `norm` and `head`.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ovseg_jax.errors import UserError
from ovseg_jax.models.positions import resize_positions
from ovseg_jax.models.remat import rematerialise
from ovseg_jax.models.tower import TowerOutput

# Cosines and sines for each token and channel of a head, see `rotary_table`.
Rotary = Float[Array, "2 n d"]

_EVA02 = dict(rope_grid=16, swiglu=True, attn_norm=True, mlp_norm=True)
_B = dict(_EVA02, width=768, depth=12, heads=12, hidden=2048, embed_dim=512)
_L = dict(_EVA02, width=1024, depth=24, heads=16, hidden=2730, embed_dim=768)
_E = dict(width=1792, depth=64, heads=16, hidden=15360, embed_dim=1024, post_norm=True)
_G = dict(width=1408, depth=40, heads=16, hidden=6144, embed_dim=1024)

# As published with the weights (shapes and options: open_clip, timm).
PRESETS: dict[str, dict[str, Any]] = {
    "eva02_clip_b16": dict(_B, patch=16, grid=14),
    "eva02_clip_l14": dict(_L, patch=14, grid=16),
    "eva02_clip_l14_336": dict(_L, patch=14, grid=24),
    "eva02_clip_e14": dict(_E, patch=14, grid=16),
    "eva01_clip_g14": dict(_G, patch=14, grid=16),
}

# As published; there, deeper layers and the head start smaller still, which is left out.
dense_init = nn.initializers.truncated_normal(0.02)


def rotary_table(rows: int, columns: int, grid: int, size: int) -> Rotary:
    """Cosines and sines of the angles by which `rotate` turns each pair of a head's channels (Su et al. 2021).

    The first half of the pairs turns with the row, the other with the column, at rates 10000^(-4 i / size). Positions
    run from 0 to `grid` on both sides, whatever the image's size: EVA-02 keeps the range that it was pretrained on. The
    class token, the first row, is not turned.

    Args:
      rows: of patches.
      columns: of patches.
      grid: rows and columns of patches in pretraining.
      size: channels of a head, a multiple of 4.
    """
    rates = 10000.0 ** (-jnp.arange(size // 4, dtype=jnp.float32) / (size // 4))
    y = jnp.arange(rows, dtype=jnp.float32)[:, None, None] * (grid / rows) * rates
    x = jnp.arange(columns, dtype=jnp.float32)[None, :, None] * (grid / columns) * rates
    shape = (rows, columns, size // 4)
    angles = jnp.concatenate([jnp.broadcast_to(y, shape), jnp.broadcast_to(x, shape)], axis=-1)
    angles = jnp.repeat(angles.reshape(rows * columns, size // 2), 2, axis=-1)
    angles = jnp.pad(angles, ((1, 0), (0, 0)))
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)])


def rotate(x: Float[Array, "b n h d"], table: Rotary) -> Float[Array, "b n h d"]:
    """Turns each pair of neighbouring channels of each token by its angle, in float32."""
    cos, sin = table[:, :, None]
    y = x.astype(jnp.float32)
    # Neighbours by shifts: with an axis of pairs, attention compiled for a TPU v4 moves 29% more bytes.
    first = jnp.arange(x.shape[-1]) % 2 == 0
    turned = y * cos + jnp.where(first, -jnp.roll(y, -1, axis=-1), jnp.roll(y, 1, axis=-1)) * sin
    return turned.astype(x.dtype)


def _layer_norm(dtype: Any, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-6, dtype=dtype, name=name)


def _dense(features: int, dtype: Any, name: str) -> nn.Dense:
    return nn.Dense(features, dtype=dtype, kernel_init=dense_init, name=name)


class Attention(nn.Module):
    """Attention among all tokens.

    Attributes:
      heads: number of heads; divides the channels.
      inner_norm: whether the heads' joined result is normalised before the projection (sub-LN).
      dtype: compute type; the softmax is in float32.
    """

    heads: int
    inner_norm: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"], rotary: Rotary | None) -> Float[Array, "b n c"]:
        """Mixes tokens; `rotary` is a `rotary_table` for queries and keys."""
        split = (self.heads, x.shape[-1] // self.heads)
        project = functools.partial(nn.DenseGeneral, dtype=self.dtype, kernel_init=dense_init)
        query = project(split, name="query")(x)
        key = project(split, use_bias=False, name="key")(x)
        value = project(split, name="value")(x)
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        mixed = jax.nn.dot_product_attention(query, key, value)
        if self.inner_norm:
            mixed = _layer_norm(self.dtype, "inner_norm")(mixed.reshape(x.shape)).reshape(mixed.shape)
        return project(x.shape[-1], axis=(-2, -1), name="out")(mixed)


class Mlp(nn.Module):
    """fc2(norm(gelu(fc1(x)))), or fc2(norm(silu(gate(x)) * fc1(x))) (SwiGLU, Shazeer 2020).

    Attributes:
      hidden: channels inside.
      swiglu: which of the two.
      norm: whether the hidden channels are normalised (sub-LN).
      dtype: compute type.
    """

    hidden: int
    swiglu: bool
    norm: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        """Maps each token."""
        y = _dense(self.hidden, self.dtype, "fc1")(x)
        if self.swiglu:
            y = nn.silu(_dense(self.hidden, self.dtype, "gate")(x)) * y
        else:
            y = nn.gelu(y, approximate=False)
        if self.norm:
            y = _layer_norm(self.dtype, "norm")(y)
        return _dense(x.shape[-1], self.dtype, "fc2")(y)


class Block(nn.Module):
    """x + branch(norm(x)) for attention, then for the MLP; x + norm(branch(x)) with `post_norm`.

    The other attributes are those of `Eva`.
    """

    heads: int
    hidden: int
    swiglu: bool
    attn_norm: bool
    mlp_norm: bool
    post_norm: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"], rotary: Rotary | None) -> Float[Array, "b n c"]:
        """Maps all tokens; `rotary` is a `rotary_table`, or None where the model has none."""
        norm1, norm2 = _layer_norm(self.dtype, "norm1"), _layer_norm(self.dtype, "norm2")
        attn = Attention(self.heads, self.attn_norm, self.dtype, name="attn")
        mlp = Mlp(self.hidden, self.swiglu, self.mlp_norm, self.dtype, name="mlp")
        if self.post_norm:
            x = x + norm1(attn(x, rotary))
            return x + norm2(mlp(x))
        x = x + attn(norm1(x), rotary)
        return x + mlp(norm2(x))


class Eva(nn.Module):
    """An image tower of EVA-CLIP for images of any size; the published shapes are `PRESETS`.

    Attributes:
      patch: side of a patch, in pixels.
      grid: rows and columns of the table of positions: the size in pretraining. Other sizes interpolate it.
      width: channels of a token; a multiple of 4 `heads`.
      depth: blocks.
      heads: of attention.
      hidden: channels inside the MLP.
      embed_dim: channels of the embedding that images and texts share.
      rope_grid: rows and columns that rotary positions are stretched to (16 when published, whatever `grid` is);
        None for a model without a rotary embedding.
      swiglu: SwiGLU in place of GELU in the MLP.
      attn_norm: a norm inside attention (sub-LN).
      mlp_norm: a norm inside the MLP (sub-LN).
      post_norm: whether branches are normalised at their end.
      taps: numbers of the blocks, from 0, whose patch tokens are given back.
      remat: what the backward pass computes again of each block, see `rematerialise`.
      dtype: compute type; parameters are float32.
    """

    patch: int = 16
    grid: int = 14
    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    embed_dim: int = 512
    rope_grid: int | None = None
    swiglu: bool = False
    attn_norm: bool = False
    mlp_norm: bool = False
    post_norm: bool = False
    taps: tuple[int, ...] = ()
    remat: str = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b height width 3"], train: bool = False) -> TowerOutput:
        """Embeds images.

        Args:
          x: normalised images; sides are multiples of `patch`.
          train: changes nothing: the model has neither dropout nor statistics.

        Returns:
          `pooled` [b embed_dim], the head's projection of the class token behind the final norm, not normalised to
          length 1; `tokens` [b height/patch width/patch width] behind the final norm; `taps` before it.

        Raises:
          UserError: an image's side that is no multiple of the patch, a width that is none of 4 `heads`, or a tap that
            the tower does not have.
        """
        b, height, width, _ = x.shape
        if height % self.patch or width % self.patch:
            raise UserError(
                f"an image of {height} x {width} pixels: EVA's sides are multiples of its patch, {self.patch}"
            )
        if self.width % (4 * self.heads):
            raise UserError(f"EVA's width {self.width} is no multiple of 4 times its {self.heads} heads")
        if unknown := [i for i in self.taps if i not in range(self.depth)]:
            raise UserError(f"EVA has blocks 0 to {self.depth - 1}; taps ask for {unknown}")
        rows, columns = height // self.patch, width // self.patch
        side = (self.patch, self.patch)
        embed = nn.Conv(
            self.width, side, side, "VALID", dtype=self.dtype, kernel_init=dense_init, name="embedding"
        )
        x = embed(x.astype(self.dtype)).reshape(b, rows * columns, self.width)

        cls = self.param("cls", dense_init, (1, 1, self.width))
        positions = self.param("pos_embedding", dense_init, (1, 1 + self.grid**2, self.width))
        x = jnp.concatenate([jnp.broadcast_to(cls, (b, 1, self.width)).astype(self.dtype), x], axis=1)
        patches = positions[0, 1:].reshape(self.grid, self.grid, self.width)
        patches = resize_positions(patches, (rows, columns)).reshape(1, rows * columns, self.width)
        x = x + jnp.concatenate([positions[:, :1], patches], axis=1).astype(self.dtype)

        rotary = None
        if self.rope_grid is not None:
            rotary = rotary_table(rows, columns, self.rope_grid, self.width // self.heads)
        block_type = rematerialise(Block, self.remat)
        taps = {}
        for i in range(self.depth):
            block = block_type(
                heads=self.heads,
                hidden=self.hidden,
                swiglu=self.swiglu,
                attn_norm=self.attn_norm,
                mlp_norm=self.mlp_norm,
                post_norm=self.post_norm,
                dtype=self.dtype,
                name=f"blocks_{i}",
            )
            x = block(x, rotary)
            if i in self.taps:
                taps[i] = x[:, 1:].reshape(b, rows, columns, self.width)
        x = _layer_norm(self.dtype, "norm")(x)
        pooled = _dense(self.embed_dim, self.dtype, "head")(x[:, 0])
        return TowerOutput(pooled, x[:, 1:].reshape(b, rows, columns, self.width), taps)

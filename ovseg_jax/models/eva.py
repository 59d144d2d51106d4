"""Image towers of EVA-CLIP (Sun et al. 2023): EVA-01-CLIP g/14 (Fang et al. 2022) and EVA-02-CLIP (Fang et al. 2023).

A Vision Transformer with a class token and a table of positions. EVA-02 B and L add to it a rotary embedding in two
dimensions, a SwiGLU MLP, and a norm inside attention and MLP; E normalises the result of each branch (residual
post-norm) where the others normalise its input. Queries and values have biases, keys have none.

Parameters: `embedding`, `cls`, `pos_embedding` [1 1+grid*grid c] with the class token's row first, `blocks_{i}` with
`norm1`, `attn/{query,key,value,inner_norm,out}`, `norm2`, `mlp/{gate,fc1,norm,fc2}`, then `norm` and `head`.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ovseg_jax.errors import UserError
from ovseg_jax.models.positions import resize_positions
from ovseg_jax.models.remat import rematerialise
from ovseg_jax.models.tower import TowerOutput, visible
from ovseg_jax.models.transformer import EVA, Adapter, Between, Block, Places, scan_blocks, through_blocks

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

# The published code also scales the initial values of deeper layers and the head down, which is left out.
dense_init = EVA.kernel_init
EPSILON = 1e-6


def rotary_table(rows: int, columns: int, grid: int, size: int) -> Float[Array, "2 n d"]:
    """Returns cosines and sines [2 n d] of the angles by which `rotate` turns channel pairs (Su et al. 2021).

    The first half of the pairs turns with the row, the other with the column, at rates 10000^(-4 i / size). Positions
    run from 0 to `grid` on both sides for any size of the image, since EVA-02 keeps the range of its pretraining. The
    class token, the first row, is not turned.

    Args:
      rows: number of rows of patches.
      columns: number of columns of patches.
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


class Eva(nn.Module):
    """An image tower of EVA-CLIP for images of any size; the published shapes are `PRESETS`.

    Attributes:
      patch: side of a patch, in pixels.
      grid: rows and columns of the table of positions, the size in pretraining; it is interpolated for other sizes.
      width: channels of a token; a multiple of 4 `heads`.
      depth: number of blocks.
      heads: number of attention heads.
      hidden: channels inside the MLP.
      embed_dim: channels of the embedding that images and texts share.
      rope_grid: rows and columns that rotary positions are scaled to (16 in published models, for any `grid`); None for
        a model without rotary embedding.
      swiglu: SwiGLU in place of GELU in the MLP.
      attn_norm: a norm inside attention (sub-LN).
      mlp_norm: a norm inside the MLP (sub-LN).
      post_norm: whether the outputs of branches are normalised instead of their inputs.
      taps: numbers of the blocks, from 0, whose patch tokens are returned.
      adapter, adapter_scale: modules beside the branches of each block, see `transformer.Block`.
      between: a function on the patch tokens between two blocks, see `transformer.Between`.
      last: how patch tokens attend in the last block, see `transformer.Block`. `pooled` is the same for all.
      remat: what the backward pass recomputes in each block, see `rematerialise`.
      scan: the first block of those, up to the last but one, that run as one loop and compile once; `between` must do
        nothing from there on. None, or taps in the loop: no loop.
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
    adapter: Adapter | None = None
    adapter_scale: float = 1.0
    between: Between | None = None
    last: str = ""
    remat: str = "none"
    scan: int | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b height width 3"],
        train: bool = False,
        inside: Bool[Array, "b _r _c"] | None = None,
    ) -> TowerOutput:
        """Embeds images.

        Args:
          x: normalised images; sides are multiples of `patch`.
          train: no effect, since the model has neither dropout nor batch statistics.
          inside: the patches that may be attended to; None means all. Not with `between`.

        Returns:
          `pooled` [b embed_dim], the head's projection of the class token after the final norm, not normalised to
          length 1; `tokens` [b height/patch width/patch width] after the final norm; `taps` before it.

        Raises:
          UserError: a side is not a multiple of the patch, the width is not a multiple of 4 `heads`, or a tap does not
            exist.
        """
        b, height, width, _ = x.shape
        if height % self.patch or width % self.patch:
            raise UserError(
                f"an image of {height} x {width} pixels does not fit EVA, whose sides are multiples of {self.patch}"
            )
        if self.width % (4 * self.heads):
            raise UserError(f"EVA's width {self.width} is not a multiple of 4 times its {self.heads} heads")
        if unknown := [i for i in self.taps if i not in range(self.depth)]:
            raise UserError(f"taps={unknown} do not exist in EVA, which has blocks 0 to {self.depth - 1}")
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
        fields: dict[str, Any] = dict(
            heads=self.heads,
            hidden=self.hidden,
            activation="swiglu" if self.swiglu else "gelu",
            epsilon=EPSILON,
            style=EVA,
            order="post" if self.post_norm else "pre",
            key_bias=False,
            attention_norm=self.attn_norm,
            mlp_norm=self.mlp_norm,
            adapter=self.adapter,
            adapter_scale=self.adapter_scale,
            dtype=self.dtype,
        )
        block_type = rematerialise(Block, self.remat)

        def block(i: int) -> Block:
            last = self.last if i == self.depth - 1 else ""
            return block_type(**fields, last=last, name=f"blocks_{i}")

        def at_once(x: Array, *args: Any) -> Array:
            weights = [self.variables["params"][f"blocks_{i}"] for i in loop]
            dropout = self.make_rng("dropout") if self.has_rng("dropout") else None
            return scan_blocks(Block(**fields, parent=None), self.remat, weights, x, *args, dropout=dropout)

        loop = range(self.depth if self.scan is None else self.scan, self.depth - 1)
        if self.is_initializing() or set(loop) & set(self.taps):
            loop = range(0)
        x, places, tapped = through_blocks(
            block,
            self.depth,
            x,
            Places((rows, columns), 1),
            valid=visible(inside, 1, x.shape[1]),
            rotary=rotary,
            between=self.between,
            taps=self.taps,
            loop=(loop, at_once),
        )
        x = places.unfold(nn.LayerNorm(EPSILON, dtype=self.dtype, name="norm")(x))
        head = nn.Dense(self.embed_dim, dtype=self.dtype, kernel_init=dense_init, name="head")

        def on_grid(tokens: Array) -> Array:
            return tokens[:, 1:].reshape(b, rows, columns, self.width)

        taps = {i: on_grid(p.unfold(tokens)) for i, (tokens, p) in tapped.items()}
        return TowerOutput(head(x[:, 0]), on_grid(x), taps)

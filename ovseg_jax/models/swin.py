"""Swin Transformer (Liu et al. 2021) as a pyramid: attention inside windows that shift from block to block.

Images may have any size: incomplete windows are padded with zeros at the bottom and right, as in the paper's detectors
(after the norm; padding takes part in attention), and odd sides are padded before merging. If one window covers a side
of the map, published models differ, see `windows.RULES`. A smaller window uses the inner part of the table of relative
positions.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ovseg_jax.errors import UserError
from ovseg_jax.models.remat import rematerialise
from ovseg_jax.models.windows import RULES, window_and_shift

# Section 3.3 of the paper; "_384" are those fine-tuned at 384 pixels.
PRESETS: dict[str, dict[str, Any]] = {
    "swin_tiny": dict(width=96, depths=(2, 2, 6, 2), heads=(3, 6, 12, 24)),
    "swin_small": dict(width=96, depths=(2, 2, 18, 2), heads=(3, 6, 12, 24)),
    "swin_base": dict(width=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32)),
    "swin_base_384": dict(width=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32), window=12),
    "swin_large": dict(width=192, depths=(2, 2, 18, 2), heads=(6, 12, 24, 48)),
    "swin_large_384": dict(width=192, depths=(2, 2, 18, 2), heads=(6, 12, 24, 48), window=12),
}

kernel_init = nn.initializers.truncated_normal(0.02)


def relative_positions(height: int, width: int, window: int) -> np.ndarray:
    """Returns the row of the table [(2*window-1)^2 ...] for each query and key of a window: [n n], n = h*w."""
    y, x = (axis.ravel() for axis in np.mgrid[:height, :width])
    down, right = (axis[:, None] - axis[None, :] + window - 1 for axis in (y, x))
    return down * (2 * window - 1) + right


def to_windows(x: Float[Array, "b h w c"], size: tuple[int, int]) -> Float[Array, "b windows n c"]:
    """Cuts [b h w c], whose sides are multiples of `size`, into windows of n tokens, both in reading order."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // size[0], size[0], w // size[1], size[1], c)
    return x.swapaxes(2, 3).reshape(b, -1, size[0] * size[1], c)


def from_windows(
    x: Float[Array, "b windows n c"], size: tuple[int, int], height: int, width: int
) -> Float[Array, "b h w c"]:
    """Inverts `to_windows`, for a map of height x width."""
    x = x.reshape(x.shape[0], height // size[0], width // size[1], *size, x.shape[-1])
    return x.swapaxes(2, 3).reshape(x.shape[0], height, width, -1)


def regions(height: int, width: int, size: tuple[int, int], shift: tuple[int, int]) -> np.ndarray:
    """Numbers tokens of a shifted map, [windows n]: equal numbers mark tokens that were neighbours before the shift.

    Only the last `shift` rows and columns wrapped around.
    """
    wrapped = [np.arange(side) >= side - s for side, s in zip((height, width), shift, strict=True)]
    number = 2 * wrapped[0][:, None] + wrapped[1][None, :]
    number = number.reshape(height // size[0], size[0], width // size[1], size[1])
    return number.swapaxes(1, 2).reshape(-1, size[0] * size[1]).astype(np.int8)


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows, with a learned bias for each relative position (paper, eq. 4).

    Attributes:
      heads: number of heads; divides the channels.
      window: side of a window; the table `relative_position_bias` is [(2*window-1)^2 heads].
      shifted: whether windows begin half a window further down and right.
      window_rule: see `windows.RULES`.
      dtype: compute type; the softmax is float32.
    """

    heads: int
    window: int
    shifted: bool
    window_rule: str = "axis"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Attends within each window."""
        _, h, w, c = x.shape
        size, shift = window_and_shift(h, w, self.window, self.shifted, self.window_rule)
        x = jnp.pad(x, ((0, 0), (0, -h % size[0]), (0, -w % size[1]), (0, 0)))
        height, width = x.shape[1:3]
        tokens = to_windows(jnp.roll(x, (-shift[0], -shift[1]), (1, 2)) if any(shift) else x, size)

        def project(name: str) -> Array:
            shape = (self.heads, c // self.heads)
            return nn.DenseGeneral(shape, dtype=self.dtype, kernel_init=kernel_init, name=name)(tokens)

        query, key, value = project("query"), project("key"), project("value")
        table_shape = ((2 * self.window - 1) ** 2, self.heads)
        table = self.param("relative_position_bias", kernel_init, table_shape)
        bias = table[relative_positions(*size, self.window)].transpose(2, 0, 1)
        query = query * (c // self.heads) ** -0.5
        logits = jnp.einsum("bwqhd,bwkhd->bwhqk", query, key, preferred_element_type=jnp.float32) + bias
        if any(shift):
            region = jnp.asarray(regions(height, width, size, shift))
            together = region[:, :, None] == region[:, None, :]
            logits = jnp.where(together[:, None], logits, -jnp.inf)
        weights = jax.nn.softmax(logits).astype(self.dtype)
        mixed = jnp.einsum("bwhqk,bwkhd->bwqhd", weights, value)
        out = nn.DenseGeneral(c, axis=(-2, -1), dtype=self.dtype, kernel_init=kernel_init, name="out")(mixed)
        x = from_windows(out, size, height, width)
        return (jnp.roll(x, shift, (1, 2)) if any(shift) else x)[:, :h, :w]


class SwinBlock(nn.Module):
    """A block: x + attention(norm1(x)), then x + mlp(norm2(x)), with stochastic depth of `drop_rate` in training."""

    heads: int
    window: int
    shifted: bool
    drop_rate: float = 0.0
    window_rule: str = "axis"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h w c"]:
        """Maps [b h w c] to the same shape."""

        def norm(name: str) -> nn.LayerNorm:
            return nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name=name)

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, dtype=self.dtype, kernel_init=kernel_init, name=name)

        def drop(y: Array) -> Array:
            if self.drop_rate == 0:
                return y
            return nn.Dropout(self.drop_rate, broadcast_dims=(1, 2, 3), deterministic=not train)(y)

        attention = WindowAttention(
            self.heads, self.window, self.shifted, self.window_rule, dtype=self.dtype, name="attn"
        )
        x = x + drop(attention(norm("norm1")(x)))
        y = nn.gelu(dense(4 * x.shape[-1], "fc1")(norm("norm2")(x)), approximate=False)
        return x + drop(dense(x.shape[-1], "fc2")(y))


class PatchMerging(nn.Module):
    """A merge of four neighbours, concatenated and normalised, into one token of twice the channels."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        """Maps [b h w c] to [b ceil(h/2) ceil(w/2) 2c]."""
        b, h, w, c = x.shape
        x = jnp.pad(x, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)))
        x = x.reshape(b, (h + 1) // 2, 2, (w + 1) // 2, 2, c)
        # Published weights expect the left column first, from top to bottom.
        x = x.transpose(0, 1, 3, 4, 2, 5).reshape(b, (h + 1) // 2, (w + 1) // 2, 4 * c)
        x = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm")(x)
        reduction = nn.Dense(2 * c, False, dtype=self.dtype, kernel_init=kernel_init, name="reduction")
        return reduction(x)


class Swin(nn.Module):
    """A Swin Transformer: feature maps at strides 4, 8, 16 and 32.

    Parameters: `patch_embed`, `patch_norm`, `stage{1..4}_{i}`, `merge{2..4}` at the beginning of a stage, and
    `out_norm{2..5}`.

    Attributes:
      width: channels of c2; each further map has twice as many.
      depths: blocks in each of the four stages.
      heads: attention heads in each of the four stages.
      window: side of a window, in tokens.
      window_rule: the rule if one window covers a side of the map, see `windows.RULES`; only a published model's own
        rule reproduces its outputs there.
      out_norms: levels whose map has a LayerNorm of its own: all in the published detectors, (5,) in the classifiers
        (their final norm), () for none.
      drop_rate: stochastic depth: both branches of block i of n are dropped with probability
        drop_rate * i / (n-1) (paper: 0.2 for tiny, 0.3 for small, 0.5 for base).
      remat: what the backward pass recomputes in each block, see `rematerialise`.
      dtype: compute type; parameters are float32.
    """

    width: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    window: int = 7
    window_rule: str = "axis"
    out_norms: tuple[int, ...] = (2, 3, 4, 5)
    drop_rate: float = 0.2
    remat: str = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"], train: bool = False) -> dict[str, Float[Array, "b _ _ _"]]:
        """Computes the pyramid.

        Args:
          x: normalised images.
          train: whether stochastic depth is on (needs the rng `dropout`).

        Returns:
          `c2`, `c3`, `c4`, `c5`: [b ceil(h/s) ceil(w/s) width*2^i] at strides s = 4, 8, 16, 32.

        Raises:
          UserError: heads do not divide the channels of their stage, or a level in `out_norms` or the rule is unknown.
        """
        if self.window_rule not in RULES:
            raise UserError(f"window_rule={self.window_rule!r} of the Swin is not one of {', '.join(RULES)}")
        if unknown := set(self.out_norms) - {2, 3, 4, 5}:
            raise UserError(f"out_norms of the Swin has {sorted(unknown)}, which are not levels 2, 3, 4 or 5")
        for stage, heads in enumerate(self.heads):
            if (channels := self.width * 2**stage) % heads:
                raise UserError(
                    f"{heads} heads do not divide the {channels} channels of Swin stage {stage + 1}"
                )

        def norm(name: str) -> nn.LayerNorm:
            return nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name=name)

        x = jnp.pad(x.astype(self.dtype), ((0, 0), (0, -x.shape[1] % 4), (0, -x.shape[2] % 4), (0, 0)))
        x = norm("patch_norm")(
            nn.Conv(self.width, (4, 4), strides=4, dtype=self.dtype, name="patch_embed")(x)
        )
        block_type = rematerialise(SwinBlock, self.remat, static_argnums=(2,))
        features, index, last = {}, 0, max(sum(self.depths) - 1, 1)
        for stage, (depth, heads) in enumerate(zip(self.depths, self.heads, strict=True), start=1):
            if stage > 1:
                x = PatchMerging(self.dtype, name=f"merge{stage}")(x)
            for i in range(depth):
                block = block_type(
                    heads=heads,
                    window=self.window,
                    shifted=i % 2 == 1,
                    drop_rate=self.drop_rate * index / last,
                    window_rule=self.window_rule,
                    dtype=self.dtype,
                    name=f"stage{stage}_{i}",
                )
                x = block(x, train)
                index += 1
            level = stage + 1
            features[f"c{level}"] = norm(f"out_norm{level}")(x) if level in self.out_norms else x
        return features

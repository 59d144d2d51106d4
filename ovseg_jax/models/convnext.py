"""ConvNeXt (Liu et al. 2022) as the image tower of CLIP, in the shapes that open_clip published (Cherti et al. 2022).

Parameters: `stem` and `stem_norm`; in stages 2 to 4 `downsample{s}_norm` and `downsample{s}` before the blocks; blocks
`stage{1..4}_{i}` with `conv`, `norm`, `fc1`, `fc2`, `gamma`; `head` with `norm` and `proj`, or `fc1` and `fc2`.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from ovseg_jax.models.remat import rematerialise

_BASE = dict(depths=(3, 3, 27, 3), width=128)
_LARGE = dict(depths=(3, 3, 27, 3), width=192)
_XXLARGE = dict(depths=(3, 4, 30, 3), width=384, epsilon=1e-5)

# Shapes of open_clip and timm. "_320" are those fine-tuned at 320 pixels, whose towers have the same shapes.
PRESETS: dict[str, dict[str, Any]] = {
    "clip_convnext_base": dict(_BASE, embed_dim=512),
    **{f"clip_convnext_base_w{size}": dict(_BASE, embed_dim=640) for size in ("", "_320")},
    **{
        f"clip_convnext_large_d{size}": dict(_LARGE, embed_dim=768, head_hidden=1536) for size in ("", "_320")
    },
    "clip_convnext_xxlarge": dict(_XXLARGE, embed_dim=1024),
}

kernel_init = nn.initializers.truncated_normal(0.02)
LAYER_SCALE = 1e-6  # its initial value (paper, A.1)


class ConvNeXtBlock(nn.Module):
    """A block: x + gamma * mlp(norm(conv(x))) with a depthwise 7x7 convolution.

    Attributes:
      epsilon: of the norm.
      dtype: compute type.
    """

    epsilon: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Maps [b h w c] to the same shape."""
        c = x.shape[-1]
        conv = nn.Conv(
            c, (7, 7), feature_group_count=c, dtype=self.dtype, kernel_init=kernel_init, name="conv"
        )
        y = nn.LayerNorm(self.epsilon, dtype=self.dtype, name="norm")(conv(x))
        y = nn.gelu(_dense(4 * c, "fc1", self.dtype)(y), approximate=False)
        gamma = self.param("gamma", nn.initializers.constant(LAYER_SCALE), (c,))
        return x + gamma.astype(self.dtype) * _dense(c, "fc2", self.dtype)(y)


class ConvNeXtHead(nn.Module):
    """The projection of pooled features, or of each pixel's, into the space of texts: a norm, then a matrix or an MLP.

    Attributes:
      embed_dim: channels of the embedding.
      hidden: channels inside the MLP; 0 for a single matrix.
      epsilon: of the norm.
      dtype: compute type.
    """

    embed_dim: int
    hidden: int = 0
    epsilon: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*n c"]) -> Float[Array, "*n e"]:
        """Projects the last axis; the result is not normalised to length 1."""
        x = nn.LayerNorm(self.epsilon, dtype=self.dtype, name="norm")(x)
        if not self.hidden:
            return _dense(self.embed_dim, "proj", self.dtype, bias=False)(x)
        x = nn.gelu(_dense(self.hidden, "fc1", self.dtype)(x), approximate=False)
        return _dense(self.embed_dim, "fc2", self.dtype, bias=False)(x)


class ConvNeXt(nn.Module):
    """A ConvNeXt of CLIP: feature maps at strides 4, 8, 16 and 32, and embeddings of the image and of its places.

    Attributes:
      depths: blocks in each of the four stages.
      width: channels of c2; each further map has twice as many.
      embed_dim: channels of the embedding that images and texts share.
      head_hidden: channels inside the head's MLP; 0 for a single matrix.
      epsilon: of all norms.
      remat: what the backward pass recomputes in each block, see `rematerialise`.
      dtype: compute type; parameters are float32.
    """

    depths: tuple[int, ...] = (3, 3, 27, 3)
    width: int = 128
    embed_dim: int = 512
    head_hidden: int = 0
    epsilon: float = 1e-6
    remat: str = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"], train: bool = False) -> dict[str, Float[Array, "b ..."]]:
        """Computes the pyramid and the embeddings.

        Args:
          x: normalised images. Sides that are not multiples of 32 are padded with zeros at the bottom and right of each
            strided convolution, where the published code drops the last rows or columns.
          train: no effect, since there are neither dropout nor batch statistics.

        Returns:
          `c2`, `c3`, `c4`, `c5`: [b ceil(h/s) ceil(w/s) width*2^i] at strides s = 4, 8, 16, 32; `pooled`: [b
          embed_dim], the head's projection of the mean of c5; `dense`: [b ceil(h/32) ceil(w/32) embed_dim], that of
          each place of c5. Neither is normalised to length 1.
        """
        norm = lambda name: nn.LayerNorm(self.epsilon, dtype=self.dtype, name=name)
        x = norm("stem_norm")(_patches(x.astype(self.dtype), self.width, 4, "stem", self.dtype))
        block_type = rematerialise(ConvNeXtBlock, self.remat)
        outputs = {}
        for stage, depth in enumerate(self.depths, start=1):
            if stage > 1:
                x = norm(f"downsample{stage}_norm")(x)
                x = _patches(x, self.width * 2 ** (stage - 1), 2, f"downsample{stage}", self.dtype)
            for i in range(depth):
                x = block_type(self.epsilon, self.dtype, name=f"stage{stage}_{i}")(x)
            outputs[f"c{stage + 1}"] = x
        head = self.head(name="head")
        outputs["pooled"], outputs["dense"] = head(x.mean((1, 2))), head(x)
        return outputs

    @nn.nowrap
    def head(self, **options: Any) -> ConvNeXtHead:
        """Creates the head, whose parameters are this module's `head`, such as for features pooled under masks."""
        return ConvNeXtHead(self.embed_dim, self.head_hidden, self.epsilon, self.dtype, **options)


def _patches(x: Array, features: int, size: int, name: str, dtype: Any) -> Array:
    """Maps each square of size x size, padded with zeros at the bottom and right, to one place."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), (0, -x.shape[2] % size), (0, 0)))
    side = (size, size)
    return nn.Conv(features, side, side, "VALID", dtype=dtype, kernel_init=kernel_init, name=name)(x)


def _dense(features: int, name: str, dtype: Any, bias: bool = True) -> nn.Dense:
    return nn.Dense(features, use_bias=bias, dtype=dtype, kernel_init=kernel_init, name=name)

"""CLIP's ResNets (Radford et al. 2021, section 2.4).

They differ from `resnet` in a stem of three convolutions, average pooling in place of strides, and attention in place
of the global average.

Parameter names are those of `resnet.ResNet`, with `conv{1..3}`, `norm{1..3}` in the stem too, and `attnpool`.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from ovseg_jax.errors import UserError
from ovseg_jax.models.positions import resize_positions
from ovseg_jax.models.remat import rematerialise
from ovseg_jax.models.resnet import kernel_init, make_norm
from ovseg_jax.models.transformer import attend

# Published with `grid` = image / 32, for images of 224, 224, 288, 384 and 448 pixels.
PRESETS: dict[str, dict[str, Any]] = {
    "clip_rn50": dict(stage_sizes=(3, 4, 6, 3), width=64, embed=1024, grid=7),
    "clip_rn101": dict(stage_sizes=(3, 4, 23, 3), width=64, embed=512, grid=7),
    "clip_rn50x4": dict(stage_sizes=(4, 6, 10, 6), width=80, embed=640, grid=9),
    "clip_rn50x16": dict(stage_sizes=(6, 8, 18, 8), width=96, embed=768, grid=12),
    "clip_rn50x64": dict(stage_sizes=(3, 15, 36, 10), width=128, embed=1024, grid=14),
}
HEAD_CHANNELS = 64


def average_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Averages 2x2 pixels, to ceil(h/2) x ceil(w/2); an incomplete square is averaged over its own pixels."""
    return nn.avg_pool(x, (2, 2), strides=(2, 2), padding="SAME", count_include_pad=False)


class ClipBottleneck(nn.Module):
    """A bottleneck as in `resnet`, with average pooling after the 3x3 and before the projection as the stride.

    Attributes:
      width: inner channels; the output has 4 times as many.
      stride: 1 or 2.
      project: whether the shortcut has a 1x1 convolution: the first block of each stage.
      norm: see `resnet.make_norm`.
      dtype: compute type.
    """

    width: int
    stride: int = 1
    project: bool = False
    norm: str = "batch"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h2 w2 c4"]:
        """Maps [b h w c] to [b ceil(h/stride) ceil(w/stride) 4*width]."""
        norm = make_norm(self.norm, train, self.dtype)

        def conv(features: int, size: int, name: str) -> nn.Conv:
            return _conv(features, size, 1, self.dtype, name)

        y = nn.relu(norm("norm1")(conv(self.width, 1, "conv1")(x)))
        y = nn.relu(norm("norm2")(conv(self.width, 3, "conv2")(y)))
        if self.stride == 2:
            x, y = average_pool(x), average_pool(y)
        y = norm("norm3")(conv(4 * self.width, 1, "conv3")(y))
        if self.project:
            x = norm("downsample_norm")(conv(4 * self.width, 1, "downsample_conv")(x))
        return nn.relu(x + y)


class AttentionPool(nn.Module):
    """A step of multi-head attention whose query is the mean of the map, with learned positions.

    Attributes:
      embed: size of the image embedding.
      grid: side of the table of positions, `positions` [1+grid*grid c]; its first row belongs to the mean. For maps of
        another size the other rows are interpolated bicubically.
      dtype: compute type.
    """

    embed: int
    grid: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> tuple[Float[Array, "b e"], Float[Array, "b h w e"]]:
        """Computes (pooled, dense).

        dense is the value and output projection at each position, without position embedding (Zhou et al. 2022,
        MaskCLIP).
        """
        b, h, w, c = x.shape
        init = nn.initializers.normal(c**-0.5)
        layers: dict[str, nn.DenseGeneral] = {}

        def layer(name: str, shape: Any, **options: Any) -> nn.DenseGeneral:
            # Kept, since the layers of values and output are used twice.
            layers[name] = nn.DenseGeneral(shape, dtype=self.dtype, kernel_init=init, name=name, **options)
            return layers[name]

        positions = self.param("positions", init, (1 + self.grid**2, c))
        table = positions[1:].reshape(self.grid, self.grid, c)
        places = resize_positions(table, (h, w)).reshape(h * w, c)
        tokens = jnp.concatenate([x.mean((1, 2))[:, None], x.reshape(b, h * w, c)], axis=1)
        tokens = tokens + jnp.concatenate([positions[:1], places]).astype(self.dtype)
        pooled = attend(layer, c // HEAD_CHANNELS, tokens[:, :1], tokens, features=self.embed)
        return pooled[:, 0], layers["out"](layers["value"](x))


class ClipResNet(nn.Module):
    """A CLIP ResNet: feature maps at strides 4, 8, 16 and 32, and the image embedding.

    Attributes:
      stage_sizes: blocks in each of the four stages.
      width: channels of the stem; the maps have 4, 8, 16 and 32 times as many.
      embed: size of the image embedding.
      grid: side of the table of positions of the attention pooling: the pretraining image's side / 32.
      norm: "batch", "frozen" or "group"; see `resnet.make_norm`.
      remat: what the backward pass recomputes in each block, see `rematerialise`.
      dtype: compute type; parameters are float32.
    """

    stage_sizes: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    embed: int = 1024
    grid: int = 7
    norm: str = "batch"
    remat: str = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"], train: bool = False) -> dict[str, Float[Array, "b ..."]]:
        """Computes the pyramid and the embeddings.

        Args:
          x: normalised images. Sides that are not multiples of 32 give ceil(side/stride), where the published code
            drops the last row or column.
          train: whether batch statistics are used and updated (collection `batch_stats`, for norm "batch").

        Returns:
          `c2`, `c3`, `c4`, `c5`: [b ceil(h/s) ceil(w/s) 4*width*2^i] at strides s = 4, 8, 16, 32;
          `pooled`: [b embed], the embedding of the image; `dense`: [b ceil(h/32) ceil(w/32) embed], one for each
          position. Neither is normalised to length 1.

        Raises:
          UserError: the width is odd.
        """
        if self.width % 2:
            raise UserError(f"the width of the CLIP ResNet is {self.width}, but must be even")
        x = x.astype(self.dtype)
        norm = make_norm(self.norm, train, self.dtype)
        for i, (features, stride) in enumerate(
            ((self.width // 2, 2), (self.width // 2, 1), (self.width, 1)), 1
        ):
            x = nn.relu(norm(f"norm{i}")(_conv(features, 3, stride, self.dtype, f"conv{i}")(x)))
        x = average_pool(x)

        block_type = rematerialise(ClipBottleneck, self.remat, static_argnums=(2,))
        outputs = {}
        for stage, blocks in enumerate(self.stage_sizes):
            for i in range(blocks):
                block = block_type(
                    width=self.width * 2**stage,
                    stride=2 if stage > 0 and i == 0 else 1,
                    project=i == 0,
                    norm=self.norm,
                    dtype=self.dtype,
                    name=f"layer{stage + 1}_{i}",
                )
                x = block(x, train)
            outputs[f"c{stage + 2}"] = x
        pool = AttentionPool(self.embed, self.grid, dtype=self.dtype, name="attnpool")
        outputs["pooled"], outputs["dense"] = pool(x)
        return outputs


def _conv(features: int, size: int, stride: int, dtype: Any, name: str) -> nn.Conv:
    return nn.Conv(
        features,
        (size, size),
        strides=stride,
        padding=size // 2,
        use_bias=False,
        dtype=dtype,
        kernel_init=kernel_init,
        name=name,
    )

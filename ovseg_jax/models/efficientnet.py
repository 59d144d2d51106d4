"""EfficientNet-B0..B8 (Tan and Le 2019) and Lite0..4 as a pyramid: no top convolution, no classifier.

As published for TensorFlow: SAME padding (the odd pixel at the end), swish, batch norm with momentum 0.99 and
epsilon 1e-3, squeeze-and-excite with a quarter of the block's input channels, stochastic depth growing over
the blocks. A Lite has ReLU6 in place of swish, and no squeeze-and-excite.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ovseg_jax.models.efficientnet_scaling import STAGES, round_channels, stage_blocks, stem_channels
from ovseg_jax.models.remat import rematerialise


def _conv_init(fan_out: int) -> nn.initializers.Initializer:
    # Explicit, since Flax would include the channels of a depthwise kernel [k k 1 c] in its fan-out.
    return nn.initializers.normal(math.sqrt(2.0 / fan_out))


class MBConv(nn.Module):
    """An inverted bottleneck: 1x1 expansion, depthwise convolution, squeeze-and-excite, 1x1 projection.

    Attributes:
      channels: channels of the output.
      kernel: side of the depthwise convolution.
      stride: stride of the depthwise convolution.
      expand: expansion ratio; 1 means no expansion.
      drop_rate: probability that the residual branch of an example is dropped in training.
      lite: see `EfficientNet`.
      dtype: compute type.
    """

    channels: int
    kernel: int
    stride: int
    expand: int
    drop_rate: float = 0.0
    lite: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h2 w2 d"]:
        """Maps [b h w c] to [b ceil(h/stride) ceil(w/stride) channels]."""
        inputs, channels_in = x, x.shape[-1]
        inner = channels_in * self.expand
        activation = jax.nn.relu6 if self.lite else nn.swish

        def norm(name: str) -> nn.BatchNorm:
            return nn.BatchNorm(not train, momentum=0.99, epsilon=1e-3, dtype=self.dtype, name=name)

        def pointwise(features: int, name: str, use_bias: bool = False) -> nn.Conv:
            init = _conv_init(features)
            return nn.Conv(features, (1, 1), use_bias=use_bias, dtype=self.dtype, kernel_init=init, name=name)

        if self.expand != 1:
            x = activation(norm("expand_norm")(pointwise(inner, "expand_conv")(x)))
        x = nn.Conv(
            inner,
            (self.kernel, self.kernel),
            strides=self.stride,
            padding="SAME",
            feature_group_count=inner,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=_conv_init(self.kernel**2),
            name="depthwise_conv",
        )(x)
        x = activation(norm("depthwise_norm")(x))

        if not self.lite:
            squeezed = jnp.mean(x, axis=(1, 2), keepdims=True, dtype=jnp.float32)
            # A quarter of the block's input, not of its expansion, as in the published code.
            gate = nn.swish(pointwise(max(1, channels_in // 4), "se_reduce", use_bias=True)(squeezed))
            x = x * nn.sigmoid(pointwise(inner, "se_expand", use_bias=True)(gate))

        x = norm("project_norm")(pointwise(self.channels, "project_conv")(x))
        if self.stride == 1 and channels_in == self.channels:
            if self.drop_rate > 0:
                x = nn.Dropout(self.drop_rate, broadcast_dims=(1, 2, 3), deterministic=not train)(x)
            x = x + inputs
        return x


class EfficientNet(nn.Module):
    """An EfficientNet: feature maps at strides 4, 8, 16 and 32.

    Parameters: `stem_conv`, `stem_norm`, then `block_{i}`, numbered through all stages as published.

    Attributes:
      width: channel multiplier.
      depth: block multiplier.
      drop_rate: the stochastic depth of block i of n drops its branch with probability drop_rate * i / n
        (published: survival 0.8 at the end for B0 to B7).
      lite: whether it is a Lite: no squeeze-and-excite, ReLU6, and an unscaled stem, first and last stage.
      remat: what the backward pass recomputes in each block, see `rematerialise`.
      dtype: compute type; parameters are float32.
    """

    width: float = 1.0
    depth: float = 1.0
    drop_rate: float = 0.2
    lite: bool = False
    remat: str = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"], train: bool = False) -> dict[str, Float[Array, "b _ _ _"]]:
        """Computes the pyramid.

        Args:
          x: normalised images.
          train: whether batch statistics are used and updated (collection `batch_stats`) and stochastic
            depth is on (needs the rng `dropout`).

        Returns:
          `c2`, `c3`, `c4`, `c5`: [b ceil(h/s) ceil(w/s) c], the last block's output at each stride s = 4, 8,
          16, 32 (24, 40, 112 and 320 channels times `width`).
        """
        stem = stem_channels(self.width, self.lite)
        x = nn.Conv(
            stem,
            (3, 3),
            strides=2,
            padding="SAME",
            use_bias=False,
            dtype=self.dtype,
            kernel_init=_conv_init(9 * stem),
            name="stem_conv",
        )(x.astype(self.dtype))
        norm = nn.BatchNorm(not train, momentum=0.99, epsilon=1e-3, dtype=self.dtype, name="stem_norm")
        x = jax.nn.relu6(norm(x)) if self.lite else nn.swish(norm(x))

        block_type = rematerialise(MBConv, self.remat, static_argnums=(2,))
        sizes = stage_blocks(self.depth, self.lite)
        features, level, index = {}, 1, 0
        for stage, blocks in zip(STAGES, sizes, strict=True):
            level += stage.stride == 2
            for i in range(blocks):
                block = block_type(
                    channels=round_channels(stage.channels, self.width),
                    kernel=stage.kernel,
                    stride=stage.stride if i == 0 else 1,
                    expand=stage.expand,
                    drop_rate=self.drop_rate * index / sum(sizes),
                    lite=self.lite,
                    dtype=self.dtype,
                    name=f"block_{index}",
                )
                x = block(x, train)
                index += 1
            features[f"c{level}"] = x
        del features["c1"]
        return features

"""ResNet-50/101 (He et al. 2015), version 1.5: the stride of a bottleneck sits in its 3x3 convolution.

Parameters follow torchvision: `conv1`, `norm1`, `layer{1..4}_{i}` with `conv{1..3}`, `norm{1..3}` and, where
a stage begins, `downsample_conv`, `downsample_norm` (its `bn` is our `norm`, its `layer1.0` our `layer1_0`).
Padding is symmetric as in PyTorch, where TensorFlow's SAME would put the odd pixel at the end.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from ovseg_jax.errors import UserError
from ovseg_jax.models.remat import rematerialise

STAGES = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}

# torchvision's kaiming_normal_(mode="fan_out", nonlinearity="relu").
kernel_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def make_norm(kind: str, train: bool, dtype: Any) -> Callable[..., nn.Module]:
    """Returns a constructor of the normalisation that follows every convolution.

    Args:
      kind: "batch" uses and updates the statistics of the batch in training (of the global batch, where the
        step is jitted over a mesh) and running statistics otherwise; "frozen" always uses the running
        statistics, for small batches on top of pretrained weights (its scale and bias are still parameters);
        "group" (32 groups) does not depend on other examples and has no statistics.
      train: whether this is a training step.
      dtype: type of the result; statistics are always float32.

    Returns:
      A constructor that takes `name`.

    Raises:
      UserError: the kind is unknown.
    """
    if kind == "group":
        return lambda name: nn.GroupNorm(num_groups=32, epsilon=1e-5, dtype=dtype, name=name)
    if kind not in ("batch", "frozen"):
        raise UserError(f"norm={kind!r} of the ResNet is not one of batch, frozen, group.")
    running = kind == "frozen" or not train
    return lambda name: nn.BatchNorm(
        use_running_average=running, momentum=0.9, epsilon=1e-5, dtype=dtype, name=name
    )


class Bottleneck(nn.Module):
    """A bottleneck: 1x1 to `width`, 3x3 with the stride, 1x1 to 4 `width`, added to the (projected) input.

    Attributes:
      width: inner channels; the output has 4 times as many.
      stride: of the 3x3 convolution and of the projection.
      project: whether the shortcut is a strided 1x1 convolution: the first block of each stage.
      norm: see `make_norm`.
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

        def conv(features: int, size: int, stride: int, name: str) -> nn.Conv:
            return nn.Conv(
                features,
                (size, size),
                strides=stride,
                padding=size // 2,
                use_bias=False,
                dtype=self.dtype,
                kernel_init=kernel_init,
                name=name,
            )

        y = nn.relu(norm("norm1")(conv(self.width, 1, 1, "conv1")(x)))
        y = nn.relu(norm("norm2")(conv(self.width, 3, self.stride, "conv2")(y)))
        y = norm("norm3")(conv(4 * self.width, 1, 1, "conv3")(y))
        if self.project:
            x = norm("downsample_norm")(conv(4 * self.width, 1, self.stride, "downsample_conv")(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A bottleneck ResNet: feature maps at strides 4, 8, 16 and 32.

    Attributes:
      stage_sizes: blocks in each of the four stages.
      width: channels of the stem; the maps have 4, 8, 16 and 32 times as many.
      norm: "batch", "frozen" or "group"; see `make_norm`.
      remat: what the backward pass recomputes in each block, see `rematerialise`.
      dtype: compute type; parameters are float32.
    """

    stage_sizes: tuple[int, int, int, int] = STAGES["resnet50"]
    width: int = 64
    norm: str = "batch"
    remat: str = "none"
    dtype: Any = jnp.float32

    def stem(self, x: Float[Array, "b h w 3"], train: bool) -> Float[Array, "b h4 w4 c"]:
        """Computes the features at stride 4 from pixels."""
        x = nn.Conv(
            self.width,
            (7, 7),
            strides=2,
            padding=3,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=kernel_init,
            name="conv1",
        )(x)
        x = nn.relu(make_norm(self.norm, train, self.dtype)("norm1")(x))
        return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"], train: bool = False) -> dict[str, Float[Array, "b _ _ _"]]:
        """Computes the pyramid.

        Args:
          x: normalised images.
          train: whether batch statistics are used and updated (collection `batch_stats`, for norm "batch").

        Returns:
          `c2`, `c3`, `c4`, `c5`: [b ceil(h/s) ceil(w/s) 4*width*2^i] at strides s = 4, 8, 16, 32.
        """
        block_type = rematerialise(Bottleneck, self.remat, static_argnums=(2,))
        x = self.stem(x.astype(self.dtype), train)
        features = {}
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
            features[f"c{stage + 2}"] = x
        return features

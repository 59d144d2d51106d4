"""UPerNet: per-pixel classification from a pyramid (Xiao et al., Unified Perceptual Parsing, 2018).

As in mmsegmentation and in transformers' UperNetForSemanticSegmentation, with the auxiliary head of a fully
convolutional network (FCN) on the third level.
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from ovseg_jax.errors import UserError
from ovseg_jax.models.openseg import normalise
from ovseg_jax.models.remat import rematerialise
from ovseg_jax.models.resnet import kernel_init, make_norm

LEVELS = ("c2", "c3", "c4", "c5")
AUXILIARY = "c4"


class UPerNetLogits(NamedTuple):
    """The outputs of the network.

    Attributes:
      logits: [B h w K], at the stride of the backbone's finest map, float32.
      auxiliary: [B h' w' K], at that of the level `AUXILIARY`; None without an auxiliary head.
    """

    logits: Float[Array, "b h w k"]
    auxiliary: Float[Array, "b _h _w k"] | None


class ConvNorm(nn.Module):
    """A convolution, a norm and a ReLU.

    Attributes:
      features: channels of the result.
      size: side of the kernel; the padding is symmetric.
      norm: see `resnet.make_norm`.
      dtype: compute type; parameters are float32.
    """

    features: int
    size: int
    norm: str = "batch"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h w d"]:
        """Maps [b h w c] to [b h w features]."""
        conv = nn.Conv(
            self.features,
            (self.size, self.size),
            padding=self.size // 2,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=kernel_init,
            name="conv",
        )
        return nn.relu(make_norm(self.norm, train, self.dtype)("norm")(conv(x)))


class UPerHead(nn.Module):
    """The head: pooled context of the coarsest level, a top-down path, the fusion of all levels.

    Attributes:
      width: channels of every level.
      pools: sides of the grids to which the coarsest level is pooled.
      norm: see `resnet.make_norm`.
      dtype: compute type; parameters are float32.
    """

    width: int
    pools: tuple[int, ...]
    norm: str = "batch"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: dict[str, Array], train: bool) -> Float[Array, "b h w d"]:
        """Fuses the maps `c2` to `c5` at the resolution of the finest."""
        conv = lambda size, name: partial(
            ConvNorm(self.width, size, self.norm, self.dtype, name=name), train=train
        )
        top = features[LEVELS[-1]]
        pooled = [top]
        for i, side in enumerate(self.pools):
            pooled.append(enlarge(conv(1, f"pool_{i}")(adaptive_pool(top, side)), top.shape[1:3]))
        laterals = [conv(1, f"lateral_{name}")(features[name]) for name in LEVELS[:-1]]
        laterals.append(conv(3, "context")(jnp.concatenate(pooled, -1)))
        for i in reversed(range(len(laterals) - 1)):
            laterals[i] = laterals[i] + enlarge(laterals[i + 1], laterals[i].shape[1:3])
        outputs = [conv(3, f"output_{name}")(x) for name, x in zip(LEVELS[:-1], laterals[:-1], strict=True)]
        outputs.append(laterals[-1])
        finest = outputs[0].shape[1:3]
        return conv(3, "fusion")(jnp.concatenate([enlarge(x, finest) for x in outputs], -1))


class UPerNet(nn.Module):
    """A per-pixel classifier with a closed set of classes.

    Attributes:
      backbone: a module that maps [B S S 3] to {"c2": ..., "c5": ...}.
      mean, std: of pixels in [0, 1], by channel.
      classes: K, the number of classes.
      width: channels of the head: 512 in mmsegmentation and transformers, 768 with MAE's ViT-B.
      pools: see `UPerHead`.
      aux_width: channels of the auxiliary head; 0 for none.
      dropout: share of a head's channels that is dropped before its classifier in training.
      norm: of both heads, see `resnet.make_norm`.
      remat: what the backward pass recomputes in the heads, see `rematerialise`.
      dtype: compute type; parameters are float32.
    """

    backbone: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: int
    width: int = 512
    pools: tuple[int, ...] = (1, 2, 3, 6)
    aux_width: int = 256
    dropout: float = 0.1
    norm: str = "batch"
    remat: str = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, image: UInt8[Array, "b s t 3"], image_size: Int[Array, "b 2"], train: bool = False
    ) -> UPerNetLogits:
        """Classifies the pixels of images that fill `image_size` (height, width) of their canvas.

        With `train`, the rng `dropout` is needed and batch statistics are updated (collection `batch_stats`).

        Raises:
          UserError: the backbone lacks a level.
        """
        x = normalise(image, image_size, self.mean, self.std, jnp.dtype(self.dtype))
        features = self.backbone(x, train=train)
        if missing := [name for name in LEVELS if name not in features]:
            raise UserError(
                f"UPerNet needs the levels {', '.join(LEVELS)}, but the backbone has no {missing[0]}"
            )

        def classify(y: Array, name: str) -> Array:
            y = nn.Dropout(self.dropout, broadcast_dims=(1, 2), deterministic=not train)(y)
            return nn.Dense(
                self.classes, dtype=self.dtype, kernel_init=nn.initializers.normal(0.01), name=name
            )(y)

        again = partial(rematerialise, policy=self.remat, static_argnums=(2,))
        head = again(UPerHead)(self.width, self.pools, self.norm, self.dtype, name="head")
        logits = classify(head(features, train), "classifier").astype(jnp.float32)
        if not self.aux_width:
            return UPerNetLogits(logits, None)
        side = again(ConvNorm)(self.aux_width, 3, self.norm, self.dtype, name="aux_head")
        auxiliary = classify(side(features[AUXILIARY], train), "aux_classifier")
        return UPerNetLogits(logits, auxiliary.astype(jnp.float32))


def enlarge(x: Float[Array, "b h w c"], size: tuple[int, ...]) -> Float[Array, "b _h _w c"]:
    """Resizes bilinearly with half-pixel centres, without antialiasing where the map shrinks, as PyTorch does."""
    if x.shape[1:3] == tuple(size):
        return x
    return jax.image.resize(x, (x.shape[0], *size, x.shape[3]), "bilinear", antialias=False).astype(x.dtype)


def adaptive_pool(x: Float[Array, "b h w c"], side: int) -> Float[Array, "b side side c"]:
    """Averages a map over side x side cells, which may overlap, as PyTorch's AdaptiveAvgPool2d does."""
    rows, columns = (jnp.asarray(pool_weights(n, side), x.dtype) for n in x.shape[1:3])
    return jnp.einsum("rh,cw,bhwd->brcd", rows, columns, x)


def pool_weights(length: int, cells: int) -> Float[np.ndarray, "cells length"]:
    """Returns the matrix of means over the positions floor(i n / m) to ceil((i + 1) n / m) of m cells."""
    first = np.arange(cells) * length // cells
    last = -(-(np.arange(cells) + 1) * length // cells)
    position = np.arange(length)
    inside = (position >= first[:, None]) & (position < last[:, None])
    return inside / inside.sum(1, keepdims=True)

"""P-Seg's pseudo-mask generator: each image's tokens, clustered by k-means, as masks (papers/002, 3.3.1).

Tokens come from a frozen transformer (`TowerTokens`, DINO ViT-S/8 in the paper), or from the colours and places of
pixels (`Colours`), which needs no weights. Masks are a function of one image alone, whatever else is in the batch.
"""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from ovseg_jax.errors import UserError
from ovseg_jax.kernels.kmeans import STARTS, kmeans
from ovseg_jax.kernels.spectral import spectral
from ovseg_jax.kernels.unit import unit
from ovseg_jax.models.backbones import build_vit
from ovseg_jax.models.openseg import inside, normalise
from ovseg_jax.models.transformer import VIT
from ovseg_jax.models.vit import ViT

# Rows: lightness, red against green, yellow against blue.
COLOURS = {
    "rgb": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "opponent": ((1 / 3, 1 / 3, 1 / 3), (1, -1, 0), (0.5, 0.5, -1)),
}
LAYERS = ("tokens", "keys")


class Colours(nn.Module):
    """The colours of an image, averaged over squares, with the position of each square.

    The defaults are ours, chosen on `scenes` at 64 pixels. The plain k-means of Table 1 is `space="rgb"`, without blur
    and position, at stride 8.

    Attributes:
      stride: side of a square in pixels; divides the side of the canvas.
      space: "opponent" (lightness, red against green, yellow against blue) or "rgb".
      blur: standard deviation in pixels of a Gaussian before the average; padding has no share in it. 0 for none.
      position: factor of the row and the column, which are -1..1 on the image's longer side; colours are 0..1.
    """

    stride: int = 2
    space: str = "opponent"
    blur: float = 2.0
    position: float = 0.15

    def __call__(
        self, image: UInt8[Array, "b s t 3"], image_size: Int[Array, "b 2"]
    ) -> Float[Array, "b h w d"]:
        """Computes the features of each square.

        Raises:
          UserError: the stride does not divide a side, or the colour space is unknown.
        """
        if self.space not in COLOURS:
            raise UserError(f"space={self.space!r} of pseudo-masks is not one of {', '.join(COLOURS)}")
        if self.stride < 1 or any(side % self.stride for side in image.shape[1:3]):
            raise UserError(
                f"an image of {image.shape[1]} x {image.shape[2]} pixels cannot be cut into squares of "
                f"stride={self.stride} for pseudo-masks"
            )
        highest = jax.lax.Precision.HIGHEST
        x = jnp.einsum("bstc,dc->bdst", image.astype(jnp.float32) / 255, np.array(COLOURS[self.space]))
        rows, columns = (_smoothing(side, self.stride, self.blur) for side in image.shape[1:3])
        row_in, column_in = (
            (jnp.arange(side) < image_size[:, i, None]).astype(jnp.float32)
            for i, side in enumerate(image.shape[1:3])
        )
        x = x * (row_in[:, None, :, None] * column_in[:, None, None, :])
        x = jnp.einsum("bdst,wt->bdsw", x, columns, precision=highest)
        x = jnp.einsum("hs,bdsw->bdhw", rows, x, precision=highest)
        share = (row_in @ rows.T)[:, :, None] * (column_in @ columns.T)[:, None, :]
        x = jnp.moveaxis(x, 1, -1) / jnp.maximum(share, 1e-6)[..., None]
        longer = jnp.maximum(image_size.max(1), 1)[:, None]
        y, z = (
            jnp.broadcast_to(
                jnp.expand_dims((centres(n, self.stride) * 2 / longer - 1), 2 - axis), x.shape[:3]
            )
            for axis, n in enumerate(x.shape[1:3])
        )
        return jnp.concatenate([x, self.position * jnp.stack([y, z], -1)], -1)


class TowerTokens(nn.Module):
    """The tokens of a frozen Vision Transformer, on its grid of patches.

    The paper names neither the layer nor a normalisation; the tokens after the final norm, as they are, is our reading.

    Attributes:
      tower: the transformer.
      mean, std: normalisation of pixels; the defaults are those of ImageNet, which DINO was trained with.
      layer: "tokens", the output after the final norm; or "keys", the keys of the last block's attention.
      normalise: whether tokens are divided by their length.
    """

    tower: ViT
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    layer: str = "tokens"
    normalise: bool = False

    @property
    def stride(self) -> int:
        """The side of a patch in pixels."""
        return self.tower.patch

    def __call__(
        self, image: UInt8[Array, "b s t 3"], image_size: Int[Array, "b 2"]
    ) -> Float[Array, "b h w d"]:
        """Computes the tokens of each patch.

        Raises:
          UserError: a side is not a multiple of the patch, or the layer is unknown.
        """
        if self.layer not in LAYERS:
            raise UserError(f"layer={self.layer!r} of pseudo-masks is not one of {', '.join(LAYERS)}")
        pixels = normalise(image, image_size, tuple(self.mean), tuple(self.std))
        last = f"encoderblock_{self.tower.depth - 1}", VIT.attention, "key"
        keys: list[Array] = []

        def keep(function: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            out = function(*args, **kwargs)
            if context.module.path[-3:] == last and context.method_name == "__call__":
                keys.append(out)
            return out

        with nn.intercept_methods(keep):
            x = self.tower(pixels).tokens
        if self.layer == "keys":
            front = int(self.tower.cls != "none")
            x = keys[0][:, front:].reshape(x.shape)
        return unit(x) if self.normalise else x.astype(jnp.float32)


class PseudoMaskGenerator(nn.Module):
    """Masks without classes, from the clusters of an image's features.

    Attributes:
      features: `Colours` or `TowerTokens`.
      clusters: K (8 in the paper).
      mask_stride: pixels of a cell of the masks (4: MaskFormer's predictions).
      start: see `kernels.kmeans.kmeans`, as the next; the paper names neither.
      iterations: how often the centres move.
      gamma: γ of spectral clustering, a baseline of Table 1, see `kernels.spectral`; 0 for k-means.
    """

    features: Colours | TowerTokens
    clusters: int = 8
    mask_stride: int = 4
    start: str = "farthest"
    iterations: int = 12
    gamma: float = 0.0

    def __call__(
        self, image: UInt8[Array, "b s t 3"], image_size: Int[Array, "b 2"]
    ) -> tuple[UInt8[Array, "b k h w"], Bool[Array, "b k"]]:
        """Returns the batch fields `masks`, 255 inside and 0 outside, and `mask_valid`, False for an empty cluster.

        A cell belongs to the cluster of the token under its centre; one whose centre is padding, to none. Jittable.

        Args:
          image: images that fill `image_size` (height, width) of their canvas.
          image_size: zeros for a padded example.
        """
        if self.mask_stride < 1 or any(side % self.mask_stride for side in image.shape[1:3]):
            raise UserError(
                f"an image of {image.shape[1]} x {image.shape[2]} pixels is not a multiple of "
                f"mask_stride={self.mask_stride} of pseudo-masks"
            )
        labels = self._on_grid(image, image_size, self.mask_stride)
        masks = labels[:, None] == jnp.arange(self.clusters)[:, None, None]
        return (masks * 255).astype(jnp.uint8), masks.any((2, 3))

    def segments(
        self, image: UInt8[Array, "b s t 3"], image_size: Int[Array, "b 2"]
    ) -> UInt8[Array, "b s t"]:
        """Returns the number of each pixel's cluster, from 1, and 0 for padding. Jittable."""
        return (self._on_grid(image, image_size, 1) + 1).astype(jnp.uint8)

    def _on_grid(self, image: Array, image_size: Array, stride: int) -> Int[Array, "b h w"]:
        """Returns the cluster under the centre of each cell, -1 in padding."""
        labels = self._labels(image, image_size)
        at = [np.asarray(centres(side // stride, stride)) for side in image.shape[1:3]]
        # A token begins above each centre inside the image, so it is no padding.
        rows, columns = ((c // self.features.stride).astype(int) for c in at)
        within = [c < image_size[:, i, None] for i, c in enumerate(at)]
        return jnp.where(within[0][:, :, None] & within[1][:, None, :], labels[:, rows][:, :, columns], -1)

    def _labels(self, image: Array, image_size: Array) -> Int[Array, "b h w"]:
        if self.start not in STARTS:
            raise UserError(f"start={self.start!r} of pseudo-masks is not one of {', '.join(STARTS)}")
        if not 1 <= self.clusters < 256:
            raise UserError(f"clusters={self.clusters} of pseudo-masks is not from 1 to 255")
        x = jax.lax.stop_gradient(self.features(image, image_size))
        b, h, w, d = x.shape
        valid = inside(image_size, (h, w), (float(self.features.stride),) * 2)
        if self.gamma < 0:
            raise UserError(f"gamma={self.gamma} of pseudo-masks is less than 0")
        find = partial(spectral, gamma=self.gamma) if self.gamma else kmeans
        found = find(
            x.reshape(b, h * w, d),
            valid.reshape(b, h * w),
            self.clusters,
            start=self.start,
            iterations=self.iterations,
            # The same draws for every image and step: masks are a function of the image.
            rng=jax.random.key(0),
        )
        return found.labels.reshape(b, h, w)


FEATURES = {"colour": Colours, "tower": TowerTokens}
GENERATOR_KEYS = (
    "backbone",
    *(f.name for kind in (PseudoMaskGenerator, Colours, TowerTokens) for f in dataclasses.fields(kind)),
)
"""The keys of a config's section that describes a generator."""


def build_generator(cfg: Mapping[str, Any], dtype: Any = jnp.float32) -> PseudoMaskGenerator:
    """Creates a pseudo-mask generator.

    Args:
      cfg: `features`, "colour" or "tower"; the attributes of `PseudoMaskGenerator`, and of `Colours` or `TowerTokens`;
        for "tower", `backbone`, see `backbones.build_backbone`, whose `init` is ignored.
      dtype: compute type of the tower.

    Raises:
      UserError: a key is unknown or has no effect on these features, or the backbone is no Vision Transformer.
    """
    options = dict(cfg.items())
    name = options.pop("features", None)
    if name not in FEATURES:
        raise UserError(f"features={name!r} of pseudo-masks is not one of {', '.join(FEATURES)}")
    fields = lambda kind: {f.name for f in dataclasses.fields(kind)} - {"parent", "name"}
    own, common = fields(FEATURES[name]), fields(PseudoMaskGenerator) - {"features"}
    own = own - {"tower"} | {"backbone"} if name == "tower" else own
    if unknown := sorted(set(options) - own - common):
        raise UserError(
            f"pseudo-masks with features={name!r} have no {unknown[0]!r}; known keys: features, "
            f"{', '.join(sorted(own | common))}"
        )
    chosen = {key: options.pop(key) for key in sorted(own & set(options))}
    if name == "tower":
        if "backbone" not in chosen:
            raise UserError(
                "pseudo-masks with features='tower' need a backbone, such as {name: 'dino_vits8'}"
            )
        chosen["tower"] = build_vit(chosen.pop("backbone"), dtype, "pseudo-masks")
    return PseudoMaskGenerator(FEATURES[name](**chosen), **options)


def centres(cells: int, stride: int) -> Float[np.ndarray, " cells"]:
    """Returns the centre of each cell in pixels, from the border of the first."""
    return (np.arange(cells) + 0.5) * stride


def _smoothing(pixels: int, stride: int, blur: float) -> Float[np.ndarray, "cells pixels"]:
    """Returns the weight of each pixel in each cell: a Gaussian up to three standard deviations, then an average."""
    distance = np.arange(pixels) - np.arange(pixels)[:, None]
    kernel = np.eye(pixels)
    if blur:
        kernel = np.exp(-0.5 * (distance / blur) ** 2) * (abs(distance) <= math.ceil(3 * blur))
    return (kernel / kernel.sum(1).max()).reshape(-1, stride, pixels).mean(1).astype(np.float32)

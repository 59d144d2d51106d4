"""FC-CLIP's own parts (Yu et al. 2023): the head that classifies masks by words, and pooling under masks.

The trunk is a frozen CLIP (`models.convnext`), the masks are Mask2Former's (`models.mask2former`).
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ovseg_jax.kernels.unit import unit
from ovseg_jax.models.mask2former import Mask2FormerHead, Mask2FormerOutput
from ovseg_jax.models.maskformer import cells_inside, linear_init

MAX_SCALE = 100.0


def pool_under(
    masks: Bool[Array, "*n h w"], features: Float[Array, "*n2 h w c"], product: str
) -> Float[Array, "*n c"]:
    """Averages features under masks, zero for an empty mask.

    Args:
      masks: the masks.
      features: the features.
      product: the einsum of both, such as "bnhw,bhwc->bnc".
    """
    total = jnp.einsum(product, masks.astype(features.dtype), features)
    return total / (masks.sum((-2, -1))[..., None] + 1e-8).astype(features.dtype)


class MaskClassifier(nn.Module):
    """The in-vocabulary head: an MLP of a query and of the mask features under its mask, into the space of texts.

    Attributes:
      dim: D of the space of texts.
      dtype: compute type.
    """

    dim: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, out: Mask2FormerOutput, image_size: Int[Array, "b 2"]
    ) -> tuple[Float[Array, "b l n d"], Float[Array, " d"], Float[Array, ""]]:
        """Embeds masks.

        Args:
          out: the outputs of `Mask2FormerHead`, of L layers.
          image_size: height and width of each image in pixels of the canvas.

        Returns:
          Unit vectors of the masks, the unit vector of "no object", and the factor from cosines to logits, at most 100.
        """
        valid = cells_inside(image_size, out.pixels.shape[1:3], "c2")[:, None, None]
        masks = jax.lax.stop_gradient(out.mask_logits > 0) & valid
        pooled = pool_under(masks, out.pixels.astype(self.dtype), "blnhw,bhwc->blnc")
        width = out.queries.shape[-1]

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, dtype=self.dtype, kernel_init=linear_init, name=name)

        pooled = nn.LayerNorm(1e-5, dtype=self.dtype, name="pooled_norm")(pooled)
        x = dense(width, "pooled")(pooled) + out.queries
        for i in range(2):
            x = nn.relu(dense(width, f"mlp_{i}")(x))
        void = self.param("void", nn.initializers.normal(1.0), (self.dim,))
        scale = self.param("scale", nn.initializers.constant(math.log(1 / 0.07)), ())
        embedded = dense(self.dim, "mlp_2")(x).astype(jnp.float32)
        return unit(embedded), unit(void), jnp.minimum(jnp.exp(scale), MAX_SCALE)


class FCClipHead(nn.Module):
    """Everything behind FC-CLIP's trunk: masks, and their embeddings."""

    masks: Mask2FormerHead
    classifier: MaskClassifier

    def __call__(
        self,
        features: dict[str, Float[Array, "b _h _w _c"]],
        image_size: Int[Array, "b 2"],
        train: bool = False,
        deep: bool = False,
    ) -> tuple[Mask2FormerOutput, tuple[Array, Array, Array]]:
        """Returns the outputs of both parts, see there."""
        out = self.masks(features, image_size, train, deep)
        return out, self.classifier(out, image_size)

"""Mask losses."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num


def dice_coefficient(
    pred: Float[Array, "b n p"], target: Float[Array, "b m p"], eps: float = 1e-3
) -> Float[Array, "b n m"]:
    """Computes the Dice coefficient of every pair, `2 Σ s t / (Σ s² + Σ t²)` (V-Net, cited by OpenSeg).

    Args:
      pred: soft masks in [0, 1].
      target: masks in [0, 1].
      eps: added to both sides of the fraction, so that two empty masks score 1.
    """
    overlap = jnp.einsum("bnp,bmp->bnm", pred, target, preferred_element_type=jnp.float32)
    size = jnp.sum(jnp.square(pred), -1)[:, :, None] + jnp.sum(jnp.square(target), -1)[:, None, :]
    return (2 * overlap + eps) / (size + eps)


def best_match_dice_loss(
    mask_logits: Float[Array, "b n h w"],
    masks: Num[Array, "b m hm wm"],
    mask_valid: Bool[Array, "b m"],
    weight: Float[Array, " b"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Computes OpenSeg's mask loss (papers/004, eq. 1): `1/M Σ_j (1 - max_i Dice(s_i, t_j))`.

    Each labelled mask trains its best proposal only; other proposals get no loss and no "no object" label, since the
    labels are one of many ways to segment an image.

    Args:
      mask_logits: logits of the proposals, which are resized bilinearly to the labels' grid.
      masks: labelled masks as coverage in 0..255 (uint8), or in [0, 1] (floating).
      mask_valid: False for padding.
      weight: weight of each image; an image of weight 0 or without a valid mask does not count.

    Returns:
      (weighted sum over images, number of images).
    """
    b, n, _, _ = mask_logits.shape
    m, hm, wm = masks.shape[1:]
    logits = mask_logits.astype(jnp.float32)
    if logits.shape[2:] != (hm, wm):
        logits = jax.image.resize(logits, (b, n, hm, wm), "bilinear")
    target = masks.astype(jnp.float32)
    if jnp.issubdtype(masks.dtype, jnp.integer):
        target = target / 255
    dice = dice_coefficient(jax.nn.sigmoid(logits).reshape(b, n, -1), target.reshape(b, m, -1))
    valid = mask_valid.astype(jnp.float32)
    per_image = jnp.sum((1 - dice.max(1)) * valid, -1) / jnp.maximum(valid.sum(-1), 1)
    counts = ((valid.sum(-1) > 0) & (weight > 0)).astype(jnp.float32)
    return jnp.sum(per_image * weight * counts), counts.sum()

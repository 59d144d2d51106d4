"""MaskFormer's losses (Cheng et al. 2021, 3.2): each mask is matched with one query, and this query learns it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Num

ALPHA = 0.25
"""The weight of pixels of the mask in the focal loss (Lin et al. 2017); the others have 1 - ALPHA."""
_EXACT = jax.lax.Precision.HIGHEST


class Weights(NamedTuple):
    """MaskFormer's weights of the parts, in costs and losses alike (the authors' configs)."""

    focal: float = 20.0
    dice: float = 1.0
    label: float = 1.0


class PointWeights(NamedTuple):
    """Mask2Former's weights of the parts, in costs and losses alike (the authors' configs)."""

    mask: float = 5.0
    dice: float = 5.0
    label: float = 2.0


PAPER = Weights()


class Matched(NamedTuple):
    """The losses of L layers, as sums over a batch.

    Attributes:
      mask: [L] losses of the pixels of matched masks, each a mean: MaskFormer's focal loss, Mask2Former's entropy.
      dice: [L] Dice losses of matched masks.
      masks: the number of masks, in images with a weight above 0.
      label: [L] weighted cross entropies of all queries; None without classes.
      label_weight: [L] the sum of the weights of these.
      query: [B L M] the query of each mask; meaningless for masks that are not valid.
    """

    mask: Float[Array, " l"]
    dice: Float[Array, " l"]
    masks: Float[Array, ""]
    label: Float[Array, " l"] | None
    label_weight: Float[Array, " l"] | None
    query: Int[Array, "b l m"]

    def total(self, weights: Weights | PointWeights = PAPER) -> Float[Array, ""]:
        """Returns the loss: weighted means over masks (at least 1) and queries, summed over the layers."""
        mask, dice, label = weights
        loss = (mask * self.mask + dice * self.dice).sum() / jnp.maximum(self.masks, 1)
        if self.label is None or self.label_weight is None:
            return loss
        return loss + label * (self.label / jnp.maximum(self.label_weight, 1e-6)).sum()


def matched_losses(
    mask_logits: Float[Array, "b l n h w"],
    masks: Num[Array, "b m hm wm"],
    mask_valid: Bool[Array, "b m"],
    weight: Float[Array, " b"],
    *,
    class_logits: Float[Array, "b l n k"] | None = None,
    classes: Int[Array, "b m"] | None = None,
    inside: Bool[Array, "b hm wm"] | None = None,
    costs: Weights = PAPER,
    no_object: float = 0.1,
    batch_axes: tuple[str, ...] = (),
) -> Matched:
    """Matches the masks with queries, for each layer on its own, and computes the losses.

    Costs are computed at the size of the logits, with masks by their nearest pixels; losses at the size of the masks,
    with logits interpolated bilinearly, as the authors do. Without classes, queries without a mask get no loss.

    Args:
      mask_logits: logits of N queries after each of L layers.
      masks: labelled masks as coverage in 0..255 (uint8), or in [0, 1] (floating).
      mask_valid: False for padding.
      weight: factor on the losses of each image's masks, 0 for padding.
      class_logits: logits of the classes, the last of which is "no object".
      classes: the class of each mask; needed with class logits.
      inside: False for pixels of the masks' grid outside of the image; None means that images fill it.
      costs: weights of the costs.
      no_object: weight of "no object" in the cross entropy.
      batch_axes: mesh axes over which the batch is sharded; each device then matches its own images.
    """
    b, layers, n, h, w = mask_logits.shape
    m, hm, wm = masks.shape[1:]
    logits, target = mask_logits.astype(jnp.float32), masks.astype(jnp.float32)
    if jnp.issubdtype(masks.dtype, jnp.integer):
        target = target / 255
    cover = jnp.ones((b, 1, hm, wm)) if inside is None else inside[:, None].astype(jnp.float32)
    fixed = jax.lax.stop_gradient(logits).reshape(b, layers, n, h * w)
    small, small_cover = (nearest(x, (h, w)).reshape(b, -1, h * w) for x in (target, cover))
    cost = mask_costs(fixed, small, small_cover[:, 0], costs)
    if class_logits is not None:
        assert classes is not None
        cost = cost + costs.label * class_costs(class_logits, classes)
    query, matched = match(cost, mask_valid, batch_axes)

    # A product instead of a gather, whose gradient would be a scatter.
    chosen = (query[..., None] == jnp.arange(n)) & matched[..., None]
    logits = jnp.einsum("blmn,blnhw->blmhw", chosen.astype(jnp.float32), logits, precision=_EXACT)
    if (h, w) != (hm, wm):
        logits = jax.image.resize(logits, (b, layers, m, hm, wm), "bilinear")
    focal, dice = mask_losses(logits, target[:, None], cover[:, None])
    each = matched * weight[:, None, None]
    count = jnp.sum(mask_valid & (weight > 0)[:, None]).astype(jnp.float32)
    sums = (focal * each).sum((0, 2)), (dice * each).sum((0, 2)), count
    if class_logits is None:
        return Matched(*sums, None, None, query)
    assert classes is not None
    return Matched(*sums, *class_losses(class_logits, classes, chosen, weight, no_object), query)


def class_costs(class_logits: Float[Array, "b l n k"], classes: Int[Array, "b m"]) -> Float[Array, "b l n m"]:
    """Computes the negative probability of each mask's class in each query; without a gradient."""
    share = jax.nn.softmax(jax.lax.stop_gradient(class_logits).astype(jnp.float32))
    index = jnp.maximum(classes, 0)[:, None, None]
    return -jnp.take_along_axis(share, jnp.broadcast_to(index, (*share.shape[:3], classes.shape[1])), -1)


def class_losses(
    class_logits: Float[Array, "b l n k"],
    classes: Int[Array, "b m"],
    chosen: Bool[Array, "b l m n"],
    weight: Float[Array, " b"],
    no_object: float,
) -> tuple[Float[Array, " l"], Float[Array, " l"]]:
    """Computes the weighted cross entropies of all queries, and the sums of their weights, for each layer.

    Args:
      class_logits: logits of the classes, the last of which is "no object".
      classes: the class of each mask.
      chosen: whether a query is that of a mask; one without a mask is "no object".
      weight: weight of each image.
      no_object: weight of "no object".
    """
    last = class_logits.shape[-1] - 1
    label = jnp.einsum("blmn,bm->bln", chosen.astype(jnp.int32), classes) + last * ~chosen.any(2)
    import optax  # 0.1 s at the start of every command, and only training needs it

    entropy = optax.softmax_cross_entropy_with_integer_labels(class_logits.astype(jnp.float32), label)
    share = jnp.where(label == last, no_object, 1.0) * weight[:, None, None]
    return (entropy * share).sum((0, 2)), share.sum((0, 2))


def nearest(x: Float[Array, "b m hm wm"], size: tuple[int, int]) -> Float[Array, "b m h w"]:
    """Resizes by picking pixel floor(i * old / new), as PyTorch's `interpolate` does by default."""
    for axis, new in zip((2, 3), size, strict=True):
        if (old := x.shape[axis]) != new:
            x = jnp.take(x, np.arange(new) * old // new, axis=axis)
    return x


def mask_costs(
    logits: Float[Array, "b l n p"],
    masks: Float[Array, "b m p"],
    inside: Float[Array, "b p"],
    weights: Weights,
) -> Float[Array, "b l n m"]:
    """Computes the weighted focal and Dice losses of all pairs of a query and a mask, in one matrix product.

    The focal loss is linear in the mask: for coverages between 0 and 1 it mixes the losses of both labels.
    """
    n = logits.shape[2]
    probability = jax.nn.sigmoid(logits) * inside[:, None, None]
    positive = ALPHA * jnp.square(1 - probability) * jax.nn.softplus(-logits)
    negative = (1 - ALPHA) * jnp.square(probability) * jax.nn.softplus(logits)
    both = jnp.concatenate([positive - negative, probability], 2)
    products = jnp.einsum("blnp,bmp->blnm", both, masks * inside[:, None], precision=_EXACT)
    pixels = jnp.maximum(inside.sum(-1), 1)[:, None, None, None]
    focal = (products[:, :, :n] + negative.sum(-1)[..., None]) / pixels
    size = probability.sum(-1)[..., None] + (masks * inside[:, None]).sum(-1)[:, None, None]
    dice = 1 - (2 * products[:, :, n:] + 1) / (size + 1)
    return weights.focal * focal + weights.dice * dice


def mask_losses(
    logits: Float[Array, "b l m h w"], masks: Float[Array, "b 1 m h w"], inside: Float[Array, "b 1 1 h w"]
) -> tuple[Float[Array, "b l m"], Float[Array, "b l m"]]:
    """Computes the focal loss, a mean over the pixels inside, and the Dice loss of each mask."""
    probability = jax.nn.sigmoid(logits)
    entropy = jax.nn.softplus(logits) - logits * masks
    wrong = probability + masks - 2 * probability * masks
    weight = (1 - ALPHA + (2 * ALPHA - 1) * masks) * inside
    pixels = jnp.maximum(inside.sum((3, 4)), 1)
    focal = (weight * jnp.square(wrong) * entropy).sum((3, 4)) / pixels
    overlap = (probability * masks * inside).sum((3, 4))
    size = (probability * inside).sum((3, 4)) + (masks * inside).sum((3, 4))
    return focal, 1 - (2 * overlap + 1) / (size + 1)


def match(
    cost: Float[Array, "b l n m"], mask_valid: Bool[Array, "b m"], batch_axes: tuple[str, ...] = ()
) -> tuple[Int[Array, "b l m"], Bool[Array, "b l m"]]:
    """Finds the query of each valid mask, each query used at most once, with the lowest total cost.

    If there are more valid masks than queries, some masks stay without one. Infinite and undefined costs count as
    higher than all others.

    Args:
      cost: of each query for each mask.
      mask_valid: False for padding.
      batch_axes: mesh axes over which the batch is sharded.

    Returns:
      The query of each mask, and whether the mask has one.
    """

    from optax.assignment import hungarian_algorithm  # as in `class_losses`

    def one(cost: Array, valid: Array) -> tuple[Array, Array]:
        n, m = cost.shape
        usable = jnp.isfinite(cost)
        highest = jnp.max(cost, initial=0.0, where=usable & valid)
        # Padding costs the same for every query, so it does not change which queries the masks get; as it costs most,
        # masks come first if queries lack.
        cost = jnp.where(valid, jnp.where(usable, cost, highest + 1), highest + 2)
        rows, columns = hungarian_algorithm(cost)
        query = jnp.full(m, n).at[columns].set(rows)
        return query, valid & (query < n)

    def local(cost: Array, valid: Array) -> tuple[Array, Array]:
        return jax.vmap(jax.vmap(one, (0, None)))(cost, valid)

    if batch_axes:
        # Loops whose length depends on data would synchronise all devices in each round.
        share = PartitionSpec(batch_axes)
        local = jax.shard_map(local, in_specs=(share, share), out_specs=(share, share), check_vma=False)
    return local(cost, mask_valid)

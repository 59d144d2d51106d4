"""Mask2Former's losses at sampled points (Cheng et al. 2022, 3.3 and 4.1), after PointRend (Kirillov et al. 2020).

Matching and losses see masks at a few thousand points, drawn anew for each layer, in place of all pixels. Points are
shares of the image's width and height, so that the mask logits and the labelled masks may have different strides.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num, PRNGKeyArray

from ovseg_jax.kernels.bilinear import sample
from ovseg_jax.kernels.smallest import smallest
from ovseg_jax.losses.matching import Matched, PointWeights, class_costs, class_losses, match

_EXACT = jax.lax.Precision.HIGHEST


class Points(NamedTuple):
    """How points are drawn; the defaults are the authors'.

    Attributes:
      number: points of a mask: 112 x 112.
      oversample: candidates for each point of the losses.
      importance: the share of the points that are the candidates with the logits nearest to zero.
    """

    number: int = 12544
    oversample: float = 3.0
    importance: float = 0.75


PAPER, PAPER_POINTS = PointWeights(), Points()


class Draws(NamedTuple):
    """Random points of one layer in [0, 1), as (x, y).

    Attributes:
      matching: for the matching, shared by all masks of an image.
      candidates: for the losses; the most uncertain are used.
      others: for the losses; all are used.
    """

    matching: Float[Array, "b p 2"]
    candidates: Float[Array, "b m c 2"]
    others: Float[Array, "b m r 2"]


def draw(rng: PRNGKeyArray, layer: Int[Array, ""], shape: tuple[int, int], points: Points) -> Draws:
    """Draws the points of one layer.

    An image's points depend on its place in the batch, and a mask's on its place in the image, not on how many there
    are.

    Args:
      rng: the key of the step.
      layer: the number of the layer.
      shape: images and masks of each image.
      points: how many.
    """
    images, masks = shape
    uncertain = int(points.importance * points.number)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(rng, layer), jnp.arange(images))

    def uniform(key: Array, number: int) -> Array:
        return jax.random.uniform(key, (number, 2))

    def of_mask(key: Array, mask: Array) -> tuple[Array, Array]:
        one, other = jax.random.split(jax.random.fold_in(key, mask + 1))
        return uniform(one, int(points.number * points.oversample)), uniform(other, points.number - uncertain)

    matching = jax.vmap(lambda key: uniform(jax.random.fold_in(key, 0), points.number))(keys)
    candidates, others = jax.vmap(jax.vmap(of_mask, (None, 0)), (0, None))(keys, jnp.arange(masks))
    return Draws(matching, candidates, others)


def point_losses(
    embeddings: Float[Array, "b l n c"],
    pixels: Float[Array, "b h w c"],
    masks: Num[Array, "b m hm wm"],
    mask_valid: Bool[Array, "b m"],
    weight: Float[Array, " b"],
    rng: PRNGKeyArray,
    *,
    class_logits: Float[Array, "b l n k"],
    classes: Int[Array, "b m"],
    filled: Float[Array, "b 2"] | None = None,
    costs: PointWeights = PAPER,
    points: Points = PAPER_POINTS,
    no_object: float = 0.1,
    batch_axes: tuple[str, ...] = (),
) -> Matched:
    """Matches the masks with queries, for each layer on its own, and computes the losses, both at points.

    Mask logits are the products of embeddings and pixels, computed only at the points of the matching and for the
    matched queries.

    Args:
      embeddings: the embeddings of N masks after each of L layers.
      pixels: the mask features.
      masks: labelled masks as coverage in 0..255 (uint8), or in [0, 1] (floating).
      mask_valid: False for padding.
      weight: factor on the losses of each image's masks, 0 for padding.
      rng: the key for the points, see `draw`.
      class_logits: logits of the classes, the last of which is "no object".
      classes: the class of each mask.
      filled: the share of the canvas's height and width that each image fills; None means all.
      costs: weights of the costs.
      points: how points are drawn.
      no_object: weight of "no object" in the cross entropy.
      batch_axes: mesh axes over which the batch is sharded; each device then matches its own images.

    Returns:
      The losses; `mask` is the binary cross entropy.
    """
    b, layers, n, _ = embeddings.shape
    m = masks.shape[1]
    pixels = pixels.astype(jnp.float32)
    filled = jnp.ones((b, 2)) if filled is None else filled
    fixed = jax.lax.stop_gradient(pixels)
    in_turn = jnp.moveaxis(embeddings, 1, 0).astype(jnp.float32), jnp.arange(layers)

    def target_at(places: Float[Array, "b m p 2"]) -> Float[Array, "b m p"]:
        whole = 255 if jnp.issubdtype(masks.dtype, jnp.integer) else 1
        return at_points(masks, places, filled) / whole

    def cost_of(inputs: tuple[Array, Array]) -> Array:
        embedding, layer = inputs
        places = draw(rng, layer, (b, m), points).matching
        there = sample(fixed, in_cells(places, fixed.shape[1:3], filled), cells(fixed.shape[1:3], filled))
        logits = jnp.einsum("bnc,bpc->bnp", embedding, there, precision=_EXACT)
        shared = jnp.broadcast_to(places[:, None], (b, m, *places.shape[1:]))
        return point_costs(logits, target_at(shared), costs)

    cost = jnp.moveaxis(jax.lax.map(cost_of, jax.lax.stop_gradient(in_turn)), 0, 1)
    query, matched = match(cost + costs.label * class_costs(class_logits, classes), mask_valid, batch_axes)
    chosen = (query[..., None] == jnp.arange(n)) & matched[..., None]  # [b l m n]

    def logits_of(embedding: Array, own: Array, pixels: Array) -> Array:
        # A product instead of a gather, whose gradient would be a scatter.
        embedding = jnp.einsum("bmn,bnc->bmc", own.astype(jnp.float32), embedding, precision=_EXACT)
        return jnp.einsum("bmc,bhwc->bmhw", embedding, pixels, precision=_EXACT)

    def places_of(inputs: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        embedding, layer, own = inputs
        drawn = draw(rng, layer, (b, m), points)
        certain = jnp.abs(at_points(logits_of(embedding, own, fixed), drawn.candidates, filled))
        best = smallest(certain, int(points.importance * points.number))
        places = jnp.take_along_axis(drawn.candidates, best[..., None], 2)
        places = jnp.concatenate([places, drawn.others], 2)
        return jnp.moveaxis(places, -1, 0), target_at(places)  # kept with long rows, which TPUs do not pad

    @jax.checkpoint
    def losses_of(inputs: tuple[Array, ...]) -> tuple[Array, Array]:
        embedding, own, places, target = inputs
        logits = logits_of(embedding, own, pixels)
        return mask_losses(at_points(logits, jnp.moveaxis(places, 0, -1), filled), target)

    own = jnp.moveaxis(chosen, 1, 0)
    # Chosen outside of `losses_of`, so that the backward pass does not choose the points again.
    found = jax.lax.stop_gradient(jax.lax.map(places_of, jax.lax.stop_gradient((*in_turn, own))))
    entropy, dice = jax.lax.map(losses_of, (in_turn[0], own, *found))  # [l b m]
    each = jnp.moveaxis(matched, 1, 0) * weight[:, None]
    count = jnp.sum(mask_valid & (weight > 0)[:, None]).astype(jnp.float32)
    sums = (entropy * each).sum((1, 2)), (dice * each).sum((1, 2)), count
    return Matched(*sums, *class_losses(class_logits, classes, chosen, weight, no_object), query)


def cells(shape: tuple[int, ...], filled: Float[Array, "b 2"]) -> Int[Array, "b 2"]:
    """Returns the columns and rows of the cells that begin within each image."""
    side = np.array(shape[::-1])
    # Shares are quotients of integers: an image that ends with a cell must not gain another by rounding.
    return jnp.ceil(filled[:, ::-1] * side - 1e-3).astype(jnp.int32)


def in_cells(
    points: Float[Array, "b *n 2"], shape: tuple[int, ...], filled: Float[Array, "b 2"]
) -> Float[Array, "b *n 2"]:
    """Returns points of an image as places on a grid over its canvas, see `kernels.bilinear`."""
    side = filled[:, ::-1] * np.array(shape[::-1])
    return points * side.reshape(len(side), *(1,) * (points.ndim - 2), 2) - 0.5


def at_points(
    maps: Num[Array, "b m h w"], points: Float[Array, "b m p 2"], filled: Float[Array, "b 2"]
) -> Float[Array, "b m p"]:
    """Samples each map at its own points."""
    b, m, *shape = maps.shape
    count = jnp.broadcast_to(cells((shape[0], shape[1]), filled)[:, None], (b, m, 2))
    return sample(maps[..., None], in_cells(points, (shape[0], shape[1]), filled), count)[..., 0]


def point_costs(
    logits: Float[Array, "b n p"], masks: Float[Array, "b m p"], weights: PointWeights
) -> Float[Array, "b n m"]:
    """Computes the weighted binary cross entropy, a mean over points, and Dice loss of all pairs."""
    n, p = logits.shape[1:]
    probability = jax.nn.sigmoid(logits)
    products = jnp.einsum("bnp,bmp->bnm", jnp.concatenate([logits, probability], 1), masks, precision=_EXACT)
    # The entropy for a coverage t is softplus(x) - t * x.
    entropy = (jax.nn.softplus(logits).sum(-1)[..., None] - products[:, :n]) / p
    size = probability.sum(-1)[..., None] + masks.sum(-1)[:, None]
    return weights.mask * entropy + weights.dice * (1 - (2 * products[:, n:] + 1) / (size + 1))


def mask_losses(
    logits: Float[Array, "b m p"], masks: Float[Array, "b m p"]
) -> tuple[Float[Array, "b m"], Float[Array, "b m"]]:
    """Computes the binary cross entropy, a mean over points, and the Dice loss of each mask."""
    probability = jax.nn.sigmoid(logits)
    entropy = (jax.nn.softplus(logits) - logits * masks).mean(-1)
    overlap, size = (probability * masks).sum(-1), probability.sum(-1) + masks.sum(-1)
    return entropy, 1 - (2 * overlap + 1) / (size + 1)

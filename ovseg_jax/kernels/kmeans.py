"""k-means on the tokens of each image of a batch (Lloyd 1982), compiled with the step that uses it."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

STARTS = ("farthest", "kmeans++")


class Clusters(NamedTuple):
    """The clusters of each image.

    Attributes:
      labels: the cluster of each token, -1 at padding.
      centres: the mean of each cluster's tokens before the last assignment; an empty one keeps its last place.
      sizes: the number of tokens in each cluster; 0 if it is empty, which it stays only if an image has fewer
        different tokens than clusters, or if the iterations end first.
      inertia: the sum over the tokens of the squared distance to their centre.
    """

    labels: Int32[Array, "b p"]
    centres: Float[Array, "b k d"]
    sizes: Float[Array, "b k"]
    inertia: Float[Array, " b"]


def kmeans(
    tokens: Float[Array, "b p d"],
    valid: Bool[Array, "b p"],
    clusters: int,
    *,
    start: str | Float[Array, "b k d"] = "farthest",
    iterations: int = 12,
    rng: Array | None = None,
) -> Clusters:
    """Clusters the tokens of each image on its own, in float32.

    Every iteration assigns tokens to the nearest centre (the first of equal ones), then moves each centre to the mean
    of its tokens; a last assignment follows. If clusters are empty, the first of them takes the token that is farthest
    from its centre, as in scikit-learn, one cluster in each iteration.

    Args:
      tokens: the tokens.
      valid: False at padding, which has no influence.
      clusters: K.
      start: the first centres. "farthest": the token nearest to the mean, then in turn the token farthest from the
        chosen ones (Gonzalez 1985), without a random draw; "kmeans++": the best of 2 + log K tokens drawn in
        proportion to the squared distance from the chosen ones (Arthur & Vassilvitskii 2007), as in scikit-learn; or
        the centres themselves.
      iterations: how often the centres move.
      rng: for "kmeans++". All images share its draws, so that a result does not depend on the place in the batch.

    Raises:
      ValueError: `start` is unknown, or "kmeans++" without `rng`.
    """
    # Distances by differences of large squares would lose the digits that decide: the mean is subtracted first.
    x = jnp.where(valid[..., None], tokens.astype(jnp.float32), 0)
    count = jnp.maximum(valid.sum(1), 1)[:, None, None]
    mean = x.sum(1, keepdims=True) / count
    x = jnp.where(valid[..., None], x - mean, 0)
    x = jnp.swapaxes(x, 1, 2)  # [B D P]: the long axis last, along which processors compute
    if not isinstance(start, str):
        centres = start.astype(jnp.float32) - mean
    elif start == "farthest":
        centres = _farthest(x, valid, clusters)
    elif start == "kmeans++" and rng is not None:
        centres = _plus_plus(x, valid, clusters, rng)
    else:
        raise ValueError(f"start={start!r} is not one of {', '.join(STARTS)}, or it needs rng")

    def iterate(_: Array, centres: Float[Array, "b k d"]) -> Float[Array, "b k d"]:
        labels, distance = _assign(x, valid, centres)
        member = _members(labels, clusters)
        size = member.sum(2)
        empty = size == 0
        # The farthest token changes to the first empty cluster; a token at its centre stays.
        distance = jnp.where(valid, distance, 0)
        moved = (jnp.arange(x.shape[2]) == distance.argmax(1)[:, None]) & (distance > 0)
        moved &= empty.any(1, keepdims=True)
        labels = jnp.where(moved, empty.argmax(1)[:, None], labels)
        member = _members(labels, clusters)
        size = member.sum(2)
        total = jnp.einsum("bkp,bdp->bkd", member, x, precision=jax.lax.Precision.HIGHEST)
        return jnp.where(size[..., None] > 0, total / jnp.maximum(size, 1)[..., None], centres)

    centres = jax.lax.fori_loop(0, iterations, iterate, centres)
    labels, distance = _assign(x, valid, centres)
    sizes = _members(labels, clusters).sum(2)
    return Clusters(labels, centres + mean, sizes, jnp.where(valid, distance, 0).sum(1))


def _assign(
    x: Float[Array, "b d p"], valid: Bool[Array, "b p"], centres: Float[Array, "b k d"]
) -> tuple[Int32[Array, "b p"], Float[Array, "b p"]]:
    """Returns the nearest centre of each token, -1 at padding, and the squared distance to it."""
    product = jnp.einsum("bkd,bdp->bkp", centres, x, precision=jax.lax.Precision.HIGHEST)
    score = jnp.square(centres).sum(2)[..., None] - 2 * product
    labels = jnp.where(valid, score.argmin(1), -1).astype(jnp.int32)
    return labels, jnp.maximum(score.min(1) + jnp.square(x).sum(1), 0)


def _members(labels: Int32[Array, "b p"], clusters: int) -> Float[Array, "b k p"]:
    return (labels[:, None] == jnp.arange(clusters)[:, None]).astype(jnp.float32)


def _token(x: Float[Array, "b d p"], index: Int32[Array, " b"]) -> Float[Array, "b d"]:
    return jnp.take_along_axis(x, index[:, None, None], axis=2)[..., 0]


def _farthest(x: Float[Array, "b d p"], valid: Bool[Array, "b p"], clusters: int) -> Float[Array, "b k d"]:
    """Chooses the token nearest to the mean, which is 0, then the token farthest from all chosen ones."""
    first = jnp.where(valid, jnp.square(x).sum(1), jnp.inf).argmin(1)
    return _chosen(x, valid, clusters, first, lambda _, distance: distance.argmax(1))


def _plus_plus(
    x: Float[Array, "b d p"], valid: Bool[Array, "b p"], clusters: int, rng: Array
) -> Float[Array, "b k d"]:
    """Draws tokens by the squared distance from the chosen ones; takes the one that leaves the smallest sum of it."""
    draws = jax.random.uniform(rng, (clusters, 2 + int(math.log(clusters))))

    def drawn(draw: Float[Array, ""], weight: Float[Array, "b p"]) -> Int32[Array, " b"]:
        """Inverts the cumulative distribution, so that padding does not change the choice."""
        total = jnp.cumsum(weight, axis=1)
        return (total <= draw * total[:, -1:]).sum(1).clip(0, x.shape[2] - 1)

    def best(k: Array, distance: Float[Array, "b p"]) -> Int32[Array, " b"]:
        tokens = jax.vmap(lambda draw: drawn(draw, distance))(draws[k])
        left = jax.vmap(lambda token: jnp.minimum(distance, _away(x, valid, _token(x, token))).sum(1))(tokens)
        return jnp.take_along_axis(tokens, left.argmin(0)[None], axis=0)[0]

    return _chosen(x, valid, clusters, drawn(draws[0, 0], valid.astype(jnp.float32)), best)


def _away(
    x: Float[Array, "b d p"], valid: Bool[Array, "b p"], token: Float[Array, "b d"]
) -> Float[Array, "b p"]:
    """Returns the squared distance of each token from one, 0 at padding."""
    return jnp.where(valid, jnp.square(x - token[..., None]).sum(1), 0)


def _chosen(x, valid, clusters, first, choose) -> Float[Array, "b k d"]:
    """Chooses tokens one by one; `choose(k, distance)` sees the squared distance to the nearest chosen one, [B P]."""
    token = _token(x, first)

    def add(distance: Float[Array, "b p"], k: Array) -> tuple[Array, Array]:
        token = _token(x, choose(k, distance))
        return jnp.minimum(distance, _away(x, valid, token)), token

    _, others = jax.lax.scan(add, _away(x, valid, token), jnp.arange(1, clusters))
    return jnp.concatenate([token[:, None], jnp.swapaxes(others, 0, 1)], axis=1)

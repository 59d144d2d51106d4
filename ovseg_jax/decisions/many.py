"""The best of many thousand names for every pixel, exactly, without computing most of their scores.

A name's score at a pixel is sum_n w_n s_n, with its weights w and masks s >= 0, so that sum_n u_n s_n is a bound on it
for any u >= w. Names come in groups, with u the largest of their weights. A group is left out of a block of pixels if,
at each of them, its bound is below the score of a name that was scored before. Bounds are tight if the names of a group
score high at the same pixels, and names with high scores should be scored first (the seeds); both are chosen by the
scores of all names at a few pixels. In a trained model almost every group is left out. Where bounds do not help, as
with random weights, all names are scored, in about the time that this takes without bounds.

Channels of pixel features may be negative. But a name's score at a pixel is a mean of its scores in the cells of the
grid around it, with weights s >= 0: there u holds the largest scores of a group's names in each cell. (The method is
ours.)
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ovseg_jax.kernels.resize import split_rows
from ovseg_jax.protocols import PRECISION

BLOCK = 128  # names that are scored at once
GROUP = 64  # names that share a bound
SEEDS = 128  # names that are scored first
SAMPLES = 64  # pixels at which all names are scored
MOST_REACHED = (
    0.25  # bounds are used if, in a smaller share of pairs of group and pixel, the bound reaches the best
)


class Groups(NamedTuple):
    """Names in groups, the seeds first.

    Attributes:
      name: [G GROUP] the number of each name; T for padding.
      bound: [G N] for each mask or cell, the largest weight or score of a group's names that may win in some view.
      seeds: the number of the first groups that hold the seeds.
      useful: False where the bounds would leave out few names; they are then not computed.
    """

    name: Int[Array, "g size"]
    bound: Float[Array, "g n"]
    seeds: Int[Array, ""]
    useful: Bool[Array, ""] | bool = True


def best_of_masks(
    weights: Float[Array, "t n"],
    masks: Float[Array, "n p"],
    views: Bool[Array, "v t"],
    wanted: Bool[Array, "p"],
) -> tuple[Int[Array, "v p"], Float[Array, "v p"], Int[Array, ""]]:
    """Returns the best name of each pixel and its score, as scoring all names does: among equal ones the first.

    The third result is the number of names that were scored at all pixels.

    Args:
      weights: finite weights of every name for every mask.
      masks: at least 0.
      views: the names that may win, in each view.
      wanted: pixels whose result is used; others get any.
    """
    cover = masks.sum(0)
    covered = wanted & (cover > 0)
    at = _sample(masks.shape[1], SAMPLES)
    y = jnp.matmul(weights, masks[:, at], precision=PRECISION)
    name, seeds = _grouped(y, cover[at], views, covered[at])
    real = views.any(0).at[name].get(mode="fill", fill_value=False)
    # Not infinite, since a mask may be 0.
    bound = jnp.where(real[..., None], weights.at[name].get(mode="clip"), -1e30).max(1)
    lift = lambda bound: jnp.matmul(bound, masks, precision=PRECISION)
    error = _rounding(masks) * jnp.abs(weights).max() * cover
    name, top, scored = best_of_many(weights, masks, views, covered, Groups(name, bound, seeds), lift, error)
    # Where all masks are 0, so are all scores.
    empty = views.any(1)[:, None] & (cover == 0)
    first = views.argmax(1).astype(jnp.int32)[:, None]
    return jnp.where(empty, first, name), jnp.where(empty, 0, top), scored


def groups_of_grid(
    weights: Float[Array, "t c"], cells: Float[Array, "c n"], views: Bool[Array, "v t"], width: int
) -> Groups:
    """Groups the names by their scores in the cells of a grid of pixel features, with rows of `width` cells.

    Whether bounds are useful is measured in the middle between four cells, where they are loosest: a name's score there
    is the mean of its scores in the four cells, but a group's bound is the mean of four maxima.
    """
    count = cells.shape[1]
    corners = _sample(max(1, count - width - 1), SAMPLES)
    at = np.stack([corners + step for step in (0, 1, width, width + 1)], 1).reshape(-1) % count
    may = views.any(0)
    y = jnp.where(may[:, None], jnp.matmul(weights, cells[:, at], precision=PRECISION), -1e30)
    name, seeds = _grouped(y, jnp.ones(len(at)), views, jnp.ones(len(at), bool))
    between = lambda y: y.reshape(len(y), -1, 4).mean(2)
    bound = jnp.where(name[..., None] < len(weights), y.at[name].get(mode="clip"), -1e30).max(1)
    reached = between(bound) >= between(y).max(0)
    useful = reached.mean() < MOST_REACHED

    def bounds(name: Int[Array, "b size"]) -> Float[Array, "b n"]:
        some = name.reshape(-1)
        y = jnp.matmul(weights.at[some].get(mode="clip"), cells, precision=PRECISION)
        y = jnp.where(may.at[some].get(mode="fill", fill_value=False)[:, None], y, -1e30)
        return y.reshape(*name.shape, -1).max(1)

    def computed() -> Float[Array, "g n"]:
        bound = jax.lax.map(bounds, split_rows(name, BLOCK // GROUP)).reshape(-1, count)
        return bound[: len(name)]

    bound = jax.lax.cond(useful, computed, lambda: jnp.zeros((len(name), count), cells.dtype))
    return Groups(name, bound, seeds, useful)


def grid_error(weights: Float[Array, "t c"], cells: Float[Array, "c n"], pixels: int) -> Float[Array, "p"]:
    """Returns the rounding error of scores of pixel features and of their bounds, for each pixel."""
    longest = jnp.linalg.norm(weights, axis=1).max() * jnp.linalg.norm(cells, axis=0).max()
    return jnp.full(pixels, _rounding(weights.T) * longest)


def best_of_many(
    weights: Float[Array, "t c"],
    maps: Float[Array, "c p"],
    views: Bool[Array, "v t"],
    wanted: Bool[Array, "p"],
    groups: Groups,
    lift: Callable[[Array], Array],
    error: Float[Array, "p"],
) -> tuple[Int[Array, "v p"], Float[Array, "v p"], Int[Array, ""]]:
    """Returns what `best_of_masks` does, for masks or channels of any sign.

    Args:
      weights, maps, views, wanted: see `best_of_masks`; scores are weights . maps.
      groups: the names in groups.
      lift: gives the bounds [B P] on the scores of groups from their rows [B N] of `Groups.bound`.
      error: the rounding error of scores and bounds together: a name that is equal must not be left out.
    """
    names = len(weights)
    some = views.any(1)
    per = BLOCK // GROUP
    count = len(groups.name)

    def score(chosen: Int[Array, "g"], stop: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        """Updates the best names by the first `stop` of the chosen groups, rounded up to whole blocks."""
        chosen = split_rows(chosen, per)

        def block(i: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
            number = groups.name[chosen[i]].reshape(-1)
            y = jnp.matmul(weights.at[number].get(mode="clip"), maps, precision=PRECISION)
            may = views.at[:, number].get(mode="fill", fill_value=False)
            y = jnp.where(may[..., None], y, -jnp.inf)
            top = y.max(1)
            which = jnp.where(y == top[:, None], number[:, None], names).min(1)
            name, least = best
            better = (top > least) | ((top == least) & (which < name))
            return jnp.where(better, which, name), jnp.where(better, top, least)

        return jax.lax.fori_loop(0, -(-stop // per), block, best)

    everything = jnp.arange(count, dtype=jnp.int32)
    start = jnp.full((len(views), maps.shape[1]), names, jnp.int32)
    best = start, jnp.full(start.shape, -jnp.inf, maps.dtype)
    best = score(everything, groups.seeds, best)
    least = jnp.where(some[:, None], best[1], jnp.inf).min(0) - error
    least = jnp.where(wanted, least, jnp.inf)
    # On CPU this is five times as fast as (lift(bound) >= least).any(1).
    reaches = lambda bound: ~((lift(bound) - least).max(1) < 0)
    left = jax.lax.map(reaches, split_rows(groups.bound, BLOCK)).reshape(-1)[:count]
    left &= everything >= groups.seeds
    some_left = left.sum()
    name, top = score(jnp.argsort(~left, stable=True).astype(jnp.int32), some_left, best)
    return jnp.where(top > -jnp.inf, name, 0), top, (groups.seeds + some_left) * GROUP


def _grouped(
    y: Float[Array, "t k"],
    cover: Float[Array, "k"],
    views: Bool[Array, "v t"],
    wanted: Bool[Array, "k"],
) -> tuple[Int[Array, "g size"], Int[Array, ""]]:
    """Groups the names by the sampled pixel at which each is closest to the best name, then by the gap to it.

    Args:
      y: the scores of the names at the sampled pixels.
      cover: the sum of the masks at each, by which gaps are divided.
      views: see `best_of_masks`.
      wanted: see `best_of_masks`.
    """
    names, count = y.shape
    y = jnp.where(views.any(0)[:, None], y, -jnp.inf)
    gap = jnp.where(wanted, (y.max(0) - y) / cover, jnp.inf)
    least = gap.min(1)
    place = jnp.where(gap == least[:, None], jnp.arange(count, dtype=jnp.int32), count).min(1)
    seed = (least <= -jax.lax.top_k(-least, min(SEEDS, names))[0][-1]) & (least < jnp.inf)
    keys = jnp.where(seed, -1, place), least, jnp.arange(names, dtype=jnp.int32)
    order = jax.lax.sort(keys, num_keys=2)[2]
    name = jnp.append(order, jnp.full(-names % GROUP, names, jnp.int32)).reshape(-1, GROUP)
    return name, -(-seed.sum() // GROUP)


def _sample(count: int, most: int) -> np.ndarray:
    return np.random.default_rng(0).choice(count, min(most, count), replace=False)


def _rounding(maps: Float[Array, "c p"]) -> float:
    """Returns twice the largest relative rounding error of a sum over all maps, for a score and a bound."""
    return (maps.shape[0] + 8) * 2 * float(jnp.finfo(maps.dtype).eps)

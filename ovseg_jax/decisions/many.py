"""The best of many thousand names for every pixel, exact, without computing most of their scores.

Masks are never negative, so that a name's score sum_n w_n s_n at a pixel is at most sum_n u_n s_n for any u >= w. Names
come in groups with u their largest weights; a group whose bound is below a score that some name has reached at every
pixel of a block is left out there. Good bounds need groups of names that are good at the same places, and scores to
compare with; both come from the scores of all names at a few pixels. In a trained model almost every group is left out.
Where no bound holds, as with random weights, all names are scored, for a few percent more than without bounds.
(The method is ours.)
"""

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


class _Groups(NamedTuple):
    """Names in groups, the seeds first.

    Attributes:
      name: [G GROUP] the number of each name; T for padding.
      bound: [G N] the largest weight of a group's names that may win in some view.
      seeds: the number of the first groups that hold the seeds.
    """

    name: Int[Array, "g size"]
    bound: Float[Array, "g n"]
    seeds: Int[Array, ""]


def best_of_many(
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
    names = len(weights)
    cover = masks.sum(0)
    some = views.any(1)
    groups = _grouped(weights, masks, views, wanted & (cover > 0))
    per = BLOCK // GROUP
    count = len(groups.name)

    def score(chosen: Int[Array, "g"], stop: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        """Updates the best names by the first `stop` of the chosen groups, rounded up to whole blocks."""
        chosen = split_rows(chosen, per)

        def block(i: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
            number = groups.name[chosen[i]].reshape(-1)
            y = jnp.matmul(weights.at[number].get(mode="clip"), masks, precision=PRECISION)
            may = views.at[:, number].get(mode="fill", fill_value=False)
            y = jnp.where(may[..., None], y, -jnp.inf)
            top = y.max(1)
            which = jnp.where(y == top[:, None], number[:, None], names).min(1)
            name, least = best
            better = (top > least) | ((top == least) & (which < name))
            return jnp.where(better, which, name), jnp.where(better, top, least)

        return jax.lax.fori_loop(0, -(-stop // per), block, best)

    everything = jnp.arange(count, dtype=jnp.int32)
    start = jnp.full((len(views), masks.shape[1]), names, jnp.int32)
    best = start, jnp.full(start.shape, -jnp.inf, masks.dtype)
    best = score(everything, groups.seeds, best)
    # Twice the rounding error of a score: a name that is equal must not be left out.
    error = (masks.shape[0] + 2) * 2 * jnp.finfo(masks.dtype).eps * jnp.abs(weights).max() * cover
    least = jnp.where(some[:, None], best[1], jnp.inf).min(0) - error
    least = jnp.where(wanted & (cover > 0), least, jnp.inf)

    def reaches(bound: Float[Array, "b n"]) -> Bool[Array, "b"]:
        # On CPU this is five times as fast as comparing and asking for any.
        return ~((jnp.matmul(bound, masks, precision=PRECISION) - least).max(1) < 0)

    left = jax.lax.map(reaches, split_rows(groups.bound, BLOCK)).reshape(-1)[:count]
    left &= everything >= groups.seeds
    some_left = left.sum()
    name, top = score(jnp.argsort(~left, stable=True).astype(jnp.int32), some_left, best)
    # Where all masks are 0, so are all scores.
    empty = some[:, None] & (cover == 0)
    first = views.argmax(1).astype(jnp.int32)[:, None]
    name, top = jnp.where(empty, first, name), jnp.where(empty, 0, top)
    return jnp.where(top > -jnp.inf, name, 0), top, (groups.seeds + some_left) * GROUP


def _grouped(
    weights: Float[Array, "t n"],
    masks: Float[Array, "n p"],
    views: Bool[Array, "v t"],
    wanted: Bool[Array, "p"],
) -> _Groups:
    """Groups the names by the pixel that they fit best, and by how far they are from the best name there."""
    names, pixels = len(weights), masks.shape[1]
    may = views.any(0)
    at = np.random.default_rng(0).choice(pixels, min(SAMPLES, pixels), replace=False)
    here = masks[:, at]
    y = jnp.where(may[:, None], jnp.matmul(weights, here, precision=PRECISION), -jnp.inf)
    gap = jnp.where(wanted[at], (y.max(0) - y) / here.sum(0), jnp.inf)
    least = gap.min(1)
    place = jnp.where(gap == least[:, None], jnp.arange(len(at), dtype=jnp.int32), len(at)).min(1)
    seed = (least <= -jax.lax.top_k(-least, min(SEEDS, names))[0][-1]) & (least < jnp.inf)
    keys = jnp.where(seed, -1, place), least, jnp.arange(names, dtype=jnp.int32)
    order = jax.lax.sort(keys, num_keys=2)[2]
    name = jnp.append(order, jnp.full(-names % GROUP, names, jnp.int32)).reshape(-1, GROUP)
    # Not infinite, since a mask may be 0.
    real = may.at[name].get(mode="fill", fill_value=False)
    bound = jnp.where(real[..., None], weights.at[name].get(mode="clip"), -1e30).max(1)
    return _Groups(name, bound, -(-seed.sum() // GROUP))

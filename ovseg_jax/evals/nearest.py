"""The classes nearest to an image, out of any number of classes, in bounded memory."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ovseg_jax.kernels.resize import row_block, split_rows
from ovseg_jax.protocols import Text
from ovseg_jax.vocab.classes import ClassList


def names_of(classes: ClassList) -> Int[np.ndarray, "n l"]:
    """Returns the positions of each class's names in `classes.flat()`, padded with the first one."""
    most = max(len(names) for names in classes.names)
    starts = np.cumsum([0, *(len(names) for names in classes.names[:-1])])
    counts = np.array([len(names) for names in classes.names])
    column = np.arange(most)
    return (starts[:, None] + np.where(column < counts[:, None], column, 0)).astype(np.int32)


def nearest_classes(
    score: Callable[[Float[Array, "b d"], Text], Float[Array, "b t"]],
    image: Float[Array, "b d"],
    text: Text,
    names: Int[np.ndarray, "n l"],
    allowed: Bool[np.ndarray, "v n"],
    count: int,
) -> Int[Array, "v b count"]:
    """Finds the classes with the highest scores, the nearest first, for several subsets of classes. Jittable.

    The score of a class is that of its best name (papers/004). Among equal scores the first class is nearer. If fewer
    than `count` classes are allowed, or scores are NaN, the remaining entries are -1. Classes are processed in blocks,
    so that [B N] is never stored.

    Args:
      score: a classifier's `score_images`.
      image: features of images.
      text: features of names.
      names: positions in `text` of each class's names, see `names_of`.
      allowed: the classes of each subset.
      count: the number of classes to return.
    """
    n, width = names.shape
    block = row_block(n, width * sum(image.shape))

    def merge(top, part):
        scores, classes = top
        names, number, allowed = part
        each = score(image, {space: x[names.ravel()] for space, x in text.items()})
        best = each.reshape(len(image), *names.shape).max(-1)
        # `best > -inf` is also False for NaN.
        best = jnp.where(allowed.T[:, None] & (best > -jnp.inf), best, -jnp.inf)
        number = jnp.broadcast_to(number, best.shape)
        scores, place = jax.lax.top_k(jnp.concatenate([scores, best], -1), count)
        classes = jnp.take_along_axis(jnp.concatenate([classes, number], -1), place, -1)
        return (scores, jnp.where(scores > -jnp.inf, classes, -1)), None

    shape = (len(allowed), len(image), count)
    start = jnp.full(shape, -jnp.inf), jnp.full(shape, -1, jnp.int32)
    # The zeros that pad the last block are never allowed.
    parts = names, np.arange(n, dtype=np.int32), allowed.T
    blocks = jax.tree.map(lambda x: split_rows(jnp.asarray(x), block), parts)
    return jax.lax.scan(merge, start, blocks)[0][1]

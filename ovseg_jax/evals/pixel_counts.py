"""Counts of pixels per class on devices, and their sums on the host, for `confusion.scores`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from ovseg_jax.evals.confusion import Counts


def count(label: Int[Array, "*b h w"], predicted: Int[Array, "*b h w"], num_classes: int) -> Counts:
    """Counts the pixels of one batch in int32, exact below 2^31 labelled pixels. Jittable.

    Args:
      label: the class of every pixel; anything outside 0..K-1 (void, padding) is ignored.
      predicted: the predicted class; anything outside 0..K-1 means none and counts as wrong where there is a label.
      num_classes: the number K of classes.
    """
    known = (label >= 0) & (label < num_classes)
    guess = known & (predicted >= 0) & (predicted < num_classes)
    return Counts(
        _histogram(label, known & (label == predicted), num_classes),
        _histogram(label, known, num_classes),
        _histogram(predicted, guess, num_classes),
    )


def _histogram(values, where, bins):
    slot = jnp.where(where, values, bins).ravel()
    return jnp.zeros(bins, jnp.int32).at[slot].add(1, mode="drop")


def present_classes(label: Int[Array, "b h w"], num_classes: int) -> Bool[Array, "b k"]:
    """Tells which classes occur in each label, bool [B K]: the queries of Grounding mIoU.

    Values outside 0..K-1 are ignored.
    """
    b = label.shape[0]
    slot = jnp.where((label >= 0) & (label < num_classes), label, num_classes).reshape(b, -1)
    return jnp.zeros((b, num_classes), bool).at[jnp.arange(b)[:, None], slot].set(True, mode="drop")


def add(total: Any, batch: Any) -> Any:
    """Adds a batch's counts, any tree of integer arrays, to the total (or None), in int64 on the host."""
    wide = jax.tree.map(lambda x: np.asarray(x).astype(np.int64), batch)
    return wide if total is None else jax.tree.map(np.add, total, wide)

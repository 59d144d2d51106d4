"""Recall of retrieval between images and texts, in bounded memory."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, Int

DEPTHS = (1, 5, 10)
_BLOCK = 2**24
"""The most scores in memory at once, if they are computed from vectors."""

Rows = Callable[[int, int], Float[np.ndarray, "b m"]]
"""(first, last) -> the scores of the queries first..last - 1 with all candidates, [last - first, M]."""


def recalls(
    by_image: Rows,
    by_text: Rows,
    owner: Int[np.ndarray, "m"],
    images: int,
    advance: Callable[[int], Any] = lambda count: None,
) -> dict[str, dict[str, float]]:
    """Computes the share of queries, in percent, with a match, their own text or image, among the K highest scores.

    Among equal scores, a match comes last. An image without text is no query, but a candidate.

    Args:
      by_image: the scores of images with all texts.
      by_text: the scores of texts with all images.
      owner: the image of each text.
      images: the number of images.
      advance: called with the number of queries done since its last call.

    Returns:
      For "image to text" and "text to image", {"R@K": percent} for the K of `DEPTHS`.
    """
    found = {}
    for way, ranks in (
        ("image to text", _ranks_of_texts(by_image, owner, images, advance)),
        ("text to image", _ranks_of_images(by_text, owner, images, advance)),
    ):
        all_ranks = np.concatenate(list(ranks))
        found[way] = {
            f"R@{depth}": 100.0 * int((all_ranks < depth).sum()) / len(all_ranks) for depth in DEPTHS
        }
    return found


def _ranks_of_texts(
    by_image: Rows, owner: Int[np.ndarray, "m"], images: int, advance: Callable[[int], Any]
) -> Iterator[Int[np.ndarray, "b"]]:
    """Yields, for each image with texts, the number of other texts that come before the best of its own."""
    for first, last in _blocks(images, len(owner)):
        scores = by_image(first, last)
        texts = np.flatnonzero((owner >= first) & (owner < last))
        image = owner[texts] - first
        own, best = scores[image, texts], np.full(last - first, -np.inf, scores.dtype)
        np.maximum.at(best, image, own)
        before = (scores >= best[:, None]).sum(1) - np.bincount(
            image[own >= best[image]], minlength=last - first
        )
        yield before[np.isfinite(best)]
        advance(last - first)


def _ranks_of_images(
    by_text: Rows, owner: Int[np.ndarray, "m"], images: int, advance: Callable[[int], Any]
) -> Iterator[Int[np.ndarray, "b"]]:
    """Yields, for each text, the number of other images that come before its own."""
    for first, last in _blocks(len(owner), images):
        scores = by_text(first, last)
        own = scores[np.arange(last - first), owner[first:last]]
        yield (scores >= own[:, None]).sum(1) - 1
        advance(last - first)


def _blocks(queries: int, found: int) -> Iterator[tuple[int, int]]:
    step = max(1, _BLOCK // found)
    for first in range(0, queries, step):
        yield first, min(first + step, queries)

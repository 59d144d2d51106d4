"""Label maps of the labels' own size, from predictions and words, in memory that does not grow with the vocabulary.

OpenSeg, section 3.4: with scores <w, z> of names and regions and masks s, the segmentation logits are y = <w, z> . s,
and a pixel's category is that of its best name (equation 6), so a category's score is the maximum over its names. y
would be [names H W]; it is computed for a block of rows and a block of names at a time, with a running maximum, and of
thousands of names only for those that can win somewhere in the block (`decisions.many`). s is
upsampled rather than y, which is equivalent since y is linear in s; labels are never resized. For predicted masks the
logits are upsampled before the sigmoid, as in the mask loss: a border then lies where the interpolated logits cross
zero. (The paper does not state how s is resized to H x W.)
"""

import dataclasses
from collections.abc import Collection
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ovseg_jax.decisions.many import Groups, best_of_many, best_of_masks, grid_error, groups_of_grid
from ovseg_jax.kernels.resize import coverage, row_block, split_rows, upsampling
from ovseg_jax.kernels.unit import unit
from ovseg_jax.protocols import PRECISION, Prediction, Segmenting, Text, Vocabulary
from ovseg_jax.vocab.classes import ClassList

Mode = Literal["predicted", "none", "truth"]
MODES: tuple[Mode, ...] = ("predicted", "none", "truth")

NAME_BLOCK = 128
MANY = 1024  # with at least this many names, those that cannot win are left out
MOST_SCORED = 0.75  # leaving names out has helped if a smaller share of them was scored
FEW_CELLS = (
    32  # for pixel features, names are left out only with at least this many pixels for each cell of the grid
)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["weights", "maps", "void", "image", "scale"],
    meta_fields=["masks"],
)
@dataclasses.dataclass(frozen=True)
class Layers:
    """The scores of one image in factors: the score of name t at a pixel is `weights[t] . up(maps)`.

    Attributes:
      weights: [T C] the score of each name for each map.
      maps: [C h w] mask logits of proposals, or channels of pixel features.
      void: [C] the score of "no object" for each proposal, or None.
      masks: whether the maps are mask logits, which need a sigmoid after the upsampling.
      image: [T] the score of each name for the whole image, or None.
      scale: the factor from scores to logits, or None.
    """

    weights: Float[Array, "t c"]
    maps: Float[Array, "c h w"]
    void: Float[Array, "c"] | None
    masks: bool
    image: Float[Array, "t"] | None = None
    scale: Float[Array, ""] | None = None


class Frame(NamedTuple):
    """The position of a label's pixels on the model's grid, as upsampling matrices.

    Attributes:
      rows: [H h] upsampling matrix of the rows.
      columns: [W w] upsampling matrix of the columns.
      inside: [H W] True for pixels of the label, False for padding.
    """

    rows: Float[Array, "height h"]
    columns: Float[Array, "width w"]
    inside: Bool[Array, "height width"]


class Backoff(NamedTuple):
    """The number of strips of an image in which all names are scored, after one in which leaving most out did not help.

    So an image in which it never helps costs hardly more than without bounds.

    Attributes:
      wait: the number of such strips that are still to come.
      next: the value of `wait` after the next strip that does not help; it doubles each time.
    """

    wait: Int[Array, ""]
    next: Int[Array, ""]

    @classmethod
    def of(cls, useful: Bool[Array, ""] | bool) -> "Backoff":
        """Returns the state for the first strip; if bounds are not `useful`, none is tried."""
        return cls(jnp.where(useful, 0, jnp.int32(1 << 30)), jnp.int32(1))

    def waited(self) -> "Backoff":
        """Returns the state after a strip in which all names were scored."""
        return self._replace(wait=self.wait - 1)

    def after(self, helped: Bool[Array, ""]) -> "Backoff":
        """Returns the state after a strip in which most were to be left out, which `helped` or not."""
        return Backoff(jnp.where(helped, 0, self.next), jnp.where(helped, 1, 2 * self.next))


def frame(
    shape: tuple[int, int],
    grid: tuple[int, int],
    canvas: int | tuple[int, int],
    image_size: Int[Array, "2"],
    label_size: Int[Array, "2"],
) -> Frame:
    """Returns the frame of a label of `label_size` in maps of `shape`; see `kernels.resize.upsampling`."""
    sides = (canvas, canvas) if isinstance(canvas, int) else canvas
    rows, columns = (upsampling(shape[i], grid[i], sides[i], image_size[i], label_size[i]) for i in range(2))
    inside = (jnp.arange(shape[0]) < label_size[0])[:, None] & (jnp.arange(shape[1]) < label_size[1])
    return Frame(rows, columns, inside)


def vocabulary_of(classes: ClassList, seen: Collection[str] = ()) -> Vocabulary:
    """Returns the classes as arrays; `seen` are the names that the method was trained on."""
    names, owner = classes.flat()
    known = np.array([name in seen for name in names], bool)
    return Vocabulary(jnp.asarray(owner), jnp.asarray(known), jnp.asarray(classes.isthing, bool))


def layers_of(
    method: Segmenting, prediction: Prediction, text: Text, vocabulary: Vocabulary, mode: Mode = "predicted"
) -> Layers:
    """Scores one image's proposals, or its pixels if mode is "none" or there are no proposals. Jittable."""
    if mode == "predicted" and prediction.mask_logits is not None:
        scores = method.score_regions(prediction, text, vocabulary)
        return Layers(scores.names, prediction.mask_logits, scores.void, True, scores.image, scores.scale)
    pixels = method.score_pixels(prediction, text, vocabulary)
    return Layers(pixels.weights, pixels.maps, None, False)


def confidence_of(
    score: Float[Array | np.ndarray, "*v h w"], cover: Float[Array | np.ndarray, "h w"]
) -> Float[Array | np.ndarray, "*v h w"]:
    """Computes how well a category fits a pixel: the mean score of the proposals there, 0 where there is none.

    With masks s and scores y it is sum_n s_n y_n / max(1, sum_n s_n). OpenSeg's demo treats less than 0.04 as unknown.

    Args:
      score: sum_n s_n y_n of the category's best name; for pixel features the score itself.
      cover: sum_n s_n; 1 for pixel features.
    """
    return score / cover.clip(1)


def true_scores(
    method: Segmenting,
    prediction: Prediction,
    text: Text,
    vocabulary: Vocabulary,
    segments: Int[Array, "height width"],
    max_segments: int,
    canvas: int,
    image_size: Int[Array, "2"],
    label_size: Int[Array, "2"],
) -> Float[Array, "t m"]:
    """Scores the true segments by the pixel features under them (mode "truth" of Table 4); row m is segment m + 1."""
    grid = next(iter(prediction.pixels.values())).shape[:2]
    rows, columns = (
        coverage(segments.shape[i], grid[i], canvas, image_size[i], label_size[i]) for i in range(2)
    )
    pooled = {
        space: unit(pool_segments(pixels, segments, max_segments, rows, columns))
        for space, pixels in prediction.pixels.items()
    }
    return method.score_regions(Prediction(None, pooled, prediction.pixels), text, vocabulary).names


def best_names(
    weights: Float[Array, "t c"],
    maps: Float[Array, "c h w"],
    rows: Float[Array, "height h"],
    cols: Float[Array, "width w"],
    views: Bool[Array, "v t"],
    *,
    logits: bool = False,
    positive: bool = False,
    groups: Groups | None = None,
) -> tuple[Int[Array, "v height width"], Float[Array, "v height width"], Float[Array, "height width"]]:
    """Computes argmax and max over names of `weights . up(maps)` for one image, with up = rows x cols.

    It loops over blocks of rows, and inside over blocks of names with a running maximum; among equal scores the first
    name wins.

    Args:
      weights: a score of every name for every map.
      maps: masks or channels on the grid.
      rows: upsampling matrix of the rows.
      cols: upsampling matrix of the columns.
      views: the names that may win, in each view.
      logits: whether the maps are mask logits, which need a sigmoid after the upsampling.
      positive: whether the maps are never negative, as masks are.
      groups: what `many.groups_of_grid` returns, if the caller has it.

    Returns:
      The best name and its score (-inf where no name may win) in each view, and the sum of the upsampled maps.
    """
    height, width = rows.shape[0], cols.shape[0]
    names, channels = weights.shape
    block = min(NAME_BLOCK, names)
    weight_blocks = split_rows(weights, block)
    view_blocks = split_rows(views.T, block).transpose(0, 2, 1)  # padding names are never allowed
    starts = jnp.arange(weight_blocks.shape[0], dtype=jnp.int32) * block
    strip = row_block(height, width * max(block, channels))
    inside = cols.sum(1) > 0  # rows and columns of zeros are padding
    by_masks = names >= MANY and (logits or positive)
    if groups is None and not by_masks and has_groups(names, maps.shape, height * width):
        groups = groups_of_grid(weights, maps.reshape(channels, -1), views, maps.shape[2])

    def of_all(x: Float[Array, "c p"]) -> tuple[Array, Array]:
        def one_block(best, inputs):
            name, score = best
            weights, allowed, start = inputs
            y = jnp.where(allowed[..., None], jnp.matmul(weights, x, precision=PRECISION), -jnp.inf)
            which, top = _argmax(y)
            better = top > score
            return (jnp.where(better, which + start, name), jnp.where(better, top, score)), None

        empty = (views.shape[0], x.shape[1])
        best = jnp.zeros(empty, jnp.int32), jnp.full(empty, -jnp.inf, x.dtype)
        return jax.lax.scan(one_block, best, (weight_blocks, view_blocks, starts))[0]

    def of_few(x: Float[Array, "c p"], strip_rows: Array) -> tuple[Array, Array, Array]:
        wanted = ((strip_rows.sum(1) > 0)[:, None] & inside).reshape(-1)
        if groups is None:
            return best_of_masks(weights, x, views, wanted)

        def lift(bound):
            bound = bound.reshape(-1, *maps.shape[1:])
            bound = jnp.einsum("rh,bhw->brw", strip_rows, bound, precision=PRECISION)
            return jnp.einsum("brw,Ww->brW", bound, cols, precision=PRECISION).reshape(len(bound), -1)

        error = grid_error(weights, maps.reshape(channels, -1), x.shape[1])
        return best_of_many(weights, x, views, wanted, groups, lift, error)

    def one_strip(backoff: Backoff, strip_rows: Array) -> tuple[Backoff, tuple[Array, ...]]:
        x = jnp.einsum("rh,chw->crw", strip_rows, maps, precision=PRECISION)
        x = jnp.einsum("crw,Ww->crW", x, cols, precision=PRECISION).reshape(channels, -1)
        x = jax.nn.sigmoid(x) if logits else x
        if not by_masks and groups is None:
            return backoff, (*of_all(x), x.sum(0))

        def few() -> tuple[Backoff, Array, Array]:
            name, score, scored = of_few(x, strip_rows)
            return backoff.after(scored < MOST_SCORED * names), name, score

        backoff, name, score = jax.lax.cond(backoff.wait > 0, lambda: (backoff.waited(), *of_all(x)), few)
        return backoff, (name, score, x.sum(0))

    backoff = Backoff.of(True if groups is None else groups.useful)
    # [strips v strip * width]
    _, (name, score, total) = jax.lax.scan(one_strip, backoff, split_rows(rows, strip))
    name, score = (
        jnp.moveaxis(x, 0, 1).reshape(views.shape[0], -1, width)[:, :height] for x in (name, score)
    )
    return name, score, total.reshape(-1, width)[:height]


def has_groups(names: int, maps: tuple[int, ...], pixels: int) -> bool:
    """Tells whether bounds are worth it for this many names, pixel features of this shape [C h w], and pixels."""
    return names >= MANY and FEW_CELLS * maps[1] * maps[2] <= pixels


def pool_segments(
    features: Float[Array, "h w d"],
    segments: Int[Array, "height width"],
    max_segments: int,
    rows: Float[Array, "h height"],
    cols: Float[Array, "w width"],
) -> Float[Array, "m d"]:
    """Sums the features under each segment's area-averaged mask on the grid; row m is segment m + 1."""
    grid = features.shape[:2]
    strip = row_block(segments.shape[0], segments.shape[1] * max_segments)

    def add(mask, inputs):
        strip_segments, strip_rows = inputs
        ours = strip_segments == jnp.arange(1, max_segments + 1)[:, None, None]
        return mask + jnp.einsum(
            "rh,mrW,wW->mhw", strip_rows, ours.astype(cols.dtype), cols, precision=PRECISION
        ), None

    start = jnp.zeros((max_segments, *grid), cols.dtype)
    mask, _ = jax.lax.scan(add, start, (split_rows(segments, strip), split_rows(rows.T, strip)))
    return jnp.einsum("mhw,hwd->md", mask, features, precision=PRECISION)


def paint(
    weights: Float[Array, "t m"],
    segments: Int[Array, "hs ws"],
    views: Bool[Array, "v t"],
    shape: tuple[int, int],
) -> tuple[Int[Array, "v h w"], Float[Array, "v h w"]]:
    """Gives the pixels of each segment (from 1; 0 is void) their best name and its score; void has -1 and -inf."""
    y = jnp.where(views[:, :, None], weights, -jnp.inf)  # [v t m]
    which, top = _argmax(y)
    void = jnp.full((views.shape[0], 1), -1, jnp.int32)
    which = jnp.concatenate([void, which], 1)
    top = jnp.concatenate([jnp.full(void.shape, -jnp.inf, top.dtype), top], 1)
    segments = jnp.where(segments < top.shape[1], segments, 0)
    segments = segments[: shape[0], : shape[1]]
    segments = jnp.pad(segments, [(0, n - m) for n, m in zip(shape, segments.shape, strict=True)])
    return which[:, segments], top[:, segments]


def _argmax(y: Float[Array, "v t p"]) -> tuple[Int[Array, "v p"], Float[Array, "v p"]]:
    """Returns the first best name and its score by two plain reductions: on CPU five times as fast as XLA's argmax."""
    top = y.max(1)
    index = jnp.arange(y.shape[1], dtype=jnp.int32)[:, None]
    return jnp.where(y == top[:, None], index, y.shape[1]).min(1), top

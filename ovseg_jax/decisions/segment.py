"""From what a model sees to label maps of the labels' own size, in memory that no vocabulary makes grow.

OpenSeg, section 3.4: with cosines <w, z> of names and regions and masks s, the segmentation logits are
y = <w, z> . s, and a pixel's category is that of its best name (equation 6), so a category's score is the
maximum over its names. y would be [names H W]; here it is computed for a block of rows and a block of names
at a time with a running maximum. s is upsampled and y follows, which is the same as upsampling y, since y is
linear in s (never a resize of labels). Of predicted masks the logits are upsampled before the sigmoid, as the
mask loss does it: a border then lies where the logits cross zero between two cells, not on a ramp of the
grid's width. (The paper has s of H x W and does not say how it came to that size.)
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ovseg_jax.kernels.resize import coverage, row_block, split_rows, upsampling
from ovseg_jax.protocols import Prediction

Mode = Literal["predicted", "none", "truth"]
MODES: tuple[Mode, ...] = ("predicted", "none", "truth")

NAME_BLOCK = 128
# The accelerators' default for float32 products is a bfloat16 or TF32 pass, enough to swap two near names.
_PRECISION = jax.lax.Precision.HIGHEST

RegionScores = Callable[[Prediction, Float[Array, "t d"], Int[Array, "t"]], Float[Array, "t n"]]
"""(what the method saw in one image, without the axis of images; its text side; the category of each name) -> the
score of each name for each proposal. Jittable, and a pure function of these."""


def cosines(prediction: Prediction, text: Float[Array, "t d"], owner: Int[Array, "t"]) -> Float[Array, "t n"]:
    """<w, z> of equation 6, of every name and every proposal of one image."""
    del owner
    assert prediction.region_embed is not None
    return jnp.matmul(text, prediction.region_embed.T, precision=_PRECISION)


def region_scores_of(method: Any) -> RegionScores:
    """The method's own `region_scores`, or `cosines`."""
    return getattr(method, "region_scores", cosines)


class LabelMaps(NamedTuple):
    """A label map per image. Values beyond an image's `label_size` are -1 and 0.

    Attributes:
      category: index of the best category, -1 where no name was allowed or no mask lies.
      name: index of the best name, -1 likewise.
      score: y of the best name: a cosine times mask values for predicted masks, a cosine otherwise.
      confidence: the cosine behind the score: for predicted masks sum_n s_n <w, z_n> / sum_n s_n, comparable
        between pixels under one mask and under several; OpenSeg's demo calls less than 0.04 unknown.
    """

    category: Int[Array, "*b h w"]
    name: Int[Array, "*b h w"]
    score: Float[Array, "*b h w"]
    confidence: Float[Array, "*b h w"]


def label_maps(
    prediction: Prediction,
    text: Float[Array, "t d"],
    owner: Int[Array, "t"],
    image_size: Int[Array, "b 2"],
    label_size: Int[Array, "b 2"],
    *,
    canvas: int,
    shape: tuple[int, int],
    mode: Mode = "predicted",
    segments: Int[Array, "b hl wl"] | None = None,
    max_segments: int = 0,
    allowed: Bool[Array, "b k"] | None = None,
) -> LabelMaps:
    """The best category of every pixel, at the labels' own size. Jittable.

    Args:
      prediction: what the method saw.
      text: unit-norm embeddings of all names.
      owner: the category of each name.
      image_size: height and width of each image on the canvas, in pixels.
      label_size: height and width of each label; both at most `shape`.
      canvas: size of the square canvas that the model was given, in pixels.
      shape: height and width of the maps to return.
      mode: where the masks come from (Table 4): "predicted" by the model, "none" (each pixel's own embedding,
        normalised, is scored), or "truth" (the segments pool the pixel embeddings).
      segments: for "truth", the segment of every label pixel, from 1; 0 is void and gets no category.
      max_segments: for "truth", the largest segment number that can occur.
      allowed: the categories that may be chosen in each image; all by default.
    """
    if allowed is None:
        views = jnp.ones((image_size.shape[0], 1, text.shape[0]), bool)
    else:
        views = allowed[:, None, owner]
    maps = view_maps(
        prediction,
        text,
        owner,
        image_size,
        label_size,
        views,
        canvas=canvas,
        shape=shape,
        mode=mode,
        segments=segments,
        max_segments=max_segments,
    )
    return jax.tree.map(lambda x: x[:, 0], maps)


def view_maps(
    prediction: Prediction,
    text: Float[Array, "t d"],
    owner: Int[Array, "t"],
    image_size: Int[Array, "b 2"],
    label_size: Int[Array, "b 2"],
    views: Bool[Array, "b v t"],
    *,
    canvas: int,
    shape: tuple[int, int],
    mode: Mode = "predicted",
    segments: Int[Array, "b hl wl"] | None = None,
    max_segments: int = 0,
    region_scores: RegionScores = cosines,
) -> LabelMaps:
    """`label_maps` for several sets of allowed names at once: maps [b v h w], at little more than one's cost.

    Args:
      prediction: as in `label_maps`, and so are the arguments not listed here.
      views: the names that may be chosen in each image and view.
      region_scores: what proposals say about names in mode "predicted".
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is none of {', '.join(MODES)}")
    if mode == "predicted" and prediction.mask_logits is None:
        raise ValueError("a per-pixel prediction has no masks: use mode 'none'")
    if mode == "truth" and (segments is None or max_segments < 1):
        raise ValueError("mode 'truth' needs segments and max_segments")
    height, width = shape
    grid = prediction.pixel_embed.shape[1:3]

    def one_image(inputs):
        masks, regions, pixels, image, label, views, segments = inputs
        if mode == "truth":
            rows = coverage(segments.shape[0], grid[0], canvas, image[0], label[0])
            cols = coverage(segments.shape[1], grid[1], canvas, image[1], label[1])
            regions = pool_segments(pixels, segments, max_segments, rows, cols)
            weights = jnp.matmul(text, _unit(regions).T, precision=_PRECISION)
            name, score = _paint(weights, segments, views, shape)
            return name, score, score
        rows = upsampling(height, grid[0], canvas, image[0], label[0])
        cols = upsampling(width, grid[1], canvas, image[1], label[1])
        if mode == "none":
            # <w, up(z)> = up(<w, z>): with channels in the place of masks, this upsamples the logits too.
            name, score, _ = best_names(text, jnp.moveaxis(_unit(pixels), -1, 0), rows, cols, views)
            return name, score, score
        weights = region_scores(Prediction(masks, regions, pixels), text, owner)
        name, score, total = best_names(weights, masks, rows, cols, views, logits=True)
        return name, score, score / jnp.maximum(total, 1e-6)

    # Image after image: the working set is that of one image, whatever the batch.
    seen = prediction.mask_logits, prediction.region_embed, prediction.pixel_embed
    name, score, confidence = jax.lax.map(one_image, (*seen, image_size, label_size, views, segments))
    inside_rows = jnp.arange(height) < label_size[:, 0, None]
    inside_cols = jnp.arange(width) < label_size[:, 1, None]
    found = (inside_rows[:, :, None] & inside_cols[:, None, :])[:, None] & (score > -jnp.inf)
    name = jnp.where(found, name, -1)
    category = jnp.where(found, owner[name], -1)
    return LabelMaps(category, name, jnp.where(found, score, 0), jnp.where(found, confidence, 0))


def best_names(
    weights: Float[Array, "t c"],
    maps: Float[Array, "c h w"],
    rows: Float[Array, "height h"],
    cols: Float[Array, "width w"],
    views: Bool[Array, "v t"],
    *,
    logits: bool = False,
) -> tuple[Int[Array, "v height width"], Float[Array, "v height width"], Float[Array, "height width"]]:
    """argmax and max over names of `weights . up(maps)`, where up = rows x cols is the upsampling; one image.

    Works through blocks of rows, and inside through blocks of names with a running maximum; of equal names
    the first wins.

    Args:
      weights: a score of every name for every map.
      maps: masks or channels on the grid.
      rows: upsampling matrix of the rows.
      cols: upsampling matrix of the columns.
      views: the names that may win, per view.
      logits: the maps are logits of masks, to be squashed by a sigmoid after the upsampling.

    Returns:
      The best name and its score (-inf where no name may win), per view; and the sum of the upsampled maps.
    """
    height, width = rows.shape[0], cols.shape[0]
    names, channels = weights.shape
    block = min(NAME_BLOCK, names)
    weight_blocks = split_rows(weights, block)
    view_blocks = split_rows(views.T, block).transpose(0, 2, 1)  # padding names are allowed nowhere
    starts = jnp.arange(weight_blocks.shape[0], dtype=jnp.int32) * block
    strip = row_block(height, width * max(block, channels))

    def one_strip(strip_rows):
        x = jnp.einsum("rh,chw->crw", strip_rows, maps, precision=_PRECISION)
        x = jnp.einsum("crw,Ww->crW", x, cols, precision=_PRECISION).reshape(channels, -1)
        x = jax.nn.sigmoid(x) if logits else x

        def one_block(best, inputs):
            name, score = best
            weights, allowed, start = inputs
            y = jnp.where(allowed[..., None], jnp.matmul(weights, x, precision=_PRECISION), -jnp.inf)
            which, top = _argmax(y)
            better = top > score
            return (jnp.where(better, which + start, name), jnp.where(better, top, score)), None

        empty = (views.shape[0], x.shape[1])
        best = jnp.zeros(empty, jnp.int32), jnp.full(empty, -jnp.inf, x.dtype)
        (name, score), _ = jax.lax.scan(one_block, best, (weight_blocks, view_blocks, starts))
        return name, score, x.sum(0)

    name, score, total = jax.lax.map(one_strip, split_rows(rows, strip))  # [strips v strip * width]
    name, score = (
        jnp.moveaxis(x, 0, 1).reshape(views.shape[0], -1, width)[:, :height] for x in (name, score)
    )
    return name, score, total.reshape(-1, width)[:height]


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
            "rh,mrW,wW->mhw", strip_rows, ours.astype(cols.dtype), cols, precision=_PRECISION
        ), None

    start = jnp.zeros((max_segments, *grid), cols.dtype)
    mask, _ = jax.lax.scan(add, start, (split_rows(segments, strip), split_rows(rows.T, strip)))
    return jnp.einsum("mhw,hwd->md", mask, features, precision=_PRECISION)


def _paint(weights, segments, views, shape):
    """Best name and score of every pixel, [v height width], from cosines [t m]; of void: -1 and -inf."""
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
    """The first best name and its score. Two plain reductions: on CPU five times as fast as XLA's argmax."""
    top = y.max(1)
    index = jnp.arange(y.shape[1], dtype=jnp.int32)[:, None]
    return jnp.where(y == top[:, None], index, y.shape[1]).min(1), top


def _unit(x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-12))

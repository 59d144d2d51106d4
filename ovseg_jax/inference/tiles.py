"""Segmentation of large images in overlapping tiles, with scores blended at the image's own size, block by block.

Eq. 6 of OpenSeg is linear in the masks, y[k] = sum_n <w_k, z_n> s_n, and so is blending with weights that only depend
on the position. The proposals of all tiles at a position are therefore one longer list of proposals, each with its
own interpolation matrices and weights: a block of pixels needs only these, for any size of the image. For a per-pixel
method the "masks" are the channels of its unit-norm feature and the weights are the names' embeddings.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt

from ovseg_jax.decisions.many import Groups, best_of_many, grid_error, groups_of_grid
from ovseg_jax.decisions.maps import Layers, best_names, confidence_of, has_groups
from ovseg_jax.errors import UserError
from ovseg_jax.kernels.resize import upsampling
from ovseg_jax.protocols import PRECISION

BLOCK_ROWS, BLOCK_COLUMNS = 64, 256  # pixels of the image scored at once


class Span(NamedTuple):
    """A tile's extent along one axis of the image, in pixels; `stop` is exclusive."""

    start: int
    stop: int


class View(NamedTuple):
    """The prediction for one tile of an image.

    Attributes:
      rows: the tile's rows in the image.
      columns: the tile's columns in the image.
      canvas: size of the model's square input in pixels.
      fitted: height and width of the tile in that input.
      layers: its scores.
    """

    rows: Span
    columns: Span
    canvas: int
    fitted: tuple[int, int]
    layers: Layers


def spans(length: int, tile: tuple[int, int] | None) -> list[Span]:
    """Computes the fewest spans of `tile` = (size, overlap) that cover an axis, evenly spaced; None gives one span.

    Raises:
      UserError: the size is not positive, or the overlap is not smaller than the size.
    """
    if tile is None:
        return [Span(0, length)]
    size, overlap = tile
    if size < 1 or not 0 <= overlap < size:
        raise UserError(f"a tile of {size} pixels with an overlap of {overlap} must have size > overlap >= 0")
    if length <= size:
        return [Span(0, length)]
    count = -(-(length - overlap) // (size - overlap))
    starts = np.linspace(0, length - size, count).round().astype(int)
    return [Span(int(s), int(s) + size) for s in starts]


def shares(axis: Sequence[Span]) -> list[Float[np.ndarray, "size"]]:
    """Computes the blending weight of each span at each of its pixels: ramps in the overlaps, 1 elsewhere.

    The weights at a pixel sum to 1.
    """
    length = max(span.stop for span in axis)
    hats = []
    for i, (start, stop) in enumerate(axis):
        x = np.arange(start, stop) + 0.5
        hat = np.ones(stop - start)
        if i > 0:
            hat = np.minimum(hat, (x - start) / max(axis[i - 1].stop - start, 1))
        if i + 1 < len(axis):
            hat = np.minimum(hat, (stop - x) / max(stop - axis[i + 1].start, 1))
        hats.append(hat)
    total = np.zeros(length)
    for (start, stop), hat in zip(axis, hats, strict=True):
        total[start:stop] += hat
    return [hat / total[start:stop] for (start, stop), hat in zip(axis, hats, strict=True)]


class Blender:
    """An accumulator that blends the views of an image, added row by row, into the best name of every pixel.

    Only tiles that can still contribute are kept, so memory is bounded by two rows of tiles (for overlaps up to half a
    tile), for any height of the image.

    Attributes:
      name: unsigned [H W], index of the best name.
      confidence: f32 [H W], see `decisions.maps.confidence_of`.
    """

    name: UInt[np.ndarray, "h w"]

    def __init__(self, rows: Sequence[Span], columns: Sequence[Span]):
        self.rows, self.columns = rows, columns
        self._row_share = dict(zip(rows, shares(rows), strict=True))
        self._column_share = dict(zip(columns, shares(columns), strict=True))
        self.confidence = np.zeros((rows[-1].stop, columns[-1].stop), np.float32)
        self._views: list[View] = []
        self._waiting: list[tuple[Span, Span, tuple[Array, Array, Array]]] = []
        self._seen = self._done = 0

    def add(self, view: View) -> bool:
        """Adds the next view, in the order of rows, then columns; returns True for the last, then call `finish`."""
        if not self._seen:
            # The smallest type, since a byte for each pixel of a photograph is 20 MB.
            names = np.min_scalar_type(len(view.layers.weights))
            self.name, self._masks = np.zeros(self.confidence.shape, names), view.layers.masks
        self._views.append(view)
        row, column = divmod(self._seen, len(self.columns))
        self._seen += 1
        last = row + 1 == len(self.rows)
        band = Span(self.rows[row].start, self.rows[-1].stop if last else self.rows[row + 1].start)
        end = column + 1 == len(self.columns)
        if column == 0:
            self.finish()
            self._done = 0
        # With masks, a block is scored as soon as its tiles are there, since the tiles of two rows may take 0.3 GiB.
        # Pixel features wait for the whole band, for which the bounds of names are computed once.
        if self._masks or end:
            self._start(band, self.columns[-1].stop if end else self.columns[column + 1].start)
        before = self.columns[-1].stop if end else self._done
        self._views = [
            v
            for v in self._views
            if v.rows.stop > band.stop or (v.rows.stop > band.start and v.columns.stop > before)
        ]
        return last and end

    def finish(self) -> None:
        """Fetches the scores that the device computes."""
        for rows, columns, best in self._waiting:
            at = slice(*rows), slice(*columns)
            name, score, cover = (
                np.asarray(block)[: rows.stop - rows.start, : columns.stop - columns.start] for block in best
            )
            self.name[at] = name
            self.confidence[at] = confidence_of(score, cover) if self._masks else score
        self._waiting = []

    def _start(self, band: Span, stop: int) -> None:
        """Lets the device score the blocks of a band of rows up to a column, for which all tiles have been added."""
        width = self.columns[-1].stop
        across = min(BLOCK_COLUMNS, -(-width // 64) * 64)
        layers, groups = self._views[0].layers, None
        channels, h, w = layers.maps.shape
        shape = (channels, len(self._views) * h, w)
        pixels = (band.stop - band.start) * width
        if not layers.masks and has_groups(len(layers.weights), shape, pixels):
            groups = _groups(layers.weights, tuple(v.layers.maps for v in self._views))
        for x in range(self._done, width, across):
            columns = Span(x, min(x + across, width))
            if columns.stop > stop:
                break
            self._done = columns.stop
            for y in range(band.start, band.stop, BLOCK_ROWS):
                rows = Span(y, min(y + BLOCK_ROWS, band.stop))
                views = [v for v in self._views if _meet(v.rows, rows) and _meet(v.columns, columns)]
                self._waiting.append((rows, columns, self._score(views, rows, columns, across, groups)))

    def _score(
        self, views: list[View], rows: Span, columns: Span, across: int, groups: Groups | None
    ) -> tuple[Array, Array, Array]:
        # The number of views is padded to a power of two, to limit compilations; the added views have shares of zero.
        count = 1 << (len(views) - 1).bit_length()
        h, w = views[0].layers.maps.shape[1:]
        down = np.zeros((count, BLOCK_ROWS, h), np.float32)
        right = np.zeros((count, across, w), np.float32)
        down_share = np.zeros((count, BLOCK_ROWS), np.float32)
        right_share = np.zeros((count, across), np.float32)
        for i, v in enumerate(views):
            share = self._row_share[v.rows], self._column_share[v.columns]
            _place(down[i], down_share[i], rows, v.rows, share[0], v.canvas, v.fitted[0])
            _place(right[i], right_share[i], columns, v.columns, share[1], v.canvas, v.fitted[1])
        views = views + views[:1] * (count - len(views))
        weights, maps = tuple(v.layers.weights for v in views), tuple(v.layers.maps for v in views)
        logits = views[0].layers.masks
        if not logits:
            weights = weights[:1]  # the embeddings of the names, the same for all tiles
        if groups is not None:
            # Each group's bounds in the cells of these views alone.
            number = [next(i for i, other in enumerate(self._views) if other is v) for v in views]
            groups = groups._replace(bound=_bounds_of(groups.bound, np.array(number, np.int32), h * w))
        return _best(weights, maps, down, right, down_share, right_share, groups, logits=logits)


def _meet(a: Span, b: Span) -> bool:
    return a.start < b.stop and b.start < a.stop


def _place(
    block: np.ndarray,
    block_share: np.ndarray,
    extent: Span,
    tile: Span,
    share: np.ndarray,
    canvas: int,
    fitted: int,
) -> None:
    """Writes the rows of a tile's interpolation matrix that fall into a block, and the tile's share there."""
    start, stop = max(extent.start, tile.start), min(extent.stop, tile.stop)
    inside = slice(start - tile.start, stop - tile.start)
    matrix = upsampling_matrix(tile.stop - tile.start, block.shape[1], canvas, fitted)
    at = slice(start - extent.start, stop - extent.start)
    block[at], block_share[at] = matrix[inside], share[inside]


_compiled = functools.partial(jax.jit, static_argnums=(0, 1, 2))(upsampling)


@functools.lru_cache(64)
def upsampling_matrix(size: int, cells: int, canvas: int, fitted: int) -> Float[np.ndarray, "size cells"]:
    """Computes `kernels.resize.upsampling` to `size` pixels on the host, compiled once for many sizes."""
    padded = -(-size // 256) * 256
    return np.asarray(_compiled(padded, cells, canvas, jnp.asarray(fitted), jnp.asarray(size)))[:size]


@jax.jit
def _groups(weights: Float[Array, "t c"], maps: tuple[Float[Array, "c h w"], ...]) -> Groups:
    """Groups the names once for all blocks of a band, with bounds in the cells of all its views, one after another."""
    everything = jnp.ones((1, len(weights)), bool)
    cells = jnp.concatenate([x.reshape(len(x), -1) for x in maps], 1)
    return groups_of_grid(weights, cells, everything, maps[0].shape[2])


@functools.partial(jax.jit, static_argnums=2)
def _bounds_of(bound: Float[Array, "g n"], number: Int[Array, "views"], cells: int) -> Float[Array, "g m"]:
    return bound.reshape(len(bound), -1, cells)[:, number].reshape(len(bound), -1)


@functools.partial(jax.jit, static_argnames="logits")
def _best(
    weights: tuple[Float[Array, "t n"], ...],
    maps: tuple[Float[Array, "n h w"], ...],
    rows: Float[Array, "views r h"],
    columns: Float[Array, "views c w"],
    row_share: Float[Array, "views r"],
    column_share: Float[Array, "views c"],
    groups: Groups | None,
    *,
    logits: bool,
) -> tuple[Int[Array, "r c"], Float[Array, "r c"], Float[Array, "r c"]]:
    """Computes the best name of a block of pixels, its score, and the sum of the masks."""
    everything = jnp.ones((1, weights[0].shape[0]), bool)
    if len(maps) == 1:
        name, score, cover = best_names(
            weights[0], maps[0], rows[0], columns[0], everything, logits=logits, groups=groups
        )
        return name[0], score[0], cover
    squash = jax.nn.sigmoid if logits else lambda x: x
    up = [
        squash(jnp.einsum("rh,nhw,cw->nrc", r, m, c, precision=jax.lax.Precision.HIGHEST))
        * (rs[:, None] * cs)
        for m, r, c, rs, cs in zip(maps, rows, columns, row_share, column_share, strict=True)
    ]
    here = jnp.eye(rows.shape[1]), jnp.eye(columns.shape[1])
    if logits:
        name, score, cover = best_names(
            jnp.concatenate(weights, 1), jnp.concatenate(up), *here, everything, positive=True
        )
        return name[0], score[0], cover
    # Scores are linear in the features too, and all views have the same names.
    blended = functools.reduce(jnp.add, up)

    def of_all() -> tuple[Array, Array]:
        name, score, _ = best_names(weights[0], blended, *here, everything)
        return name[0], score[0]

    if groups is None:
        return *of_all(), blended.sum(0)
    size = blended.shape[1:]

    def lift(bound: Float[Array, "b m"]) -> Float[Array, "b p"]:
        of_view = bound.reshape(len(bound), len(maps), *maps[0].shape[1:])
        shared = rows * row_share[..., None], columns * column_share[..., None]
        both = jnp.einsum("vrh,bvhw,vcw->brc", shared[0], of_view, shared[1], precision=PRECISION)
        return both.reshape(len(bound), -1)

    def of_few() -> tuple[Array, Array]:
        wanted = (jnp.einsum("vr,vc->rc", row_share, column_share) > 0).reshape(-1)
        cells = jnp.concatenate([x.reshape(len(x), -1) for x in maps], 1)
        features = blended.reshape(len(blended), -1)
        error = grid_error(weights[0], cells, features.shape[1])
        name, score, _ = best_of_many(weights[0], features, everything, wanted, groups, lift, error)
        return name[0].reshape(size), score[0].reshape(size)

    return *jax.lax.cond(groups.useful, of_few, of_all), blended.sum(0)

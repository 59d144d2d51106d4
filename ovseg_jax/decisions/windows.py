"""Decisions on the average of sliding windows, as mmsegmentation's `slide_inference` (NVlabs/GroupViT).

In each window, the maps are upsampled to the window's pixels and scored (`Decision.rows`); scores are averaged over the
windows at each pixel of the resized image, upsampled to the label's own size, and the best row there decides. All steps
after the maps are linear, so that two small matrices for each window do them at once, for any block of rows. Not with
`Softmax`, where scores become probabilities at the window's pixels: these are computed for the two rows of the window
that a row of the label lies between.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ovseg_jax.decisions.maps import layers_of
from ovseg_jax.decisions.rules import Decided, Decision, Rows, Softmax
from ovseg_jax.errors import UserError
from ovseg_jax.kernels.resize import row_block, split_rows, upsampling
from ovseg_jax.protocols import PRECISION, Prediction, Segmenting, Text, Variables, Vocabulary


class Windows(NamedTuple):
    """The places of an image's W windows; see `data.windows.Cut`."""

    image_size: Int[Array, "*b w 2"]
    window_at: Int[Array, "*b w 2"]
    window_valid: Bool[Array, "*b w"]
    resized: Int[Array, "*b 2"]

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Windows":
        """Takes them from a batch."""
        return cls(*(row[name] for name in cls._fields))


def predict_windows(
    predict: Any, variables: Variables, image: Array, image_size: Array, valid: Array
) -> Prediction:
    """Predicts the windows of a batch of images: [B W ...]. Jittable; runs as often as an image has windows.

    Args:
      predict: a method's `predict`.
      variables: its variables.
      image: u8 [B W S S 3].
      image_size: [B W 2].
      valid: [B W] False for padding, which comes last.
    """
    one = lambda i: predict(variables, image[:, i], image_size[:, i])
    empty = jax.tree.map(
        lambda x: jnp.zeros((image.shape[1], *x.shape), x.dtype), jax.eval_shape(one, jnp.int32(0))
    )
    put = lambda i, out: jax.tree.map(lambda all_, x: all_.at[i].set(x), out, one(i))
    out = jax.lax.fori_loop(0, valid.sum(1).max(), put, empty)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), out)


def decide_windows(
    method: Segmenting,
    prediction: Prediction,
    text: Text,
    vocabulary: Vocabulary,
    windows: Windows,
    label_size: Int[Array, "b 2"],
    views: Bool[Array, "b v t"],
    *,
    canvas: int,
    shape: tuple[int, int],
    decision: Decision,
    mode: str = "predicted",
) -> Decided:
    """Decides on every image of a batch at the labels' own size: [B V H W]. Jittable; see `decisions.rules.decide`.

    Args:
      method, text, vocabulary, label_size, views, shape, decision: see `decide`.
      prediction: [B W ...] the predictions for the windows.
      windows: their places.
      canvas: the side of a window in pixels.
      mode: "predicted" or "none".

    Raises:
      UserError: the decision needs masks and there are none, or it or the mode works on whole images only.
    """
    if mode not in ("predicted", "none"):
        raise UserError(f"masks={mode!r} cannot be used with sliding windows: take predicted or none")
    if decision.needs_masks and (mode == "none" or prediction.mask_logits is None):
        raise UserError(
            f"the decision {type(decision).__name__} needs predicted masks, which this method or mode does not have"
        )

    masks = mode == "predicted" and prediction.mask_logits is not None

    def one_image(inputs: Any) -> Decided:
        seen, places, label, allowed = inputs

        def window(x: Prediction) -> tuple[Rows, Array]:
            layers = layers_of(method, x, text, vocabulary, mode)  # type: ignore[arg-type]
            return jax.vmap(lambda may: decision.rows(layers, vocabulary, may))(allowed), layers.maps

        rows, maps = jax.vmap(window)(seen)
        return _average(rows, maps, masks, places, label, canvas, shape, decision)

    return jax.lax.map(one_image, (prediction, windows, label_size, views))


def _average(
    rows: Rows,
    maps: Float[Array, "w c h g"],
    masks: bool,
    places: Windows,
    label: Int[Array, "2"],
    canvas: int,
    shape: tuple[int, int],
    decision: Decision,
) -> Decided:
    """Decides on one image; `rows` are those of each window and view."""
    count = places.window_valid.sum()
    weights, owner, may = rows.weights, rows.owner[0, 0], rows.allowed[0]  # [W V R C] [R] [V R]
    grid = maps.shape[2:]
    # From the grid to the window's pixels, [W S g], without the part of the grid that is padding.
    down, across = (
        jax.vmap(partial(upsampling, canvas, grid[i], canvas))(
            places.image_size[:, i], places.image_size[:, i]
        )
        for i in range(2)
    )
    product = partial(jnp.einsum, precision=PRECISION)
    if masks:
        maps = product("wyh,wchx->wcyx", down, maps)
        maps = product("wcyx,wzx->wcyz", maps, across)
        if decision.strongest:
            maps = jax.nn.one_hot(maps.argmax(1), maps.shape[1], axis=1)
        else:
            maps = jax.nn.sigmoid(maps)
        down = across = jnp.broadcast_to(jnp.eye(canvas), (len(maps), canvas, canvas))
    shares = [_places(places, i, canvas, shape[i], label[i]) for i in range(2)]
    _, views, r, c = weights.shape
    if isinstance(decision, Softmax):
        to_rows, to_columns = shares
        block = row_block(shape[0], 2 * max(canvas, shape[1]) * (views * r + c))
    else:
        to_rows, to_columns = (
            product("wlp,wpg->wlg", share, up) for share, up in zip(shares, (down, across), strict=True)
        )
        block = row_block(shape[0], shape[1] * (views * r + c))

    def probabilities(i: Array, own: Float[Array, "n p"]) -> Float[Array, "v r n x"]:
        """Returns the shares of one window in the probabilities at some rows of the label."""
        rows, columns = _between(own), _between(to_columns[i])
        x = product("nh,chx->cnx", down[i][jnp.concatenate([rows.first, rows.second])], maps[i])
        x = product("cnx,px->cnp", x, across[i])
        x = product("vrc,cnp->vrnp", weights[i], x)
        x = jax.nn.softmax(jnp.where(may[:, :, None, None], x, -jnp.inf), 1)
        n = own.shape[0]
        x = x[:, :, :n] * rows.of_first[:, None] + x[:, :, n:] * rows.of_second[:, None]
        return x[..., columns.first] * columns.of_first + x[..., columns.second] * columns.of_second

    def strip(own: Float[Array, "w n g"]) -> tuple[Array, Array, Array]:
        def add(i: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
            if isinstance(decision, Softmax):
                return sums[0] + probabilities(i, own[i]), sums[1]
            x = product("nh,chx->cnx", own[i], maps[i])
            x = product("cnx,zx->cnz", x, to_columns[i])
            return sums[0] + product("vrc,cnz->vrnz", weights[i], x), sums[1] + x.sum(0)

        n = own.shape[1]
        empty = jnp.zeros((views, r, n, shape[1])), jnp.zeros((n, shape[1]))
        score, cover = jax.lax.fori_loop(0, count, add, empty)
        score = jnp.where(may[:, :, None, None], score, -jnp.inf)
        return score.argmax(1).astype(jnp.int32), score.max(1), cover

    strips = jnp.moveaxis(split_rows(jnp.moveaxis(to_rows, 1, 0), block), 2, 1)  # [blocks W n g]
    row, score, cover = jax.lax.map(strip, strips)
    row, score = (jnp.moveaxis(x, 0, 1).reshape(views, -1, shape[1])[:, : shape[0]] for x in (row, score))
    cover = cover.reshape(-1, shape[1])[: shape[0]]
    confidence = decision.confidence(score, cover, masks)
    inside = (jnp.arange(shape[0]) < label[0])[:, None] & (jnp.arange(shape[1]) < label[1])
    found = inside & (score > -jnp.inf) & (confidence >= decision.least) & (count > 0)
    category = jnp.where(found, owner[row], -1)
    return Decided(category, jnp.where(category >= 0, confidence, 0))


class _Between(NamedTuple):
    """The two pixels that a label's row or column lies between, and their weights."""

    first: Int[Array, " l"]
    second: Int[Array, " l"]
    of_first: Float[Array, " l"]
    of_second: Float[Array, " l"]


def _between(share: Float[Array, "l p"]) -> _Between:
    """Finds both pixels in a matrix of bilinear weights, whose rows have at most two entries above 0, side by side."""
    first = jnp.argmax(share > 0, 1)
    second = jnp.minimum(first + 1, share.shape[1] - 1)
    at = jnp.arange(len(share))
    return _Between(first, second, share[at, first], jnp.where(second > first, share[at, second], 0))


def _places(places: Windows, axis: int, size: int, pixels: int, label: Array) -> Float[Array, "w l p"]:
    """Returns the share of each window's pixels in each label pixel on an axis, averaged over the windows."""
    start, valid, length = (
        places.window_at[:, axis],
        places.window_valid,
        jnp.maximum(places.resized[axis], 1),
    )
    pixel = start[:, None] + jnp.arange(size)  # [W S], in the resized image
    first = places.window_at[:, 1 - axis].min(where=valid, initial=1 << 30)
    # Of the windows at one position of this axis, only the first along the other axis is counted.
    single = valid & (places.window_at[:, 1 - axis] == first)
    covers = (pixel[:, :, None] >= start) & (pixel[:, :, None] < start + size) & single
    share = jnp.where(valid[:, None] & (pixel < length), 1 / jnp.maximum(covers.sum(-1), 1), 0)
    label = jnp.maximum(label, 1)
    at = (jnp.minimum(jnp.arange(pixels), label - 1) + 0.5) * length / label - 0.5
    at = jnp.clip(at, 0, length - 1)
    return jnp.maximum(0, 1 - jnp.abs(at[:, None] - pixel[:, None, :])) * share[:, None, :]

"""The answers of the page, without its widgets: pictures with hover maps, words at a pixel, similarity, downloads."""

import dataclasses
import html
import io
import json
import zipfile
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from etils import epath
from jaxtyping import Float, Int, UInt8
from PIL import Image

from ovseg_jax.data.images import encode_image, read_header, read_image
from ovseg_jax.decisions.maps import Layers, frame, layers_of, vocabulary_of
from ovseg_jax.errors import UserError
from ovseg_jax.inference.folder import TASKS
from ovseg_jax.inference.result import Result, sigmoid
from ovseg_jax.inference.segmenter import Batch, Segmenter
from ovseg_jax.reading import reading
from ovseg_jax.viz.html import SAFE, data_uri
from ovseg_jax.viz.segments import overlay, palette
from ovseg_jax.vocab.classes import ClassList, is_built_in, parse_labels, read_label_file

MAX_BYTES, MAX_PIXELS, SIDE = 20_000_000, 50_000_000, 2048
"""Limits of an uploaded file and its pixels; the longer side to which larger pictures are shrunk."""
MAX_NAMES, MAX_LETTERS = 2000, 60_000
SHOWN = 1024  # the longer side of pictures in the page
HEAT = 512  # the longer side of similarity maps
LISTED = 24  # the most rows of a legend: `instances` gives up to 100 segments, most of them behind others
FORMATS = ("png", "json", "features")


def read_picture(path: epath.PathLike) -> tuple[UInt8[np.ndarray, "h w 3"], str]:
    """Reads an uploaded picture, and shrinks one whose longer side exceeds SIDE.

    Returns:
      The picture, and a sentence about its size.

    Raises:
      UserError: the file is no readable image, or exceeds MAX_BYTES or MAX_PIXELS.
    """
    path = epath.Path(path)
    try:
        with reading(path):
            size = path.stat().length
        if size > MAX_BYTES:
            raise UserError(
                f"{path.name} has {size / 1e6:.1f} MB, more than the limit of {MAX_BYTES / 1e6:.0f} MB"
            )
        (height, width), _ = read_header(path)
        if height * width > MAX_PIXELS:
            raise UserError(
                f"{path.name} has {width} x {height} pixels, more than the limit of {MAX_PIXELS / 1e6:.0f} million"
            )
        image = read_image(path)
    except UserError as error:
        # Visitors must not see the server's own path.
        raise UserError(str(error).replace(str(path), path.name)) from None
    shrunk = _shrunk(image, SIDE)
    if shrunk.shape == image.shape:
        return image, f"{path.name}, {width} x {height} pixels."
    return shrunk, (
        f"{path.name}, {width} x {height} pixels, shrunk to {shrunk.shape[1]} x {shrunk.shape[0]}: larger ones are "
        "for the command predict."
    )


def read_words(text: str, known: Sequence[ClassList] = ()) -> ClassList | None:
    """Reads the words that a visitor typed: labels, or the name of a shipped label file; None for no text.

    In contrast to the commands it opens no files. A category that is stuff in a list of `known` is stuff, others are
    things.

    Raises:
      UserError: there are more than MAX_NAMES names or MAX_LETTERS letters; or see `parse_labels`.
    """
    text = text.strip()
    if not text:
        return None
    if is_built_in(text):
        return read_label_file(text)
    if len(text) > MAX_LETTERS:
        raise UserError(f"the words have {len(text)} letters, more than the limit of {MAX_LETTERS}")
    classes = parse_labels(text)
    if (count := len(classes.flat()[0])) > MAX_NAMES:
        raise UserError(f"{count} names were given, more than the limit of {MAX_NAMES}")
    isthing: dict[str, bool] = {}
    for other in known:
        for name, k in other.index.items():
            isthing.setdefault(name, other.isthing[k])
    things = tuple(isthing.get(names[0], True) for names in classes.names)
    return dataclasses.replace(classes, isthing=things)


def segment(
    segmenter: Segmenter, image: UInt8[np.ndarray, "h w 3"], classes: ClassList | None, task: str
) -> Result:
    """Segments by a task of `inference.folder.TASKS`, with features where the model has them."""
    return segmenter.segment(image, classes, decision=TASKS[task], features=segmenter.has_features())


def above(result: Result, threshold: int | float, task: str) -> Result:
    """Returns a result without pixels (of task "semantic") or segments that score less; 0 keeps all."""
    if threshold <= 0:
        return result
    if task == "semantic":
        labels = np.where(result.confidence >= threshold, result.label_map, -1)
        return Result.of(result.image, result.classes, labels, result.confidence, features=result.features)
    kept = tuple(segment for segment in result.segments if segment.score >= threshold)
    covered = np.zeros(result.label_map.shape, bool)
    for each in kept:
        covered |= each.mask
    labels = np.where(covered, result.label_map, -1)
    return dataclasses.replace(result, label_map=labels, segments=kept)


def numbers(result: Result) -> Int[np.ndarray, "h w"]:
    """Returns the index of the segment of each pixel, -1 for none; where segments overlap, the best is in front."""
    found = np.full(result.label_map.shape, -1, np.int32)
    for i, each in sorted(enumerate(result.segments), key=lambda pair: pair[1].score):
        found[each.mask] = i
    return found


def words_of(result: Result) -> list[str]:
    """Returns the word of each segment, with its number where a category has several."""
    several = [each.instance > 1 for each in result.segments]
    many = {each.category for each, more in zip(result.segments, several, strict=True) if more}
    return [
        f"{name} {each.instance}" if each.category in many else name
        for name, each in zip(result.labels, result.segments, strict=True)
    ]


def colours_of(results: Sequence[Result]) -> dict[str, UInt8[np.ndarray, "3"]]:
    """Chooses a colour for each category that was found: SAFE ones for the largest, then those of `palette`."""
    areas: dict[str, int] = {}
    for result in results:
        for name, area in zip(result.labels, result.areas, strict=True):
            areas[name] = areas.get(name, 0) + int(area)
    safe = np.array([[c >> 16, c >> 8 & 255, c & 255] for c in SAFE], np.uint8)
    order = sorted(areas, key=lambda name: -areas[name])
    return dict(zip(order, np.concatenate([safe, palette(len(order))]), strict=False))


def picture(
    result: Result, colours: Mapping[str, UInt8[np.ndarray, "3"]], legend: bool = False
) -> Image.Image:
    """Draws a result with a colour for each category and a name on each segment."""
    own = np.array([colours[name] for name in result.labels], np.uint8).reshape(-1, 3)
    return overlay(result.image, numbers(result), words_of(result), colours=own, legend=legend)


def hover_map(result: Result, task: str) -> Image.Image:
    """Encodes each pixel's segment and score: 256 R + G = the segment's number from 1, 0 for none; B = 255 score."""
    index = numbers(result)
    score = np.append(result.scores, 0)[index]
    if task == "semantic":
        score = np.where(index < 0, 0, result.confidence)
    high, low = np.divmod(index + 1, 256)
    return Image.fromarray(np.stack([high, low, np.clip(score, 0, 1) * 255], -1).round().astype(np.uint8))


def figure(
    result: Result | UInt8[np.ndarray, "h w 3"],
    name: str,
    colours: Mapping[str, UInt8[np.ndarray, "3"]] | None = None,
    task: str = "semantic",
) -> str:
    """Returns the HTML of a result with its legend, or of a picture before it is segmented.

    Args:
      result: the result or the picture.
      name: the model.
      colours: of `colours_of`, for a result.
      task: the task of the result.
    """
    title = html.escape(name, quote=True)
    if not isinstance(result, Result):
        return (
            _photo(_fitting(Image.fromarray(result)), title, "the picture, not yet segmented", "")
            + "</figure>"
        )
    drawn = _fitting(picture(result, colours or {}))
    index = hover_map(result, task)
    index = index.resize(drawn.size, Image.Resampling.NEAREST)
    names = words_of(result)
    spoken = "; ".join(names[:12]) or "nothing"
    data = f'data-map="{data_uri(index, "PNG")}" data-words="{html.escape(json.dumps(names), quote=True)}"'
    rows = []
    listed = list(zip(names, result.labels, result.segments, strict=True))
    if task == "instance":
        listed.sort(key=lambda row: -row[2].score)
    for word, label, each in listed[:LISTED]:
        swatch = "#{:02x}{:02x}{:02x}".format(*(colours or {})[label])
        rows.append(
            f'<tr><td><i style="background:{swatch}"></i>{html.escape(word)}</td>'
            f"<td>{_share(each.area, result)}</td><td>{each.score:.2f}</td></tr>"
        )
    if (more := len(listed) - LISTED) > 0:
        rows.append(f'<tr class="none"><td colspan="3">and {more} more: raise the threshold</td></tr>')
    if unknown := int((result.label_map < 0).sum()):
        rows.append(
            f'<tr class="none"><td><i></i>unknown</td><td>{_share(unknown, result)}</td><td></td></tr>'
        )
    head = "<tr><th>word</th><th>area</th><th>score</th></tr>"
    return (
        _photo(drawn, title, f"segments: {html.escape(spoken, quote=True)}", data)
        + f'<table class="ov-legend">{head}{"".join(rows)}</table></figure>'
    )


class PicturePrediction:
    """A model's prediction for a picture, before any words, so that no question needs a forward pass."""

    def __init__(self, segmenter: Segmenter, image: UInt8[np.ndarray, "h w 3"]):
        self.segmenter = segmenter
        self.batch: Batch = next(iter(segmenter.stream_batches([image])))

    def layers(self, classes: ClassList) -> Layers:
        """Returns the scores of the names of `classes`, in factors."""
        text, method = self.segmenter.embed(classes), self.segmenter.method
        prediction = jax.tree.map(lambda x: x[0], self.batch.prediction)
        return layers_of(method, prediction, text, vocabulary_of(classes, method.seen_names()))

    def maps(self, layers: Layers, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the matrices that upsample rows and columns of `layers.maps` to the picture in another size."""
        fitted = self.batch.fitted[0]
        height, width = layers.maps.shape[1:]
        canvas = self.segmenter.canvas_of(fitted)
        at = frame(shape, (height, width), canvas, jnp.array(fitted), jnp.array(shape))
        return np.asarray(at.rows), np.asarray(at.columns)


def _scores(weights: np.ndarray, maps: np.ndarray, masks: bool) -> np.ndarray:
    """Computes `decisions.maps.confidence_of` for names [T C] at points [C ...]: [T ...]."""
    if masks:
        maps = sigmoid(maps)
        return np.tensordot(weights, maps / np.maximum(maps.sum(0), 1), 1)
    return np.tensordot(weights, maps, 1)


def words_at(
    prediction: PicturePrediction, words: ClassList, at: tuple[float, float], count: int = 10
) -> list[tuple[str, float]]:
    """Ranks words at a point of the picture.

    Args:
      prediction: a model's, of the picture.
      words: the words to choose from, see `embeddable`.
      at: x and y as shares of the width and height, 0 to 1.
      count: the number of words to return.

    Returns:
      The best words with their scores, those that `Segmenter` compares at this pixel (OpenSeg, eq. 6).
    """
    layers = prediction.layers(words)
    height, width = prediction.batch.sizes[0]
    rows, columns = prediction.maps(layers, (height, width))
    x, y = (min(int(share * n), n - 1) for share, n in zip(at, (width, height), strict=True))
    values = np.einsum("h,chw,w->c", rows[y], np.asarray(layers.maps, np.float32), columns[x], optimize=True)
    scores = _scores(np.asarray(layers.weights, np.float32), values, layers.masks)
    return [(words.display(i), float(scores[i])) for i in np.argsort(-scores, kind="stable")[:count]]


def similarity(prediction: PicturePrediction, word: str) -> Float[np.ndarray, "h w"]:
    """Computes the score of a word, or of the best of several with commas, for all pixels of the shrunk picture."""
    classes = parse_labels(word)
    layers = prediction.layers(classes)
    height, width = prediction.batch.sizes[0]
    scale = min(1.0, HEAT / max(height, width))
    shape = (max(1, round(height * scale)), max(1, round(width * scale)))
    rows, columns = prediction.maps(layers, shape)
    maps = np.einsum("Hh,chw,Ww->cHW", rows, np.asarray(layers.maps, np.float32), columns, optimize=True)
    return _scores(np.asarray(layers.weights, np.float32), maps, layers.masks).max(0)


def heat_figure(
    image: UInt8[np.ndarray, "h w 3"], scores: Float[np.ndarray, "h2 w2"], word: str, name: str
) -> str:
    """Returns the HTML of a similarity map over the grey picture, from its lowest score (blue) to its highest."""
    low, high = float(scores.min()), float(scores.max())
    size = _fitting(Image.fromarray(image)).size
    share = Image.fromarray(((scores - low) / max(high - low, 1e-6)).astype(np.float32))
    # Cividis is made for colour-blind people, too: Nuñez, Anderton and Renslow, PLOS ONE 2018.
    heat = (
        matplotlib.colormaps["cividis"](np.asarray(share.resize(size, Image.Resampling.BILINEAR)))[..., :3]
        * 255
    )
    grey = np.asarray(Image.fromarray(image).convert("L").resize(size))[..., None]
    drawn = Image.fromarray((0.75 * heat + 0.25 * grey).astype(np.uint8))
    best = f"similarity to {word}"
    caption = f"{html.escape(name)}: {html.escape(word)}, {low:.2g} (dark) to {high:.2g} (bright)"
    return (
        f'<figure class="ov-heat"><img src="{data_uri(drawn, "WEBP")}" alt="{html.escape(best, quote=True)}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def words_table(name: str, found: Sequence[tuple[str, float]], total: int) -> str:
    """Returns the HTML of the words of `words_at`."""
    rows = "".join(f"<tr><td>{html.escape(word)}</td><td>{score:.3f}</td></tr>" for word, score in found)
    return (
        f'<figure class="ov-words"><figcaption>{html.escape(name)}: best of {total:,} words</figcaption>'
        f'<table class="ov-legend"><tr><th>word</th><th>score</th></tr>{rows}</table></figure>'
    )


def embeddable(segmenter: Segmenter, words: Sequence[str]) -> ClassList:
    """Returns the names of the model's own classes, and those of `words` that its text side can embed, each once.

    A text side that was trained on captions knows their words alone; a published one knows all.
    """
    own = [] if segmenter.classes is None else segmenter.classes.flat()[0]
    listed = ClassList.things(dict.fromkeys([*own, *words]))
    try:
        segmenter.embed(listed)
        return listed
    except UserError:
        return ClassList.things(dict.fromkeys([*own, *(word for word in words if _embeds(segmenter, word))]))


def download(results: Sequence[Result], names: Sequence[str], kind: str) -> tuple[str, bytes]:
    """Returns the name and content of a file; of several models, a zip of their files.

    Args:
      results: the result of each model.
      names: the name of each model.
      kind: "png", the overlay with its legend; "json", `Result.to_json`; or "features", an .npz of `PixelFeatures`.

    Raises:
      UserError: a model has no features.
    """
    colours = colours_of(results)
    files = {}
    for i, (result, name) in enumerate(zip(results, names, strict=True), 1):
        if kind == "png":
            content = encode_image(picture(result, colours, legend=True))
        elif kind == "json":
            content = (result.to_json() + "\n").encode()
        else:
            if result.features is None:
                raise UserError(f"{name} has no text-aligned features of pixels: choose another model")
            content = result.features.to_npz()
        end = {"png": "overlay.png", "json": "segments.json", "features": "features.npz"}[kind]
        files[end if len(results) == 1 else f"{i}.{end}"] = content
    if len(files) == 1:
        return next(iter(files.items()))
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for file, content in files.items():
            archive.writestr(file, content)
    return f"{kind}.zip", stream.getvalue()


def _embeds(segmenter: Segmenter, word: str) -> bool:
    try:
        segmenter.embed(ClassList.things([word]))
    except UserError:
        return False
    return True


def _share(area: int, result: Result) -> str:
    share = area / result.label_map.size
    return f"{share:.0%}" if share >= 0.005 else "&lt;1%"


def _photo(drawn: Image.Image, title: str, says: str, data: str) -> str:
    return (
        f'<figure class="ov-figure"><figcaption>{title}</figcaption><div class="ov-frame" tabindex="0" '
        f'role="application" aria-label="{title}, {says}. Arrow keys move the cross, Enter asks what is there." {data}>'
        f'<img class="ov-photo" src="{data_uri(drawn, "WEBP")}" alt="{says}" draggable="false"><b class="ov-cross"></b>'
        '<output class="ov-tip"></output></div>'
    )


def _fitting(drawn: Image.Image) -> Image.Image:
    """Resizes a picture for the page: its longer side becomes at least 512 pixels and at most SHOWN."""
    longer = max(drawn.size)
    scale = min(max(longer, 512), SHOWN) / longer
    return drawn.resize((max(1, round(drawn.width * scale)), max(1, round(drawn.height * scale))))


def _shrunk(image: UInt8[np.ndarray, "h w 3"], side: int) -> UInt8[np.ndarray, "h2 w2 3"]:
    if max(image.shape[:2]) <= side:
        return image
    shrunk = Image.fromarray(image)
    shrunk.thumbnail((side, side))
    return np.asarray(shrunk)

"""Pictures of segmentations: a palette, an overlay with a legend, and a grid of predictions."""

import functools
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont

from ovseg_jax.data.images import encode_image
from ovseg_jax.files import write_whole

UNKNOWN_COLOUR = (150, 150, 150)
_NOTE = "* held out: no captioned or labelled training image shows this combination"
_BAND = 256  # rows drawn at once
_MOST = 2_000_000  # pixels of a mask in which a place for its name is searched
INK, FAINT, PAPER = (33, 37, 41), (134, 142, 150), (255, 255, 255)

# The first colours are chosen by eye, each further one by its distance from all before it.
_FIRST = (0x4C78A8, 0xF2A93B, 0x54A24B, 0xE4575E, 0x72B7B2, 0xB279A2, 0xEECA3B, 0x9D755D, 0xFF9DA6, 0x7A6FD0)


@functools.cache
def _all_colours() -> UInt8[np.ndarray, "n 3"]:
    grid = np.stack(np.meshgrid(*[np.arange(16, 256, 17)] * 3, indexing="ij"), -1).reshape(-1, 3)
    first = np.array([[c >> 16, c >> 8 & 255, c & 255] for c in _FIRST])
    lightness, a, b = _oklab(grid).T
    chroma = np.hypot(a, b)
    grid = grid[(lightness > 0.45) & (lightness < 0.9) & (chroma > 0.06) & (chroma < 0.2)]
    chosen = list(first)
    space = _oklab(grid)
    distance = np.min([np.linalg.norm(space - c, axis=-1) for c in _oklab(first)], axis=0)
    for _ in range(len(grid)):
        best = int(distance.argmax())
        chosen.append(grid[best])
        distance = np.minimum(distance, np.linalg.norm(space - space[best], axis=-1))
    return np.asarray(chosen, np.uint8)


def _oklab(rgb: np.ndarray) -> Float[np.ndarray, "n 3"]:
    """Converts sRGB 0..255 to Ottosson's OKLab, in which distances match the perceived difference."""
    linear = (rgb / 255) ** 2.2
    m1 = [[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]]
    m2 = [[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]]
    return np.cbrt(linear @ np.transpose(m1)) @ np.transpose(m2)


def palette(count: int) -> UInt8[np.ndarray, "n 3"]:
    """Returns `count` colours, each as far as possible from those before it.

    Colour i does not depend on `count`, so a label keeps its colour when labels are added after it. Colours repeat
    after about 1,300.
    """
    colours = _all_colours()
    return colours[np.arange(count) % len(colours)]


def paint(label_map: Int[np.ndarray, "h w"], colours: UInt8[np.ndarray, "k 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """Converts a label map to colours; -1 is grey."""
    return np.concatenate([np.array([UNKNOWN_COLOUR], np.uint8), colours])[label_map + 1]


def enlarge_labels(label_map: Int[np.ndarray, "h w"], size: tuple[int, int]) -> Int[np.ndarray, "H W"]:
    """Resizes a label map to (height, width) with smooth outlines.

    Each label's mask is resized bilinearly, and a pixel takes the label that covers most of it.
    """
    if label_map.shape == size:
        return label_map
    height, width = size
    best = np.full(size, -1.0, np.float32)
    result = np.zeros(size, np.int32)
    for label in np.unique(label_map):
        mask = Image.fromarray((label_map == label).astype(np.float32))
        cover = np.asarray(mask.resize((width, height), Image.Resampling.BILINEAR))
        np.putmask(result, cover > best, label)
        np.maximum(best, cover, out=best)
    return result


def overlay(
    image: UInt8[np.ndarray, "h w 3"],
    label_map: Int[np.ndarray, "h2 w2"],
    names: Sequence[str],
    *,
    alpha: float = 0.55,
    colours: UInt8[np.ndarray, "k 3"] | None = None,
    legend: bool = True,
    min_side: int = 512,
) -> Image.Image:
    """Draws an image with its segments coloured, outlined and named, above a legend.

    Args:
      image: the picture.
      label_map: index into `names` for every pixel; -1 = unknown, which is drawn faded and without colour.
      names: a word or phrase for every label.
      alpha: opacity of the colours, 0 to 1.
      colours: one for every name; `palette` by default.
      legend: whether to add the legend below.
      min_side: pictures whose longer side is smaller are enlarged to this size, so that text is readable.
    """
    height, width = image.shape[:2]
    scale = max(1.0, min_side / max(height, width))
    size = (round(height * scale), round(width * scale))
    colours = palette(len(names)) if colours is None else colours
    words = dict(enumerate(names))
    font_size = int(np.clip(max(size) / 30, 15, 40))
    picture = _segments_over(image, label_map, size, words, colours, alpha, font_size)
    if not legend:
        return picture
    labels, areas = np.unique(label_map, return_counts=True)
    order = [int(k) for k in labels[np.argsort(-areas)] if k >= 0]
    entries = _entries(order, words, colours) + [("unknown", None)] * (-1 in labels)
    # The legend of a narrow picture is wider than the picture.
    strip = _legend(entries, max(size[1] - font_size, 12 * font_size), font_size)
    return _stack([picture, _padded(strip, font_size // 2)], gap=0)


def write_sheet(
    path: epath.PathLike, pictures: Sequence[tuple[np.ndarray, np.ndarray]], columns: int = 4
) -> None:
    """Writes a PNG of pairs: each image u8 [H W 3] beside its segments i32 [H W], 0 = void, drawn over it."""
    rows = []
    for image, segments in pictures:
        drawn = overlay(image, segments - 1, [""] * int(segments.max()), legend=False, min_side=240)
        drawn.thumbnail((240, 240))
        rows.append(_padded(_side_by_side([_resized(image, drawn.size[::-1]), drawn], gap=4), 4))
    lines = [_side_by_side(rows[k : k + columns], gap=8) for k in range(0, len(rows), columns)]
    write_whole(path, encode_image(_stack(lines, gap=8)))


class GridRow(NamedTuple):
    """One image of `prediction_grid`; maps may have another resolution than the image.

    Attributes:
      image: u8 [H W 3].
      truth: label map with -1 for void, or None.
      prediction: label map with -1 for unknown.
      proposals: the index of the best proposal for every pixel, or None.
      caption: a line above the row.
    """

    image: UInt8[np.ndarray, "h w 3"]
    truth: Int[np.ndarray, "h1 w1"] | None
    prediction: Int[np.ndarray, "h2 w2"]
    proposals: Int[np.ndarray, "h3 w3"] | None = None
    caption: str = ""


def prediction_grid(
    rows: Sequence[GridRow],
    names: Sequence[str],
    *,
    marked: Collection[int] = (),
    title: str = "",
    cell: int = 256,
    first: str = "image",
    second: str = "prediction",
) -> Image.Image:
    """Draws a grid with a row per image: image | truth | prediction | proposals, above the words in it.

    Args:
      rows: the images; `truth` and `proposals` columns appear if any row has them.
      names: a word or phrase for every label.
      marked: labels of held-out words, which get an asterisk and a note at the bottom.
      title: a line at the top.
      cell: the longer side of a cell in pixels; pictures are scaled to it.
      first: the heading of the images.
      second: the heading of the predictions.
    """
    if not rows:
        raise ValueError("prediction_grid needs at least one row")
    colours = palette(len(names))
    words = {k: name + "*" * (k in marked) for k, name in enumerate(names)}
    heads = [first] + ["truth"] * any(r.truth is not None for r in rows) + [second]
    heads += ["proposals"] * any(r.proposals is not None for r in rows)
    abreast = 2 if len(rows) >= 6 else 1
    blocks = [_grid_row(row, heads, words, colours, cell) for row in rows]
    width = blocks[0].width
    columns = [_stack([_heads(heads, cell, width), *blocks[i::abreast]], gap=14) for i in range(abreast)]
    body = _side_by_side(columns, gap=40)
    parts = [body]
    if title:
        parts.insert(0, _line(title, body.width, 24, INK))
    if marked:
        parts.append(_line(_NOTE, body.width, 15, FAINT))
    return _padded(_stack(parts, gap=16), 24)


def _grid_row(
    row: GridRow, heads: list[str], words: dict[int, str], colours: np.ndarray, cell: int
) -> Image.Image:
    height, width = row.image.shape[:2]
    scale = cell / max(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    cells = []
    for place, head in enumerate(heads):
        if place == 0:
            cells.append(_resized(row.image, size))
        elif head == "proposals":
            cells.append(_proposals(row.proposals, size))
        else:
            labels = row.truth if head == "truth" else row.prediction
            cells.append(_segments_over(row.image, labels, size, words, colours, 0.8, 14))
    # All cells get the same width, so that they stay aligned below their headings.
    padded = [_on_paper(c, cell, size[0], 0, 0) for c in cells]
    picture = _side_by_side(padded, gap=10)
    maps = [m for m in (row.truth, row.prediction) if m is not None]
    found = [int(k) for k in np.unique(np.concatenate([m.ravel() for m in maps])) if k >= 0]
    caption = [_line(row.caption, picture.width, 15, INK)] if row.caption else []
    return _stack([*caption, picture, _legend(_entries(found, words, colours), picture.width, 14)], gap=0)


def _segments_over(
    image: np.ndarray,
    label_map: np.ndarray | None,
    size: tuple[int, int],
    words: dict[int, str],
    colours: np.ndarray,
    alpha: float,
    font_size: int,
) -> Image.Image:
    """Draws the picture at `size` with its segments: colour, outline, and names where they fit."""
    if label_map is None:
        return Image.new("RGB", size[::-1], (241, 243, 245))
    base = np.asarray(_resized(image, size))
    labels = enlarge_labels(label_map, size)
    edge = _outline(labels, max(1, round(max(size) / 400)))
    drawn = np.empty_like(base)
    # In floats, a photograph of 20 megapixels would take two gigabytes at once.
    for start in range(0, size[0], _BAND):
        at = slice(start, start + _BAND)
        drawn[at] = _mixed(base[at], labels[at], edge[at], colours, alpha)
    picture = Image.fromarray(drawn)
    draw = ImageDraw.Draw(picture)
    for label in np.unique(labels):
        if label >= 0:
            _write_inside(draw, labels == label, words[int(label)], font_size)
    return picture


def _mixed(
    image: UInt8[np.ndarray, "h w 3"],
    labels: Int[np.ndarray, "h w"],
    edge: Bool[np.ndarray, "h w"],
    colours: UInt8[np.ndarray, "k 3"],
    alpha: float,
) -> UInt8[np.ndarray, "h w 3"]:
    """Mixes the colours of segments and edges into an image."""
    base = image.astype(np.float32)
    # The picture shows through mostly as lightness, so that its colours do not mix with those of the labels.
    shade = base.mean(-1, keepdims=True)
    mixed = (1 - alpha) * (0.5 * base + 0.5 * shade) + alpha * paint(labels, colours)
    faded = 0.75 * (0.3 * base + 0.7 * shade) + 0.25 * 255
    mixed = np.where((labels >= 0)[..., None], mixed, faded)
    mixed = np.where(edge[..., None], 0.15 * mixed + 0.85 * 255, mixed)
    return np.clip(mixed, 0, 255).astype(np.uint8)


def _outline(labels: Int[np.ndarray, "h w"], thickness: int) -> Bool[np.ndarray, "h w"]:
    edge = np.zeros(labels.shape, bool)
    for d in range(1, thickness + 1):
        edge[:, d:] |= labels[:, d:] != labels[:, :-d]
        edge[d:] |= labels[d:] != labels[:-d]
    return edge


def _write_inside(
    draw: ImageDraw.ImageDraw, mask: Bool[np.ndarray, "h w"], text: str, font_size: int
) -> None:
    """Writes the text at the place in the mask with most room around it, or not at all if it does not fit."""
    step = max(1, round((mask.size / _MOST) ** 0.5))  # in large pictures, one pixel in `step` is enough
    mask = mask[::step, ::step]
    area = np.pad(np.cumsum(np.cumsum(mask, 0, dtype=np.int32), 1, dtype=np.int32), ((1, 0), (1, 0)))
    for points in (font_size, round(font_size * 0.8)):
        font = _font(points, text)
        left, top, right, bottom = (round(v) for v in font.getbbox(text))
        for room in (8.0, 5.0, 3.0, 2.0, 1.2, 0.6, 0.25):
            pad = round(points * room)
            wide, high = right - left + 2 * min(pad, points), bottom - top + 2 * pad
            w, h = -(-wide // step), -(-high // step)
            if w >= mask.shape[1] or h >= mask.shape[0]:
                continue
            covered = area[h:, w:] - area[:-h, w:] - area[h:, :-w] + area[:-h, :-w]
            ys, xs = np.nonzero(covered >= w * h)
            if len(ys):
                # Among the places with this much room, the one nearest to their middle.
                i = np.argmin((ys - ys.mean()) ** 2 + (xs - xs.mean()) ** 2)
                x = xs[i] * step + wide / 2 - (left + right) / 2
                y = ys[i] * step + high / 2 - (top + bottom) / 2
                draw.text((x, y), text, font=font, fill="white", stroke_width=2, stroke_fill=INK)
                return


def _proposals(index: np.ndarray | None, size: tuple[int, int]) -> Image.Image:
    if index is None:
        return Image.new("RGB", size[::-1], (241, 243, 245))
    labels = enlarge_labels(index, size)
    picture = paint(labels, palette(int(max(index.max() + 1, 1))))
    return Image.fromarray(np.where(_outline(labels, 1)[..., None], np.uint8(255), picture))


Entry = tuple[str, tuple[int, ...] | None]  # a word and its colour; None = unknown


def _entries(labels: Sequence[int], words: dict[int, str], colours: UInt8[np.ndarray, "k 3"]) -> list[Entry]:
    return [(words[k], tuple(colours[k].tolist())) for k in labels]


def _legend(entries: Sequence[Entry], width: int, font_size: int) -> Image.Image:
    """Draws swatches with words, in as many lines as they need; an empty swatch stands for unknown."""
    line, swatch, gap = round(font_size * 1.7), font_size, round(font_size * 1.1)
    places, x, y = [], 0, 0
    for text, colour in entries:
        font = _font(font_size, text)
        text = _shortened(text, font, width - swatch - font_size // 2)
        length = round(swatch * 1.45 + font.getlength(text))
        if x and x + length > width:
            x, y = 0, y + line
        places.append((x, y, text, colour, font))
        x += length + gap
    picture = Image.new("RGB", (width, y + line if entries else 1), PAPER)
    draw = ImageDraw.Draw(picture)
    for x, y, text, colour, font in places:
        top = y + (line - swatch) // 2
        box = (x, top, x + swatch - 1, top + swatch - 1)
        draw.rounded_rectangle(box, swatch // 4, fill=colour or PAPER, outline=None if colour else FAINT)
        draw.text((x + round(swatch * 1.45), y + line / 2), text, font=font, fill=INK, anchor="lm")
    return picture


def _font(size: int, text: str = "") -> Any:
    """Returns Pillow's own font, which has no letters with accents, or for other texts one that has theirs, if any."""
    if all(c.isascii() or c == "…" for c in text):
        return ImageFont.load_default(size)
    import matplotlib

    own = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    # What it has: Latin with accents, Greek, Cyrillic and Arabic, but neither Chinese nor Japanese nor Korean.
    if all(ord(c) < 0x700 or c == "…" for c in text):
        return ImageFont.truetype(own, size)
    for name in (
        "NotoSansCJK-Regular.ttc",
        "Arial Unicode.ttf",
        "msyh.ttc",
        "NotoSans-Regular.ttf",
    ):
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.truetype(own, size)


def _resized(image: np.ndarray, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC)


def _line(text: str, width: int, font_size: int, ink: tuple[int, int, int]) -> Image.Image:
    picture, font = Image.new("RGB", (width, round(font_size * 1.5)), PAPER), _font(font_size, text)
    place = (0, picture.height / 2)
    ImageDraw.Draw(picture).text(place, _shortened(text, font, width), font=font, fill=ink, anchor="lm")
    return picture


def _shortened(text: str, font: Any, width: int) -> str:
    """Returns the text, or as much of its beginning as fits with "…" after it."""
    while font.getlength(text) > width and len(text) > 2:
        text = text[:-2].rstrip("…") + "…"
    return text


def _heads(heads: Sequence[str], cell: int, width: int) -> Image.Image:
    return _side_by_side([_line(head, cell, 16, FAINT) for head in heads], gap=10).crop((0, 0, width, 24))


def _on_paper(picture: Image.Image, width: int, height: int, left: int, top: int) -> Image.Image:
    result = Image.new("RGB", (width, height), PAPER)
    result.paste(picture, (left, top))
    return result


def _stack(pictures: Sequence[Image.Image], gap: int) -> Image.Image:
    height = sum(p.height for p in pictures) + gap * (len(pictures) - 1)
    result = Image.new("RGB", (max(p.width for p in pictures), height), PAPER)
    y = 0
    for picture in pictures:
        result.paste(picture, (0, y))
        y += picture.height + gap
    return result


def _side_by_side(pictures: Sequence[Image.Image], gap: int) -> Image.Image:
    width = sum(p.width for p in pictures) + gap * (len(pictures) - 1)
    result = Image.new("RGB", (width, max(p.height for p in pictures)), PAPER)
    x = 0
    for picture in pictures:
        result.paste(picture, (x, 0))
        x += picture.width + gap
    return result


def _padded(picture: Image.Image, margin: int) -> Image.Image:
    return _on_paper(picture, picture.width + 2 * margin, picture.height + 2 * margin, margin, margin)

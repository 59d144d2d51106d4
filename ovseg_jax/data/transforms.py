"""Pure functions that transform one example: image, segments and boxes together.

No function changes its arguments, since examples may come from a cache. Random ones take a `numpy.random.Generator`, so
that the caller decides what the draw depends on.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Num, UInt8
from PIL import Image

Example = Mapping[str, Any]


def flip(example: Example) -> dict[str, Any]:
    """Mirrors an example's image, and its segments and boxes if present, left to right.

    The caller has to drop words such as "left".
    """
    out, width = dict(example), example["image"].shape[1]
    out["image"] = example["image"][:, ::-1]
    if "segments" in example:
        out["segments"] = example["segments"][:, ::-1]
    if "boxes" in example:
        x0, y0, x1, y1 = example["boxes"].T
        out["boxes"] = np.stack([width - x1, y0, width - x0, y1], -1)
    return out


def scale_jitter(
    example: Example, size: int, jitter: tuple[float, float], rng: np.random.Generator
) -> dict[str, Any]:
    """Scales an example by a random factor, then crops or pads it to a square (OpenSeg, 4.1).

    This is the small jitter of Simple Copy-Paste. The image is scaled to fit into a square of side `f * size`, f
    uniform in `jitter`, keeping its aspect. A side longer than `size` is cropped at a random place; a shorter one is
    padded at the bottom or right.

    Args:
      example: with `image`, and optionally `segments` and `boxes`.
      size: side S of the square in pixels.
      jitter: lowest and highest f.
      rng: draws f and the place of the crop.

    Returns:
      The example with `image` u8 [S S 3] (padding 0), `segments` i32 [S S] (padding 0 = void), `boxes`
      clipped to the crop (an empty one has x0 = x1), and `image_size` = (height, width) of the part that is
      not padding.
    """
    height, width = example["image"].shape[:2]
    factor, at_y, at_x = rng.random(3)
    scale = (jitter[0] + factor * (jitter[1] - jitter[0])) * min(size / height, size / width)
    scaled = max(1, round(height * scale)), max(1, round(width * scale))
    if scaled == (height, width) == (size, size):
        return {**example, "image_size": np.array(scaled, np.int32)}
    top = int(at_y * (max(scaled[0] - size, 0) + 1))
    left = int(at_x * (max(scaled[1] - size, 0) + 1))
    return _crop_scaled(example, scaled, top, left, size)


def short_side_crop(
    example: Example,
    size: int,
    ratio: tuple[float, float],
    rng: np.random.Generator,
    *,
    long_side: int = 2048,
    category_share: float = 1.0,
    tries: int = 10,
) -> dict[str, Any]:
    """Scales an example by its short side and crops or pads it to a square, as mmsegmentation's recipes for scenes do.

    These are RandomResize with keep_ratio and RandomCrop with cat_max_ratio: the image is scaled so that its short side
    is f * size, f uniform in `ratio`, or its long side f * long_side if that is smaller. A crop in which one category
    has `category_share` or more of the labelled pixels is drawn anew, up to `tries` times.

    Args:
      example: with `image`, and optionally `segments` (with `class_ids`, the category of each) and `boxes`.
      size: side S of the square in pixels.
      ratio: lowest and highest f.
      rng: draws f and the places of the crops.
      long_side: see above, in pixels.
      category_share: see above; 1 takes the first crop.
      tries: see above.

    Returns:
      As `scale_jitter`.
    """
    height, width = example["image"].shape[:2]
    factor = rng.uniform(*ratio)
    scale = factor * min(size / min(height, width), long_side / max(height, width))
    scaled = max(1, round(height * scale)), max(1, round(width * scale))
    for _ in range(tries + 1):
        top, left = (int(rng.integers(max(side - size, 0) + 1)) for side in scaled)
        if category_share >= 1 or "segments" not in example:
            break
        rows, columns = _crop_rows(height, scaled[0], top, size), _crop_rows(width, scaled[1], left, size)
        seen = class_map(example["segments"].take(rows, 0).take(columns, 1), example["class_ids"])
        count = np.bincount(seen[seen >= 0])
        if (count > 0).sum() > 1 and count.max() / count.sum() < category_share:
            break
    return _crop_scaled(example, scaled, top, left, size)


def crop_resize(example: Example, crop: tuple[int, int, int, int], size: int) -> dict[str, Any]:
    """Crops a rectangle and resizes it to a square, bicubically; segments by nearest neighbour.

    Args:
      example: with `image`, and optionally `segments` and `boxes`.
      crop: (top, left, height, width) in pixels, inside the image.
      size: side S of the square in pixels.

    Returns:
      The example with `image` u8 [S S 3], `segments` i32 [S S], `boxes` clipped to the crop (an empty one has
      x0 = x1 or y0 = y1), and `image_size` = (S, S).
    """
    top, left, height, width = crop
    # Cropped before resizing: the filter would otherwise mix in pixels from outside of the crop.
    part = Image.fromarray(example["image"][top : top + height, left : left + width])
    image = np.asarray(part.resize((size, size), Image.Resampling.BICUBIC))
    out = {**example, "image": image, "image_size": np.array((size, size), np.int32)}
    if "segments" in example:
        rows, columns = top + _nearest(height, size), left + _nearest(width, size)
        out["segments"] = example["segments"].take(rows, 0).take(columns, 1)
    if "boxes" in example:
        boxes = (example["boxes"] - np.array([left, top] * 2)) * ([size / width, size / height] * 2)
        out["boxes"] = np.clip(boxes, 0, size).astype(np.float32)
    return out


def scramble_channels(
    image: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator, grey: float = 0.8
) -> UInt8[np.ndarray, "h w 3"]:
    """Permutes the colour channels and mixes them with their mean by a random share in [0, grey].

    It makes colour words untrue and keeps textures and outlines. Meant for drawn images; see `rotate_hue` for
    photographs.
    """
    share = rng.random() * grey
    mix = (1 - share) * np.eye(3)[rng.permutation(3)] + share / 3
    return mix_channels(image, mix)


def rotate_hue(
    image: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator, degrees: float = 180.0, grey: float = 0.5
) -> UInt8[np.ndarray, "h w 3"]:
    """Rotates the hue by at most `degrees` in either direction and removes at most a share `grey` of the saturation.

    Both amounts are random. The rotation is linear in RGB and keeps luminance (the matrix of CSS's `hue-rotate`), so
    shading stays natural.
    """
    angle = np.deg2rad(rng.uniform(-degrees, degrees))
    luma = np.tile([0.213, 0.715, 0.072], (3, 1))
    sine = np.array([[-0.213, -0.715, 0.928], [0.143, 0.140, -0.283], [-0.787, 0.715, 0.072]])
    turn = luma + np.cos(angle) * (np.eye(3) - luma) + np.sin(angle) * sine
    share = rng.random() * grey
    return mix_channels(image, share * luma + (1 - share) * turn)


def distort_colours(
    image: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator
) -> UInt8[np.ndarray, "h w 3"]:
    """Changes brightness, contrast, saturation and hue, each with probability 1/2.

    This is mmsegmentation's PhotoMetricDistortion. Brightness adds -32 to 32; contrast multiplies by 0.5 to 1.5, before
    or after the other two with equal probability; saturation multiplies by 0.5 to 1.5; the hue turns by -36 to 34
    degrees. Results are clipped to 0..255.
    """
    coin = lambda: rng.random() < 0.5
    x = image
    if coin():
        x = _linear(x, 1.0, rng.uniform(-32, 32))
    contrast_last = coin()
    contrast = rng.uniform(0.5, 1.5) if coin() else None
    if contrast is not None and not contrast_last:
        x = _linear(x, contrast, 0.0)
    saturation = rng.uniform(0.5, 1.5) if coin() else None
    turn = int(rng.integers(-18, 18)) if coin() else 0  # in units of 2 degrees
    if saturation is not None or turn:
        hue, vivid, value = np.moveaxis(np.asarray(Image.fromarray(x).convert("HSV")), -1, 0)
        if saturation is not None:
            vivid = _linear(vivid, saturation, 0.0)
        hue = hue + np.uint8(round(turn * 256 / 180) % 256)  # It wraps around.
        x = np.asarray(Image.fromarray(np.stack([hue, vivid, value], -1), "HSV").convert("RGB"))
    if contrast is not None and contrast_last:
        x = _linear(x, contrast, 0.0)
    return x


def mix_channels(
    image: UInt8[np.ndarray, "h w 3"], matrix: Float[np.ndarray, "3 3"]
) -> UInt8[np.ndarray, "h w 3"]:
    """Multiplies the RGB channels by a matrix, rounded and clipped to 0..255; row i makes output channel i."""
    coefficients = np.concatenate([matrix, np.zeros((3, 1))], 1)
    return np.asarray(Image.fromarray(image).convert("RGB", tuple(coefficients.ravel().tolist())))


def blur(
    image: UInt8[np.ndarray, "h w 3"], image_size: Int[np.ndarray, "2"], factor: float
) -> UInt8[np.ndarray, "h w 3"]:
    """Removes detail finer than `factor` pixels by scaling the valid part down and up again."""
    height, width = (int(n) for n in image_size)
    part = Image.fromarray(image[:height, :width])
    small = part.resize(
        (max(1, round(width / factor)), max(1, round(height / factor))), Image.Resampling.BILINEAR
    )
    blurred = image.copy()
    blurred[:height, :width] = np.asarray(small.resize((width, height), Image.Resampling.BILINEAR))
    return blurred


def chosen_segments(
    segments: Int[np.ndarray, "h w"], iscrowd: Bool[np.ndarray, "n"], max_masks: int
) -> Int[np.ndarray, "m"]:
    """Returns the 1-based ids of at most `max_masks` visible segments that are not crowds, the largest first."""
    area = np.bincount(segments.ravel(), minlength=len(iscrowd) + 1)[1:]
    area[iscrowd] = 0
    order = np.argsort(-area, kind="stable")[:max_masks]
    return (order[area[order] > 0] + 1).astype(np.int32)


def segment_masks(
    segments: Int[np.ndarray, "s s"], ids: Int[np.ndarray, "m"], max_masks: int, stride: int
) -> UInt8[np.ndarray, "{max_masks} s//{stride} s//{stride}"]:
    """Computes the share of each cell of `stride` x `stride` pixels that each segment covers, in 0..255.

    It counts (segment, cell) pairs in one pass and makes no full-size masks. Rows beyond `len(ids)` are 0.
    """
    size = segments.shape[0] // stride
    masks = np.zeros((max_masks, size, size), np.uint8)
    if stride == 1:
        np.multiply(segments == ids[:, None, None], np.uint8(255), out=masks[: len(ids)])
        return masks
    slot = np.full(max(int(segments.max(initial=0)), int(ids.max(initial=0))) + 1, len(ids), np.int64)
    slot[ids] = np.arange(len(ids))
    row = np.arange(size * stride) // stride
    cell = row[:, None] * size + row
    used = segments[: size * stride, : size * stride]
    pairs = slot[used] * (size * size) + cell
    counts = np.bincount(pairs.ravel(), minlength=(len(ids) + 1) * size * size)
    counts = counts.reshape(-1, size, size)[: len(ids)]
    masks[: len(ids)] = (counts * 255 + stride * stride // 2) // (stride * stride)
    return masks


def class_map(
    segments: Int[np.ndarray, "h w"], class_ids: Int[np.ndarray, "n"], stride: int = 1
) -> Int[np.ndarray, "h//{stride} w//{stride}"]:
    """Returns the class of every pixel, or of the middle pixel of every cell; -1 if void or unlabelled."""
    height, width = (n // stride * stride for n in segments.shape)
    middle = segments[stride // 2 : height : stride, stride // 2 : width : stride]
    return np.concatenate([[-1], class_ids]).astype(np.int32)[middle]


def corners(boxes: Num[np.ndarray, "n 4"]) -> Num[np.ndarray, "n 4"]:
    """Returns boxes (x, y, width, height) as (x0, y0, x1, y1)."""
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)


def segment_boxes(segments: Int[np.ndarray, "h w"], count: int) -> Float[np.ndarray, "{count} 4"]:
    """Computes boxes (x0, y0, x1, y1; exclusive ends, pixels) of segments 1..count; zeros without pixels."""
    return np.stack(
        [
            edge
            for ends in zip(*(_extent(segments, count, axis) for axis in (1, 0)), strict=True)
            for edge in ends
        ],
        -1,
    ).astype(np.float32)


def _linear(x: np.ndarray, factor: float, offset: float) -> np.ndarray:
    """Computes factor x + offset of bytes, clipped to 0..255 and rounded down, by a table."""
    table = np.clip(np.arange(256, dtype=np.float32) * factor + offset, 0, 255).astype(np.uint8)
    return table[x]


def _extent(segments: np.ndarray, count: int, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first, and one past the last, position along `axis` at which each segment has a pixel."""
    length = segments.shape[axis]
    position = np.arange(length) if axis else np.arange(length)[:, None]
    seen = np.bincount(
        (segments.astype(np.int64) * length + position).ravel(), minlength=(count + 1) * length
    )
    visible = seen.reshape(-1, length)[1 : count + 1] > 0
    some = visible.any(1)
    return np.where(some, visible.argmax(1), 0), np.where(some, length - visible[:, ::-1].argmax(1), 0)


def _crop_scaled(example: Example, scaled: tuple[int, int], top: int, left: int, size: int) -> dict[str, Any]:
    """Scales an example and crops it at (top, left), or pads it, to a square; see `scale_jitter`."""
    height, width = example["image"].shape[:2]
    kept = min(scaled[0], size), min(scaled[1], size)
    image = np.zeros((size, size, 3), np.uint8)
    image[: kept[0], : kept[1]] = _resize_part(example["image"], scaled, top, left, kept)
    out = {**example, "image": image, "image_size": np.array(kept, np.int32)}
    if "segments" in example:
        segments = np.zeros((size, size), np.int32)
        rows, columns = _crop_rows(height, scaled[0], top, size), _crop_rows(width, scaled[1], left, size)
        # Gathering rows, then columns, is several times as fast as one gather by pairs of indices.
        segments[: kept[0], : kept[1]] = example["segments"].take(rows, 0).take(columns, 1)
        out["segments"] = segments
    if "boxes" in example:
        ratio = np.array([scaled[1] / width, scaled[0] / height] * 2, np.float32)
        boxes = example["boxes"] * ratio - np.array([left, top] * 2, np.float32)
        out["boxes"] = np.clip(boxes, 0, np.array([kept[1], kept[0]] * 2)).astype(np.float32)
    return out


def _crop_rows(length: int, scaled: int, start: int, size: int) -> np.ndarray:
    """Returns the source position of each position of a crop along one axis."""
    return _nearest(length, scaled)[start : start + size]


def _nearest(length: int, scaled: int) -> np.ndarray:
    """Returns the source position whose pixel covers the middle of each scaled pixel."""
    return np.minimum(((np.arange(scaled) + 0.5) * (length / scaled)).astype(np.int64), length - 1)


def _resize_part(
    image: np.ndarray, scaled: tuple[int, int], top: int, left: int, kept: tuple[int, int]
) -> np.ndarray:
    """Resizes an image to `scaled`, but computes only the part [top:, left:] of size `kept`."""
    if scaled == image.shape[:2]:
        return image[top : top + kept[0], left : left + kept[1]]
    y, x = image.shape[0] / scaled[0], image.shape[1] / scaled[1]
    box = (
        left * x,
        top * y,
        min((left + kept[1]) * x, image.shape[1]),
        min((top + kept[0]) * y, image.shape[0]),
    )
    picture = Image.fromarray(image).resize(kept[::-1], Image.Resampling.BILINEAR, box=box)
    return np.asarray(picture)

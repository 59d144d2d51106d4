"""Masks in COCO's files, as polygons or run lengths (RLE), checked and brought to compressed RLE."""

import re
from typing import Any

import numpy as np

from ovseg_jax.reading import array, number, short, whole

LONGEST = 1 << 16
"""The longest side of an image that has masks, in pixels; RLE has 32 bits for the length of a run."""

# Six bits a character, of which one says that the number goes on; seven characters hold 32 bits.
_STRING = re.compile("(?:[P-o]{0,6}[0-O])+")


class OtherSize(ValueError):
    """A mask whose size is not that of its image."""


def mask_rle(value: Any, name: str, size: tuple[int, ...]) -> dict[str, Any]:
    """Checks a mask and returns it as compressed RLE, {"size": [height, width], "counts": text}.

    Args:
      value: polygons, lists [x, y, x, y, ...] in pixels, whose union is the mask; RLE; or RLE with a list of counts.
      name: the mask's name in errors.
      size: height and width of the image.

    Raises:
      OtherSize: the RLE is of another size.
      ValueError: it is none of these.
    """
    from pycocotools import mask as coco

    height, width = size
    if isinstance(value, list):
        if not value:
            raise ValueError(f"{name}: it has no polygon")
        return _text(
            coco.merge(coco.frPyObjects([_polygon(p, name, height, width) for p in value], height, width))
        )
    if not isinstance(value, dict) or not {"size", "counts"} <= value.keys():
        raise ValueError(f"{name}: expected polygons, or RLE with 'size' and 'counts', got {short(value)}")
    own = [whole(side, f"{name}: 'size'", 1, LONGEST) for side in array(value["size"], f"{name}: 'size'")]
    if own != [height, width]:
        shown = " x ".join(map(str, own))
        raise OtherSize(f"{name} is {shown} (height x width), but its image is {height} x {width}")
    counts = value["counts"]
    if isinstance(counts, list):
        total = sum(whole(count, f"{name}: 'counts'", 0, height * width) for count in counts)
    elif isinstance(counts, str) and counts.isascii() and _STRING.fullmatch(counts):
        total = _total(counts.encode())
    else:
        raise ValueError(f"{name}: 'counts': expected run lengths, got {short(counts)}")
    if total != height * width:
        raise ValueError(f"{name}: its run lengths are not of {height} x {width} pixels")
    if isinstance(counts, list):
        return _text(coco.frPyObjects({"size": own, "counts": counts}, height, width))
    return {"size": own, "counts": counts}


def rle_area(rle: dict[str, Any]) -> float:
    """Returns the number of pixels of a mask in compressed RLE."""
    from pycocotools import mask as coco

    return float(coco.area({**rle, "counts": rle["counts"].encode()}))


def _text(rle: dict[str, Any]) -> dict[str, Any]:
    return {**rle, "counts": rle["counts"].decode()}


def _polygon(value: Any, name: str, height: int, width: int) -> list[float]:
    found = [number(x, name) for x in array(value, name)]
    if len(found) < 6 or len(found) % 2:
        raise ValueError(f"{name}: expected at least three points [x, y, x, y, ...], got {short(value)}")
    # Far points cost memory: the outline is drawn pixel by pixel, also outside of the image.
    if min(found) < -max(height, width) or max(found) > 2 * max(height, width):
        raise ValueError(f"{name}: a polygon lies far outside of the image: {short(value)}")
    return found


def _total(counts: bytes) -> int:
    """Returns the sum of the run lengths of compressed RLE, or -1 if one is negative."""
    raw = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    end = np.flatnonzero(raw < 32)  # the last character of each number
    start = np.concatenate([[0], end[:-1] + 1])
    length = end - start + 1
    place = np.arange(len(raw)) - np.repeat(start, length)
    # Five bits a character, the lowest first; the highest bit of the last one is the sign.
    found = np.add.reduceat((raw & 31) << 5 * place, start) - ((raw[end] & 16) << 5 * (length - 1) + 1)
    # From the fourth number on, differences to the number two before are stored.
    found[1::2], found[2::2] = np.cumsum(found[1::2]), np.cumsum(found[2::2])
    return int(found.sum()) if found.min() >= 0 else -1

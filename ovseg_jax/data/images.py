"""Images as people have them, read into one form: u8 [H W 3], upright, on white where they are
transparent."""

import io
import os
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image, ImageOps

from ovseg_jax.errors import UserError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})


def read_image(image: Any) -> UInt8[np.ndarray, "h w 3"]:
    """Reads a file, a PIL image or an array.

    Args:
      image: a path (local or of a bucket); a PIL image of any mode; or an array [H W], [H W 1], [H W 3] or
        [H W 4] of uint8, of uint16 (scaled by 257), or of floats in 0..1. EXIF rotation is undone.

    Raises:
      UserError: the file is missing, truncated or no image, or the array is of none of these forms.
    """
    if isinstance(image, str | os.PathLike):
        return _read_file(epath.Path(image))
    if isinstance(image, Image.Image):
        return _from_pil(image, "the image")
    if hasattr(image, "__array__"):
        return _from_array(np.asarray(image))
    raise UserError(f"an image is a path, a PIL image or an array, not a {type(image).__name__}")


def _read_file(path: epath.Path) -> UInt8[np.ndarray, "h w 3"]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"no image file {path}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # a large photograph is welcome
            return _from_pil(Image.open(io.BytesIO(data)), str(path))
    except Image.UnidentifiedImageError:
        raise UserError(f"{path} is not an image that Pillow can read") from None
    except Image.DecompressionBombError as error:
        raise UserError(f"{path} is too large: {error}; cut it into pieces") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # a file that ends within its header
        raise UserError(f"{path} is damaged or truncated: {error}") from error


def _from_pil(image: Image.Image, name: str) -> UInt8[np.ndarray, "h w 3"]:
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # Pillow's own words for a damaged file
        raise UserError(f"{name} is damaged or truncated: {error}") from error
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        if image.mode == "F" or values.max(initial=0) > 65535 or values.min(initial=0) < 0:
            raise UserError(
                f"{name} has pixels of mode {image.mode!r}, which is no picture: convert it to 8 or 16 bits"
            )
        return _from_array(values.astype(np.uint16))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.array(image.convert("RGB"))


def _from_array(array: np.ndarray) -> UInt8[np.ndarray, "h w 3"]:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4) or 0 in array.shape:
        raise UserError(
            f"an image array has the shape [H W], [H W 1], [H W 3] or [H W 4], not {list(array.shape)}"
        )
    if array.dtype == np.uint16:
        array = np.round(array / 257)
    elif np.issubdtype(array.dtype, np.floating):
        low, high = array.min(), array.max()
        if not (low >= 0 and high <= 1):  # also false for NaN
            raise UserError(f"an image array of floats has values in 0..1, not {low:g}..{high:g}")
        array = np.round(array * 255)
    elif array.dtype != np.uint8:
        raise UserError(f"an image array holds uint8, uint16 or floats in 0..1, not {array.dtype}")
    array = array.astype(np.uint8)
    if array.shape[-1] == 4:
        return _from_pil(Image.fromarray(array), "the image")
    return np.array(np.broadcast_to(array, (*array.shape[:2], 3)))


def fit_canvas(
    image: UInt8[np.ndarray, "h w 3"], size: int
) -> tuple[UInt8[np.ndarray, "s s 3"], tuple[int, int]]:
    """The image, its aspect kept, at the top left of an S x S canvas, and its (height, width) there.

    It is scaled by min(S/h, S/w), bilinearly. The rest is padding, which methods zero after normalisation (as
    OpenSeg's demo does).
    """
    height, width = image.shape[:2]
    scale = min(size / height, size / width)
    fitted = (max(1, round(height * scale)), max(1, round(width * scale)))
    if fitted != (height, width):
        image = np.asarray(Image.fromarray(image).resize(fitted[::-1], Image.Resampling.BILINEAR))
    canvas = np.zeros((size, size, 3), np.uint8)
    canvas[: fitted[0], : fitted[1]] = image
    return canvas, fitted


def centre_square(image: UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[np.ndarray, "s s 3"]:
    """The middle of the image as an S x S square, as CLIP sees an image: its shorter side is scaled to S,
    bicubically, and the longer one cropped."""
    height, width = image.shape[:2]
    short = min(height, width)
    scaled = (size * height // short, size * width // short)
    if scaled != (height, width):
        image = np.asarray(Image.fromarray(image).resize(scaled[::-1], Image.Resampling.BICUBIC))
    # Halves are rounded to even numbers, as in torchvision.
    top, left = (round((length - size) / 2) for length in scaled)
    return image[top : top + size, left : left + size]


def colour(name: str, fill: Sequence[float]) -> UInt8[np.ndarray, "3"]:
    """A colour of bytes, of what a config gives the source `name`.

    Raises:
      UserError: it is not three numbers from 0 to 255.
    """
    if len(fill) != 3 or not all(0 <= x <= 255 for x in fill):
        raise UserError(f"{name}: fill={tuple(fill)} is not three numbers from 0 to 255")
    return np.round(np.asarray(fill, np.float64)).astype(np.uint8)

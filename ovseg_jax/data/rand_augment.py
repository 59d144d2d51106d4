"""RandAugment (Cubuk et al., 2020), in the variants of torchvision and Dassl: a few operations drawn from a list.

torchvision's `RandAugment` applies every drawn operation at one strength; Dassl's `RandAugment2`, on which CoOp and
POMP are built, draws the strengths and skips operations at random.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageEnhance, ImageOps

BINS = 30  # the strongest magnitude of torchvision


def _affine(image: Image.Image, *matrix: float | int) -> Image.Image:
    """Applies an affine map with nearest-neighbour sampling; outside of the image is black."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix)


def _enhance(kind: Any) -> Callable[[Image.Image, float], Image.Image]:
    return lambda image, v: kind(image).enhance(1 + v)


OPERATIONS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "identity": lambda image, v: image,
    "shear_x": lambda image, v: _affine(image, 1, v, 0, 0, 1, 0),
    "shear_y": lambda image, v: _affine(image, 1, 0, 0, v, 1, 0),
    "translate_x": lambda image, v: _affine(image, 1, 0, -v, 0, 1, 0),
    "translate_y": lambda image, v: _affine(image, 1, 0, 0, 0, 1, -v),
    "rotate": lambda image, v: image.rotate(v),
    "brightness": _enhance(ImageEnhance.Brightness),
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "posterize": lambda image, v: ImageOps.posterize(image, int(v)),
    "solarize": lambda image, v: ImageOps.solarize(image, v),  # type: ignore[arg-type]  # floats are fine
    "auto_contrast": lambda image, v: ImageOps.autocontrast(image),
    "equalize": lambda image, v: ImageOps.equalize(image),
    "invert": lambda image, v: ImageOps.invert(image),
}
"""The operations (image, strength) -> image; the strength is in pixels, degrees, contrast, bits or a threshold."""

TORCHVISION = tuple(name for name in OPERATIONS if name != "invert")
"""The 14 operations of torchvision."""


def rand_augment(
    image: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator, num_ops: int = 2, magnitude: int = 9
) -> UInt8[np.ndarray, "h w 3"]:
    """Applies torchvision's RandAugment: `num_ops` operations of one magnitude (0..30) with random signs."""
    strengths = torchvision_strengths(image.shape[1], image.shape[0], magnitude)
    picture = Image.fromarray(image)
    for name in rng.choice(TORCHVISION, num_ops):
        strength, signed = strengths[name]
        negative = signed and rng.random() < 0.5
        picture = OPERATIONS[name](picture, -strength if negative else strength)
    return np.asarray(picture)


def torchvision_strengths(width: int, height: int, magnitude: int) -> dict[str, tuple[float, bool]]:
    """Returns the strength of each of torchvision's operations, and whether its sign is random."""
    share = magnitude / BINS
    enhance = (0.9 * share, True)
    return {
        "identity": (0.0, False),
        "shear_x": (0.3 * share, True),
        "shear_y": (0.3 * share, True),
        "translate_x": (int(150 / 331 * width * share), True),
        "translate_y": (int(150 / 331 * height * share), True),
        "rotate": (30 * share, True),
        "brightness": enhance,
        "color": enhance,
        "contrast": enhance,
        "sharpness": enhance,
        "posterize": (8 - round(4 * share), False),
        "solarize": (255 - 255 * magnitude / BINS, False),
        "auto_contrast": (0.0, False),
        "equalize": (0.0, False),
    }


def rand_augment_dassl(
    image: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator, num_ops: int = 2, probability: float = 0.6
) -> UInt8[np.ndarray, "h w 3"]:
    """Applies Dassl's `RandAugment2`: `num_ops` operations, each with `probability` and of a random strength."""
    ranges = dassl_ranges(image.shape[1], image.shape[0])
    picture = Image.fromarray(image)
    for name in rng.choice(list(OPERATIONS), num_ops):
        if rng.random() < probability:
            picture = OPERATIONS[name](picture, rng.uniform(*ranges[name]))
    return np.asarray(picture)


def dassl_ranges(width: int, height: int) -> dict[str, tuple[float, float]]:
    """Returns the lowest and highest strength of each operation of Dassl's `RandAugment2`."""
    none, enhance = (0.0, 0.0), (-0.9, 0.9)
    return {
        "identity": none,
        "shear_x": (-0.3, 0.3),
        "shear_y": (-0.3, 0.3),
        "translate_x": (-0.3 * width, 0.3 * width),
        "translate_y": (-0.3 * height, 0.3 * height),
        "rotate": (-30, 30),
        "brightness": enhance,
        "color": enhance,
        "contrast": enhance,
        "sharpness": enhance,
        "posterize": (4, 8),
        "solarize": (0, 256),
        "auto_contrast": none,
        "equalize": none,
        "invert": none,
    }

"""Resized images: whole, or in sliding windows as mmsegmentation cuts them (`test_cfg` mode "slide")."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, UInt8
from PIL import Image

from ovseg_jax.errors import UserError

RESAMPLES = ("bilinear", "bicubic")


class Cut(NamedTuple):
    """The windows of an image, padded to a fixed number W.

    Attributes:
      image: u8 [W S S 3], each window at the top left of its square.
      image_size: i32 [W 2], height and width of each window, at most S; 0 for padding.
      window_at: i32 [W 2], row and column of each window's first pixel in the resized image.
      window_valid: [W] False for padding, which comes last.
      resized: i32 [2], height and width of the resized image.
    """

    image: UInt8[np.ndarray, "w s s 3"]
    image_size: Int[np.ndarray, "w 2"]
    window_at: Int[np.ndarray, "w 2"]
    window_valid: Bool[np.ndarray, "w"]
    resized: Int[np.ndarray, "2"]


def resized(height: int, width: int, short: int, longest: int) -> tuple[int, int]:
    """Returns the size of an image whose shorter side becomes `short`, or less so that no side exceeds `longest`."""
    scale = min(longest / max(height, width), short / min(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


@dataclasses.dataclass(frozen=True)
class Whole:
    """How whole images are resized and padded to canvases of their own, as detectron2 does in its tests.

    Attributes:
      short: the shorter side of a resized image.
      longest: the most that its longer side may have; the shorter one is then smaller than `short`.
      multiple: the sides of a canvas are multiples of this.
    """

    short: int
    longest: int
    multiple: int

    def fit(self, image: UInt8[np.ndarray, "h w 3"]) -> tuple[UInt8[np.ndarray, "s t 3"], tuple[int, int]]:
        """Resizes an image bilinearly; returns it at the top left of its canvas, and its (height, width) there."""
        height, width = image.shape[:2]
        size = resized(height, width, self.short, self.longest)
        if size != (height, width):
            image = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))
        canvas = np.zeros((*self.canvas(size), 3), np.uint8)
        canvas[: size[0], : size[1]] = image
        return canvas, size

    def canvas(self, size: tuple[int, int]) -> tuple[int, int]:
        """Returns height and width of the canvas of a resized image."""
        height, width = (-(-side // self.multiple) * self.multiple for side in size)
        return height, width


@dataclasses.dataclass(frozen=True)
class Sliding:
    """How images are resized and cut.

    Attributes:
      stride: pixels between windows.
      short: the shorter side of a resized image.
      longest: the most that its longer side may have; the shorter one is then smaller than `short`.
      resample: "bilinear", without antialiasing as OpenCV; "bicubic", with it as Pillow, and fractions of a pixel are
        cut off the longer side.
    """

    stride: int
    short: int
    longest: int
    resample: str = "bilinear"

    @classmethod
    def of(cls, value: Any) -> "Sliding":
        """Creates it from a mapping of its fields.

        Raises:
          UserError: a field is missing or unknown, or not a positive number, or the sides are in the wrong order.
        """
        if isinstance(value, cls):
            return value
        given = dict(value.items())
        resample = given.pop("resample", "bilinear")
        if resample not in RESAMPLES:
            raise UserError(f"windows.resample={resample!r} is not one of {', '.join(RESAMPLES)}")
        names = [field.name for field in dataclasses.fields(cls) if field.name != "resample"]
        if set(given) != set(names):
            raise UserError(
                f"windows has the keys {', '.join(given) or 'none'}, but needs {', '.join(names)}"
            )
        for name, number in given.items():
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise UserError(f"windows.{name}={number!r} is not a positive whole number")
        if given["longest"] < given["short"]:
            raise UserError(f"windows.longest={given['longest']} is less than short={given['short']}")
        return cls(**given, resample=resample)

    def count(self, size: int) -> int:
        """Returns the most windows of `size` pixels that an image may have."""
        return len(_starts(self.short, size, self.stride)) * len(_starts(self.longest, size, self.stride))

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Returns the size of an image after its aspect-keeping resize."""
        if self.resample == "bicubic" and max(height, width) * self.short <= self.longest * min(
            height, width
        ):
            return self.short * height // min(height, width), self.short * width // min(height, width)
        return resized(height, width, self.short, self.longest)

    def cut(self, image: UInt8[np.ndarray, "h w 3"] | None, size: int) -> Cut:
        """Resizes an image and cuts windows of `size`; None for padding."""
        count = self.count(size)
        out = Cut(
            np.zeros((count, size, size, 3), np.uint8),
            np.zeros((count, 2), np.int32),
            np.zeros((count, 2), np.int32),
            np.zeros(count, bool),
            np.zeros(2, np.int32),
        )
        if image is None:
            return out
        height, width = self.resized(*image.shape[:2])
        if (height, width) != image.shape[:2]:
            picture, whole = Image.fromarray(image), (0, 0, image.shape[1], image.shape[0])
            if self.resample == "bicubic":
                picture = picture.resize((width, height), Image.Resampling.BICUBIC)
            else:
                picture = picture.transform(
                    (width, height), Image.Transform.EXTENT, whole, Image.Resampling.BILINEAR
                )
            image = np.asarray(picture)
        out.resized[:] = height, width
        starts = [
            (y, x) for y in _starts(height, size, self.stride) for x in _starts(width, size, self.stride)
        ]
        for i, (y, x) in enumerate(starts):
            window = image[y : y + size, x : x + size]
            out.image[i, : window.shape[0], : window.shape[1]] = window
            out.image_size[i], out.window_at[i], out.window_valid[i] = window.shape[:2], (y, x), True
        return out


def _starts(length: int, size: int, stride: int) -> list[int]:
    """Returns the first pixels of the windows over an axis; the last one is moved back into the image."""
    count = max(length - size + stride - 1, 0) // stride + 1
    return [max(0, min(i * stride, length - size)) for i in range(count)]

"""Rows of evaluation batches, made from examples: images, with segments or a class if the evaluator needs them."""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from ovseg_jax.data.images import centre_square, fit_canvas
from ovseg_jax.data.source_base import Source
from ovseg_jax.data.transforms import class_map
from ovseg_jax.data.windows import Sliding
from ovseg_jax.errors import UserError

Row = dict[str, np.ndarray]


def eval_rows(needs: Collection[str], data: Any, source: Source) -> Callable[[int], Row]:
    """Returns the function that makes a row of a position in a source, and reads only what an evaluator needs.

    Args:
      needs: the fields that the evaluator needs: `SegmentsEval` with segments, `ClassifyEval` with a label,
        `SquareEval` with captions, and else `ImageEval`.
      data: of `config.data`: `image_size`, and see `SegmentsEval.from_config`.
      source: what to read.
    """
    if "segments" in needs:
        return SegmentsEval.from_config(data, source)
    kind = ClassifyEval if "label" in needs else SquareEval if "captions" in needs else ImageEval
    return kind.from_config(data, source)


@dataclasses.dataclass(frozen=True)
class ImageEval:
    """Makes evaluation rows of images; the index -1 makes a row of padding.

    The image is scaled to fit the canvas, its aspect kept; it covers the `image_size` (height, width) at the top left.
    """

    source: Source
    image_size: int

    @classmethod
    def from_config(cls, data: Any, source: Source) -> "ImageEval":
        """Creates it from `image_size` of `config.data`."""
        return cls(source, int(data["image_size"]))

    def __call__(self, index: int) -> Row:
        """Returns the row of example `index` of the source."""
        return _image_row(self.source[index]["image"] if index >= 0 else None, self.image_size, index)


@dataclasses.dataclass(frozen=True)
class SegmentsEval:
    """Makes evaluation rows of images with segments; the index -1 makes a row of padding.

    It adds labels and segments to the row of `ImageEval`. Labels are never resized, which would change scores: labels
    and segments keep their own size, in the top left of a canvas of `label_size`. `segment_valid` marks the visible
    segments that are not crowds; `segment_classes`, `segment_isthing` and `segment_iscrowd` cover all. With `windows`,
    the row holds the fields of `data.windows.Cut` in place of a single image.
    """

    source: Source
    image_size: int
    label_size: tuple[int, int]
    max_segments: int
    windows: Sliding | None = None

    @classmethod
    def from_config(cls, data: Any, source: Source) -> "SegmentsEval":
        """Creates it from `image_size`, `label_size`, `max_segments` and `windows` of `config.data`."""
        label_size, segments = data.get("label_size"), data.get("max_segments")
        if not label_size or not segments:
            extent = source.extent()
            label_size = label_size or extent[:2]
            segments = segments or extent.segments
        height, width = (label_size, label_size) if isinstance(label_size, int) else label_size
        windows = Sliding.of(data["windows"]) if data.get("windows") else None
        return cls(source, int(data["image_size"]), (int(height), int(width)), int(segments), windows)

    def __call__(self, index: int) -> Row:
        """Returns the row of example `index` of the source.

        Raises:
          UserError: the example exceeds `label_size` or `max_segments`.
        """
        row = {
            "label": np.full(self.label_size, -1, np.int32),
            "segments": np.zeros(self.label_size, np.int32),
            "label_size": np.zeros(2, np.int32),
            "segment_valid": np.zeros(self.max_segments, bool),
            "segment_classes": np.full(self.max_segments, -1, np.int32),
            "segment_isthing": np.zeros(self.max_segments, bool),
            "segment_iscrowd": np.zeros(self.max_segments, bool),
        }
        if index < 0:
            return _image_row(None, self.image_size, index, self.windows) | row
        example = self.source[index]
        segments, count = example["segments"], len(example["class_ids"])
        height, width = segments.shape
        where = f"{self.source.name} example {example['image_id']!r}"
        if height > self.label_size[0] or width > self.label_size[1]:
            raise UserError(
                f"{where} is {height} x {width} (height x width), larger than data.label_size="
                f"{self.label_size}: raise it, or leave it out to fit the largest example"
            )
        if count > self.max_segments:
            raise UserError(
                f"{where} has {count} segments, more than data.max_segments={self.max_segments}: raise it"
            )
        row["label"][:height, :width] = class_map(segments, example["class_ids"])
        row["segments"][:height, :width] = segments
        row["label_size"][:] = height, width
        present = np.bincount(segments.ravel(), minlength=count + 1)[1 : count + 1] > 0
        row["segment_valid"][:count] = present & ~example["iscrowd"]
        row["segment_classes"][:count] = example["class_ids"]
        row["segment_isthing"][:count] = example["isthing"]
        row["segment_iscrowd"][:count] = example["iscrowd"]
        return _image_row(example["image"], self.image_size, index, self.windows) | row


@dataclasses.dataclass(frozen=True)
class ClassifyEval(ImageEval):
    """Makes evaluation rows of images of one class; the index -1 makes a row of padding.

    The row holds `image` (see `centre_square`) or the example's `feature`, `label`, `index` and
    `example_mask`.
    """

    def __call__(self, index: int) -> Row:
        """Returns the row of example `index` of the source."""
        example = self.source[max(index, 0)]
        if "feature" in example:
            row = {"feature": np.asarray(example["feature"], np.float32)}
        else:
            row = {"image": centre_square(example["image"], self.image_size)}
        row["label"] = np.asarray(example["label"], np.int32)
        if index < 0:
            row = {key: np.zeros_like(value) for key, value in row.items()}
        return {**row, "index": np.int32(index), "example_mask": np.bool_(index >= 0)}  # type: ignore[dict-item]


@dataclasses.dataclass(frozen=True)
class SquareEval(ImageEval):
    """Makes evaluation rows of images that fill the canvas (see `centre_square`); the index -1 makes one of padding."""

    def __call__(self, index: int) -> Row:
        """Returns the row of example `index` of the source: `image`, `index` and `example_mask`."""
        image = np.zeros((self.image_size, self.image_size, 3), np.uint8)
        if index >= 0:
            image = centre_square(self.source[index]["image"], self.image_size)
        return {"image": image, "index": np.asarray(index, np.int32), "example_mask": np.asarray(index >= 0)}


def _image_row(image: np.ndarray | None, size: int, index: int, windows: Sliding | None = None) -> Row:
    """Returns the part of a row that every image has; `image` is None for padding."""
    row: Row = {"index": np.asarray(index, np.int32), "example_mask": np.asarray(index >= 0)}
    if windows is not None:
        cut: Row = windows.cut(image, size)._asdict()
        return cut | row
    canvas, fitted = np.zeros((size, size, 3), np.uint8), (0, 0)
    if image is not None:
        canvas, fitted = fit_canvas(image, size)
    return {"image": canvas, "image_size": np.asarray(fitted, np.int32), **row}

"""A classification source of the segments of a segmentation source, cropped from their images."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from ovseg_jax.data.images import colour
from ovseg_jax.data.source_base import Example, Source, check_provides
from ovseg_jax.data.sources.build import make_source
from ovseg_jax.errors import UserError
from ovseg_jax.vocab.splits import load_split


class Crops(Source):
    """A classification source of cropped segments that have a class and are not crowds.

    Its index comes from `regions()` of the segmentation source, which COCO answers without opening images.

    Args:
      of: the config of the segmentation source, see `make_source`.
      context: share of the box's width and height that is added on each side, within the image.
      min_size: the shortest side of a box in pixels, before context is added.
      things_only: leave stuff out.
      fill: colour (red, green, blue; 0..255) of pixels outside of the segment, as ZSSeg crops masks; by default they
        are kept.
      unseen: the unseen classes, which become the groups "unseen" and "seen", see `vocab.splits.load_split`; "" adds
        no groups.

    Attributes:
      classes: the classes of the source, with the groups of `unseen`.
      labels: i32 [n], the class of every crop.

    Raises:
      UserError: a value is invalid, or the source has no segments to crop.
    """

    provides = frozenset({"image", "label"})
    labels: np.ndarray

    def __init__(
        self,
        of: Any,
        context: float = 0.0,
        min_size: int = 16,
        things_only: bool = False,
        fill: Sequence[float] | None = None,
        unseen: str = "",
    ):
        if context < 0 or min_size < 1:
            raise UserError(f"crops: context={context} is less than 0, or min_size={min_size} is less than 1")
        self._fill = None if fill is None else colour("crops", fill)
        self.name, self._source, self._context = "crops", make_source(of), context
        check_provides(self._source, ("image", "segments", "class_ids", "boxes"), "the source 'crops'")
        classes = self._source.classes
        self.classes = load_split(classes, unseen) if unseen else classes
        regions = self._source.regions()
        sides = regions.box[:, 2:] - regions.box[:, :2]
        kept = (sides >= min_size).all(1)
        if things_only:
            kept &= np.asarray(self.classes.isthing, bool)[regions.class_id]
        if not kept.any():
            what = "thing" if things_only else "segment"
            raise UserError(
                f"crops: the source {self._source.name!r} has no {what} with a class and a box of at least "
                f"{min_size} x {min_size} pixels"
            )
        self._image, self._segment = regions.image[kept], regions.segment[kept]
        self.labels = regions.class_id[kept]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        """Returns one example: `image` u8 [H W 3] of the box's own size, `label`, `image_id`."""
        self._check_index(index)
        example, segment = self._source[int(self._image[index])], int(self._segment[index])
        return Example(
            image=lambda _: self._cut(example, segment),
            label=int(self.labels[index]),
            image_id=lambda _: f"{example['image_id']}-{segment + 1}",
        )

    def _cut(self, example: Mapping[str, Any], segment: int) -> UInt8[np.ndarray, "h w 3"]:
        height, width = example["image"].shape[:2]
        x0, y0, x1, y1 = (float(edge) for edge in example["boxes"][segment])
        across, down = self._context * (x1 - x0), self._context * (y1 - y0)
        rows = slice(max(0, round(y0 - down)), min(height, round(y1 + down)))
        columns = slice(max(0, round(x0 - across)), min(width, round(x1 + across)))
        image = np.ascontiguousarray(example["image"][rows, columns])
        if self._fill is not None:
            own = example["segments"][rows, columns] == segment + 1
            image = np.where(own[..., None], image, self._fill)
        return image

"""Results for an image: a label map, segments with masks and scores, pictures and files; text-aligned features."""

import dataclasses
import io
import json
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image

from ovseg_jax.data.images import encode_image
from ovseg_jax.decisions.rules import Segments
from ovseg_jax.errors import UserError
from ovseg_jax.files import write_whole
from ovseg_jax.inference.tiles import upsampling_matrix
from ovseg_jax.kernels.unit import host_unit
from ovseg_jax.protocols import Prediction
from ovseg_jax.viz import segments as draw
from ovseg_jax.vocab.classes import ClassList


@dataclasses.dataclass(frozen=True)
class Segment:
    """A segment of an image.

    Attributes:
      category: index into the requested classes.
      score: its mean confidence, see `Result`; for decisions that separate instances, the score of its category.
      isthing: whether the category is countable.
      instance: its number among the segments of this category, from 1; 0 if a segment is all pixels of its category.
      area: its number of pixels.
    """

    category: int
    score: float
    isthing: bool
    instance: int
    area: int
    _map: np.ndarray = dataclasses.field(repr=False, compare=False)
    _number: int = dataclasses.field(repr=False, compare=False)

    @property
    def mask(self) -> Bool[np.ndarray, "h w"]:
        """Its mask, bool [H W]."""
        return self._map == self._number


@dataclasses.dataclass(frozen=True)
class Result:
    """The segmentation of an image.

    Attributes:
      image: the image as it was read, u8 [H W 3].
      classes: the requested categories.
      label_map: index into `classes` for every pixel, -1 = unknown.
      confidence: how well the category of every pixel fits, see `decisions.maps.confidence_of`: the mean score of its
        best name over the proposals that cover the pixel, approaching 0 where none does.
      segments: the segments, from large to small; unless the decision separates instances, a segment is all pixels of a
        category.
      features: text-aligned features, if requested.
    """

    image: UInt8[np.ndarray, "h w 3"]
    classes: ClassList
    label_map: Int[np.ndarray, "h w"]
    confidence: Float[np.ndarray, "h w"]
    segments: tuple[Segment, ...]
    features: "PixelFeatures | None" = None

    @classmethod
    def of(
        cls,
        image: UInt8[np.ndarray, "h w 3"],
        classes: ClassList,
        label_map: Int[np.ndarray, "h w"],
        confidence: Float[np.ndarray, "h w"],
        segments: Segments | None = None,
        features: "PixelFeatures | None" = None,
    ) -> "Result":
        """Creates a result from the output of a decision, see `decisions.rules.Decided`."""
        if segments is None:
            areas, sums = np.zeros(len(classes), np.int64), np.zeros(len(classes))
            # In bands, since the counting copies its arguments in 64 bits.
            for start in range(0, len(label_map), 512):
                labels = label_map[start : start + 512]
                known = labels >= 0
                areas += np.bincount(labels[known], minlength=len(classes))
                sums += np.bincount(labels[known], confidence[start : start + 512][known], len(classes))
            found = [
                Segment(
                    int(k), float(sums[k] / areas[k]), classes.isthing[k], 0, int(areas[k]), label_map, int(k)
                )
                for k in np.argsort(-areas, kind="stable")
                if areas[k]
            ]
            return cls(image, classes, label_map, confidence, tuple(found), features)
        number = np.asarray(segments.number)
        areas = np.bincount(number.ravel(), minlength=len(segments.category) + 1)[1:]
        if segments.masks is not None:
            areas = np.asarray(segments.masks).sum((1, 2))
        counts: dict[int, int] = {}
        found = []
        for i, (k, score, area) in enumerate(
            zip(np.asarray(segments.category), np.asarray(segments.score), areas, strict=True)
        ):
            if k < 0 or not area:
                continue
            instance = 0
            if classes.isthing[k]:
                instance = counts[int(k)] = counts.get(int(k), 0) + 1
            place = (number, i + 1) if segments.masks is None else (np.asarray(segments.masks[i]), 1)
            found.append(Segment(int(k), float(score), classes.isthing[k], instance, int(area), *place))
        found.sort(key=lambda segment: -segment.area)
        return cls(image, classes, label_map, confidence, tuple(found), features)

    @property
    def labels(self) -> list[str]:
        """The first name of each segment's category."""
        return [self.classes.display(segment.category) for segment in self.segments]

    @property
    def areas(self) -> Int[np.ndarray, "n"]:
        """The number of pixels of each segment."""
        return np.array([segment.area for segment in self.segments], np.int64)

    @property
    def scores(self) -> Float[np.ndarray, "n"]:
        """The score of each segment."""
        return np.array([segment.score for segment in self.segments], np.float64)

    @property
    def masks(self) -> Bool[np.ndarray, "n h w"]:
        """The mask of each segment, [n H W]."""
        masks = [segment.mask for segment in self.segments]
        return np.array(masks, bool).reshape(-1, *self.label_map.shape)

    def overlay(self, alpha: float = 0.55, legend: bool = True) -> Image.Image:
        """Draws the image with its segments coloured, outlined and named, over a legend; see `viz.segments.overlay`."""
        names = [self.classes.display(k) for k in range(len(self.classes))]
        return draw.overlay(self.image, self.label_map, names, alpha=alpha, legend=legend)

    def record(self) -> dict[str, Any]:
        """Returns the result as plain values: for each segment category, names, id, score, area, box and mask.

        `category_id` is the index + 1 (as in the label map that `save` writes), `id` the id in the label file, and
        `instance` that of `Segment`. The mask is in COCO's RLE, which `pycocotools.mask.decode` decodes; `bbox` is
        COCO's [x, y, width, height].
        """
        from pycocotools import mask as coco

        height, width = self.label_map.shape
        segments = []
        for segment in self.segments:
            k = segment.category
            rle = coco.encode(np.asfortranarray(segment.mask, np.uint8))
            segments.append(
                {
                    "category": self.classes.display(k),
                    "names": list(self.classes.names[k]),
                    "category_id": k + 1,
                    "id": int(self.classes.ids[k]),
                    "isthing": bool(segment.isthing),
                    "instance": segment.instance,
                    "score": round(segment.score, 5),
                    "area": segment.area,
                    "bbox": [int(v) for v in coco.toBbox(rle)],
                    "segmentation": {"size": [height, width], "counts": rle["counts"].decode()},
                }
            )
        unknown = int((self.label_map < 0).sum())
        return {"height": height, "width": width, "unknown_area": unknown, "segments": segments}

    def panoptic(self) -> tuple[Image.Image, list[dict[str, Any]]]:
        """Returns COCO's panoptic PNG, whose colours are R + 256 G + 65536 B = id, and its `segments_info`.

        `category_id` is the class's id in the label file. Where segments overlap, the one with the higher score is in
        front.
        """
        from pycocotools import mask as coco

        ids = np.zeros(self.label_map.shape, np.int64)
        for number, segment in sorted(enumerate(self.segments, 1), key=lambda pair: pair[1].score):
            ids[segment.mask] = number
        rows = []
        for number, segment in enumerate(self.segments, 1):
            mask = ids == number
            if mask.any():
                box = coco.toBbox(coco.encode(np.asfortranarray(mask, np.uint8)))
                rows.append(
                    {
                        "id": number,
                        "category_id": int(self.classes.ids[segment.category]),
                        "isthing": int(segment.isthing),
                        "iscrowd": 0,
                        "score": round(segment.score, 5),
                        "area": int(mask.sum()),
                        "bbox": [int(v) for v in box],
                    }
                )
        colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
        return Image.fromarray(colours), rows

    def save_panoptic(self, folder: epath.PathLike, stem: str) -> dict[str, Any]:
        """Writes `stem.panoptic.png` into a folder, see `panoptic`, and returns {"segments_info": ...}."""
        picture, rows = self.panoptic()
        write_whole(epath.Path(folder) / f"{stem}.panoptic.png", encode_image(picture))
        return {"segments_info": rows}

    def to_json(self, record: Mapping[str, Any] | None = None) -> str:
        """Returns `record` as JSON."""
        return json.dumps(self.record() if record is None else record, indent=1)

    def label_image(self) -> Image.Image:
        """Returns the label map as a grey picture: index + 1, 0 = unknown; 16 bits for more than 255 categories."""
        if len(self.classes) > 65535:
            raise UserError(
                f"{len(self.classes)} categories do not fit a 16-bit label map: use the JSON output instead"
            )
        kind = np.uint8 if len(self.classes) < 256 else np.uint16
        return Image.fromarray((self.label_map + 1).astype(kind))

    def save(
        self, folder: epath.PathLike, stem: str, record: Mapping[str, Any] | None = None
    ) -> list[epath.Path]:
        """Writes `stem.labels.png`, `stem.json` and finally `stem.overlay.png` into a folder.

        If the overlay cannot be drawn, this is logged as a warning.

        Args:
          folder: the folder, created if missing.
          stem: the name of the files.
          record: `self.record()`, if the caller has it.

        Returns:
          The paths of the files.
        """
        folder = epath.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{stem}.{end}" for end in ("labels.png", "json", "overlay.png")]
        write_whole(paths[0], encode_image(self.label_image()))
        write_whole(paths[1], self.to_json(record) + "\n")
        try:
            picture = encode_image(self.overlay())
        except Exception as error:
            logging.getLogger(__name__).warning("%s was not drawn: %r", paths[2], error)
            return paths[:2]
        write_whole(paths[2], picture)
        return paths


@dataclasses.dataclass(frozen=True)
class PixelFeatures:
    """Text-aligned features of one image, on the part of the model's grid that the image covers.

    Attributes:
      size: height and width of the image.
      fitted: height and width of the image in the model's input.
      stride: input pixels per grid cell; if it does not divide `fitted`, the last cell lies partly outside.
      pixels: [h w D] mean over the proposals at a pixel of their features, weighted by their masks. Its dot product
        with a name's embedding is the confidence of `Result` on this grid, so a search over these features finds the
        same pixels as `segment`. (OpenSeg's demo: `ppixel_ave_feat`.) For a per-pixel method, F_z of unit norm.
      embedding: [h w D] F_z itself, not normalised (`image_embedding_feat`).
      mask_logits: [N h w] logits of the proposals; None for a per-pixel method.
      regions: [N D] their unit-norm features; None for a per-pixel method.
    """

    size: tuple[int, int]
    fitted: tuple[int, int]
    stride: int
    pixels: Float[np.ndarray, "h w d"]
    embedding: Float[np.ndarray, "h w d"]
    mask_logits: Float[np.ndarray, "n h w"] | None
    regions: Float[np.ndarray, "n d"] | None

    @classmethod
    def of(
        cls,
        prediction: Prediction,
        canvas: int,
        fitted: tuple[int, int],
        size: tuple[int, int],
        space: str | None = None,
    ) -> "PixelFeatures":
        """Extracts the features of one space from a prediction of one image that fills `fitted` input pixels.

        Raises:
          UserError: there is no such space, or there are several and none is named.
        """
        spaces = sorted(prediction.pixels)
        if prediction.mask_logits is not None:
            spaces = sorted(prediction.pixels.keys() & prediction.regions.keys())
            if other := sorted(prediction.regions.keys() - prediction.pixels.keys()):
                raise UserError(
                    f"regions have features ({', '.join(other)}) that pixels lack: two stages have no common "
                    "features, so load the run that proposes the masks alone; a MaskFormer has none"
                )
        if space is None and len(spaces) == 1:
            space = spaces[0]
        if space not in spaces:
            raise UserError(f"the space {space!r} of the features is not one of {', '.join(spaces)}")
        embedding = np.asarray(prediction.pixels[space][0], np.float32)
        stride = canvas // embedding.shape[0]
        h, w = (-(-pixels // stride) for pixels in fitted)
        embedding = embedding[:h, :w]
        if prediction.mask_logits is None:
            return cls(size, fitted, stride, host_unit(embedding), embedding, None, None)
        logits = np.asarray(prediction.mask_logits[0], np.float32)[:, :h, :w]
        regions = np.asarray(prediction.regions[space][0], np.float32)
        return cls(size, fitted, stride, _mean_over_masks(logits, regions), embedding, logits, regions)

    @property
    def masks(self) -> Float[np.ndarray, "n h w"] | None:
        """The mask of each proposal in [0, 1], [N h w]; None for a per-pixel method."""
        return None if self.mask_logits is None else sigmoid(self.mask_logits)

    def at_image_size(self) -> Float[np.ndarray, "H W d"]:
        """Returns `pixels` for every pixel of the image, [H W D], which may need much memory.

        The logits of masks are upsampled bilinearly if there are any, otherwise the features.
        """
        if self.mask_logits is None or self.regions is None:
            return np.moveaxis(self.upsample(np.moveaxis(self.pixels, -1, 0)), 0, -1)
        return _mean_over_masks(self.upsample(self.mask_logits), self.regions)

    def proposals(self) -> Int[np.ndarray, "H W"] | None:
        """Returns the index of the strongest proposal at every pixel; None for a per-pixel method."""
        return None if self.mask_logits is None else self.upsample(self.mask_logits).argmax(0)

    def upsample(self, maps: Float[np.ndarray, "c h w"]) -> Float[np.ndarray, "c H W"]:
        """Upsamples maps on this grid (mask logits, features) to the image's size, bilinearly."""
        axes = zip(self.size, maps.shape[1:], self.fitted, strict=True)
        rows, columns = (
            upsampling_matrix(size, cells, cells * self.stride, fitted) for size, cells, fitted in axes
        )
        return np.einsum("Hh,chw,Ww->cHW", rows, maps, columns, optimize=True)

    def to_npz(self) -> bytes:
        """Returns the content of an .npz file, with features and masks in float16."""
        arrays = {"pixels": self.pixels, "embedding": self.embedding}
        if self.masks is not None and self.regions is not None:
            arrays |= {"masks": self.masks, "regions": self.regions}
        halves: dict[str, Any] = {name: value.astype(np.float16) for name, value in arrays.items()}
        content = io.BytesIO()
        np.savez_compressed(content, **halves, size=self.size, fitted=self.fitted, stride=self.stride)
        return content.getvalue()

    def save(self, path: epath.PathLike) -> None:
        """Writes `to_npz` to a file."""
        write_whole(path, self.to_npz())


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Computes 1 / (1 + exp(-x)) without overflow."""
    return 0.5 + 0.5 * np.tanh(0.5 * logits)


def _mean_over_masks(
    logits: Float[np.ndarray, "n h w"], regions: Float[np.ndarray, "n d"]
) -> Float[np.ndarray, "h w d"]:
    """Computes the mean of the features of the proposals at each pixel, approaching 0 where there are none."""
    masks = sigmoid(logits)
    pixels = np.einsum("nhw,nd->hwd", masks, regions, optimize=True)
    return pixels / np.maximum(masks.sum(0), 1)[..., None]

"""What comes back for an image: a label map with masks, scores, pictures and files; text-aligned features."""

import dataclasses
import functools
import io
import json
import logging
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image

from ovseg_jax.errors import UserError
from ovseg_jax.files import write_whole
from ovseg_jax.inference.tiles import upsampling_matrix
from ovseg_jax.protocols import Prediction
from ovseg_jax.viz import segments as draw
from ovseg_jax.vocab.classes import ClassList


@dataclasses.dataclass(frozen=True)
class Result:
    """An image, segmented. A segment is all pixels of one category; segments are listed from large to small.

    Attributes:
      image: the image as it was read, u8 [H W 3].
      classes: the categories that were asked for.
      label_map: index into `classes` for every pixel, -1 = unknown.
      confidence: for every pixel the cosine of its category's best name with what the model sees there: the
        mean over the proposals that cover it, fading to 0 where none does. With masks s and cosines <w, z>:
        sum_n s_n <w, z_n> / max(1, sum_n s_n).
      features: text-aligned features, where they were asked for.
    """

    image: UInt8[np.ndarray, "h w 3"]
    classes: ClassList
    label_map: Int[np.ndarray, "h w"]
    confidence: Float[np.ndarray, "h w"]
    features: "PixelFeatures | None" = None

    @functools.cached_property
    def found(self) -> list[int]:
        """Indices of the categories that have pixels, the largest first."""
        areas = self._areas
        return [int(k) for k in np.argsort(-areas, kind="stable") if areas[k]]

    @property
    def labels(self) -> list[str]:
        """First names of the categories found."""
        return [self.classes.display(k) for k in self.found]

    @property
    def areas(self) -> Int[np.ndarray, "n"]:
        """Pixels of each segment."""
        return self._areas[self.found]

    @property
    def scores(self) -> Float[np.ndarray, "n"]:
        """Mean confidence of each segment."""
        known = self.label_map >= 0
        sums = np.bincount(self.label_map[known], self.confidence[known], len(self.classes))
        return sums[self.found] / self.areas

    @property
    def masks(self) -> Bool[np.ndarray, "n h w"]:
        """The mask of each segment."""
        return np.array([self.label_map == k for k in self.found], bool).reshape(-1, *self.label_map.shape)

    @functools.cached_property
    def _areas(self) -> Int[np.ndarray, "k"]:
        return np.bincount(self.label_map[self.label_map >= 0], minlength=len(self.classes))

    def overlay(self, alpha: float = 0.55, legend: bool = True) -> Image.Image:
        """The image with its segments in colour, outlined and named, over a legend; see `draw.overlay`."""
        names = [self.classes.display(k) for k in range(len(self.classes))]
        return draw.overlay(self.image, self.label_map, names, alpha=alpha, legend=legend)

    def record(self) -> dict[str, Any]:
        """The result as plain values: for each segment category, names, id, score, area, box and mask.

        `category_id` is the index + 1 (as in the label map that `save` writes), `id` the number in the label
        file. The mask is COCO's RLE, decoded by `pycocotools.mask.decode`; `bbox` is COCO's [x, y, width,
        height].
        """
        from pycocotools import mask as coco

        height, width = self.label_map.shape
        segments = []
        for k, area, score in zip(self.found, self.areas, self.scores, strict=True):
            rle = coco.encode(np.asfortranarray(self.label_map == k, np.uint8))
            segments.append(
                {
                    "category": self.classes.display(k),
                    "names": list(self.classes.names[k]),
                    "category_id": k + 1,
                    "id": int(self.classes.ids[k]),
                    "score": round(float(score), 5),
                    "area": int(area),
                    "bbox": [int(v) for v in coco.toBbox(rle)],
                    "segmentation": {"size": [height, width], "counts": rle["counts"].decode()},
                }
            )
        unknown = int((self.label_map < 0).sum())
        return {"height": height, "width": width, "unknown_area": unknown, "segments": segments}

    def to_json(self) -> str:
        """`record` as JSON."""
        return json.dumps(self.record(), indent=1)

    def label_image(self) -> Image.Image:
        """The label map as a grey picture: index + 1, 0 = unknown; 16 bits for more than 255 categories."""
        if len(self.classes) > 65535:
            raise UserError(
                f"{len(self.classes)} categories do not fit a 16-bit label map: take the JSON instead"
            )
        kind = np.uint8 if len(self.classes) < 256 else np.uint16
        return Image.fromarray((self.label_map + 1).astype(kind))

    def save(self, folder: epath.PathLike, stem: str) -> list[epath.Path]:
        """Writes `stem.labels.png`, `stem.json` and, at last, `stem.overlay.png` into a folder.

        A picture that cannot be drawn is a warning: the results are there.

        Returns:
          The paths of the files.
        """
        folder = epath.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{stem}.{end}" for end in ("labels.png", "json", "overlay.png")]
        write_whole(paths[0], _png(self.label_image()))
        write_whole(paths[1], self.to_json() + "\n")
        try:
            picture = _png(self.overlay())
        except Exception as error:
            logging.getLogger(__name__).warning("%s is not drawn: %r", paths[2], error)
            return paths[:2]
        write_whole(paths[2], picture)
        return paths


def _png(picture: Image.Image) -> bytes:
    content = io.BytesIO()
    picture.save(content, "PNG")
    return content.getvalue()


@dataclasses.dataclass(frozen=True)
class PixelFeatures:
    """Text-aligned features of one image, on the model's grid cut to the image's part of it.

    Attributes:
      size: height and width of the image.
      fitted: height and width of the image on the model's canvas.
      stride: canvas pixels per grid cell; where it does not divide `fitted`, the last cell lies partly
        outside.
      pixels: [h w D] mean over the proposals at a pixel of their features, weighted by their masks. Its dot
        product with a name's embedding is the confidence of `Result` on this grid, so a search over these
        features finds what `segment` finds. (OpenSeg's demo: `ppixel_ave_feat`.) For a per-pixel method, F_z
        of unit norm.
      embedding: [h w D] F_z itself, not normalised (`image_embedding_feat`).
      mask_logits: [N h w] the proposals, None for a per-pixel method.
      regions: [N D] their unit-norm features, None likewise.
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
        cls, prediction: Prediction, canvas: int, fitted: tuple[int, int], size: tuple[int, int]
    ) -> "PixelFeatures":
        """From a prediction of one image that fills `fitted` pixels of its canvas.

        Raises:
          UserError: regions and pixels are not of one space (`methods.zsseg`).
        """
        embedding = np.asarray(prediction.pixel_embed[0], np.float32)
        stride = canvas // embedding.shape[0]
        h, w = (-(-pixels // stride) for pixels in fitted)
        embedding = embedding[:h, :w]
        if prediction.mask_logits is None or prediction.region_embed is None:
            norm = np.linalg.norm(embedding, axis=-1, keepdims=True)
            return cls(size, fitted, stride, embedding / np.maximum(norm, 1e-6), embedding, None, None)
        logits = np.asarray(prediction.mask_logits[0], np.float32)[:, :h, :w]
        regions = np.asarray(prediction.region_embed[0], np.float32)
        if regions.shape[-1] != embedding.shape[-1]:
            raise UserError(
                "two stages have no common features: ask the run that proposes the masks for its own"
            )
        return cls(size, fitted, stride, _mean_over_masks(logits, regions), embedding, logits, regions)

    @property
    def masks(self) -> Float[np.ndarray, "n h w"] | None:
        """Each proposal's mask in [0, 1]; None for a per-pixel method."""
        return None if self.mask_logits is None else sigmoid(self.mask_logits)

    def at_image_size(self) -> Float[np.ndarray, "H W d"]:
        """`pixels` for every pixel of the image: H W D floats, which may be many.

        Masks (their logits) are upsampled bilinearly where there are any, features otherwise.
        """
        if self.mask_logits is None or self.regions is None:
            return np.moveaxis(self.upsample(np.moveaxis(self.pixels, -1, 0)), 0, -1)
        return _mean_over_masks(self.upsample(self.mask_logits), self.regions)

    def proposals(self) -> Int[np.ndarray, "H W"] | None:
        """The strongest proposal at every pixel of the image; None for a per-pixel method."""
        return None if self.mask_logits is None else self.upsample(self.mask_logits).argmax(0)

    def upsample(self, maps: Float[np.ndarray, "c h w"]) -> Float[np.ndarray, "c H W"]:
        """Maps on this grid (mask logits, features) at the image's size, bilinearly."""
        axes = zip(self.size, maps.shape[1:], self.fitted, strict=True)
        rows, columns = (
            upsampling_matrix(size, cells, cells * self.stride, fitted) for size, cells, fitted in axes
        )
        return np.einsum("Hh,chw,Ww->cHW", rows, maps, columns, optimize=True)

    def arrays(self) -> dict[str, Any]:
        """What `save` writes."""
        arrays = {"pixels": self.pixels, "embedding": self.embedding}
        if self.masks is not None and self.regions is not None:
            arrays |= {"masks": self.masks, "regions": self.regions}
        halves = {name: value.astype(np.float16) for name, value in arrays.items()}
        return halves | {
            "size": np.array(self.size),
            "fitted": np.array(self.fitted),
            "stride": np.array(self.stride),
        }

    def save(self, path: epath.PathLike) -> None:
        """Writes an .npz of the arrays by their names here, features and masks in float16."""
        content = io.BytesIO()
        np.savez_compressed(content, **self.arrays())
        write_whole(path, content.getvalue())


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), without overflow."""
    return 0.5 + 0.5 * np.tanh(0.5 * logits)


def _mean_over_masks(
    logits: Float[np.ndarray, "n h w"], regions: Float[np.ndarray, "n d"]
) -> Float[np.ndarray, "h w d"]:
    """The mean over the proposals at each pixel of their features, fading to 0 where none is."""
    masks = sigmoid(logits)
    pixels = np.einsum("nhw,nd->hwd", masks, regions, optimize=True)
    return pixels / np.maximum(masks.sum(0), 1)[..., None]

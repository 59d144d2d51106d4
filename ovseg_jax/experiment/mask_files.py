"""Masks that another program proposed, read from files: the first stage of two (`methods.zsseg`) without a run.

    FILE.json     COCO's results: a list of {"image_id": ..., "segmentation": {"size": [h, w], "counts": RLE}, "score":
                  ...}, or the same as the `annotations` of a whole annotation file
    DIR/NAME.npz  `masks` [n h w], of booleans or probabilities, and optionally `scores` [n]

An image's id is the one of its source, the file's name without its suffix; leading zeros do not count.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Array, Float, Int, UInt8
from ml_collections import ConfigDict
from PIL import Image

from ovseg_jax.data.source_base import Source
from ovseg_jax.errors import UserError
from ovseg_jax.evals.masks import mask_rle
from ovseg_jax.experiment.load import Run
from ovseg_jax.protocols import Prediction, Segmenting, Text, Variables
from ovseg_jax.reading import array, objects, read_json, read_npz, reading, short
from ovseg_jax.vocab.classes import ClassList
from ovseg_jax.vocab.words import WordList

CANVAS, CELL = 640, 4
"""Side of the canvas that images are fitted to, and of a cell of the masks' grid on it, in pixels."""
MOST = 128
"""The most masks of an image that count, those with the best scores."""
_MARGIN = 1e-4  # the least distance of a probability from 0 and 1, so that logits are finite


class MaskFiles(Segmenting):
    """The masks of a JSON file or a folder; `predict` takes them from its variables, see `batches`.

    Attributes:
      count: the number N of masks in a row of a batch, the largest of any image.
    """

    modes = ("predicted",)

    def __init__(self, path: epath.PathLike):
        """Reads the JSON file, or lists the folder.

        Raises:
          UserError: there is no mask, or the file is damaged.
        """
        self._path = epath.Path(path)
        if self._path.is_dir():
            files = sorted(self._path.glob("*.npz"))
            self._of: Mapping[str, Any] = {_key(file.stem): file for file in files}
            sizes = [len(read_masks(file)[0]) for file in files]
        else:
            self._of = read_mask_list(self._path)
            sizes = [len(found) for found in self._of.values()]
        self.count = min(MOST, max(sizes, default=0))
        if not self.count:
            raise UserError(
                f"{path} holds no mask: give a JSON file of COCO's results, or a folder of NAME.npz"
            )

    def predict(
        self, variables: Variables, image: UInt8[Array, "b s s 3"], image_size: Int[Array, "b 2"]
    ) -> Prediction:
        """Returns the masks among the variables, without features."""
        del image, image_size
        return Prediction(variables["mask_logits"], {}, {})

    def embed_text(self, variables: Variables, texts: Sequence[str]) -> Text:
        """Returns no embeddings, since the masks have none to compare with."""
        del variables, texts
        return {}

    def check(self, source: Source, limit: int | None) -> str:
        """Checks that every image has masks; returns a sentence on images that are not in the source, or "".

        Raises:
          UserError: an image has no masks.
        """
        ids = [_key(source[i]["image_id"]) for i in range(len(source))[:limit]]
        if missing := [name for name in ids if name not in self._of]:
            raise UserError(
                f"{self._path} has no masks for {len(missing)} of {len(ids)} images, such as {missing[0]!r}"
            )
        surplus = len(self._of.keys() - set(ids))
        return f"{self._path} also has masks for {surplus} images that are not evaluated" if surplus else ""

    def batches(
        self, start: Callable[[], Iterable[Mapping[str, np.ndarray]]], source: Source
    ) -> Callable[[], Iterator[dict[str, np.ndarray]]]:
        """Returns a function that starts a pass with the field `mask_logits` [b N h w] beside the others."""

        def begin() -> Iterator[dict[str, np.ndarray]]:
            for batch in start():
                rows = zip(batch["index"], batch["image_size"], batch["label_size"], strict=True)
                logits = [self._row(source, int(i), size, label) for i, size, label in rows]
                yield {**batch, "mask_logits": np.stack(logits)}

        return begin

    def _row(self, source: Source, index: int, size: np.ndarray, label: np.ndarray) -> np.ndarray:
        """Returns the logits [N h w] of an image's masks on the canvas; a missing mask covers nothing."""
        side = CANVAS // CELL
        share = np.full((self.count, side, side), _MARGIN, np.float32)
        if index < 0:
            return _logit(share)
        name = source[index]["image_id"]
        found = self._of[_key(name)]
        masks, scores = read_masks(found) if isinstance(found, epath.Path) else decode(found, str(self._path))
        if len(masks) and masks.shape[1:] != tuple(label):
            raise UserError(
                f"{self._path}: the masks of {name!r} have {masks.shape[1]} x {masks.shape[2]} pixels, its labels "
                f"{label[0]} x {label[1]}"
            )
        for row, k in enumerate(np.argsort(-scores, kind="stable")[: self.count]):
            canvas = np.zeros((CANVAS, CANVAS), np.float32)
            height, width = (int(n) for n in size)
            picture = Image.fromarray(masks[k].astype(np.float32))
            canvas[:height, :width] = np.asarray(picture.resize((width, height), Image.Resampling.BOX))
            share[row] = canvas.reshape(side, CELL, side, CELL).mean((1, 3))
        return _logit(np.clip(share, _MARGIN, 1 - _MARGIN))


def is_mask_file(where: str) -> bool:
    """Tells whether a place is a file of masks, or a folder of them, and not a run."""
    path = epath.Path(where)
    return where.lower().endswith(".json") or (
        path.is_dir() and not (path / "config.json").exists() and any(path.glob("*.npz"))
    )


def stage_of(where: str) -> Run:
    """Returns masks of files as the run of a first stage: without variables, words and classes."""
    config = ConfigDict(dict(data=dict(image_size=CANVAS)))
    return Run(config, MaskFiles(where), {}, WordList([]), ClassList(), 0)


def read_mask_list(path: epath.PathLike) -> dict[str, list[Mapping[str, Any]]]:
    """Reads the entries of a JSON file of masks by image.

    Raises:
      UserError: the file is damaged, or an entry is not of that form.
    """
    found = read_json(path, "the masks")
    by_image: dict[str, list[Mapping[str, Any]]] = {}
    with reading(path, "the masks"):
        listed = found.get("annotations") if isinstance(found, dict) else found
        for entry in objects(listed, "the list of masks"):
            image, code = entry["image_id"], entry["segmentation"]
            if isinstance(image, bool) or not isinstance(image, int | str):
                raise ValueError(f"image_id is neither a number nor a text: {short(image)}")
            if not isinstance(code, dict):
                raise ValueError(f"segmentation is no run-length encoding of COCO's: {short(code)}")
            code = mask_rle(code, "segmentation", tuple(array(code["size"], "size")))
            if not np.isfinite(float(entry.get("score", 1.0))):
                raise ValueError(f"a score is {short(entry['score'])}")
            by_image.setdefault(_key(image), []).append({**entry, "segmentation": code})
    return by_image


def decode(
    entries: Sequence[Mapping[str, Any]], where: str
) -> tuple[Float[np.ndarray, "n h w"], Float[np.ndarray, "n"]]:
    """Decodes the masks of an image, which have one size, and their scores.

    Raises:
      UserError: a mask is damaged, or sizes differ.
    """
    from pycocotools import mask as coco

    with reading(where, "the masks"):
        sizes = {tuple(entry["segmentation"]["size"]) for entry in entries}
        if len(sizes) > 1:
            raise ValueError(f"the masks of one image have several sizes: {short(sorted(sizes))}")
        masks = [coco.decode(entry["segmentation"]).astype(np.float32) for entry in entries]
        return np.stack(masks), np.array([float(entry.get("score", 1.0)) for entry in entries], np.float64)


def read_masks(path: epath.PathLike) -> tuple[Float[np.ndarray, "n h w"], Float[np.ndarray, "n"]]:
    """Reads the masks of an image, 0..1, and their scores from an .npz file.

    Raises:
      UserError: the file is damaged, or its arrays do not fit.
    """
    found = read_npz(path, "the masks")
    with reading(path, "the masks"):
        masks = found["masks"]
        scores = found.get("scores", np.ones(len(masks)))
        if masks.ndim != 3 or masks.dtype.kind not in "biuf" or scores.shape != masks.shape[:1]:
            raise ValueError(f"masks of shape {masks.shape} and type {masks.dtype}, scores of {scores.shape}")
        masks, scores = masks.astype(np.float32), scores.astype(np.float64)
        if not (np.isfinite(scores).all() and ((masks >= 0) & (masks <= 1)).all()):
            raise ValueError("masks are not within 0 and 1, or a score is not finite")
        return masks, scores


def _key(image: Any) -> str:
    return str(image).lstrip("0") or "0"


def _logit(share: np.ndarray) -> np.ndarray:
    return np.log(share / (1 - share))

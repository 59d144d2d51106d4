"""Pseudo-masks: a teacher's proposals as non-overlapping segments, a PNG for each image of a folder."""

import io
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jaxtyping import Float, Int32
from tqdm import tqdm

from ovseg_jax.data.images import list_images, save_mask
from ovseg_jax.errors import UserError
from ovseg_jax.files import locked, write_whole
from ovseg_jax.inference.folder import ImageReader
from ovseg_jax.inference.result import PixelFeatures, sigmoid
from ovseg_jax.inference.segmenter import Segmenter


class Labelled(NamedTuple):
    """The numbers of masks that `label_folder` wrote, of existing masks, and of unreadable images."""

    written: int
    there: int
    skipped: int


def select_masks(
    masks: Float[np.ndarray, "n h w"], threshold: float, max_overlap: float, min_area: float
) -> list[int]:
    """Selects the proposals to keep, the most confident first (this rule is ours; the paper gives none).

    A proposal covers the pixels where it exceeds `threshold`; its confidence is its mean there. It is dropped if it is
    smaller than `min_area` of the image, or has an IoU above `max_overlap` with a more confident one.
    """
    binary = (masks > threshold).reshape(len(masks), -1)
    area = binary.sum(1)
    sureness = (masks.reshape(len(masks), -1) * binary).sum(1) / np.maximum(area, 1)
    kept: list[int] = []
    for i in np.argsort(-sureness, kind="stable"):
        if area[i] < max(1, min_area * binary.shape[1]):
            continue
        overlap = binary[kept] & binary[i]
        iou = overlap.sum(1) / (area[kept] + area[i] - overlap.sum(1))
        if not (iou > max_overlap).any():
            kept.append(int(i))
    return kept


def segments_of(
    features: PixelFeatures, threshold: float = 0.5, max_overlap: float = 0.7, min_area: float = 0.001
) -> Int32[np.ndarray, "H W"]:
    """Converts proposals to non-overlapping segments i32 [H W] at the image's size, numbered from 1; 0 is void.

    Smaller proposals lie in front of larger ones, so that a part or a small thing is not covered by its surroundings.

    Raises:
      UserError: the model is a per-pixel model without proposals.
    """
    if features.mask_logits is None:
        raise UserError(
            "the teacher is a per-pixel model without mask proposals: use an OpenSeg run as teacher"
        )
    kept = select_masks(sigmoid(features.mask_logits), threshold, max_overlap, min_area)
    segments = np.zeros(features.size, np.int32)
    masks = sigmoid(features.upsample(features.mask_logits[kept])) > threshold
    for number, mask in enumerate(sorted(masks, key=np.sum, reverse=True), 1):
        segments[mask] = number
    return segments


def label_folder(
    load: Callable[[], Segmenter],
    root: epath.PathLike,
    *,
    threshold: float,
    max_overlap: float,
    min_area: float,
    out: epath.PathLike | None = None,
) -> Labelled:
    """Writes ROOT/masks/NAME.png for each image ROOT/images/NAME.* that has no mask.

    Args:
      load: loads the teacher; called only if an image is left to label.
      root: a folder in the layout of `data.sources.folder`.
      threshold: see `select_masks`.
      max_overlap: see `select_masks`.
      min_area: see `select_masks`.
      out: the folder for the masks, if it is not ROOT/masks.

    Raises:
      UserError: a number is not between 0 and 1, there are no images, two of them share a mask's name, or a mask
        cannot be written.
    """
    for name, value in dict(threshold=threshold, max_overlap=max_overlap, min_area=min_area).items():
        if not (isinstance(value, int | float) and 0 <= value <= 1):
            raise UserError(f"{name}={value} is not between 0 and 1")
    root = epath.Path(root)
    images, masks = root / "images", root / "masks" if out is None else epath.Path(out)
    if not images.is_dir():
        raise UserError(f"--data_dir={root} has no folder images/")
    files = list_images(images)
    if not files:
        raise UserError(f"{images} holds no readable image")
    by_stem: dict[str, epath.Path] = {}
    for path in files:
        if (other := by_stem.setdefault(path.stem, path)) != path:
            raise UserError(f"{images}: {other.name} and {path.name} would share the mask {path.stem}.png")
    with locked(root):
        masks.mkdir(exist_ok=True)
        done = {path.stem for path in list_images(masks)}
        if out is not None and (root / "masks").is_dir():
            done |= {path.stem for path in list_images(root / "masks")}
        reader = ImageReader([path for path in files if path.stem not in done])
        written = 0
        if reader.files:
            with tqdm(
                total=len(files), initial=len(files) - len(reader.files), unit="image", disable=None
            ) as bar:
                reader.report = lambda error: (bar.update(), bar.write(f"skipped: {error}", sys.stderr))
                for features in load().stream_features(reader):
                    path, _ = reader.done.popleft()
                    segments = segments_of(features, threshold, max_overlap, min_area)
                    content = io.BytesIO()
                    kind = np.uint16 if segments.max() > 255 else np.uint8
                    save_mask(content, segments.astype(kind))
                    write_whole(masks / f"{path.stem}.png", content.getvalue())
                    written += 1
                    bar.update()
    return Labelled(written, len(files) - len(reader.files), reader.skipped)


def label_stage(
    folder: epath.Path,
    *,
    teacher: str,
    data_dir: str,
    threshold: float = 0.5,
    max_overlap: float = 0.7,
    min_area: float = 0.001,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Runs a stage of kind "pseudo_label": writes FOLDER/NAME.png for each image of a folder without a mask.

    `masks="stage:NAME"` of a source of kind "folder" reads these masks in addition to its own.

    Args:
      folder: the folder of the stage; the other arguments are the keys of its config.
      teacher: a run's folder or "stage:NAME".
      data_dir: a folder with images/.
      threshold: see `select_masks`.
      max_overlap: see `select_masks`.
      min_area: see `select_masks`.
      batch_size: the number of images at once.

    Raises:
      UserError: an image cannot be read; and see `label_folder`.
    """
    rules = dict(threshold=threshold, max_overlap=max_overlap, min_area=min_area)
    problem = ""
    if jax.process_index() == 0:
        try:
            load = lambda: Segmenter.from_checkpoint(teacher, batch_size=batch_size)
            done = label_folder(load, data_dir, out=folder, **rules)
            print(f"{done.written} masks written to {folder}, {done.there} existed", flush=True)
            if done.skipped:
                unread = f"{done.skipped} images of {data_dir} could not be read"
                problem = f"{unread}: repair or remove them, and run it again"
        except UserError as error:
            problem = str(error)
    if jax.process_count() > 1 and multihost_utils.broadcast_one_to_all(bool(problem)):
        problem = problem or "the first process could not write the pseudo-masks"
    if problem:
        raise UserError(problem)
    return {}

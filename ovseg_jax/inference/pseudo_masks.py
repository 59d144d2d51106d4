"""Pseudo-masks: proposals of a teacher as non-overlapping segments, a PNG for each image of a folder."""

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
    """How many masks `label_folder` wrote, how many were there, and how many images could not be read."""

    written: int
    there: int
    skipped: int


def select_masks(
    masks: Float[np.ndarray, "n h w"], threshold: float, max_overlap: float, min_area: float
) -> list[int]:
    """Selects proposals worth keeping, the surest first (the paper gives no rule: ours).

    A proposal counts where it exceeds `threshold`; its sureness is its mean there. One that is smaller than
    `min_area` of the image, or that overlaps a surer one by an IoU above `max_overlap`, is left out.
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
    """Makes non-overlapping segments at the image's own size, numbered from 1; 0 is void.

    Smaller proposals lie in front of larger ones, so that a part or a small thing is not swallowed by what
    surrounds it.

    Raises:
      UserError: a per-pixel model, which has no proposals.
    """
    if features.mask_logits is None:
        raise UserError("the teacher is a per-pixel model, which proposes no masks: train OpenSeg as teacher")
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
      load: makes the teacher, where an image is left to do.
      root: a folder in the layout of `data.sources.folder`.
      threshold: see `select_masks`, as are the rest.
      max_overlap: of two proposals.
      min_area: of a proposal.
      out: a folder for the masks that is not ROOT/masks.

    Raises:
      UserError: a number is not between 0 and 1, there are no images, two of them share a mask's name, or a mask
        cannot be written.
    """
    for name, value in dict(threshold=threshold, max_overlap=max_overlap, min_area=min_area).items():
        if not (isinstance(value, int | float) and 0 <= value <= 1):
            raise UserError(f"{name}={value}: it is between 0 and 1")
    root = epath.Path(root)
    images, masks = root / "images", root / "masks" if out is None else epath.Path(out)
    if not images.is_dir():
        raise UserError(f"--data_dir={root} has no folder images/")
    files = list_images(images)
    if not files:
        raise UserError(f"{images} holds no image")
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
                reader.report = lambda error: (bar.update(), bar.write(f"left out: {error}", sys.stderr))
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
    """Runs a stage of kind "pseudo_label": writes FOLDER/NAME.png for each image of a folder that has no mask.

    `masks="stage:NAME"` of a source of kind "folder" reads them beside those that are there.

    Args:
      folder: of the stage. The others are the keys of its config.
      teacher: a run's folder, or "stage:NAME".
      data_dir: a folder with images/.
      threshold: see `select_masks`, as are the next two.
      max_overlap: of two proposals.
      min_area: of a proposal.
      batch_size: images at once.

    Raises:
      UserError: an image cannot be read; and see `label_folder`.
    """
    rules = dict(threshold=threshold, max_overlap=max_overlap, min_area=min_area)
    problem = ""
    if jax.process_index() == 0:
        try:
            load = lambda: Segmenter.from_checkpoint(teacher, batch_size=batch_size)
            done = label_folder(load, data_dir, out=folder, **rules)
            print(f"{done.written} masks written to {folder}, {done.there} were there", flush=True)
            if done.skipped:
                problem = f"{done.skipped} images of {data_dir} could not be read: mend or remove them, and start again"
        except UserError as error:
            problem = str(error)
    if jax.process_count() > 1 and multihost_utils.broadcast_one_to_all(bool(problem)):
        problem = problem or "the first process could not write the pseudo-masks"
    if problem:
        raise UserError(problem)
    return {}

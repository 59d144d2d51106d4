"""A picture sheet of the images with the lowest scores."""

import io
import os
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, UInt8

from ovseg_jax.data.images import image_suffixes, read_image
from ovseg_jax.errors import UserError
from ovseg_jax.files import write_whole
from ovseg_jax.scoring.files import Pair, list_files
from ovseg_jax.scoring.label_maps import Rules, read_pair
from ovseg_jax.viz.segments import GridRow, prediction_grid
from ovseg_jax.vocab.classes import ClassList

_RIGHT, _WRONG, _VOID = (255, 255, 255), (220, 60, 60), (225, 228, 232)


def draw_sheet(
    path: str, worst: Sequence[tuple[Pair, float]], rules: Rules, classes: ClassList, images: str | None
) -> None:
    """Draws truth and prediction of images, beside the photograph or, without photographs, the wrong pixels.

    Args:
      path: the PNG to write.
      worst: pairs of label maps and their scores.
      rules: the meaning of their values.
      classes: the classes, for names.
      images: the folder of the photographs.

    Raises:
      UserError: a photograph is missing or has another size, or the file cannot be written.
    """
    photographs = _find(images, [pair for pair, _ in worst]) if images else {}
    rows = []
    for pair, value in worst:
        prediction, truth = read_pair(rules, pair)
        picture = read_image(photographs[pair.name]) if images else _errors(prediction, truth)
        if picture.shape[:2] != truth.shape:
            raise UserError(
                f"the image {photographs[pair.name]} is {picture.shape[0]} x {picture.shape[1]} (height x width), "
                f"but its truth {pair.truth} is {truth.shape[0]} x {truth.shape[1]}"
            )
        caption = f"{pair.name}: mIoU {value:.1f}"
        rows.append(GridRow(picture, truth, prediction, caption=caption))
    names = [classes.display(k) for k in range(len(classes))]
    grid = prediction_grid(rows, names, first="image" if images else "wrong pixels")
    file = io.BytesIO()
    grid.save(file, "PNG")
    write_whole(path, file.getvalue())


def _find(images: str, pairs: Sequence[Pair]) -> dict[str, str]:
    files = list_files(images, "--images", image_suffixes())
    last = {os.path.basename(name): file for name, file in files.items()}
    known = files | (last if len(last) == len(files) else {})
    found: dict[str, str] = {}
    for pair in pairs:
        own = known.get(pair.name) or known.get(os.path.basename(pair.name)) or known.get("")
        if own is None:
            raise UserError(f"--images={images} holds no image {pair.name!r}")
        found[pair.name] = own
    return found


def _errors(prediction: Int[np.ndarray, "h w"], truth: Int[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
    colours = np.array([_RIGHT, _WRONG, _VOID], np.uint8)
    return colours[np.where(truth < 0, 2, (prediction != truth).astype(np.int64))]

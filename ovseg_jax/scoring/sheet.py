"""A picture sheet of the images with the lowest scores."""

import argparse
import os
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Int, UInt8

from ovseg_jax.cli.outputs import check_out_file
from ovseg_jax.data.images import encode_image, image_suffixes, read_image
from ovseg_jax.errors import UserError
from ovseg_jax.files import write_whole
from ovseg_jax.scoring.files import list_files
from ovseg_jax.viz.segments import GridRow, prediction_grid
from ovseg_jax.vocab.classes import ClassList

_RIGHT, _WRONG, _VOID = (255, 255, 255), (220, 60, 60), (225, 228, 232)
_CELL = 256  # pixels of the longer side of a picture on the sheet
_DEFAULT = 12


def add_sheet_flags(parser: argparse.ArgumentParser, metric: str) -> None:
    """Adds the flags of the sheet.

    Args:
      parser: the parser of a kind.
      metric: the score of an image.
    """
    parser.add_argument(
        "--worst",
        type=int,
        metavar="N",
        help=f"list the N images with the lowest {metric} (their own; default {_DEFAULT} with --sheet)",
    )
    parser.add_argument("--sheet", metavar="FILE.png", help="draw the worst images")
    parser.add_argument(
        "--images", metavar="DIR", help="the photographs for --sheet, with the names of the truths' files"
    )


def worst_of(arguments: argparse.Namespace) -> int:
    """Returns how many of the worst images to list, 0 for none.

    Raises:
      UserError: a flag of the sheet is invalid, or it cannot be written.
    """
    if arguments.worst is not None and arguments.worst < 1:
        raise UserError(f"--worst={arguments.worst} is less than 1")
    if arguments.images and not arguments.sheet:
        raise UserError("--images is for --sheet, which is missing")
    if arguments.sheet:
        if not arguments.sheet.lower().endswith(".png"):
            raise UserError(f"--sheet={arguments.sheet} must end in .png")
        check_out_file(arguments.sheet, {"--pred": arguments.pred, "--gt": arguments.gt}, "--sheet")
    return arguments.worst or (_DEFAULT if arguments.sheet else 0)


def find_photographs(images: str | None, names: Sequence[str]) -> dict[str, str]:
    """Returns the photograph of each of some images by name; {} without a folder.

    Raises:
      UserError: a photograph is missing.
    """
    if not images:
        return {}
    files = list_files(images, "--images", image_suffixes())
    last = {os.path.basename(name): file for name, file in files.items()}
    known = files | (last if len(last) == len(files) else {})
    found: dict[str, str] = {}
    for name in names:
        own = known.get(name) or known.get(os.path.basename(name)) or known.get("")
        if own is None:
            raise UserError(f"--images={images} holds no image {name!r}")
        found[name] = own
    return found


def sheet_row(
    caption: str,
    prediction: Int[np.ndarray, "h w"],
    truth: Int[np.ndarray, "h w"],
    right: Bool[np.ndarray, "h w"],
    photograph: str | None,
    file: str,
) -> GridRow:
    """Returns the row of an image: its photograph or, without one, its wrong pixels, then truth and prediction.

    Args:
      caption: the line above it.
      prediction: the class of each pixel, -1 for none.
      truth: the same of the truth, -1 where it is not scored.
      right: whether the prediction is right, where it is scored.
      photograph: the file of the photograph.
      file: the truth's file, for errors.

    Raises:
      UserError: the photograph is damaged or has another size.
    """
    if photograph is None:
        colours = np.array([_RIGHT, _WRONG, _VOID], np.uint8)
        picture: UInt8[np.ndarray, "h w 3"] = colours[np.where(truth < 0, 2, np.where(right, 0, 1))]
    else:
        picture = read_image(photograph)
    if picture.shape[:2] != truth.shape:
        raise UserError(
            f"the image {photograph} is {picture.shape[0]} x {picture.shape[1]} (height x width), but its truth {file} "
            f"is {truth.shape[0]} x {truth.shape[1]}"
        )
    return GridRow(picture, truth, prediction, caption=caption)


def write_sheet(
    path: str, rows: Sequence[GridRow], classes: ClassList, photographs: Mapping[str, str]
) -> None:
    """Writes rows of `sheet_row` as a PNG.

    Raises:
      UserError: the file cannot be written.
    """
    names = [classes.display(k) for k in range(len(classes))]
    grid = prediction_grid(rows, names, first="image" if photographs else "wrong pixels", cell=_CELL)
    write_whole(path, encode_image(grid))


def parted(classes: Int[np.ndarray, "h w"], segments: Int[np.ndarray, "h w"]) -> Int[np.ndarray, "h2 w2"]:
    """Returns a map of classes in the size of the sheet, with -1 between two segments of one class.

    Args:
      classes: the class of each pixel, -1 for none.
      segments: the number of its segment.
    """
    scale = min(1.0, _CELL / max(classes.shape))
    rows, columns = (
        ((np.arange(new) + 0.5) * (size / new)).astype(int)
        for size in classes.shape
        for new in [max(1, round(size * scale))]
    )
    small, number = (x[rows[:, None], columns] for x in (classes, segments))
    between = np.zeros(small.shape, bool)
    between[:, 1:] |= (number[:, 1:] != number[:, :-1]) & (small[:, 1:] == small[:, :-1])
    between[1:] |= (number[1:] != number[:-1]) & (small[1:] == small[:-1])
    return np.where(between, -1, small)

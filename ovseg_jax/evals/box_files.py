"""Files of boxes: proposals and images in, AP out, in the forms of COCO and LVIS."""

import contextlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float

from ovseg_jax.data.images import list_images
from ovseg_jax.errors import UserError


class Proposals(NamedTuple):
    """The boxes of an image.

    Attributes:
      boxes: left, top, width and height in pixels.
      objectness: in 0..1.
    """

    boxes: Float[np.ndarray, "n 4"]
    objectness: Float[np.ndarray, " n"]


def read_boxes(path: epath.PathLike) -> dict[Any, Proposals]:
    """Reads COCO's result format, a JSON list of {"image_id", "bbox", "score"}; by image, in the order of their ids.

    Without a score all boxes of the file are equally good.

    Raises:
      UserError: no such file, none of that form, no box; a box without a size, or a score outside 0..1.
    """
    entries = read_json(path)
    if not isinstance(entries, list) or not entries:
        raise UserError(
            f"{path} is no list of boxes: [{{'image_id': 285, 'bbox': [x, y, width, height], 'score': 1}}, ...]"
        )
    by_image: dict[Any, list[tuple[list[float], float]]] = {}
    for i, entry in enumerate(entries):
        try:
            box = [float(x) for x in entry["bbox"]]
            found = by_image.setdefault(entry["image_id"], [])
            score = float(entry.get("score", 1))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{path}: box {i} has no 'image_id', 'bbox' or 'score' that can be read: {error!r}"
            ) from error
        if len(box) != 4 or not np.isfinite(box).all() or box[2] <= 0 or box[3] <= 0:
            raise UserError(
                f"{path}: the bbox of box {i} is not x, y, width and height of a box: {entry['bbox']}"
            )
        if not 0 <= score <= 1:
            raise UserError(f"{path}: the score of box {i} is {score}: a probability is wanted, not a logit")
        found.append((box, score))
    ordered = sorted(by_image, key=lambda key: (isinstance(key, str), key))
    return {key: Proposals(*(np.array(x) for x in zip(*by_image[key], strict=True))) for key in ordered}


def find_images(folder: epath.PathLike, ids: Iterable[Any], annotations: Any = None) -> dict[Any, epath.Path]:
    """The image files of some ids: as `images` of an annotation file says, or called by the id as COCO writes it.

    Raises:
      UserError: there is no such file.
    """
    folder = epath.Path(folder)
    if not folder.is_dir():
        raise UserError(f"--images={folder} is not a folder")
    entries = annotations.get("images", []) if isinstance(annotations, dict) else []
    # LVIS has the address in place of the name, with the folder of COCO's split before it.
    named = {entry["id"]: entry.get("file_name") or entry.get("coco_url", "") for entry in entries}
    files = {path.stem: path for path in list_images(folder)}
    found = {}
    for key in ids:
        parts = named[key].split("/") if key in named else []
        places = [folder.joinpath(*parts[-n:]) for n in (len(parts), 2, 1) if parts]
        stems = (str(key), f"{key:012d}" if isinstance(key, int) else str(key))
        path = (
            next((place for place in places if place.exists()), None)
            or files.get(stems[0])
            or files.get(stems[1])
        )
        if path is None:
            raise UserError(f"--images={folder} holds no image of the id {key}")
        found[key] = path
    return found


def average_precision(annotations: epath.PathLike, results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """AP of boxes in percent, averaged over IoU 0.5 to 0.95, and its parts, of which those without boxes are left out.

    By pycocotools, at most 100 boxes an image; of an LVIS file by the package lvis, at most 300.

    Raises:
      ImportError: the file is LVIS's, and lvis is not installed.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        if is_lvis(read_json(annotations)):
            return _lvis(str(annotations), list(results))
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        truth = COCO(str(annotations))
        judge = COCOeval(truth, truth.loadRes(list(results)), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    scores = zip(("AP", "AP50", "AP75", "APs", "APm", "APl"), judge.stats[:6].tolist(), strict=True)
    return {name: 100 * score for name, score in scores if score >= 0}


def is_lvis(annotations: Any) -> bool:
    """Whether an annotation file is of LVIS, whose categories have frequencies."""
    return any("frequency" in category for category in annotations.get("categories", []))


def read_json(path: epath.PathLike) -> Any:
    """The content of a JSON file.

    Raises:
      UserError: it cannot be read.
    """
    try:
        return json.loads(epath.Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error


def _lvis(annotations: str, results: list[Mapping[str, Any]]) -> dict[str, float]:
    import lvis
    import lvis.eval

    # lvis 0.5.3, the last one, says np.float, which NumPy 2 has no more.
    lvis.eval.np = SimpleNamespace(**{**vars(np), "float": float})
    truth = lvis.LVIS(annotations)
    judge = lvis.LVISEval(truth, lvis.LVISResults(truth, results), "bbox")
    judge.run()
    scores = judge.get_results().items()
    return {name: 100 * float(score) for name, score in scores if name.startswith("AP") and score >= 0}

"""Files of boxes and masks in the formats of COCO and LVIS: proposals and annotations."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float

from ovseg_jax.data.images import list_images
from ovseg_jax.errors import UserError
from ovseg_jax.evals.average_precision import Kind, Rule
from ovseg_jax.evals.masks import LONGEST, mask_rle, rle_area
from ovseg_jax.reading import (
    array,
    column,
    flag,
    number,
    numbers,
    objects,
    read_json,
    reading,
    short,
    text,
    whole,
)
from ovseg_jax.vocab.classes import ClassList

_LVIS_LISTS = ("neg_category_ids", "not_exhaustive_category_ids")


class Proposals(NamedTuple):
    """The boxes of an image.

    Attributes:
      boxes: left, top, width and height in pixels.
      objectness: in 0..1.
    """

    boxes: Float[np.ndarray, "n 4"]
    objectness: Float[np.ndarray, " n"]


def read_boxes(path: epath.PathLike) -> dict[int | str, Proposals]:
    """Reads COCO's result format, a JSON list of {"image_id", "bbox", "score"}; returns boxes by image, sorted by id.

    Boxes without a score get 1.

    Raises:
      UserError: the file is missing, not of this form, or empty; a box has no area, or a score is outside 0..1.
    """
    entries = read_json(path)
    if not isinstance(entries, list) or not entries:
        raise UserError(
            f"{path} is not a list of boxes: [{{'image_id': 285, 'bbox': [x, y, width, height], 'score': 1}}, ...]"
        )
    by_image: dict[str, list[tuple[list[float], float]]] = {}
    keys: dict[str, int | str] = {}
    with reading(path):
        rows = objects(entries, "the list of boxes")
        ids, boxes = column(rows, "image_id", image_id, of="box"), column(rows, "bbox", numbers, 4, of="box")
        for i, score in enumerate(column(rows, "score", number, default=1.0, of="box")):
            if min(boxes[i][2:]) <= 0:
                raise ValueError(f"the bbox of box {i} is not [x, y, width, height] of a box: {boxes[i]}")
            if not 0 <= score <= 1:
                raise ValueError(f"the score of box {i} is {score}: it must be a probability, not a logit")
            keys.setdefault(str(ids[i]), ids[i])
            by_image.setdefault(str(ids[i]), []).append((boxes[i], score))
    return {
        key: Proposals(*(np.array(x) for x in zip(*by_image[str(key)], strict=True)))
        for key in sorted(keys.values(), key=_by_number)
    }


def image_id(value: Any, name: str) -> int | str:
    """Checks that a value is an image id, a whole number or a text, and returns it.

    Raises:
      ValueError: it is neither.
    """
    return text(value, name) if isinstance(value, str) else whole_id(value, name)


def whole_id(value: Any, name: str) -> int:
    """Checks that a value is a whole number, which some tools write as 3.0, and returns it."""
    return whole(int(value) if isinstance(value, float) and value.is_integer() else value, name)


def _by_number(key: int | str) -> tuple[bool, int, str]:
    return (True, 0, key) if isinstance(key, str) else (False, key, "")


class Annotations(NamedTuple):
    """An annotation file of COCO or LVIS, checked and completed.

    Attributes:
      data: `images`, `annotations` and `categories` in the form of the packages that compute AP, with new ids of images
        and annotations from 1.
      ids: the file's own id of each image, in the order of the new ids.
      files: the file name of each image, or its address, or "".
      classes: its categories, in the file's order.
    """

    data: dict[str, list[dict[str, Any]]]
    ids: list[int | str]
    files: list[str]
    classes: ClassList

    @property
    def numbers(self) -> dict[str, int]:
        """The new id of each image, from 1, by its own id as text, since tools write both 285 and "285"."""
        return {str(key): number for number, key in enumerate(self.ids, 1)}

    @property
    def frequencies(self) -> dict[int, str]:
        """LVIS's "r", "c" or "f" for each category id; empty for files that are not LVIS's."""
        return {row["id"]: row["frequency"] for row in self.data["categories"] if "frequency" in row}

    @property
    def rule(self) -> Rule:
        """The rule by which results are scored: LVIS's where categories have frequencies."""
        return "lvis" if self.frequencies else "coco"


def read_annotations(
    path: epath.PathLike, classes: ClassList | None = None, kind: Kind = "bbox"
) -> Annotations:
    """Reads annotations and adds the fields that the evaluation package requires.

    Annotations get ids from 1, since the package takes 0 for "no match". `iscrowd` becomes 0 where it is missing, and
    everywhere by LVIS's rules; a missing area becomes that of the box or mask.

    Args:
      path: the file.
      classes: the classes that it must have, if not None.
      kind: "bbox" reads boxes; "segm" reads masks, and sizes of images.

    Raises:
      UserError: the file cannot be read, has no category with the id of a class, or an annotation names an unknown
        image or category or has no valid box or mask.
    """
    found = read_json(path)
    parts = ("images", "annotations", "categories")
    if not isinstance(found, dict) or not all(
        isinstance(found.get(key), list) and found[key] for key in parts
    ):
        raise UserError(f"{path} needs lists of images, annotations and categories that are not empty")
    with reading(path):
        rows, truth, kinds = (
            # null is treated as a missing value.
            [{k: v for k, v in row.items() if v is not None} for row in objects(found[key], repr(key))]
            for key in parts
        )
        categories = [
            {**row, "id": k}
            for row, k in zip(kinds, column(kinds, "id", whole_id, of="category"), strict=True)
        ]
        is_lvis = any(column(kinds, "frequency", _frequency, default="", of="category"))
        shown = column(kinds, "name", text, default="", of="category")
        images = _images(rows, kind)
        numbers_of = {str(image.id): n for n, image in enumerate(images, 1)}
        if len(numbers_of) < len(images):
            raise ValueError("two images have the same id")
        known = {category["id"] for category in categories}
        if len(known) < len(categories):
            raise ValueError("two categories have the same id")
        annotations = _annotations(truth, kind, images, numbers_of, known)
        for annotation in annotations if is_lvis else ():
            annotation["iscrowd"] = 0
    if classes and (strange := [k for k, wanted in enumerate(classes.ids) if wanted not in known]):
        lost, name = classes.ids[strange[0]], classes.display(strange[0])
        raise UserError(
            f"{path} has no category {lost}, which --classes calls {name!r}: use --classes={path}"
        )
    data = {
        "images": [
            {"id": n, **dict(zip(("height", "width"), image.size, strict=False)), **image.lvis}
            for n, image in enumerate(images, 1)
        ],
        "annotations": annotations,
        "categories": categories,
    }
    ids = [row["id"] for row in categories]
    own_classes = ClassList.things([name or str(k) for name, k in zip(shown, ids, strict=True)], ids)
    return Annotations(data, [image.id for image in images], [image.file for image in images], own_classes)


class _Image(NamedTuple):
    """An image of an annotation file: its id, file name or address, size if masks are read, and lists of LVIS."""

    id: int | str
    file: str
    size: tuple[int, ...]
    lvis: dict[str, list[int]]


def _images(rows: Sequence[dict[str, Any]], kind: Kind) -> list[_Image]:
    """Checks images and sorts them by their ids."""
    sizes: list[tuple[int, ...]] = [() for _ in rows]
    if kind == "segm":
        sides = (column(rows, side, whole, 1, LONGEST, of="image") for side in ("height", "width"))
        sizes = list(zip(*sides, strict=True))
    names, addresses = (column(rows, key, text, default="", of="image") for key in ("file_name", "coco_url"))
    lists = [column(rows, key, _ids, default=[], of="image") for key in _LVIS_LISTS]
    images = [
        _Image(key, name or address, size, dict(zip(_LVIS_LISTS, own, strict=True)))
        for key, name, address, size, *own in zip(
            column(rows, "id", image_id, of="image"), names, addresses, sizes, *lists, strict=True
        )
    ]
    return sorted(images, key=lambda image: _by_number(image.id))


def _annotations(
    rows: Sequence[dict[str, Any]],
    kind: Kind,
    images: Sequence[_Image],
    numbers_of: Mapping[str, int],
    known: Collection[int],
) -> list[dict[str, Any]]:
    """Checks annotations of images, which `numbers_of` numbers from 1 by their ids, and of `known` categories."""
    columns = (
        column(rows, "image_id", image_id, of="annotation"),
        column(rows, "category_id", whole_id, of="annotation"),
        column(rows, "area", number, default=None, of="annotation"),
        column(rows, "iscrowd", flag, default=False, of="annotation"),
        column(rows, "bbox", numbers, 4, of="annotation")
        if kind == "bbox"
        else column(rows, "segmentation", _given, of="annotation"),
    )
    annotations = []
    for i, (image, category, area, crowd, shape) in enumerate(zip(*columns, strict=True)):
        if str(image) not in numbers_of or category not in known:
            what = f"image {image!r}" if str(image) not in numbers_of else f"category {category}"
            raise ValueError(f"annotation {i} refers to the {what}, which the file does not list")
        where = numbers_of[str(image)]
        if kind == "bbox":
            own = {"bbox": shape, "area": shape[2] * shape[3] if area is None else area}
        else:
            rle = mask_rle(shape, f"annotation {i}: 'segmentation'", images[where - 1].size)
            own = {"segmentation": rle, "area": rle_area(rle) if area is None else area}
        head = {"id": i + 1, "image_id": where, "category_id": category, "iscrowd": int(crowd)}
        annotations.append(head | own)
    return annotations


def _given(value: Any, name: str) -> Any:
    return value


def _frequency(value: Any, name: str) -> str:
    if value not in ("r", "c", "f"):
        raise ValueError(f"{name}: expected r, c or f, got {short(value)}")
    return value


def _ids(value: Any, name: str) -> list[int]:
    return [whole_id(item, name) for item in array(value, name)]


def match_images(
    proposals: Mapping[int | str, Proposals], annotations: Annotations
) -> dict[int | str, Proposals]:
    """Returns the proposals under the ids that the annotations give their images.

    Raises:
      UserError: the annotations lack an image, so that no score could be computed.
    """
    numbers = annotations.numbers
    if foreign := [key for key in proposals if str(key) not in numbers]:
        more = f" and of {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise UserError(
            f"--boxes has boxes of the image {foreign[0]!r}{more}, which --annotations does not list"
        )
    return {annotations.ids[numbers[str(key)] - 1]: boxes for key, boxes in proposals.items()}


def find_images(
    folder: epath.PathLike, ids: Iterable[int | str], annotations: Annotations | None = None
) -> dict[int | str, epath.Path]:
    """Finds the image files of some ids: as the annotations name them, or named by the id as in COCO.

    Raises:
      UserError: an image has no such file.
    """
    folder = epath.Path(folder)
    if not folder.is_dir():
        raise UserError(f"--images={folder} is not a folder")
    # LVIS gives an address in place of the name, which includes the folder of COCO's split.
    named = dict(zip(annotations.ids, annotations.files, strict=True)) if annotations else {}
    files = {path.stem: path for path in list_images(folder)}
    found = {}
    for key in ids:
        parts = [part for part in named.get(key, "").split("/") if part]
        places = [folder.joinpath(*parts[-n:]) for n in (len(parts), 2, 1) if parts]
        path = next((place for place in places if place.exists()), None)
        path = path or files.get(str(key)) or files.get(str(key).zfill(12))
        if path is None:
            raise UserError(f"--images={folder} holds no image with the id {key}")
        found[key] = path
    return found

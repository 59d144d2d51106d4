"""`score panoptic`: panoptic quality of COCO's JSON and PNGs."""

import argparse
import dataclasses
import functools
import os
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from ovseg_jax.data.images import read_colours
from ovseg_jax.errors import UserError
from ovseg_jax.evals.box_files import image_id, whole_id
from ovseg_jax.evals.panoptic_quality import (
    RULES,
    Overlaps,
    Rule,
    Tally,
    add,
    by_class,
    matches,
    overlaps,
    scores,
    table,
    tally,
)
from ovseg_jax.reading import column, flag, number, objects, read_json, reading, text, whole
from ovseg_jax.scoring.files import Fault, Skips, add_file_flags, lone, results, workers_of
from ovseg_jax.scoring.report import Report, add_report_flags, check_report_flags, publish
from ovseg_jax.scoring.sheet import (
    add_sheet_flags,
    find_photographs,
    parted,
    sheet_row,
    worst_of,
    write_sheet,
)
from ovseg_jax.vocab.classes import ClassList

_DESCRIPTION = """\
Scores panoptic segmentation: PQ, SQ and RQ over all classes, things and stuff, and for each class.

  python -m ovseg_jax.score panoptic --pred=panoptic.json --gt=panoptic_val2017.json --csv=classes.csv

Both are JSON files in COCO's panoptic format, with their PNGs (ids are R + 256 G + 65536 B) in the folder of the same
name without .json, or in --pred_masks and --gt_masks. Categories are those of --gt. An image without any segment needs
an annotation with an empty segments_info, or counts as missing.

--rule says how pixels without a true segment and crowds count:
  coco     as in panopticapi: void counts in no union, and a false prediction is ignored if more than half of it is void
           or on a crowd of its class. ADE20K, Cityscapes and Mapillary use it too.
  bdd100k  void counts in unions, and a false prediction is ignored if more than half of it is outside of all true
           segments but crowds.
As in panopticapi, a true segment without pixels is missed, and an id of a true PNG that its JSON lacks is neither void
nor a segment; both are counted in the report. In a prediction they are errors. Also as there, the rule coco takes the
area of a true segment in a union from the JSON, if it states one. It may be another than the pixels: of ADE20K's stuff,
as MaskFormer prepares it, it includes what things cover.
"""


class Annotation(NamedTuple):
    """The segments of an image.

    Attributes:
      file: the name of the PNG.
      ids: their ids, in the JSON's order.
      category: the index of each one's class.
      crowd: whether each is a crowd.
      area: the area of each in the JSON, or -1.
      unknown: the first category_id that is not among the categories, whose index is -1; None if there is none.
    """

    file: str
    ids: np.ndarray
    category: np.ndarray
    crowd: np.ndarray
    area: np.ndarray
    unknown: int | None = None


class _Pair(NamedTuple):
    name: str
    predicted: Annotation
    true: Annotation


class _Found(NamedTuple):
    """The result of an image: its tally, its own PQ in percent, and counts of faults in the truth."""

    tally: Tally
    pq: float | None
    invisible: int
    unlisted: int
    other_area: int


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the description and the flags."""
    parser.description = _DESCRIPTION
    add = parser.add_argument
    add("--pred", required=True, metavar="FILE", help="the JSON of the predictions")
    add("--gt", required=True, metavar="FILE", help="the JSON of the truth")
    add("--pred_masks", metavar="DIR", help="the PNGs of the predictions (default: --pred without .json)")
    add("--gt_masks", metavar="DIR", help="the PNGs of the truth (default: --gt without .json)")
    add("--rule", choices=RULES, default="coco", help="see above (default %(default)s)")
    add_sheet_flags(parser, "PQ")
    add_file_flags(parser)
    add_report_flags(parser)


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    check_report_flags(arguments, {"--pred": arguments.pred, "--gt": arguments.gt})
    skips, workers, worst = Skips(arguments.missing), workers_of(arguments), worst_of(arguments)
    folders = [
        _folder(given or path.removesuffix(".json"), f"{name}_masks")
        for name, path, given in (
            ("--pred", arguments.pred, arguments.pred_masks),
            ("--gt", arguments.gt, arguments.gt_masks),
        )
    ]
    classes, pairs = read_pairs(arguments.pred, arguments.gt, skips)
    found, each = score(classes, pairs, folders[0], folders[1], arguments.rule, skips, workers)
    lowest = sorted((value, pair.name, pair) for pair, value in each if value is not None)[:worst]
    if arguments.sheet:
        photographs = find_photographs(arguments.images, [_stem(pair) for _, _, pair in lowest])
        rows = [
            _row(
                pair,
                value,
                photographs.get(_stem(pair)),
                _files(pair, *folders),
                len(classes),
                arguments.rule,
            )
            for value, _, pair in lowest
        ]
        write_sheet(arguments.sheet, rows, classes, photographs)
    if worst:
        shown = [f"{name} ({value:.1f})" for value, name, _ in lowest]
        found = dataclasses.replace(found, facts={**found.facts, "worst images": shown})
    publish(found, arguments)


def _stem(pair: _Pair) -> str:
    return os.path.splitext(pair.true.file)[0]


def _folder(path: str, flag: str) -> str:
    if not epath.Path(path).is_dir():
        raise UserError(f"the folder {path} with the PNGs is missing: name it by {flag}")
    return path


def read_pairs(pred: str, gt: str, skips: Skips) -> tuple[ClassList, list[_Pair]]:
    """Reads prediction and truth.

    Args:
      pred: the JSON of the predictions.
      gt: the JSON of the truth.
      skips: takes images without a partner.

    Returns:
      The classes of the truth, and the images that both have.

    Raises:
      UserError: a file is not of COCO's form, or an image has no partner and `skips` does not allow it.
    """
    classes, truths = read_panoptic(gt)
    _, predictions = read_panoptic(pred, classes)
    without = [name for name in truths if name not in predictions]
    skips.add(without, lone("no prediction", without, len(truths), f"images have no prediction in {pred}"))
    surplus = [name for name in predictions if name not in truths]
    skips.add(surplus, lone("no truth", surplus, len(predictions), f"predicted images are not in {gt}"))
    pairs = [_Pair(name, predictions[name], true) for name, true in truths.items() if name in predictions]
    return classes, pairs


def score(
    classes: ClassList,
    pairs: list[_Pair],
    pred_masks: str,
    gt_masks: str,
    rule: Rule,
    skips: Skips,
    workers: int,
) -> tuple[Report, list[tuple[_Pair, float | None]]]:
    """Scores a prediction.

    Args:
      classes: the classes.
      pairs: the images.
      pred_masks: the folder of the predictions' PNGs.
      gt_masks: the folder of the true PNGs.
      rule: see `panoptic_quality`.
      skips: takes images that cannot be scored.
      workers: the number of processes.

    Returns:
      The report, and each image with its own PQ, which is None if neither side has a segment that counts.

    Raises:
      UserError: no image can be scored, or one cannot and `skips` does not allow it.
    """
    one = functools.partial(_image, pred_masks=pred_masks, gt_masks=gt_masks, classes=len(classes), rule=rule)
    total: Tally | None = None
    odd, each = Counter[str](), []
    for pair, image in results(one, pairs, skips, workers=workers):
        total = add(total, image.tally)
        each.append((pair, image.pq))
        odd += Counter(
            {
                "true segments without pixels, which are missed": image.invisible,
                "ids in true PNGs that the JSON lacks": image.unlisted,
                "true segments whose area in the JSON is another": image.other_area,
            }
        )
    if total is None:
        raise UserError("no image of the truth can be scored")
    return _report(total, classes, {"images": len(each), "rule": rule, **odd}, skips), each


def _report(total: Tally, classes: ClassList, facts: dict[str, Any], skips: Skips) -> Report:
    found, rows = scores(total, classes.isthing), table(total, classes)
    grid: dict[str, dict[str, float | None]] = {}
    for name, end, kinds in (
        ("all", "", ("thing", "stuff")),
        ("things", "/thing", ("thing",)),
        ("stuff", "/stuff", ("stuff",)),
    ):
        grid[name] = {metric.upper(): found.get(f"{metric}{end}") for metric in ("pq", "sq", "rq")}
        grid[name]["classes"] = sum(row.pq is not None and row.kind in kinds for row in rows)
    lines = [
        {
            "class": row.name,
            "id": classes.ids[k],
            "kind": row.kind,
            **{key.upper(): value for key, value in row._asdict().items() if key not in ("name", "kind")},
        }
        for k, row in enumerate(rows)
    ]
    return Report("panoptic", grid, lines, facts, skips.names)


class _Compared(NamedTuple):
    """The segments of an image, in the numbers of `_numbers`.

    Attributes:
      shared: their overlaps.
      ids: the ids of the predicted and of the true segments, in the order of their numbers.
      true_class: the class of each true segment; those that the JSON lacks have K, which no score counts.
      true_crowd: whether each is a crowd.
      stated: the area of each in the JSON, or -1.
      unlisted: the number of those that the JSON lacks.
    """

    shared: Overlaps
    ids: tuple[np.ndarray, np.ndarray]
    true_class: np.ndarray
    true_crowd: np.ndarray
    stated: np.ndarray
    unlisted: int


def _compared(pair: _Pair, files: tuple[str, str], classes: int) -> tuple[np.ndarray, np.ndarray, _Compared]:
    """Returns the colours of both PNGs of an image, and its segments.

    Raises:
      UserError: a PNG cannot be read, sizes differ, JSON and PNG of the prediction disagree, or it has an unknown
        category.
    """
    if pair.predicted.unknown is not None:
        raise Fault(
            "unknown category",
            f"a predicted segment of the image {pair.name} has the category_id {pair.predicted.unknown}, which is not "
            "among the categories of the truth",
        )
    predicted, true = (read_colours(file, "the PNG") for file in files)
    if predicted.shape != true.shape:
        sizes = [f"{height} x {width}" for height, width, _ in (predicted.shape, true.shape)]
        raise Fault(
            "another size",
            f"{files[0]} is {sizes[0]} (height x width), but the true {files[1]} is {sizes[1]}",
        )
    shared = overlaps(predicted, true)
    guess, unlisted = _numbers(shared.predicted, pair.predicted.ids)
    for name, wrong in (
        ("the PNG has the segment {} that the JSON lacks", unlisted),
        (
            "the JSON has the segment {} that the PNG lacks",
            np.array(sorted({*pair.predicted.ids.tolist()} - {*shared.predicted.tolist()})),
        ),
    ):
        if wrong.size:
            raise Fault(
                "JSON and PNG disagree", f"{files[0]}, image {pair.name}: {name.format(int(wrong[0]))}"
            )
    place, unlisted = _numbers(shared.true, pair.true.ids)
    compared = _Compared(
        Overlaps(guess, place, shared.pixels),
        (pair.predicted.ids, np.concatenate([pair.true.ids, unlisted])),
        np.concatenate([pair.true.category, np.full(len(unlisted), classes)]),
        np.concatenate([pair.true.crowd, np.zeros(len(unlisted), bool)]),
        np.concatenate([pair.true.area, np.full(len(unlisted), -1.0)]),
        len(unlisted),
    )
    return predicted, true, compared


def _sides(pair: _Pair, found: _Compared, classes: int, rule: Rule) -> tuple[Any, ...]:
    """Returns the arguments of `tally` and `matches`."""
    stated = found.stated if rule == "coco" else None
    category = pair.predicted.category
    return found.shared, category, found.true_class, found.true_crowd, classes, rule, stated


def _files(pair: _Pair, pred_masks: str, gt_masks: str) -> tuple[str, str]:
    return os.path.join(pred_masks, pair.predicted.file), os.path.join(gt_masks, pair.true.file)


def _image(pair: _Pair, *, pred_masks: str, gt_masks: str, classes: int, rule: Rule) -> _Found:
    """Scores one image.

    Raises:
      UserError: see `_compared`.
    """
    _, _, found = _compared(pair, _files(pair, pred_masks, gt_masks), classes)
    area = np.bincount(found.shared.true, found.shared.pixels, len(found.true_class) + 1)
    area = area[1 : len(pair.true.ids) + 1]
    stated = pair.true.area
    own = tally(*_sides(pair, found, classes, rule))
    each, occurs = by_class(own)
    return _Found(
        own,
        float(each[0, occurs].mean()) if occurs.any() else None,
        int((area == 0).sum()),
        found.unlisted,
        int(((stated >= 0) & (stated != area) & (area > 0)).sum()),
    )


def _row(
    pair: _Pair, value: float, photograph: str | None, files: tuple[str, str], classes: int, rule: Rule
) -> Any:
    """Returns the image's row on the sheet, on which a pixel is right if its segments match."""
    *colours, found = _compared(pair, files, classes)
    maps = []
    for side, ids in zip(colours, found.ids, strict=True):
        pixels = side.astype(np.int64) @ np.array([1, 256, 65536])
        order = np.argsort(ids)
        at = (
            order[np.minimum(np.searchsorted(ids, pixels, sorter=order), len(ids) - 1)]
            if len(ids)
            else 0 * pixels
        )
        maps.append(np.where(np.append(ids, 0)[at] == pixels, at + 1, 0) * (pixels > 0))
    true_class = np.append(-1, np.where(found.true_class < classes, found.true_class, -1))
    match = np.full(len(found.true_class) + 1, -1)
    hits = matches(*_sides(pair, found, classes, rule))
    match[hits[1]] = hits[0]
    guess = np.append(-1, pair.predicted.category)[maps[0]]
    truth = true_class[maps[1]]
    row = sheet_row(
        f"{pair.name}: PQ {value:.1f}", guess, truth, match[maps[1]] == maps[0], photograph, files[1]
    )
    return row._replace(prediction=parted(guess, maps[0]), truth=parted(truth, maps[1]))


def _numbers(ids: np.ndarray, listed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers ids from 1 in the order of the list, then those that it lacks; 0 stays 0.

    Returns:
      The numbers, and the ids that the list lacks.
    """
    number = {0: 0, **{key: k for k, key in enumerate(listed.tolist(), 1)}}
    unlisted = sorted({*ids.tolist()} - number.keys())
    number |= {key: len(listed) + 1 + k for k, key in enumerate(unlisted)}
    return np.array([number[key] for key in ids.tolist()], np.int64), np.array(unlisted, np.int64)


def read_panoptic(path: str, classes: ClassList | None = None) -> tuple[ClassList, dict[str, Annotation]]:
    """Reads a panoptic JSON.

    Args:
      path: the file.
      classes: the categories; those of the file itself if None.

    Returns:
      The categories, and the annotation of each image by its id, as text, since tools write both 285 and "285".

    Raises:
      UserError: it is not of COCO's form, an image or a segment's id occurs twice, or a category is not among those of
        the file itself.
    """
    content = read_json(path)
    with reading(path):
        if not isinstance(content, dict) or not content.get("annotations"):
            raise ValueError("it has no annotations, so it is not in COCO's panoptic format")
        if classes is None:
            classes = _categories(content.get("categories"))
            found = _annotations(objects(content["annotations"], "'annotations'"), classes)
            for name, own in found.items():
                if own.unknown is not None:
                    raise ValueError(
                        f"a segment of the image {name} has the category_id {own.unknown}, which 'categories' lacks"
                    )
            return classes, found
        return classes, _annotations(objects(content["annotations"], "'annotations'"), classes)


def _categories(rows: Any) -> ClassList:
    rows = objects(rows, "'categories'")
    ids = column(rows, "id", whole, of="category")
    if len(set(ids)) < len(ids):
        raise ValueError("two categories have the same id")
    names = column(rows, "name", text, default=None, of="category")
    things = column(rows, "isthing", flag, of="category")
    shown = tuple((name or str(k),) for name, k in zip(names, ids, strict=True))
    return ClassList(shown, tuple(ids), tuple(things))


def _annotations(rows: list[dict[str, Any]], classes: ClassList) -> dict[str, Annotation]:
    index = {category: k for k, category in enumerate(classes.ids)}
    found: dict[str, Annotation] = {}
    names = [str(x) for x in column(rows, "image_id", image_id, of="annotation")]
    files = column(rows, "file_name", text, of="annotation")
    infos = column(rows, "segments_info", objects, of="annotation")
    for name, file, segments in zip(names, files, infos, strict=True):
        where = f"image {name}, segment"
        ids = column(segments, "id", whole, 1, (1 << 24) - 1, of=where)
        kinds = column(segments, "category_id", whole_id, of=where)
        if name in found:
            raise ValueError(f"it has two annotations for the image {name}")
        if len(set(ids)) < len(ids):
            raise ValueError(
                f"two segments of the image {name} have the id {Counter(ids).most_common(1)[0][0]}"
            )
        found[name] = Annotation(
            file,
            np.array(ids, np.int64),
            np.array([index.get(k, -1) for k in kinds], np.int64),
            np.array(column(segments, "iscrowd", flag, default=False, of=where), bool),
            np.array(column(segments, "area", number, default=-1.0, of=where), np.float64),
            next((k for k in kinds if k not in index), None),
        )
    return found

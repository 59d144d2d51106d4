"""`score semantic`: label maps against label maps."""

import argparse
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ovseg_jax.errors import UserError
from ovseg_jax.evals import confusion
from ovseg_jax.scoring.files import (
    Pair,
    Skips,
    add_file_flags,
    list_files,
    pair_files,
    read_list,
    results,
    workers_of,
)
from ovseg_jax.scoring.label_maps import SUFFIXES, Counted, Rules, Values, count_pair, read_pair
from ovseg_jax.scoring.protocols import PROTOCOLS
from ovseg_jax.scoring.report import Report, add_report_flags, check_report_flags, publish
from ovseg_jax.scoring.sheet import add_sheet_flags, find_photographs, sheet_row, worst_of, write_sheet
from ovseg_jax.vocab.class_files import read_class_file
from ovseg_jax.vocab.classes import ClassList
from ovseg_jax.vocab.splits import UNSEEN, load_split

_DESCRIPTION = """\
Scores label maps: pictures whose pixel values are classes (PNG, TIFF, BMP or PGM; 8, 16 or 32 bits, or a palette).

  python -m ovseg_jax.score semantic --pred=DIR --gt=DIR --classes=FILE --json=scores.json --csv=classes.csv
  python -m ovseg_jax.score semantic --pred=DIR --gt=VOC2012/SegmentationClass --protocol=pas20 \\
      --list=VOC2012/ImageSets/Segmentation/val.txt
  python -m ovseg_jax.score semantic --pred=DIR --gt=ADEChallengeData2016/annotations/validation \\
      --num_classes=150 --reduce_zero_label
  python -m ovseg_jax.score semantic --pred=OUT --pred_suffix=.labels.png --pred_first=1 ...    (files of `predict`)

A prediction belongs to the truth with the same path in its folder, without suffix; where no path agrees, with the same
file name. All scores are in percent, from the pixels of all images together:
  mIoU      mean IoU over the classes that occur in truth or prediction (mmsegmentation, detectron2 until July 2022)
  mIoU_gt   mean IoU over the classes that occur in the truth (detectron2 since July 2022)
  mIoU_all  mean IoU over all classes; one that occurs in neither counts as 0
  fwIoU     IoU weighted by pixels of truth; mACC: mean over classes in the truth of the share of their pixels that are
            right; pACC: share of all labelled pixels that are right
  hIoU, hIoU_gt   with --split: harmonic mean of mIoU (mIoU_gt) of the seen and of the unseen classes
A labelled pixel whose predicted value is no class is wrong, and counted. A truth with a value that is neither a class
nor ignored is an error.

Protocols of Pascal VOC take VOC's own label maps as truth:
  pas20           20 classes, background ignored; predictions 0..19
  pas21-openseg   predictions 0..58 are PASCAL Context's classes (mmsegmentation's order); those that VOC lacks are
                  background
  pas21-catseg    predictions 0..19 are VOC's classes, all others are background; the truth is SegmentationClassAug
  pas21-groupvit  predictions 0 (background, by a threshold of the method) and 1..20
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the description and the flags."""
    parser.description = _DESCRIPTION
    add = parser.add_argument
    add(
        "--pred",
        required=True,
        metavar="DIR",
        help="the predictions: a folder, also with subfolders, or a file",
    )
    add("--gt", required=True, metavar="DIR", help="the truths: the same")
    add(
        "--pred_suffix",
        default="",
        metavar="TEXT",
        help="the end of the predictions' file names, to be left out",
    )
    add(
        "--gt_suffix",
        default="",
        metavar="TEXT",
        help="the end of the truths' file names, such as _gtFine_labelTrainIds.png",
    )
    add("--list", metavar="FILE", help="score only the images that this file names, one a line")
    add(
        "--classes",
        metavar="FILE",
        help="the classes: a label file (id:name,name), COCO's categories, or a name a line; without ids, they are "
        "numbered from 0",
    )
    add("--num_classes", type=int, metavar="K", help="in place of --classes: K classes, 0 to K-1")
    add("--protocol", choices=PROTOCOLS, help="in place of --classes: a protocol, see above")
    add(
        "--pred_classes",
        metavar="FILE",
        help="the classes of the predictions, where their ids or names differ; matched by name",
    )
    add(
        "--rest",
        metavar="NAME",
        help="the class of all other values of the predictions (default: they are wrong)",
    )
    add(
        "--pred_first",
        type=int,
        metavar="N",
        help="the value of the first class in the predictions, which then count on from it (default: the classes' ids)",
    )
    add(
        "--ignore",
        type=int,
        nargs="*",
        metavar="VALUE",
        help="values of the truth that are not scored, as stored (default: 255 in 8 bits, 65535 in 16, -1 in 32, "
        "unless it is a class)",
    )
    add(
        *("--reduce_zero_label", "--reduce-zero-label"),
        action="store_true",
        help="the truth stores 0 for ignored and id + 1 for a class, as ADE20K",
    )
    add(
        "--split",
        metavar="NAME|TEXT|FILE.json",
        help=f"the unseen classes: {' or '.join(UNSEEN)}, 'cow; giraffe; ...', or a file that lists them",
    )
    add_sheet_flags(parser, "mIoU")
    add_file_flags(parser)
    add_report_flags(parser)


class _Total(NamedTuple):
    """The sums over all images.

    Attributes:
      counts: pixels per class.
      void: ignored pixels.
      unlisted: labelled pixels whose prediction is no class.
      each: the image and its own mIoU, in the images' order; None if it has no labelled pixel.
    """

    counts: confusion.Counts
    void: int
    unlisted: int
    each: list[tuple[Pair, float | None]]


def run(arguments: argparse.Namespace) -> None:
    """Scores the label maps and prints the report.

    Raises:
      UserError: a flag or a file is invalid.
    """
    classes, rules = _rules(arguments)
    workers, worst = workers_of(arguments), worst_of(arguments)
    check_report_flags(arguments, {"--classes": arguments.classes, "--list": arguments.list})
    skips = Skips(arguments.missing)
    pairs = pair_files(
        list_files(arguments.pred, "--pred", SUFFIXES, arguments.pred_suffix),
        list_files(arguments.gt, "--gt", SUFFIXES, arguments.gt_suffix),
        skips,
        read_list(arguments.list, SUFFIXES) if arguments.list else None,
    )
    total = _count(pairs, rules, skips, workers)
    if not total.counts.truth.sum():
        raise UserError(f"--gt={arguments.gt}: no pixel of {len(total.each)} images is labelled with a class")
    lowest = sorted((value, pair.name, pair) for pair, value in total.each if value is not None)[:worst]
    if arguments.sheet:
        _draw(arguments, [(pair, value) for value, _, pair in lowest], rules, classes)
    worst_images = [f"{name} ({value:.1f})" for value, name, _ in lowest]
    publish(_report(arguments, classes, total, skips, worst_images), arguments)


def _rules(arguments: argparse.Namespace) -> tuple[ClassList, Rules]:
    """Returns the classes that are scored, and the meaning of the pixel values."""
    given = [flag for flag in ("classes", "num_classes", "protocol") if getattr(arguments, flag) is not None]
    if len(given) != 1:
        raise UserError(
            "give one of --classes=FILE, --num_classes=K and --protocol=NAME"
            + (f", not {' and '.join(f'--{flag}' for flag in given)}" if given else "")
        )
    if arguments.protocol:
        classes, truth, prediction = _of_protocol(arguments)
    else:
        classes, truth, prediction = _of_flags(arguments)
    if arguments.split:
        classes = load_split(classes, arguments.split)
    return classes, Rules(truth, prediction, len(classes))


def _of_protocol(arguments: argparse.Namespace) -> tuple[ClassList, Values, Values]:
    for flag in ("pred_classes", "rest", "pred_first", "ignore", "reduce_zero_label"):
        if getattr(arguments, flag) not in (None, False):
            raise UserError(f"--{flag} is part of --protocol={arguments.protocol}: give one of the two")
    found = PROTOCOLS[arguments.protocol]
    truth = {number: k for k, number in enumerate(found.classes.ids)}
    return found.classes, Values.of(truth, found.ignored), Values.of(found.predicted, rest=found.rest)


def _of_flags(arguments: argparse.Namespace) -> tuple[ClassList, Values, Values]:
    if arguments.classes:
        classes = read_class_file(arguments.classes, first=0)
    elif arguments.num_classes > 0:
        classes = ClassList.things(map(str, range(arguments.num_classes)))
    else:
        raise UserError(f"--num_classes={arguments.num_classes} is less than 1")
    shift = int(arguments.reduce_zero_label)
    truth = {number + shift: k for k, number in enumerate(classes.ids)}
    ignored = (*(arguments.ignore or ()), *((0,) if shift else ()))
    asked, meaning = classes, dict(enumerate(range(len(classes))))
    if arguments.pred_classes:
        asked = read_class_file(arguments.pred_classes, first=0)
        meaning = _by_name(asked, classes, arguments)
    ids: Sequence[int] = asked.ids
    if arguments.pred_first is not None:
        ids = range(arguments.pred_first, arguments.pred_first + len(asked))
    rest = None
    if arguments.rest is not None:
        if arguments.rest not in classes.index:
            raise UserError(f"--rest={arguments.rest} is not one of the {len(classes)} classes")
        rest = classes.index[arguments.rest]
    predicted = {ids[k]: own for k, own in meaning.items()}
    return (
        classes,
        Values.of(truth, ignored, ignore_default=arguments.ignore is None),
        Values.of(predicted, rest=rest),
    )


def _by_name(asked: ClassList, classes: ClassList, arguments: argparse.Namespace) -> dict[int, int]:
    """Returns the index of the scored class that each class of the predictions is, of those that are one."""
    index = classes.index
    found = {
        k: next((index[name] for name in names if name in index), None) for k, names in enumerate(asked.names)
    }
    known = {k: own for k, own in found.items() if own is not None}
    if not known:
        raise UserError(
            f"--pred_classes={arguments.pred_classes} has no name of the classes, such as {classes.display(0)!r}"
        )
    return known


def _count(pairs: Sequence[Pair], rules: Rules, skips: Skips, workers: int) -> _Total:
    sums, void, unlisted = np.zeros((3, rules.classes), np.int64), 0, 0
    each: list[tuple[Pair, float | None]] = []
    counted: Counted
    for pair, counted in results(functools.partial(count_pair, rules), pairs, skips, workers=workers):
        sums[:, counted.classes] += counted.pixels
        void, unlisted = void + counted.void, unlisted + counted.unlisted
        each.append((pair, counted.miou))
    return _Total(confusion.Counts(*sums), void, unlisted, each)


def _draw(
    arguments: argparse.Namespace, worst: Sequence[tuple[Pair, float]], rules: Rules, classes: ClassList
) -> None:
    """Draws the sheet.

    Raises:
      UserError: a photograph is missing or has another size, or the file cannot be written.
    """
    photographs = find_photographs(arguments.images, [pair.name for pair, _ in worst])
    rows = []
    for pair, value in worst:
        prediction, truth = read_pair(rules, pair)
        caption, photograph = f"{pair.name}: mIoU {value:.1f}", photographs.get(pair.name)
        rows.append(sheet_row(caption, prediction, truth, prediction == truth, photograph, pair.truth))
    write_sheet(arguments.sheet, rows, classes, photographs)


def _report(
    arguments: argparse.Namespace, classes: ClassList, total: _Total, skips: Skips, worst: Sequence[str]
) -> Report:
    counts = total.counts
    found = confusion.scores(counts, classes.groups)
    each, either = confusion.iou(counts)
    in_truth = counts.truth > 0
    columns = {"mIoU": "miou", "mIoU_gt": "miou_gt"}
    rest = {"fwIoU": "fwiou", "mACC": "macc", "pACC": "pacc"}
    if arguments.split:
        rest |= {"hIoU": "hiou", "hIoU_gt": "hiou_gt"}
    groups: Mapping[str, Any] = {"all": range(len(classes))} | dict(classes.groups)
    scores: dict[str, dict[str, float | None]] = {}
    for name, members in groups.items():
        suffix = "" if name == "all" else f"/{name}"
        scores[name] = {column: found.get(f"{key}{suffix}") for column, key in columns.items()}
        scores[name]["mIoU_all"] = float(each[list(members)].mean()) if len(members) else None
    scores["all"] |= {column: found.get(key) for column, key in rest.items()}
    rows = [
        {
            "class": classes.display(k),
            "IoU": float(each[k]) if either[k] else None,
            "ACC": 100.0 * int(counts.intersection[k]) / int(counts.truth[k]) if in_truth[k] else None,
            "pixels": int(counts.truth[k]),
            "predicted": int(counts.prediction[k]),
        }
        for k in range(len(classes))
    ]
    facts = {
        **({"protocol": arguments.protocol} if arguments.protocol else {}),
        "images": len(total.each),
        "classes": len(classes),
        "classes in the truth": int(in_truth.sum()),
        "classes in truth or prediction": int(either.sum()),
        "labelled pixels": int(counts.truth.sum()),
        "ignored pixels": total.void,
        "pixels predicted as no class": total.unlisted,
        **({"worst images": list(worst)} if worst else {}),
    }
    return Report("semantic", scores, rows, facts, skips.names)

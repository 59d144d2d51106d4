"""`score classification`: classes of images."""

import argparse
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from ovseg_jax.errors import UserError
from ovseg_jax.scoring.answers import SUFFIXES, Answers, Class, read_answers
from ovseg_jax.scoring.files import Fault, Pair, Skips, add_file_flags, list_files, pair_files
from ovseg_jax.scoring.report import Report, add_report_flags, check_report_flags, publish
from ovseg_jax.vocab.class_files import read_class_file
from ovseg_jax.vocab.classes import ClassList
from ovseg_jax.vocab.splits import PER_CLASS

_DESCRIPTION = """\
Scores classifications of images, of one data set or of several.

  python -m ovseg_jax.score classification --pred=FILE --gt=FILE2 --csv=classes.csv
  python -m ovseg_jax.score classification --pred=DIR --gt=DIR2 --json=scores.json    (a file for each data set)

A file is one of these; a class is a name or a whole number, and NAME an image:
  .json   {"NAME": class, ...} or, in --pred, {"NAME": [score, ...], ...}; or a list, in the order of the other file
  .csv    titles, then lines `NAME,class`; or, in --pred, titles `image,CLASS,CLASS,...` and lines `NAME,score,...`
  .npz    `classes` [N] or, in --pred, `scores` [N K]; optionally `names` [N], and `columns` [K]: their classes
Without titles or `columns`, scores are those of the classes of --classes in its order, or without it of 0 to K-1.

Scores, in percent:
  accuracy     share of images whose class is right; of equal scores the first one counts
  accuracy@5   share of images whose class has one of the five highest scores; needs scores of more than five classes
  per_class    mean over the classes that occur in --gt of the accuracy on their images
Several data sets are averaged, each with the same weight. If one of caltech101, oxford_pets, flowers102 and
fgvc_aircraft is among them, by the name of its file, `main` is averaged too: per_class for these four and accuracy for
others, as papers/000, table 11, names them. The authors' evaluation prints the accuracy of all, as in their table 2.
A predicted class that is unknown is wrong, and counted.
"""

_TOP = 5


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the description and the flags."""
    parser.description = _DESCRIPTION
    add = parser.add_argument
    add("--pred", required=True, metavar="FILE|DIR", help="the predictions")
    add("--gt", required=True, metavar="FILE|DIR", help="the truths")
    add(
        "--classes",
        metavar="FILE",
        help="the classes, by all their names and ids: a label file (id:name,name), COCO's categories, or a name a "
        "line, numbered from 0 (default: those in --gt)",
    )
    add_file_flags(parser, parallel=False)
    add_report_flags(parser)


class Outcomes(NamedTuple):
    """The results of the images of a data set.

    Attributes:
      names: the classes.
      label: the index of the true class.
      right: whether the predicted class is the true one.
      top: whether the true class is among the five of the highest scores; None without scores of more classes.
      unknown: the number of images whose predicted class is unknown.
    """

    names: Sequence[str]
    label: Int[np.ndarray, "n"]
    right: Bool[np.ndarray, "n"]
    top: Bool[np.ndarray, "n"] | None
    unknown: int


def run(arguments: argparse.Namespace) -> None:
    """Scores the files and prints the report.

    Raises:
      UserError: a flag or a file is invalid.
    """
    inputs = {f"--{flag}": getattr(arguments, flag) for flag in ("pred", "gt", "classes")}
    check_report_flags(arguments, inputs)
    skips = Skips(arguments.missing)
    classes = read_class_file(arguments.classes, first=0) if arguments.classes else None
    pairs = pair_files(
        list_files(arguments.pred, "--pred", SUFFIXES), list_files(arguments.gt, "--gt", SUFFIXES), skips
    )
    sets = {}
    for pair in pairs:
        prediction, truth = read_answers(pair.prediction, "--pred:"), read_answers(pair.truth, "--gt:")
        where = f"{pair.name}/" if len(pairs) > 1 else ""
        sets[pair.name] = _outcomes(prediction, truth, pair, where, skips, classes)
    publish(_report(sets, skips, several=len(pairs) > 1), arguments)


def _matched(
    prediction: Answers, truth: Answers, pair: Pair, where: str, skips: Skips
) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"], list[str]]:
    """Returns the positions of the same images in both files, and their names."""
    if prediction.names is None or truth.names is None:
        if len(prediction) != len(truth):
            raise UserError(
                f"{pair.prediction} has {len(prediction)} images and {pair.truth} {len(truth)}: they match by their "
                "order, since not both files name them"
            )
        names = prediction.names or truth.names or [str(k) for k in range(len(truth))]
        return np.arange(len(truth)), np.arange(len(truth)), [where + name for name in names]
    place = {name: k for k, name in enumerate(prediction.names)}
    known = set(truth.names)
    for lone, reason, text in (
        (
            [n for n in truth.names if n not in place],
            "no prediction",
            f"images of {pair.truth} have no prediction",
        ),
        ([n for n in place if n not in known], "no truth", f"images of {pair.prediction} have no truth"),
    ):
        if lone:
            skips.add(
                [where + name for name in lone], Fault(reason, f"{len(lone)} {text}, such as {lone[0]!r}")
            )
    both = [(place[name], k) for k, name in enumerate(truth.names) if name in place]
    if not both:
        raise UserError(f"{pair.prediction} and {pair.truth} have no image in common")
    first, second = np.array(both, np.int64).T
    return first, second, [where + truth.names[k] for k in second]


def _outcomes(
    prediction: Answers, truth: Answers, pair: Pair, where: str, skips: Skips, classes: ClassList | None
) -> Outcomes:
    if truth.scores is not None:
        raise UserError(f"--gt: {pair.truth} holds scores, not classes")
    at, of, images = _matched(prediction, truth, pair, where, skips)
    names, index = _index(prediction, truth, pair, classes)
    label = np.array([index.get(truth.classes[k], -1) for k in of], np.int64)
    if len(lost := np.flatnonzero(label < 0)):
        sentence = f"{pair.truth}: {truth.classes[of[lost[0]]]!r} is not one of the {len(names)} classes"
        skips.add([images[k] for k in lost], Fault("unknown class", sentence))
        at, label = at[label >= 0], label[label >= 0]
    if not len(label):
        raise UserError(f"{pair.truth} has no image of a known class")
    if prediction.scores is None:
        given = [prediction.classes[k] for k in at]
        # A CSV file does not tell the name "1" from the number.
        guess = np.array([index.get(value, index.get(str(value), -1)) for value in given], np.int64)
        if (guess < 0).all():
            raise UserError(
                f"{pair.prediction}: no predicted class is one of the {len(names)} classes, such as {names[0]!r}: the "
                f"first is {prediction.classes[at[0]]!r}"
            )
        return Outcomes(names, label, guess == label, None, int((guess < 0).sum()))
    scores, column = prediction.scores[at], _columns(prediction, pair, names, index)
    right = column[scores.argmax(1)] == label
    if len(column) <= _TOP:
        return Outcomes(names, label, right, None, 0)
    best = np.argsort(-scores, axis=1, kind="stable")[:, :_TOP]
    return Outcomes(names, label, right, (column[best] == label[:, None]).any(1), 0)


def _index(
    prediction: Answers, truth: Answers, pair: Pair, classes: ClassList | None
) -> tuple[list[str], dict[Class, int]]:
    """Returns the names of the classes, and the index of each by all its names and numbers."""
    if classes is not None:
        by_id: dict[Class, int] = {number: k for k, number in enumerate(classes.ids)}
        return [classes.display(k) for k in range(len(classes))], by_id | classes.index
    if prediction.scores is None:
        found: list[Class] = sorted(set(truth.classes), key=lambda value: (str(type(value)), value))
    else:
        found = prediction.columns or list(range(prediction.scores.shape[1]))
    if len({type(value) for value in [*found, *truth.classes]}) > 1:
        raise UserError(
            f"{pair.truth} and {pair.prediction} mix names and numbers of classes: give --classes=FILE, which has both"
        )
    index: dict[Class, int] = {str(value): k for k, value in enumerate(found)}
    return [str(value) for value in found], index | {value: k for k, value in enumerate(found)}


def _columns(
    prediction: Answers, pair: Pair, names: Sequence[str], index: Mapping[Class, int]
) -> Int[np.ndarray, "k"]:
    """Returns the index of the class of each column of the scores."""
    count = prediction.scores.shape[1]  # type: ignore[union-attr]
    if prediction.columns is None:
        if count != len(names):
            raise UserError(f"{pair.prediction} has scores of {count} classes, but there are {len(names)}")
        return np.arange(count)
    if unknown := [value for value in prediction.columns if value not in index]:
        raise UserError(
            f"{pair.prediction}: its column {unknown[0]!r} is not one of the {len(names)} classes"
        )
    found = np.array([index[value] for value in prediction.columns], np.int64)
    if len(set(found.tolist())) < count:
        raise UserError(f"{pair.prediction}: two of its columns are the same class")
    return found


def _report(sets: Mapping[str, Outcomes], skips: Skips, several: bool) -> Report:
    scores: dict[str, dict[str, float | None]] = {}
    rows = []
    main = several and any(name in PER_CLASS for name in sets)
    for name, (names, label, right, top, _) in sets.items():
        images, correct = (np.bincount(part, minlength=len(names)) for part in (label, label[right]))
        there = images > 0
        row = {
            "accuracy": 100.0 * float(right.mean()),
            "accuracy@5": None if top is None else 100.0 * float(top.mean()),
            "per_class": 100.0 * float((correct[there] / images[there]).mean()),
        }
        if main:
            row["main"] = row["per_class" if name in PER_CLASS else "accuracy"]
        scores[name if several else "all"] = row
        rows += [
            {
                "class": f"{name}/{own}" if several else own,
                "images": int(n),
                "correct": int(c),
                "accuracy": 100.0 * int(c) / int(n) if n else None,
            }
            for own, n, c in zip(names, images, correct, strict=True)
        ]
    facts = {
        **({"data sets": len(sets)} if several else {}),
        "images": sum(len(found.label) for found in sets.values()),
        "classes": sum(len(found.names) for found in sets.values()),
        "predictions of an unknown class": sum(found.unknown for found in sets.values()),
    }
    if several:
        columns = {key: [row[key] for row in scores.values()] for key in next(iter(scores.values()))}
        scores[f"average of {len(sets)}"] = {
            key: None if None in values else float(np.mean([v for v in values if v is not None]))
            for key, values in columns.items()
        }
    return Report("classification", scores, rows, facts, skips.names)

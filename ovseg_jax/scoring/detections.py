"""Reading and scoring of results in COCO's format, for `score instances`, `boxes` and `proposals`."""

import argparse
import dataclasses
import functools
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ovseg_jax.errors import UserError
from ovseg_jax.evals import average_precision as ap
from ovseg_jax.evals.average_precision import Kind, Rule
from ovseg_jax.evals.box_files import Annotations, image_id, read_annotations, whole_id
from ovseg_jax.evals.masks import OtherSize, mask_rle
from ovseg_jax.experiment.tables import Cell
from ovseg_jax.reading import column, number, numbers, objects, read_json, reading
from ovseg_jax.scoring.detection_sheet import draw_sheet, worst_images
from ovseg_jax.scoring.files import Fault, Skips, add_file_flags, results, workers_of
from ovseg_jax.scoring.report import Report, add_report_flags, check_report_flags, publish
from ovseg_jax.scoring.sheet import add_sheet_flags, worst_of

NOTE = """\
--gt is an annotation file of COCO or LVIS, --pred a JSON list of results, as both servers take them. A result of an
unknown image or category is an error; --missing=skip leaves it out and counts it. An image without results counts as
missed.
"""


def add_detection_flags(parser: argparse.ArgumentParser, per_class: bool = True) -> None:
    """Adds the flags of files and reports.

    Args:
      parser: the parser of a kind.
      per_class: whether classes (in parallel) and single images are scored.
    """
    parser.add_argument("--pred", required=True, metavar="FILE", help="the results")
    parser.add_argument("--gt", required=True, metavar="FILE", help="the annotations")
    if per_class:
        add_sheet_flags(parser, "AP50")
    add_file_flags(parser, per_class)
    add_report_flags(parser, per_class)


def run_precision(arguments: argparse.Namespace, kind: Kind) -> None:
    """Scores boxes or masks by their average precision and prints the report."""
    check_report_flags(arguments, {"--pred": arguments.pred, "--gt": arguments.gt})
    skips, workers, count = Skips(arguments.missing), workers_of(arguments), worst_of(arguments)
    if kind == "bbox" and arguments.sheet and not arguments.images:
        raise UserError("--sheet of boxes needs the photographs: name their folder by --images")
    truth = read_annotations(arguments.gt, kind=kind)
    rule = arguments.rule or truth.rule
    found = read_results(arguments.pred, arguments.gt, truth, kind, skips)
    report = score_precision(truth, found, kind, rule, skips, workers)
    if count:
        worst = worst_images(truth, found, kind, rule, workers, count)
        if arguments.sheet:
            draw_sheet(arguments.sheet, arguments.images, worst, truth, kind)
        shown = [f"{judged.name} ({value:.1f})" for judged, value in worst]
        report = dataclasses.replace(report, facts={**report.facts, "worst images": shown})
    publish(report, arguments)


def score_precision(
    truth: Annotations, found: list[dict[str, Any]], kind: Kind, rule: Rule, skips: Skips, workers: int
) -> Report:
    """Scores results by average precision.

    Args:
      truth: the annotations.
      found: the results, see `read_results`.
      kind: boxes or masks.
      rule: COCO's or LVIS's.
      skips: what was left out, for the report.
      workers: the number of processes.
    """
    frequencies = truth.frequencies
    limits = ap.LIMITS[rule]
    one = functools.partial(ap.curve, kind=kind, limits=limits, federated=rule == "lvis")
    parts = ap.split(truth.data, found, rule)
    curves = ap.joined(own for _, own in results(one, parts, skips, workers=workers, unit="class"))
    scores = {name: defined(x) for name, x in ap.metrics(curves, rule, frequencies).items()}
    counts = Counter(row["category_id"] for row in truth.data["annotations"] if not row["iscrowd"])
    shown, rows = dict(zip(truth.classes.ids, truth.classes.names, strict=True)), list[Mapping[str, Cell]]()
    for k, (own, own50) in ap.class_precision(curves).items():
        row: dict[str, Cell] = {"class": shown[k][0], "id": k}
        row |= {"frequency": frequencies.get(k)} if frequencies else {}
        rows.append(row | {"instances": counts[k], "AP": defined(own), "AP50": defined(own50)})
    facts = {**counted(truth, found), **_beyond(truth, found, rule), "rule": rule}
    return Report("boxes" if kind == "bbox" else "instances", {"all": scores}, rows, facts, skips.names)


def counted(truth: Annotations, found: list[dict[str, Any]]) -> dict[str, int]:
    """Returns the numbers of images, of true instances that are no crowds, and of results."""
    without = len(truth.ids) - len({row["image_id"] for row in found})
    return {
        "images": len(truth.ids),
        "true instances": sum(not row["iscrowd"] for row in truth.data["annotations"]),
        "results": len(found),
        **({"images without a result": without} if without else {}),
    }


def _beyond(truth: Annotations, found: list[dict[str, Any]], rule: Rule) -> dict[str, int]:
    """Returns the numbers of results that the rule leaves out, if any."""
    limit, facts = ap.LIMITS[rule][-1], {}
    of = "image and class" if rule == "coco" else "image"
    groups = Counter((row["image_id"], row["category_id"] if rule == "coco" else 0) for row in found)
    facts[f"results beyond the best {limit} of an {of}"] = sum(max(0, n - limit) for n in groups.values())
    if rule == "lvis":
        known = ap.labelled(truth.data)
        facts["results of classes that their image is not labelled for"] = sum(
            (row["image_id"], row["category_id"]) not in known for row in found
        )
    return {name: count for name, count in facts.items() if count}


def defined(value: float) -> float | None:
    """Returns a score, or None for NaN, which means that there was nothing to score."""
    return None if value != value else value


def read_results(
    path: str, gt: str, truth: Annotations, kind: Kind, skips: Skips, classes: bool = True
) -> list[dict[str, Any]]:
    """Reads results, a JSON list of {"image_id", "category_id", "score"} with "bbox" or "segmentation".

    Args:
      path: the file.
      gt: the annotation file, for errors.
      truth: its content.
      kind: "bbox" reads boxes, "segm" masks in RLE.
      skips: takes results of unknown images and categories, and masks of another size.
      classes: whether to read the categories of results.

    Returns:
      The results, with the new ids of images.

    Raises:
      UserError: the file is not of this form, or a result cannot be scored and `skips` does not allow it.
    """
    content = read_json(path)
    with reading(path):
        if not isinstance(content, list):
            raise ValueError("it is not a list of results, as COCO's server takes them")
        rows, of = objects(content, "the list of results"), "result"
        images = column(rows, "image_id", image_id, of=of)
        categories = column(rows, "category_id", whole_id, of=of) if classes else [0] * len(rows)
        scores = column(rows, "score", number, of=of)
        shapes = (
            column(rows, "bbox", _box, of=of)
            if kind == "bbox"
            else column(rows, "segmentation", _mask, of=of)
        )
    new, known, found = truth.numbers, set(truth.classes.ids), list[dict[str, Any]]()
    sizes = [(row.get("height", 0), row.get("width", 0)) for row in truth.data["images"]]
    for i, (image, category, score, shape) in enumerate(zip(images, categories, scores, shapes, strict=True)):
        where = new.get(str(image))
        if where is None:
            fault = Fault(
                "unknown image", f"result {i} of {path} is of the image {image!r}, which {gt} does not list"
            )
        elif classes and category not in known:
            fault = Fault(
                "unknown category", f"result {i} of {path} is of the category {category}, which {gt} lacks"
            )
        else:
            own = {"image_id": where, "score": score} | ({"category_id": category} if classes else {})
            if kind == "bbox":
                found.append(own | {"bbox": shape})
                continue
            with reading(path):
                try:
                    rle = mask_rle(shape, f"result {i}: 'segmentation'", sizes[where - 1])
                    found.append(own | {"segmentation": rle})
                    continue
                except OtherSize as error:
                    fault = Fault("another size", f"{path}: {error}")
        skips.add([f"result {i}"], fault)
    return found


def _box(value: Any, name: str) -> list[float]:
    found = numbers(value, name, 4)
    if min(found[2:]) < 0:
        raise ValueError(f"{name}: expected [x, y, width, height], got {found}")
    return found


def _mask(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name}: expected a mask in RLE, got {str(value)[:40]}")
    return value

"""`score proposals`: recall of boxes or masks whatever their class."""

import argparse

from ovseg_jax.evals import average_precision as ap
from ovseg_jax.evals.average_precision import Kind
from ovseg_jax.evals.box_files import read_annotations
from ovseg_jax.scoring.detections import NOTE, add_detection_flags, counted, defined, read_results
from ovseg_jax.scoring.files import Skips
from ovseg_jax.scoring.report import Report, check_report_flags, publish

_KINDS: dict[str, Kind] = {"boxes": "bbox", "masks": "segm"}
_THRESHOLDS = {0.5: 0, 0.7: 4, 0.9: 8}  # and their place among 0.5, 0.55, ..., 0.95

_DESCRIPTION = (
    """\
Scores proposals whatever their class: for the best 100, 300 and 1000 of an image the average recall over IoU 0.5 to
0.95 (AR), that of small, medium and large instances, and the recall at IoU 0.5, 0.7 and 0.9.

  python -m ovseg_jax.score proposals --pred=proposals.json --gt=instances_val2017.json

"""
    + NOTE
    + """\
A result is {"image_id": 285, "bbox": [x, y, width, height], "score": 0.9}; with --shape=masks it has "segmentation" in
RLE in place of "bbox". A category_id is ignored. The rule is COCO's without categories (useCats = 0), also for LVIS's
files: from the best score on, each proposal is matched to the free true instance with the highest IoU.
"""
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the description and the flags."""
    parser.description = _DESCRIPTION
    parser.add_argument(
        "--shape", choices=_KINDS, default="boxes", help="what is compared (default %(default)s)"
    )
    add_detection_flags(parser, per_class=False)


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    check_report_flags(arguments, {"--pred": arguments.pred, "--gt": arguments.gt})
    kind = _KINDS[arguments.shape]
    publish(score_proposals(arguments.pred, arguments.gt, kind, Skips(arguments.missing)), arguments)


def score_proposals(pred: str, gt: str, kind: Kind, skips: Skips) -> Report:
    """Scores proposals.

    Args:
      pred: the file of proposals.
      gt: the annotation file.
      kind: boxes or masks.
      skips: takes proposals that cannot be scored.

    Raises:
      UserError: a file is not of its form, or a proposal cannot be scored and `skips` does not allow it.
    """
    truth = read_annotations(gt, kind=kind)
    found = read_results(pred, gt, truth, kind, skips, classes=False)
    limits = ap.LIMITS["proposals"]
    recall = ap.curve(ap.pool(truth.data, found), kind, limits).recall[:, 0]
    rows = {}
    for m, limit in enumerate(limits):
        row = {name: ap.mean(recall[:, area, m]) for area, name in enumerate(("AR", "ARs", "ARm", "ARl"))}
        row |= {f"recall@{t}": ap.mean(recall[place : place + 1, 0, m]) for t, place in _THRESHOLDS.items()}
        rows[f"best {limit}"] = {name: defined(value) for name, value in row.items()}
    return Report("proposals", rows, (), counted(truth, found), skips.names)

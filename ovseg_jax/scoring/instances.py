"""`score instances`: average precision of masks, by COCO's or LVIS's rules."""

import argparse

from ovseg_jax.evals.average_precision import RULES
from ovseg_jax.scoring.detections import NOTE, add_detection_flags, run_precision

_DESCRIPTION = (
    """\
Scores the masks of instances: AP over IoU 0.5 to 0.95, AP50, AP75, AP of small, medium and large ones and, for LVIS, of
rare, common and frequent classes; average recall; AP of each class.

  python -m ovseg_jax.score instances --pred=results.json --gt=instances_val2017.json --csv=classes.csv

"""
    + NOTE
    + """\
A result is {"image_id": 285, "category_id": 1, "segmentation": RLE, "score": 0.9}.

--rule=lvis is the federated rule: an image counts for a class only if it holds it or names it in neg_category_ids,
false results of a class in not_exhaustive_category_ids do not count, the best 300 results of an image count, and there
are no crowds. --rule=coco: the best 100 of an image and class count. Without it, LVIS's holds where the categories of
--gt have frequencies. The area of a mask is its pixels, also where a result has a box.
--sheet draws the images with the lowest AP50 of their own: the true instances, and as many of the best results.
"""
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the description and the flags."""
    parser.description = _DESCRIPTION
    parser.add_argument("--rule", choices=RULES, help="see above")
    add_detection_flags(parser)


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    run_precision(arguments, "segm")

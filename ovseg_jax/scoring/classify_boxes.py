"""`score classify_boxes`: names for a detector's boxes."""

import argparse

from ovseg_jax.cli.prompt_flags import add_prompt_flags, chosen_prompt
from ovseg_jax.experiment.box_classes import classify_boxes

_DESCRIPTION = """\
Names the boxes that a detector proposes, and scores them where there are annotations.

  python -m ovseg_jax.score classify_boxes --checkpoint=runs/pomp --images=val2017 --boxes=proposals.json \\
      --classes=instances_val2017.json --annotations=instances_val2017.json --out=results.json

--boxes is a JSON list of {"image_id", "bbox": [x, y, width, height], "score"}, in COCO's results format; category_id is
ignored. Images are found by the file names in --annotations, or by their ids. --out has the same format, with the ids
of --classes as category_id, and can be sent to the COCO and LVIS servers. If the command was stopped, run it again to
continue.
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the description and the flags."""
    parser.description = _DESCRIPTION
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="WORKDIR", help="a training run that classifies images")
    add("--images", required=True, metavar="DIR", help="the images")
    add("--boxes", required=True, metavar="FILE", help="the detector's boxes, see above")
    add(
        "--classes",
        required=True,
        metavar="FILE",
        help="a label file, a list, or an annotation file of COCO or LVIS",
    )
    add("--out", required=True, metavar="FILE", help="the results, see above")
    add(
        "--annotations",
        metavar="FILE",
        help="score the results: COCO's AP, or LVIS's where categories have frequencies",
    )
    add("--batch", type=int, default=64, metavar="N", help="crops at once (default %(default)s)")
    add(
        "--max_boxes",
        type=int,
        metavar="N",
        help="results per image (default 100; 300 with LVIS annotations)",
    )
    add_prompt_flags(parser)


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    prompt = chosen_prompt(arguments)
    flags = {key: value for key, value in vars(arguments).items() if key not in ("template", "ensemble")}
    classify_boxes(**{**flags, "prompt": prompt})

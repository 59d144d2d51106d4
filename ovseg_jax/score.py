"""The command that scores predictions: `python -m ovseg_jax.score KIND ...`, of files of any framework or of runs."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from ovseg_jax.cli.console import LazyParser, Parser, run_command, start

_DESCRIPTION = """\
Scores predictions against annotations, both as files of any framework, or scores trained runs.

  python -m ovseg_jax.score KIND --help
"""

_KINDS = {
    "semantic": "label maps: mIoU, IoU of each class, seen and unseen classes",
    "panoptic": "panoptic segmentation, files of COCO's form: PQ, SQ, RQ",
    "instances": "masks of instances, files of COCO's and LVIS's form: AP",
    "boxes": "boxes, files of COCO's and LVIS's form: AP",
    "proposals": "boxes or masks whatever their class, files of the same form: recall",
    "retrieval": "images and texts by vectors or scores: R@1, R@5, R@10 both ways",
    "classification": "classes of images: accuracy, over all and per class, of one or several data sets",
    "suite": "a trained classifier, zero-shot on the data sets of a suite",
    "transfer": "segmentation with the masks of one run and the classifier of another",
    "classify_boxes": "names for the boxes of a detector, by a trained classifier",
}
"""The modules of `scoring`, each with `add_flags` and `run`."""

_RUNS = ("suite", "transfer", "classify_boxes")
"""The kinds that run a model: the others import no JAX, and so start at once."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    return run_command(parser, _run, argv)


def parser() -> Parser:
    """Returns the command's parser; only the module of the chosen kind is imported."""
    parser = Parser("score", _DESCRIPTION)
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True, parser_class=LazyParser)
    for kind, text in _KINDS.items():
        module = f"ovseg_jax.scoring.{kind}"
        kinds.add_parser(
            kind, help=text, fill=lambda own, m=module: importlib.import_module(m).add_flags(own)
        )
    return parser


def _run(arguments: argparse.Namespace) -> None:
    module = importlib.import_module(f"ovseg_jax.scoring.{arguments.kind}")
    del arguments.kind
    module.run(arguments)


if __name__ == "__main__":
    start(main, compiles=any(kind in sys.argv[1:2] for kind in _RUNS))

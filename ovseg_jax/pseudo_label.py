"""The command that writes pseudo-masks: `python -m ovseg_jax.pseudo_label --checkpoint=TEACHER --data_dir=DIR`."""

import argparse
from collections.abc import Sequence

from ovseg_jax.cli.console import FAILED, Parser, run_command, start
from ovseg_jax.data.sources.pseudo_masks import Rules
from ovseg_jax.errors import UserError

_DESCRIPTION = """\
Writes masks for the images of a folder, from the proposals of a teacher.

  python -m ovseg_jax.pseudo_label --checkpoint=TEACHER --data_dir=DIR

OpenSeg's recipe for caption-only data (papers/004, 3.3, after MuST): a teacher trained with the mask loss alone
(`--config.loss.grounding_weight=0`) labels the images, and the student trains on human and pseudo-masks together.
DIR is a folder in the layout of `data.sources.folder`. Each image without a mask gets DIR/masks/NAME.png; existing
files are not changed. If the command was stopped, run it again to continue. DIR/pseudo_masks.png shows some of them.
To label other data sets, or with several hosts, use a stage of kind "pseudo_label" in a config.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; the exit status is 1 also if some images could not be read."""
    return run_command(parser, _run, argv)


def parser() -> Parser:
    """Returns the command's parser."""
    parser = Parser("pseudo_label", _DESCRIPTION)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="WORKDIR", help="the folder of the teacher's run")
    add("--data_dir", required=True, metavar="DIR", help="a folder with images/")
    for name, text in (
        ("threshold", "lowest probability of a pixel inside a mask"),
        ("min_area", "smallest mask, as a share of the image"),
        ("min_confidence", "lowest confidence of a mask, the mean probability of its pixels"),
        ("max_overlap", "IoU above which the less confident mask is dropped"),
        ("min_visible", "smallest share of a mask that smaller ones may leave uncovered"),
    ):
        default = getattr(Rules(), name)
        add(f"--{name}", type=float, default=default, metavar="X", help=f"{text} (default %(default)s)")
    add("--batch", type=int, default=8, metavar="N", help="images at once (default %(default)s)")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    import jax

    from ovseg_jax.inference.pseudo_masks import label_folder
    from ovseg_jax.inference.segmenter import Segmenter

    if arguments.batch < 1:
        raise UserError(f"--batch={arguments.batch} is less than 1")
    load = lambda: Segmenter.from_checkpoint(
        arguments.checkpoint, batch_size=arguments.batch, devices=jax.local_devices()
    )
    done = label_folder(
        load, arguments.data_dir, Rules(*(getattr(arguments, name) for name in Rules._fields))
    )
    print(
        f"{done.written} masks written to {arguments.data_dir}/masks, {done.there} existed, "
        f"{done.skipped} images skipped"
    )
    if done.written:
        print(f"{done.statistics}. Some are drawn in {arguments.data_dir}/pseudo_masks.png")
    return FAILED if done.skipped else 0


if __name__ == "__main__":
    start(main)

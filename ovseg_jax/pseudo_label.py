"""The command that writes pseudo-masks: `python -m ovseg_jax.pseudo_label --checkpoint=TEACHER --data_dir=DIR`."""

import argparse
from collections.abc import Sequence

from ovseg_jax.cli.console import FAILED, Parser, run_command, start
from ovseg_jax.errors import UserError

_DESCRIPTION = """\
Writes masks for the images of a folder, from the proposals of a teacher.

  python -m ovseg_jax.pseudo_label --checkpoint=TEACHER --data_dir=DIR

OpenSeg's recipe for caption-only data (papers/004, 3.3, after MuST): a teacher trained with the mask loss alone
(`--config.loss.grounding_weight=0`) labels the images, and the student trains on human and pseudo-masks together.
DIR is a folder in the layout of `data.sources.folder`. Each image without a mask gets DIR/masks/NAME.png; existing
files are not changed. If the command was stopped, run it again to continue.
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
    for name, default, text in (
        ("threshold", 0.5, "lowest probability of a pixel inside a mask"),
        ("max_overlap", 0.7, "IoU above which the less confident mask is dropped"),
        ("min_area", 0.001, "smallest mask, as a share of the image"),
    ):
        add(f"--{name}", type=float, default=default, metavar="X", help=f"{text} (default %(default)s)")
    add("--batch", type=int, default=8, metavar="N", help="images at once (default %(default)s)")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    from ovseg_jax.inference.pseudo_masks import label_folder
    from ovseg_jax.inference.segmenter import Segmenter

    rules = {name: getattr(arguments, name) for name in ("threshold", "max_overlap", "min_area")}
    if arguments.batch < 1:
        raise UserError(f"--batch={arguments.batch} is less than 1")
    load = lambda: Segmenter.from_checkpoint(arguments.checkpoint, batch_size=arguments.batch)
    done = label_folder(load, arguments.data_dir, **rules)
    print(
        f"{done.written} masks written to {arguments.data_dir}/masks, {done.there} existed, "
        f"{done.skipped} images skipped"
    )
    return FAILED if done.skipped else 0


if __name__ == "__main__":
    start(main)

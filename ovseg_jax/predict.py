"""The command that segments images by words: `python -m ovseg_jax.predict --checkpoint=DIR --images=PATH --out=DIR`."""

import argparse
from collections.abc import Sequence

from ovseg_jax.cli.console import Parser, run_command, start
from ovseg_jax.inference.model_flags import add_model_flags

_DESCRIPTION = """\
Segments an image, every image of a folder or list, or a video, by the words you give.

  python -m ovseg_jax.predict --checkpoint=runs/openseg --images=wedding.jpg \\
      --labels="bride,woman in white; groom; cake" --out=out
  python -m ovseg_jax.predict --model=tipsv2_l14 --images=wedding.jpg --labels="bride; groom; cake" --out=out

For each image NAME it writes into --out
  NAME.overlay.png   the image under its segments, with names and a legend
  NAME.labels.png    the label map: 0 = unknown, k = the k-th category (16 bits above 255 categories)
  NAME.json          category, instance, score, area, box and COCO RLE mask of each segment
  NAME.panoptic.png  with --task=panoptic: COCO's panoptic PNG, whose colours R + 256 G + 65536 B are ids of segments
  NAME.features.npz  with --features: pixels, embedding [h w D], masks [N h w], regions [N D] in float16
and predictions.json, the segments of all images; with --task also panoptic.json or instances.json, which `python -m
ovseg_jax.score` reads, with --pred_masks for the folder of the PNGs. NAME is the image's name without its suffix, or
with it if two images share the stem. If the command was stopped, run it again to continue: predictions.jsonl lists the
finished images.

Of a video (pip install 'ovseg_jax[video]'), or with --fps of images as its frames, it writes
  NAME.mp4           the overlays, without sound
  NAME.jsonl         a line for each frame, as NAME.json above, with its number and time in seconds
"""

# Pixels: each tile is resized to the model's input, so that a photograph in tiles of 2 pixels would take days.
_LEAST_TILE = 8


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; the exit status is 1 also if some images could not be read."""
    return run_command(parser, _run, argv)


def parser() -> Parser:
    """Returns the command's parser."""
    from ovseg_jax.decisions.published import DECISIONS as PROTOCOLS
    from ovseg_jax.decisions.rules import DECISIONS
    from ovseg_jax.inference.folder import TASKS
    from ovseg_jax.protocols import Segmenting
    from ovseg_jax.vocab.classes import LABEL_FILES

    parser = Parser("predict", _DESCRIPTION)
    add = parser.add_argument
    add("--checkpoint", metavar="WORKDIR", help="the folder (or bucket) of a training run")
    add_model_flags(parser)
    add(
        "--images",
        required=True,
        metavar="PATH",
        help="an image, a folder of images, a pattern with * or **, a video file, or a list: @FILE with a path a line, "
        "or - for the standard input",
    )
    add("--out", required=True, metavar="DIR", help="the output folder, created if missing")
    add(
        "--labels",
        metavar="TEXT|FILE",
        help="';' between categories, ',' between the names of one; or a file of lines 'id:name,name,...' or "
        f"'name,name,...', or one of {', '.join(LABEL_FILES)}; or "
        "an .npz of names and vectors (ovseg_jax.prompts); "
        "by default the classes that the model was trained with",
    )
    add(
        "--threshold",
        type=float,
        metavar="T",
        help=f"pixels with a lower confidence are unknown (default {Segmenting.unknown_below}; with --proposals or a "
        "--model of towers alone -1, so that none are)",
    )
    add(
        "--decision",
        choices=tuple(DECISIONS),
        help="how scores become segments, in place of --threshold; panoptic and instances separate objects of one "
        "category",
    )
    add(
        "--task",
        choices=tuple(TASKS),
        help="panoptic: one segment for every pixel, things apart; instance: the best things, which may overlap; "
        "semantic: the best category of every pixel; in place of --threshold and --decision, with COCO's files",
    )
    add(
        "--tile",
        type=_tile,
        metavar="SIZE[,OVERLAP]",
        help="segment large images in overlapping tiles of SIZE pixels, for more detail (default overlap: a quarter)",
    )
    add(
        "--protocol",
        choices=tuple(PROTOCOLS),
        metavar="NAME",
        help="resize, average sliding windows and decide as in a published evaluation, in place of --threshold, "
        f"--decision and --tile: {', '.join(PROTOCOLS)}",
    )
    add("--fps", type=float, metavar="N", help="take the images as the frames of a video, N a second")
    add(
        "--smooth",
        type=float,
        default=0.0,
        metavar="A",
        help="average the confidence of each name over the frames: A parts of the one before, 1 - A of this one",
    )
    add("--crf", action="store_true", help="move the borders of the label map to those of the image")
    add(
        "--proposals",
        metavar="WORKDIR",
        help="a run that proposes masks, for a --checkpoint that classifies images, such as a prompt's",
    )
    add(
        "--ensemble",
        type=float,
        metavar="W",
        help="with --proposals: weight w of `ovseg_jax.score transfer`; 0 classifies by --checkpoint alone (default "
        "0.8). All classes count as unseen unless the run lists unseen ones",
    )
    add(
        "--fill",
        choices=("mean", "zero"),
        help="with --proposals: colour around a cut-out mask (default mean)",
    )
    add("--features", action="store_true", help="also write text-aligned features; not with --tile")
    add("--overwrite", action="store_true", help="replace files in --out that this command has not written")
    add(
        "--batch",
        type=int,
        metavar="N",
        help="images or tiles at once (default 8; on a CPU one tile, which is as fast and takes less memory)",
    )
    add("--step", type=int, metavar="N", help="the checkpoint of this step (default: the latest)")
    return parser


def _tile(text: str) -> tuple[int, int]:
    size, _, overlap = text.partition(",")
    if not size.isdecimal() or not (overlap or "0").isdecimal() or int(size) < _LEAST_TILE:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not the side of a tile in pixels, at least {_LEAST_TILE}, such as 640, or 640,160 with the "
            "overlap"
        )
    return int(size), int(overlap) if overlap else int(size) // 4


def _run(arguments: argparse.Namespace) -> int:
    from ovseg_jax.inference.command import run

    return run(arguments)


if __name__ == "__main__":
    start(main)

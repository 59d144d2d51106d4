"""The command that segments images by words: `python -m ovseg_jax.predict --checkpoint=DIR --images=PATH --out=DIR`."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ovseg_jax.cli.console import FAILED, Parser, return_compilers_memory, run_command, start, texts_folder
from ovseg_jax.errors import UserError
from ovseg_jax.inference.model_flags import add_model_flags, check_model_flags, pretrained_arguments

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
    return int(size), int(overlap) if overlap else int(size) // 4


def _run(arguments: argparse.Namespace) -> int:
    from ovseg_jax.data.images import read_image
    from ovseg_jax.data.videos import is_video
    from ovseg_jax.inference.folder import image_files
    from ovseg_jax.vocab.classes import load_labels
    from ovseg_jax.vocab.vectors import ClassVectors

    # Errors in the request are reported before the model is loaded.
    _check_flags(arguments)
    threshold = arguments.threshold
    decides = arguments.protocol or arguments.decision or arguments.task
    if threshold is None and arguments.proposals and not decides:
        threshold = -1.0
    labels: Any = ClassVectors.of(arguments.labels)
    if arguments.labels is not None and labels is None:
        labels = load_labels(arguments.labels)
    video = _of_video(arguments)
    paths = [] if is_video(arguments.images) else image_files(arguments.images, frames=video)
    if len(paths) == 1:
        read_image(paths[0])
    options: dict[str, Any] = dict(
        threshold=threshold,
        decision=arguments.decision,
        tile=arguments.tile,
        protocol=arguments.protocol,
        crf=arguments.crf,
        overwrite=arguments.overwrite,
    )
    load = _loader(arguments)
    return (_segment_video if video else _segment_images)(arguments, load, paths, labels, options)


def _of_video(arguments: argparse.Namespace) -> bool:
    """Returns whether --images is a video file, or --fps makes its images the frames of one."""
    from ovseg_jax.data.videos import is_video

    return is_video(arguments.images) or arguments.fps is not None


def _two_stage_rules(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the arguments of `Segmenter.from_two_stages` that were given."""
    given = {key: getattr(arguments, key) for key in ("ensemble", "fill")}
    return {key: value for key, value in given.items() if value is not None}


def _check_flags(arguments: argparse.Namespace) -> None:
    """Checks that the flags can be used together.

    Raises:
      UserError: they cannot.
    """
    from ovseg_jax.data.videos import is_video
    from ovseg_jax.decisions.rules import decision_of
    from ovseg_jax.inference.folder import TASKS
    from ovseg_jax.inference.tiles import spans

    check_model_flags(arguments, ("proposals", "step"))
    rules = _two_stage_rules(arguments)
    if rules and not arguments.proposals:
        raise UserError(f"--{next(iter(rules))} needs --proposals")
    if arguments.proposals and arguments.step is not None:
        raise UserError("--step cannot be used with --proposals, which takes the latest checkpoints")
    if arguments.decision and arguments.threshold is not None:
        raise UserError("--decision replaces --threshold: give only one of them")
    if arguments.task and (arguments.decision or arguments.threshold is not None):
        raise UserError("--task replaces --decision and --threshold: give only one of them")
    decision = TASKS[arguments.task] if arguments.task else arguments.decision
    if decision and arguments.tile and decision_of(decision).needs_masks:
        raise UserError(f"the decision {decision!r} works on whole images: leave out --tile")
    if arguments.protocol and (decision or arguments.tile or arguments.threshold is not None):
        raise UserError(
            "--protocol replaces --threshold, --decision, --task and --tile: give only one of them"
        )
    if arguments.protocol and arguments.features:
        raise UserError("--features works on whole images: leave out --protocol")
    if arguments.crf and decision and decision_of(decision).separates:
        raise UserError(f"--crf works on label maps: leave out the decision {decision!r}")
    if arguments.features and arguments.tile:
        raise UserError("--features works on whole images: leave out --tile, or cut the images yourself")
    if arguments.features and arguments.proposals:
        raise UserError("--features works with a single model: leave out --proposals")
    if arguments.batch is not None and arguments.batch < 1:
        raise UserError(f"--batch={arguments.batch} is less than 1")
    if arguments.fps is not None and (is_video(arguments.images) or not 0.001 <= arguments.fps <= 1000):
        raise UserError(
            "--fps is the number of images a second, from 0.001 to 1000, of images that are not a video file"
        )
    video = _of_video(arguments)
    if arguments.smooth and not video:
        raise UserError(
            "--smooth averages over the frames of a video: give one, or --fps for a folder of frames"
        )
    if video and (arguments.features or arguments.task):
        raise UserError("--features and --task work on images: leave them out for a video")
    spans(1, arguments.tile)  # raises for an impossible size or overlap


def _loader(arguments: argparse.Namespace) -> Callable[[], Any]:
    """Returns a function that loads the model."""
    import jax

    from ovseg_jax.inference.segmenter import Segmenter

    few = arguments.tile and jax.default_backend() == "cpu"
    if few:
        return_compilers_memory()
    shared: dict[str, Any] = dict(batch_size=arguments.batch or (1 if few else 8), devices=None)

    def load() -> Segmenter:
        if arguments.model:
            return Segmenter.from_pretrained(
                **pretrained_arguments(arguments), texts=texts_folder(), **shared
            )
        if not arguments.proposals:
            return Segmenter.from_checkpoint(
                arguments.checkpoint, arguments.step, texts=texts_folder(), **shared
            )
        return Segmenter.from_two_stages(
            arguments.proposals, arguments.checkpoint, **shared, **_two_stage_rules(arguments)
        )

    return load


def _segment_video(
    arguments: argparse.Namespace,
    load: Callable[[], Any],
    paths: Sequence[Any],
    labels: Any,
    options: Mapping[str, Any],
) -> int:
    """Segments a video file, or images as its frames; returns the exit status."""
    from etils import epath

    from ovseg_jax.data.images import read_image
    from ovseg_jax.data.videos import VideoReader
    from ovseg_jax.inference.video import segment_video

    frames: Any = map(read_image, paths)
    if not paths:
        frames = VideoReader(arguments.images)
        next(iter(frames))  # An unreadable video is reported before the model is loaded.
    path = epath.Path(arguments.images)
    name = path.name if path.is_dir() else path.stem.strip("@*") or "video"
    fps = arguments.fps or frames.fps
    records = segment_video(
        load(), frames, arguments.out, name, labels, fps=fps, smooth=arguments.smooth, **options
    )
    print(f"{len(records)} frames segmented; see {epath.Path(arguments.out) / name}.mp4")
    return 0


def _segment_images(
    arguments: argparse.Namespace,
    load: Callable[[], Any],
    paths: Sequence[Any],
    labels: Any,
    options: Mapping[str, Any],
) -> int:
    """Segments images and prints what was found in the first ones; returns the exit status."""
    from ovseg_jax.cli.outputs import run_stamp
    from ovseg_jax.inference.folder import segment_files

    request = {
        "checkpoint": arguments.checkpoint,
        "stamp": run_stamp(arguments.checkpoint, arguments.step) if arguments.checkpoint else None,
        **{
            key: getattr(arguments, key)
            for key in ("model", "weights", "tokenizer", "patches")
            if arguments.model
        },
        "proposals": arguments.proposals,
        "proposals_stamp": run_stamp(arguments.proposals) if arguments.proposals else None,
        **_two_stage_rules(arguments),
    }
    done = segment_files(
        load,
        paths,
        arguments.out,
        labels,
        request,
        task=arguments.task,
        features=arguments.features,
        **options,
    )
    for record in done.records[:10]:
        total, segments = record["height"] * record["width"], record["segments"]
        if arguments.task == "instance":  # they overlap, so that shares of the image say little
            best = sorted(segments, key=lambda s: -s["score"])
            found = ", ".join(f"{s['category']} {s['score']:.2f}" for s in best[:6])
        else:
            found = ", ".join(f"{s['category']} {s['area'] / total:.0%}" for s in segments[:6])
        print(f"{record['stem']}: {found or 'unknown'}")
    if len(done.records) > 10:
        print(f"... and {len(done.records) - 10} more")
    there = f" ({done.there} of them earlier)" if done.there else ""
    bad = f", {done.skipped} could not be read" if done.skipped else ""
    print(f"{len(done.records)} segmented{there}{bad}; see {arguments.out}")
    return FAILED if done.skipped else 0


if __name__ == "__main__":
    start(main)

"""The body of the command `predict`: checks its flags, loads the model, and segments images or a video."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from ovseg_jax.cli.console import FAILED, return_compilers_memory, texts_folder
from ovseg_jax.cli.outputs import run_stamp
from ovseg_jax.data.images import read_image
from ovseg_jax.data.videos import VideoReader, is_video
from ovseg_jax.decisions.rules import decision_of
from ovseg_jax.errors import UserError
from ovseg_jax.inference.folder import TASKS, image_files, segment_files
from ovseg_jax.inference.model_flags import check_model_flags, pretrained_arguments
from ovseg_jax.inference.segmenter import Segmenter
from ovseg_jax.inference.tiles import spans
from ovseg_jax.inference.video import segment_video
from ovseg_jax.vocab.classes import load_labels
from ovseg_jax.vocab.vectors import ClassVectors


def run(arguments: argparse.Namespace) -> int:
    """Segments what the flags of the command `predict` ask for, and returns the exit status.

    Raises:
      UserError: flags cannot be used together, or see `inference.folder.segment_files`, `inference.video.segment_video`
        and `Segmenter`.
    """
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


def _loader(arguments: argparse.Namespace) -> Callable[[], Segmenter]:
    """Returns a function that loads the model."""
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
    load: Callable[[], Segmenter],
    paths: Sequence[epath.Path],
    labels: Any,
    options: Mapping[str, Any],
) -> int:
    """Segments a video file, or images as its frames; returns the exit status."""
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
    load: Callable[[], Segmenter],
    paths: Sequence[epath.Path],
    labels: Any,
    options: Mapping[str, Any],
) -> int:
    """Segments images and prints what was found in the first ones; returns the exit status."""
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

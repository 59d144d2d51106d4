"""Segmentation of the frames of a video: an MP4 of overlays, and a line of JSON for every frame."""

import collections
import fractions
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from etils import epath
from tqdm import tqdm

from ovseg_jax.cli.outputs import check_out_folder
from ovseg_jax.data.videos import VideoWriter
from ovseg_jax.errors import UserError
from ovseg_jax.files import locked, write_whole
from ovseg_jax.inference.folder import THREADS
from ovseg_jax.inference.result import Result
from ovseg_jax.inference.segmenter import Segmenter
from ovseg_jax.vocab.classes import Labels
from ovseg_jax.vocab.vectors import ClassVectors


def segment_video(
    segmenter: Segmenter,
    frames: Iterable[Any],
    out: epath.PathLike,
    name: str,
    labels: Labels | ClassVectors | None = None,
    *,
    fps: float | int | fractions.Fraction,
    overwrite: bool = False,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Segments frames and writes `NAME.mp4`, their overlays, and `NAME.jsonl`, a record per frame, into a folder.

    Args:
      segmenter: the model.
      frames: images of one size, in order, such as a `data.videos.VideoReader`.
      out: the folder to write into, created if missing.
      name: the name of the files.
      labels: see `Segmenter.segment`.
      fps: frames a second; a record has its frame's number and time.
      overwrite: whether to replace such files.
      **settings: further arguments of `Segmenter.stream`, such as `smooth`.

    Returns:
      The records.

    Raises:
      UserError: a file is there already, PyAV is not installed, or a frame cannot be read or has another size.
    """
    out = check_out_folder(out)
    with locked(out):
        return _segment_video(segmenter, frames, out, name, labels, fps, overwrite, settings)


def _segment_video(
    segmenter: Segmenter,
    frames: Iterable[Any],
    out: epath.Path,
    name: str,
    labels: Labels | ClassVectors | None,
    fps: float | int | fractions.Fraction,
    overwrite: bool,
    settings: Mapping[str, Any],
) -> list[dict[str, Any]]:
    paths = out / f"{name}.mp4", out / f"{name}.jsonl"
    for path in paths:
        if path.exists() and not overwrite:
            raise UserError(f"{path} exists already: give another folder, or --overwrite")
    rate = fractions.Fraction(fps).limit_denominator(1001)
    draw = lambda result: (result.overlay(legend=False), result.record())
    records: list[dict[str, Any]] = []
    waiting: collections.deque[Future] = collections.deque()
    with (
        VideoWriter(paths[0], rate) as writer,
        tqdm(unit="frame", disable=None) as bar,
        ThreadPoolExecutor(THREADS) as pool,
    ):

        def finish() -> None:
            picture, record = waiting.popleft().result()
            writer.add(picture)
            records.append({"frame": len(records), "time": round(len(records) / float(rate), 4), **record})
            bar.update()

        result: Result
        try:
            for result in segmenter.stream(frames, labels, **settings):
                waiting.append(pool.submit(draw, result))
                if len(waiting) > THREADS:
                    finish()
            while waiting:
                finish()
        except KeyboardInterrupt:
            raise KeyboardInterrupt("the same command begins the video again") from None
    write_whole(paths[1], "".join(json.dumps(record) + "\n" for record in records))
    return records

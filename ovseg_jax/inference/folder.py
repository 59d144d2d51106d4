"""Segmentation of the images of a folder into another folder, with a journal of the finished images."""

import collections
import glob
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import UInt8
from tqdm import tqdm

from ovseg_jax.cli.outputs import Journal, check_not_foreign, check_out_folder, output_names
from ovseg_jax.data.images import image_suffixes, list_images, read_image
from ovseg_jax.errors import UserError
from ovseg_jax.files import file_stamp, locked, write_whole
from ovseg_jax.inference.result import Result
from ovseg_jax.inference.segmenter import Segmenter
from ovseg_jax.reading import read_text
from ovseg_jax.vocab.classes import ClassList
from ovseg_jax.vocab.vectors import ClassVectors

JOURNAL, SUMMARY = "predictions.jsonl", "predictions.json"
FEATURES = "features.npz"
TASKS = {"panoptic": "panoptic", "instance": "instances", "semantic": "argmax"}
"""The decision of each task."""
PANOPTIC = "panoptic.png"
# The file of all images that a task writes in the format of COCO's evaluations.
COCO_FILES = {"panoptic": "panoptic.json", "instance": "instances.json"}
THREADS = min(8, os.cpu_count() or 1)
"""Number of threads that read, and of those that write."""
_PIXELS = 16_000_000  # of images that wait for a stage: a photograph of 20 megapixels waits alone
ENDS = ("labels.png", "json", "overlay.png")


class Done(NamedTuple):
    """The outcome of `segment_files`.

    Attributes:
      records: the record of each image, in order, as in predictions.json.
      skipped: the number of images that could not be read.
      there: the number of images that an earlier call has segmented.
    """

    records: list[dict[str, Any]]
    skipped: int
    there: int


def image_files(path: epath.PathLike, *, frames: bool = False) -> list[epath.Path]:
    """Lists images: one, those of a folder (without subfolders) or of a pattern, by name, or those of a list, in order.

    Files that `segment_files` has written into the folder are not included.

    Args:
      path: an image; a folder; a pattern with `*`, or `**` for folders in folders; `@FILE` for a file with a path a
        line; or `-` for such lines from the standard input.
      frames: whether numbers in the names of a folder or pattern count by their value, so that frame 2 precedes 10.

    Raises:
      UserError: the path does not exist, or there is no image.
    """
    if str(path) == "-" or str(path).startswith("@"):
        return _listed(str(path))
    path = epath.Path(path)
    if path.is_dir():
        own = written_files(Journal(path / JOURNAL).head)
        files = [file for file in list_images(path) if file.name not in own]
        if not files:
            raise UserError(f"--images={path}: the folder holds no readable image")
        return sorted(files, key=_by_number) if frames else files
    if path.exists():
        return [path]
    if glob.has_magic(str(path)):
        files = [epath.Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        files = [file for file in files if file.suffix.lower() in image_suffixes() and not file.is_dir()]
        if files:
            return sorted(files, key=_by_number) if frames else files
        raise UserError(f"--images={path}: no image matches this pattern")
    raise UserError(f"--images={path}: there is no such file or folder")


def _by_number(path: epath.Path) -> list[str | tuple[int, str]]:
    """Returns what orders paths by the values of the numbers in them: texts and numbers in turn."""
    parts = re.split(r"([0-9]+)", str(path))
    return [(int(part), part) if k % 2 else part for k, part in enumerate(parts)]


def _listed(source: str) -> list[epath.Path]:
    """Returns the images of a list of paths, each once."""
    where = "the standard input" if source == "-" else source[1:]
    lines = (sys.stdin.read() if source == "-" else read_text(source[1:])).splitlines()
    found: dict[str, None] = {}
    for number, line in enumerate(lines, 1):
        if name := line.strip():
            if not (epath.Path(name).exists() if "://" in name else os.path.isfile(name)):
                raise UserError(f"--images: line {number} of {where}: there is no file {name!r}")
            found[name] = None
    if not found:
        raise UserError(f"--images: {where} lists no image")
    return [epath.Path(name) for name in found]


def written_files(head: Mapping[str, Any]) -> set[str]:
    """Returns the names of all files written by a call with this journal head."""
    names = head.get("names")
    if not isinstance(names, dict):
        return set()
    return {f"{name}.{end}" for name in names.values() for end in (*ENDS, FEATURES, PANOPTIC)} | {
        JOURNAL,
        SUMMARY,
        *COCO_FILES.values(),
    }


def segment_files(
    load: Callable[[], Segmenter],
    paths: Sequence[epath.Path],
    out: epath.PathLike,
    labels: ClassList | ClassVectors | None,
    request: Mapping[str, Any],
    *,
    threshold: float | None,
    decision: str | None = None,
    task: str | None = None,
    tile: tuple[int, int] | None = None,
    features: bool = False,
    protocol: str | None = None,
    crf: bool = False,
    overwrite: bool = False,
) -> Done:
    """Segments files and writes the results that the help of the command `predict` lists.

    An image is recorded in predictions.jsonl as soon as its files are complete, so that a stopped command continues
    when it is run again.

    Args:
      load: loads the segmenter; called only if an image is left to segment.
      paths: the images.
      out: the folder to write into.
      labels: see `Segmenter.stream`.
      request: everything else that the results depend on, as plain values.
      threshold: see `Segmenter.stream`.
      decision: see `Segmenter.stream`.
      task: a key of TASKS, in place of `decision`: its files in COCO's formats are written, too.
      tile: see `Segmenter.stream`.
      features: whether to also write features.
      protocol: see `Segmenter.stream`.
      crf: see `Segmenter.stream`.
      overwrite: whether to replace files in `out` that no earlier call has written.

    Raises:
      UserError: there is such a file and `overwrite` is False, or the folder cannot be written.
    """
    out = check_out_folder(out)
    if task is not None:
        decision = TASKS[task]
    together = COCO_FILES.get(task or "")
    with locked(out):
        journal = Journal(out / JOURNAL)
        known = journal.head.get("names", {})
        names = output_names(paths, known if isinstance(known, dict) else {}, reserved=(_stem(SUMMARY),))
        ends = (*ENDS, *((FEATURES,) if features else ()), *((PANOPTIC,) if task == "panoptic" else ()))
        files = {str(path): [f"{names[str(path)]}.{end}" for end in ends] for path in paths}
        if not overwrite:
            planned = [name for group in files.values() for name in group]
            summaries = [SUMMARY, *([together] if together else [])]
            check_not_foreign(out, [*planned, JOURNAL, *summaries], written_files(journal.head))
        classes = labels.classes if isinstance(labels, ClassVectors) else labels
        options: dict[str, Any] = dict(
            threshold=threshold,
            decision=decision,
            tile=tile,
            features=features,
            protocol=protocol,
            crf=crf,
        )
        request = _request(request, labels, options, task)
        listed = journal.head.get("labels")
        journal.start(
            request, names={**known, **names}, labels=listed if classes is None else request["labels"]
        )
        done = _done_earlier(journal, out, files)
        count = len(done)
        reader = ImageReader([path for path in paths if str(path) not in done])
        try:
            if reader.files:
                segmenter = load()
                if classes is None and segmenter.classes is not None:
                    listed = [list(group) for group in segmenter.classes.names]
                    journal.start(request, names={**known, **names}, labels=listed)
                results = segmenter.stream(reader, labels, **options)
                for record in _save_all(results, reader, out, names, len(paths), count, task):
                    journal.append(record)
                    done[record["image"]] = record
        finally:
            journal.close()
        records = [done[str(path)] for path in paths if str(path) in done]
        shown = [{key: value for key, value in record.items() if key != "stamp"} for record in records]
        summary = {
            "checkpoint": request.get("checkpoint"),
            "threshold": threshold,
            "decision": decision,
            "labels": journal.head["labels"] or [],
            "images": shown,
        }
        write_whole(out / SUMMARY, json.dumps(summary, indent=1) + "\n")
        if together:
            write_whole(out / together, json.dumps(coco_results(shown, task or "")) + "\n")
        return Done(shown, reader.skipped, count)


def _request(
    given: Mapping[str, Any],
    labels: ClassList | ClassVectors | None,
    options: Mapping[str, Any],
    task: str | None,
) -> dict[str, Any]:
    """Returns everything that the results depend on, as plain values."""
    classes = labels.classes if isinstance(labels, ClassVectors) else labels
    return {
        **given,
        "labels": None if classes is None else [*map(list, classes.names)],
        "ids": None if classes is None else list(classes.ids),
        "vectors": _digest(labels.vectors) if isinstance(labels, ClassVectors) else None,
        **options,
        "task": task,
    }


def _done_earlier(
    journal: Journal, out: epath.Path, files: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, Any]]:
    """Returns the records of unchanged images whose files are all there, by image."""
    there = {path.name for path in out.iterdir()}
    return {
        record["image"]: record
        for record in journal.records
        if record.get("image") in files
        and record.get("stamp") == file_stamp(record["image"])
        and there.issuperset(files[record["image"]])
    }


def coco_results(records: Sequence[Mapping[str, Any]], task: str) -> Any:
    """Returns the records of all images in the format of COCO's evaluations.

    An image's id is its name without its suffix, as a number where it is one, as in COCO's files, and no other image
    has the same number, as 7 and 007 do.

    Args:
      records: see `Done`, with "segments_info" for task "panoptic".
      task: "panoptic" for {"annotations": [...]}, "instance" for a list of results, of things alone.
    """
    shared = collections.Counter(int(r["stem"]) for r in records if r["stem"].isdecimal())
    number = lambda stem: int(stem) if stem.isdecimal() and shared[int(stem)] == 1 else stem
    if task == "panoptic":
        rows = [
            {
                "image_id": number(record["stem"]),
                "file_name": f"{record['stem']}.{PANOPTIC}",
                "segments_info": record["segments_info"],
            }
            for record in records
        ]
        return {"annotations": rows}
    names = {"id": "category_id", "segmentation": "segmentation", "score": "score", "bbox": "bbox"}
    return [
        {"image_id": number(record["stem"]), **{ours: segment[key] for key, ours in names.items()}}
        for record in records
        for segment in record["segments"]
    ]


def _save_all(
    results: Iterator[Result],
    reader: "ImageReader",
    out: epath.Path,
    names: Mapping[str, str],
    total: int,
    done: int,
    task: str | None,
) -> Iterator[dict[str, Any]]:
    """Writes the files of each result and yields its record."""

    def save(result: Result, name: str) -> dict[str, Any]:
        if result.features is not None:
            result.features.save(out / f"{name}.{FEATURES}")
        coco = result.save_panoptic(out, name) if task == "panoptic" else {}
        record = result.record()
        result.save(out, name, record)
        return record | coco

    waiting: collections.deque[tuple[epath.Path, list[int], Future]] = collections.deque()

    def finished() -> dict[str, Any]:
        path, stamp, saved = waiting.popleft()
        name = names[str(path)]
        bar.set_postfix_str(path.name, refresh=False)
        try:
            record = saved.result()
        except (OSError, UserError) as error:
            text = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise UserError(
                f"{out / name}: {text}; {done} of {total} images are done; the same command continues "
                "from there"
            ) from error
        return {"image": str(path), "stem": name, "stamp": stamp, **record}

    with tqdm(total=total, initial=done, unit="image", disable=None, dynamic_ncols=True) as bar:
        reader.report = lambda error: (bar.update(), bar.write(f"skipped: {error}", sys.stderr))
        pool = ThreadPoolExecutor(THREADS)
        try:
            for result in results:
                path, stamp = reader.done.popleft()
                waiting.append((path, stamp, pool.submit(save, result, names[str(path)])))
                while len(waiting) > _room(result.image):
                    yield finished()
                    done += 1
                    bar.update()
            while waiting:
                yield finished()
                done += 1
                bar.update()
        finally:
            pool.shutdown(cancel_futures=True)


class ImageReader:
    """An iterator over the images of files, which skips unreadable ones and remembers the others.

    It reads ahead in threads.
    """

    def __init__(self, files: Sequence[epath.Path]):
        self.files = files
        self.done: collections.deque[tuple[epath.Path, list[int]]] = collections.deque()
        self.skipped = 0
        self.report: Callable[[UserError], Any] = print

    def __iter__(self) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        def read(path: epath.Path) -> tuple[list[int], np.ndarray | UserError]:
            stamp = file_stamp(path)
            try:
                return stamp, read_image(path)
            except UserError as error:
                return stamp, error

        files = collections.deque(self.files)
        waiting: collections.deque[tuple[epath.Path, Future]] = collections.deque()
        room = 1
        pool = ThreadPoolExecutor(THREADS)
        try:
            while files or waiting:
                while files and len(waiting) < room:
                    path = files.popleft()
                    waiting.append((path, pool.submit(read, path)))
                path, reading = waiting.popleft()
                stamp, image = reading.result()
                if isinstance(image, UserError):
                    self.skipped += 1
                    self.report(image)
                    continue
                room = 1 + _room(image)
                self.done.append((path, stamp))
                yield image
        finally:
            pool.shutdown(cancel_futures=True)


def _room(image: np.ndarray) -> int:
    """Returns how many images of this size may wait to be segmented, or to be written."""
    return int(np.clip(_PIXELS // (image.shape[0] * image.shape[1]), 1, THREADS))


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def _stem(name: str) -> str:
    return name.partition(".")[0]

"""The run of the workflow over a source: in this process, or on any runner of Apache Beam; resumable.

    OUT/records/request.json    the plugs and rules that the records depend on
    OUT/records/00007.todo      the images of a shard: [index in the source, name]
    OUT/records/00007.jsonl     the record of each that is done, or {"image": name, "error": reason}

A call lists the images without a record, and deals them to new shards. A runner works on whole shards, but records are
written one by one: a process that is killed loses only its current batch. An image with an error is tried again by the
next call.
"""

import concurrent.futures
import functools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath
from tqdm import tqdm

from ovseg_jax.annotation.plug import Picture
from ovseg_jax.annotation.workflow import RECORD_RULES, Annotator, Record, Rules, Specs, check_specs
from ovseg_jax.cli.outputs import Journal
from ovseg_jax.data.images import list_images, read_oriented
from ovseg_jax.data.source_base import Example, Source, check_provides
from ovseg_jax.data.sources.build import make_source
from ovseg_jax.errors import UserError
from ovseg_jax.files import locked, write_whole
from ovseg_jax.reading import array, read_json, read_text, reading, text, whole
from ovseg_jax.vocab.classes import ClassList

RECORDS, REQUEST = "records", "request.json"
SHARD = 256  # images
_LOCK = threading.Lock()  # a runner's threads share the models of their process


class Images(Source):
    """The images of a folder."""

    name = "images"
    classes = ClassList()
    provides = frozenset({"image"})

    def __init__(self, data_dir: epath.PathLike):
        """Lists the folder.

        Raises:
          UserError: it is no folder, or holds no image.
        """
        if not epath.Path(data_dir).is_dir():
            raise UserError(f"{str(data_dir)!r} is not a folder of images")
        self.files = list_images(data_dir)
        if not self.files:
            raise UserError(f"{data_dir} holds no readable image")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        """Returns one example, whose image is decoded when it is accessed.

        Raises:
          UserError: the file is damaged.
        """
        self._check_index(index)
        path = self.files[index]
        return Example(image=lambda _: read_oriented(path)[0], image_id=path.stem)


class Job(NamedTuple):
    """What a worker needs, as plain values.

    Attributes:
      source: the config of the source.
      plugs: by kind, see `Annotator`.
      rules: see `Rules`.
      out: the folder to write to.
      batch: images at once.
    """

    source: dict[str, Any]
    plugs: Specs
    rules: Rules
    out: str
    batch: int


class Runner(NamedTuple):
    """Where a run takes place.

    Attributes:
      name: "" for this process without Beam, "direct" for Beam's processes on this machine, or a runner of Beam.
      workers: processes of the direct runner; 0 takes one for each CPU core.
      options: further options of the runner, as on Beam's command line.
    """

    name: str = ""
    workers: int = 0
    options: Sequence[str] = ()


def annotate(job: Job, runner: Runner, shard_size: int = SHARD) -> tuple[int, int]:
    """Makes the records of all images that have none.

    Args:
      job: the work.
      runner: where it takes place.
      shard_size: images of a shard.

    Returns:
      (images annotated by this call, images that had a record before).

    Raises:
      UserError: the source, a plug or a rule is invalid, or OUT holds records of another source, other plugs or rules.
    """
    job.rules.check()
    check_specs(job.plugs)
    if job.batch < 1 or shard_size < 1 or runner.workers < 0:
        raise UserError("the batch and the shards must have at least 1 image, and workers be at least 0")
    out = epath.Path(job.out)
    source = make_source(job.source)
    if isinstance(source, Images) and os.path.realpath(source.files[0].parent) == os.path.realpath(out):
        raise UserError(f"the outputs would lie among the images of {out}: choose another folder")
    check_provides(source, ("image",), "annotate")
    _check_request(job)
    known = {record["image"] for record in read_records(out) if "error" not in record}
    names = image_names(source)
    todo = [[index, name] for index, name in enumerate(names) if name not in known]
    there = len(names) - len(todo)
    if todo:
        _run(job, runner, _deal(out, todo, shard_size), len(names), there)
    now = {record["image"] for record in read_records(out) if "error" not in record}
    return len(now - known), there


def _check_request(job: Job) -> None:
    """Raises a UserError if the folder holds records of another source, other plugs or other rules than the job's."""
    folder = epath.Path(job.out) / RECORDS
    kept = {key: value for key, value in job.rules._asdict().items() if key in RECORD_RULES}
    request = json.loads(json.dumps({"source": job.source, "plugs": job.plugs, "rules": kept}))
    path = folder / REQUEST
    if path.exists() and any(folder.glob("*.jsonl")):
        before = read_json(path)
        with reading(path):
            differing = [key for key in request if before[key] != request[key]]
        if differing:
            raise UserError(
                f"{folder} was made with other {differing[0]}: {_cut(before[differing[0]])}, not "
                f"{_cut(request[differing[0]])}; choose another --out, or delete that folder to annotate anew"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(request, indent=1) + "\n")


def _cut(value: Any) -> str:
    """Returns a value as JSON, cut for a sentence."""
    found = json.dumps(value)
    return found if len(found) <= 300 else f"{found[:297]}..."


def image_names(source: Source) -> list[str]:
    """Returns the name of each image's files: its id, with "_" in place of "/".

    Raises:
      UserError: two images have one name.
    """
    names = [str(source[index]["image_id"]).replace("/", "_") for index in range(len(source))]
    seen: set[str] = set()
    for name in names:
        if name.casefold() in seen:
            raise UserError(f"{source.name}: two images have the name {name!r}, and their files would clash")
        seen.add(name.casefold())
    return names


def read_records(out: epath.Path) -> Iterator[Record]:
    """Yields all records and errors of a folder.

    A line that is damaged, or that a killed process left incomplete, is passed over: its image has no record.
    """
    for path in sorted((out / RECORDS).glob("*.jsonl")):
        yield from Journal(path).records


def _deal(out: epath.Path, todo: Sequence[Any], size: int) -> list[int]:
    """Writes the lists of new shards and returns their numbers."""
    folder = out / RECORDS
    shards = (path.stem for pattern in ("*.todo", "*.jsonl") for path in folder.glob(pattern))
    first = 1 + max((int(stem) for stem in shards if stem.isdecimal()), default=-1)
    count = -(-len(todo) // size)
    for k in range(count):
        write_whole(folder / f"{first + k:05d}.todo", json.dumps(todo[k * size : (k + 1) * size]))
    return [*range(first, first + count)]


def _run(job: Job, runner: Runner, shards: Sequence[int], total: int, there: int) -> None:
    """Annotates shards."""
    folder = epath.Path(job.out) / RECORDS
    for path in folder.glob("*.error"):
        path.unlink()
    where, begun = str(folder / "job.json"), time.time_ns()
    write_whole(folder / "job.json", json.dumps({**job._asdict(), "rules": job.rules._asdict()}))
    if not runner.name:
        if runner.workers or runner.options:
            raise UserError("--workers and --beam are for a --runner, such as direct")
        with tqdm(total=total, initial=there, unit="image", disable=None) as bar:
            for shard in shards:
                annotate_shard(shard, where, begun, bar.update)
                _raise_error(folder)
        return
    from ovseg_jax.datasets.beam import check_beam, pipeline_options, progress, quiet_workers, run_elements

    check_beam("annotate with a --runner")
    options = pipeline_options(runner.name, runner.workers, runner.options)
    finished = lambda: sum((folder / f"{k:05d}.done").exists() for k in shards)
    with quiet_workers() as terminal, progress("annotate", len(shards), finished, terminal):
        run_elements(annotate_shard, shards, options, runner.name, where, begun)
    _raise_error(folder)


def _raise_error(folder: epath.Path) -> None:
    if errors := [read_text(path) for path in sorted(folder.glob("*.error"))]:
        raise UserError(f"{errors[0]}; the images that are done are kept: the same command continues")


@functools.lru_cache(maxsize=1)
def _load(path: str, begun: int) -> tuple[Job, Source, Annotator]:
    """Loads the job, the source and the models, once in each process."""
    content = read_json(path)
    job = Job(**{**content, "rules": Rules(**content["rules"])})
    return job, make_source(job.source), Annotator(job.plugs, job.rules)


def annotate_shard(shard: int, path: str, begun: int, report: Callable[[int], Any] | None = None) -> None:
    """Annotates the images of a shard that have no record; a UserError is left in a file for the main process.

    Args:
      shard: its number.
      path: the job's file.
      begun: the time when the job was started, so that a worker does not use what it loaded for an earlier one.
      report: is called with a number of images that are done.
    """
    folder = epath.Path(path).parent
    try:
        with _LOCK:
            _annotate_shard(shard, *_load(path, begun), report)
            (folder / f"{shard:05d}.done").touch()
    except UserError as error:
        write_whole(folder / f"{shard:05d}.error", str(error), shared=True)


def _annotate_shard(
    shard: int, job: Job, source: Source, annotator: Annotator, report: Callable[[int], Any] | None
) -> None:
    folder = epath.Path(job.out) / RECORDS
    journal = Journal(folder / f"{shard:05d}.jsonl")
    journal.start({"shard": shard})
    done = {record["image"] for record in journal.records}
    todo = [row for row in _read_todo(folder / f"{shard:05d}.todo") if row[1] not in done]
    batches = [todo[k : k + job.batch] for k in range(0, len(todo), job.batch)]
    try:
        with concurrent.futures.ThreadPoolExecutor(job.batch) as pool:
            read = lambda batch: [pool.submit(_read, source, *row) for row in batch]
            waiting = read(batches[0]) if batches else []
            for k, batch in enumerate(batches):
                found = [future.result() for future in waiting]
                waiting = read(batches[k + 1]) if k + 1 < len(batches) else []  # while the models work
                pictures = [picture for picture in found if isinstance(picture, Picture)]
                records = annotator(pictures) if pictures else []
                for record in (*records, *(own for own in found if not isinstance(own, Picture))):
                    if "error" in record:
                        print(f"failed: {record['image']}: {record['error']}", file=sys.stderr)
                    journal.append(record)
                if report is not None:
                    report(len(batch))
    finally:
        journal.close()


def _read(source: Source, index: int, name: str) -> Picture | Record:
    """Reads an image, or returns its error."""
    try:
        return Picture(name, source[index]["image"])
    except UserError as error:
        return {"image": name, "error": str(error)}


def _read_todo(path: epath.Path) -> list[tuple[int, str]]:
    rows = read_json(path)
    with reading(path):
        return [(whole(row[0], "an index"), text(row[1], "a name")) for row in array(rows, "the images")]


def annotate_source(
    source: Mapping[str, Any],
    plugs: Specs,
    rules: Rules,
    out: epath.PathLike,
    batch: int = 8,
    shard_size: int = SHARD,
    runner: Runner | None = None,
) -> Any:
    """Annotates a source into a folder, or continues where an earlier call was stopped, and writes all outputs.

    Args:
      source: the config of a source that provides images, see `make_source`.
      plugs: by kind, see `Annotator`.
      rules: see `Rules`.
      out: the folder.
      batch: images at once.
      shard_size: images of a shard of the runner.
      runner: by default this process.

    Returns:
      The summary, see `outputs.Summary`.

    Raises:
      UserError: see `annotate` and `outputs.write_outputs`.
    """
    from ovseg_jax.annotation.outputs import write_outputs

    specs = {kind: [dict(spec) for spec in listed] for kind, listed in plugs.items() if listed}
    job = Job(_plain(source), specs, rules, os.fspath(out), batch)
    with locked(out):
        made, there = annotate(job, runner or Runner(), shard_size)
        return write_outputs(job)._replace(made=made, there=there)


def _plain(tree: Any) -> Any:
    """Returns a tree of plain dicts and lists."""
    if isinstance(tree, Mapping):
        return {key: _plain(value) for key, value in tree.items()}
    return [_plain(value) for value in tree] if isinstance(tree, list | tuple) else tree

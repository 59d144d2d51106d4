"""The writer of prepared data sets: shards of ArrayRecord, written by an Apache Beam pipeline that any runner can run.

The main process lists the entries of a split once, and writes them to `.work`, a file for each shard. An element of the
pipeline is the number of a shard: a worker reads its entries, writes the examples to a temporary file, renames it, and
leaves its counts and light fields in `.work`. A shard that has left them is skipped by the next call. When all are
there, the main process writes the metadata, and last the manifest (`data.prepared_files`).
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import logging
import os
import pickle
import re
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from ovseg_jax.data.prepared_files import (
    CLASSES,
    FORMAT,
    MANIFEST,
    Index,
    file_sha256,
    index_name,
    join_indices,
    make_index,
    read_index,
    read_manifest,
    shard_name,
)
from ovseg_jax.datasets.base import Dataset, Entry
from ovseg_jax.datasets.beam import (
    check_beam,
    pipeline_options,
    progress,
    quiet_workers,
    run_elements,
    silence_beam,
)
from ovseg_jax.datasets.fields import complete, encode, fields_of, serializer, tfds_features
from ovseg_jax.errors import UserError
from ovseg_jax.files import locked, write_whole
from ovseg_jax.reading import parse_json, read_json, read_text, reading, text, whole

_LOG = logging.getLogger(__name__)
WORK, JOB = ".work", "job.pickle"
_MOST_SHARDS = 1024
_PACKAGES = ("ovseg_jax", "apache-beam", "array_record", "tensorflow-datasets")


@dataclasses.dataclass(frozen=True)
class Job:
    """What a worker needs to write any shard of a split.

    Attributes:
      dataset: the reader.
      split: the split.
      out: the folder to write to.
      count: the number of shards.
      examples: the number of examples.
    """

    dataset: Dataset
    split: str
    out: str
    count: int
    examples: int


def prepare(
    dataset: Dataset,
    out: epath.PathLike,
    splits: Sequence[str] = (),
    shard_examples: int = 1024,
    runner: str = "direct",
    workers: int = 0,
    beam_options: Sequence[str] = (),
) -> dict[str, Any]:
    """Writes splits of a data set to a folder, or goes on where an earlier call was stopped.

    Args:
      dataset: its reader.
      out: the folder, local or of a bucket; splits may be added to it later.
      splits: the names of the splits; () takes all.
      shard_examples: the number of examples in a shard; more, where there would be more than 1024 shards.
      runner: "direct", or the name of a Beam runner such as "DataflowRunner".
      workers: processes of the direct runner; 0 takes one for each CPU core.
      beam_options: further options of the runner, as on Beam's command line.

    Returns:
      The manifest.

    Raises:
      UserError: a file of the data set is missing or damaged, the folder holds something else, a package is missing, or
        an option is unknown.
    """
    check_beam("prepare", ("apache_beam", "tensorflow_datasets", "array_record"))
    out = epath.Path(out)
    for split in splits:
        dataset.check_split(split)
    if double := [split for split in splits if list(splits).count(split) > 1]:
        raise UserError(f"the split {double[0]!r} is named twice")
    if shard_examples < 1 or workers < 0:
        raise UserError("--shard_examples must be at least 1, and --workers at least 0")
    options = pipeline_options(runner, workers, beam_options)
    with locked(out, "wait for it, or choose another --out"):
        done = _check_folder(dataset, out)
        for split in splits or dataset.splits:
            if split not in done:
                done[split] = _prepare_split(dataset, out, split, shard_examples, runner, options)
                _finish(dataset, out, done)
                (out / WORK / split).rmtree(missing_ok=True)
        (out / WORK).rmtree(missing_ok=True)
        return read_manifest(out)


def _request(dataset: Dataset) -> dict[str, Any]:
    """Returns everything that the content of a prepared folder depends on, but its splits."""
    return {"dataset": dataset.name, "version": dataset.version, "options": dict(dataset.chosen)}


def _check_folder(dataset: Dataset, out: epath.Path) -> dict[str, Any]:
    """Returns the splits that the folder already holds, and raises a UserError if it holds something else."""
    request, path = _request(dataset), out / WORK / "request.json"
    if (out / MANIFEST).exists():
        found = read_manifest(out)
        held, splits = {key: found.get(key) for key in request}, dict(found["splits"])
    elif path.exists():
        held, splits = read_json(path), {}
        if not isinstance(held, dict):
            raise UserError(f"{path} is damaged: delete the folder {path.parent}, or choose another --out")
    else:
        held, splits = request, {}
        if foreign := [p.name for p in out.iterdir() if not p.name.startswith(".")]:
            raise UserError(
                f"--out={out} holds {foreign[0]}, which prepare has not written: choose another --out"
            )
    if held != request:
        raise UserError(
            f"--out={out} holds {json.dumps(held)}, not {json.dumps(request)}: choose another --out"
        )
    (out / WORK).mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(request))
    return splits


def _prepare_split(
    dataset: Dataset, out: epath.Path, split: str, shard_examples: int, runner: str, options: Any
) -> dict[str, Any]:
    """Writes all shards of a split and returns its part of the manifest."""
    if not re.fullmatch(r"\w+", split) or not re.fullmatch(r"[a-z]\w*", dataset.name):
        raise UserError(f"{dataset.name}, split {split!r}: names may hold letters, digits and underscores")
    plan = _plan(dataset, out, split, shard_examples)
    job = Job(dataset, split, str(out), plan["shards"], plan["examples"])
    missing = [k for k in range(job.count) if not _is_written(job, k)]
    if missing:
        for path in _errors(job):
            path.unlink()
        write_whole(_work(job) / JOB, pickle.dumps(job))
        title = f"{dataset.name} {split}"
        with quiet_workers() as terminal, progress(title, job.count, lambda: _finished(job), terminal):
            run_elements(write_shard, missing, options, runner, str(_work(job) / JOB), time.time_ns())
        if errors := [read_text(path) for path in _errors(job)]:
            more = f" (and {len(errors) - 1} other shards have errors)" if len(errors) > 1 else ""
            raise UserError(f"{errors[0]}{more}; the other shards are kept: the same command continues")
    marks = [_read_mark(job, k) for k in range(job.count)]
    parts = [_read_part(job, k, mark) for k, mark in enumerate(marks)]
    index = join_indices(parts)
    file = index_name(split)
    with _whole_file(out, out / file) as path, path.open("wb") as opened:
        np.savez_compressed(opened, allow_pickle=False, **index)
    sides = index["sizes"].max(0, initial=1)
    return {
        "examples": plan["examples"],
        "extent": [*map(int, sides), max(1, int(index["segments"].max(initial=0)))],
        "notes": plan["notes"],
        "source": plan["source"],
        "shards": marks,
        "index": {"file": file, "bytes": (out / file).stat().length, "sha256": file_sha256(out / file)},
    }


def _plan(dataset: Dataset, out: epath.Path, split: str, shard_examples: int) -> dict[str, Any]:
    """Lists the entries of a split in a file for each shard, or takes over the list of an earlier call."""
    folder = out / WORK / split
    path = folder / "plan.json"
    if path.exists():
        plan = read_json(path)
        with reading(path):
            whole(plan["shards"], "'shards'", 1)
            whole(plan["examples"], "'examples'", 1)
            changed = plan["source"] != dataset.stamp()
        if changed:
            raise UserError(
                f"the files in {dataset.source} have changed since {out} was begun: delete {out / WORK}, or choose "
                "another --out"
            )
        return plan
    folder.mkdir(parents=True, exist_ok=True)
    dataset.notes.clear()
    keys: set[str] = set()
    with tempfile.TemporaryDirectory() as scratch:
        # The number of shards depends on the number of entries, which is known at the end.
        listing = os.path.join(scratch, "entries")
        with open(listing, "w", encoding="utf-8") as file:
            for key, data in dataset.entries(split):
                if key in keys:
                    raise UserError(f"{dataset.name}, split {split}, has two examples {key!r}")
                keys.add(key)
                file.write(json.dumps([key, data]) + "\n")
        if not keys:
            raise UserError(f"{dataset.name}, split {split}, has no example in {dataset.source}")
        count = min(_MOST_SHARDS, -(-len(keys) // shard_examples))
        with open(listing, encoding="utf-8") as file:
            for k in range(count):
                lines = "".join(file.readline() for _ in range(_shard_length(len(keys), count, k)))
                write_whole(folder / f"{k:05d}.entries", lines)
    plan = {"examples": len(keys), "shards": count, "notes": list(dataset.notes), "source": dataset.stamp()}
    write_whole(path, json.dumps(plan))
    return plan


def _shard_length(examples: int, count: int, shard: int) -> int:
    """Returns the number of examples in one of `count` shards."""
    return examples * (shard + 1) // count - examples * shard // count


@functools.lru_cache(maxsize=1)
def _load_job(path: str, begun: int) -> Job:
    return pickle.loads(epath.Path(path).read_bytes())


def write_shard(shard: int, path: str, begun: int) -> None:
    """Writes one shard, unless it is there; a mistake in the data is left in a file for the main process.

    Args:
      shard: its number, from 0.
      path: the pickled job, which `prepare` has written. It is not part of the pipeline, since the list of a data
        set's files may have more bytes than a pipeline may.
      begun: the time at which it was written, so that a worker does not use what it loaded for an earlier one.
    """
    job = _load_job(path, begun)
    if _is_written(job, shard):
        return
    try:
        _write_shard(shard, job)
    except UserError as error:
        write_whole(_work(job) / f"{shard:05d}.error", str(error), shared=True)


def _write_shard(shard: int, job: Job) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    silence_beam()
    serialize, provides = serializer(tfds_features(job.dataset)), fields_of(job.dataset)
    out = epath.Path(job.out)
    target = out / shard_name(job.dataset.name, job.split, shard, job.count)
    rows = []
    with _whole_file(out, target) as path:
        writer = ArrayRecordWriter(str(path), "group_size:1")
        try:
            for key, data in _read_entries(job, shard):
                example = complete(job.dataset, key, job.dataset.example(job.split, Entry(key, data)))
                writer.write(serialize(encode(key, example, job.dataset.wide)))
                rows.append({k: v for k, v in example.items() if k not in ("image", "segments")})
        finally:
            writer.close()
        size, digest = path.stat().length, file_sha256(path)
    with _whole_file(out, _part(job, shard)) as path, path.open("wb") as opened:
        np.savez(opened, allow_pickle=False, **make_index(rows, provides))
    mark = {"file": target.name, "examples": len(rows), "bytes": size, "sha256": digest}
    write_whole(_mark(job, shard), json.dumps(mark), shared=True)


@contextlib.contextmanager
def _whole_file(out: epath.Path, target: epath.Path) -> Iterator[epath.Path]:
    """Gives a local temporary path, and moves the file there to `target` at the end.

    The name is unique, since a runner may start an element twice.
    """
    if "://" not in str(out):
        path = out / WORK / f"{uuid.uuid4().hex}.tmp"
        try:
            yield path
            with path.open("rb") as file:
                os.fsync(file.fileno())  # a power cut must not leave a mark of a shard that is not on disk
            path.replace(target)
        finally:
            path.unlink(missing_ok=True)
        return
    with tempfile.TemporaryDirectory() as scratch:
        path = epath.Path(scratch) / target.name
        yield path
        path.copy(target, overwrite=True)


def _work(job: Job) -> epath.Path:
    return epath.Path(job.out) / WORK / job.split


def _mark(job: Job, shard: int) -> epath.Path:
    return _work(job) / f"{shard:05d}.json"


def _part(job: Job, shard: int) -> epath.Path:
    return _work(job) / f"{shard:05d}.npz"


def _finished(job: Job) -> int:
    return sum(re.fullmatch(r"\d+\.json", path.name) is not None for path in _work(job).iterdir())


def _errors(job: Job) -> list[epath.Path]:
    return sorted(path for path in _work(job).iterdir() if path.name.endswith(".error"))


def _read_entries(job: Job, shard: int) -> Iterator[Entry]:
    path = _work(job) / f"{shard:05d}.entries"
    lines = read_text(path).split("\n")[:-1]
    with reading(path):
        if len(lines) != _shard_length(job.examples, job.count, shard):
            raise ValueError(f"it lists {len(lines)} examples: delete {_work(job).parent}, and repeat")
        for line in lines:
            key, data = parse_json(line)
            yield Entry(key, data)


def _read_mark(job: Job, shard: int) -> dict[str, Any]:
    path = _mark(job, shard)
    mark = read_json(path)
    with reading(path):
        whole(mark["examples"], "'examples'")
        file = epath.Path(job.out) / text(mark["file"], "'file'")
        if not file.exists() or file.stat().length != mark["bytes"]:
            raise ValueError(f"{file} is missing or has changed since it was written")
    return mark


def _is_written(job: Job, shard: int) -> bool:
    """Tells whether a shard is finished; one whose files were removed or cut off since is written again."""
    if not _mark(job, shard).exists():
        return False
    try:
        _read_part(job, shard, _read_mark(job, shard))
    except UserError as error:
        _LOG.warning("%s: it is written again", error)
        return False
    return True


def _read_part(job: Job, shard: int, mark: dict[str, Any]) -> Index:
    return read_index(_part(job, shard), mark["examples"], fields_of(job.dataset))


def _finish(dataset: Dataset, out: epath.Path, splits: dict[str, Any]) -> None:
    """Writes the metadata of TensorFlow Datasets, the classes and the manifest of the finished splits."""
    import tensorflow_datasets as tfds

    infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[shard["examples"] for shard in entry["shards"]],
            num_bytes=sum(shard["bytes"] for shard in entry["shards"]),
        )
        for split, entry in splits.items()
    ]
    with tempfile.TemporaryDirectory() as scratch:
        # In a folder of its own: TFDS would take the files of an unfinished split for a split.
        for entry in splits.values():
            for shard in entry["shards"]:
                open(os.path.join(scratch, shard["file"]), "w").close()
        tfds.folder_dataset.write_metadata(
            data_dir=scratch,
            features=tfds_features(dataset),
            split_infos=infos,
            version=dataset.version,
            check_data=False,
            description=dataset.about,
            homepage=dataset.homepage,
            license=dataset.licence,
        )
        for file in os.listdir(scratch):
            if ".array_record-" not in file:
                with open(os.path.join(scratch, file), "rb") as opened:
                    write_whole(out / file, opened.read())
    write_whole(out / CLASSES, dataset.classes.to_json())
    manifest = {
        "format": FORMAT,
        **_request(dataset),
        "about": dataset.about,
        "homepage": dataset.homepage,
        "licence": dataset.licence,
        "provides": sorted(fields_of(dataset)),
        "written_by": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "splits": splits,
    }
    write_whole(out / MANIFEST, json.dumps(manifest, indent=1) + "\n")

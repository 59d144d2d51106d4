"""A whole run: its folder, stages, vocabulary, training, final evaluation and summary.

WORKDIR/config.json     the resolved config            WORKDIR/metrics.jsonl   one JSON object a line
WORKDIR/words.json      the caption vocabulary         WORKDIR/summary.json    final scores
WORKDIR/classes.json    the training data's classes    WORKDIR/tables/*.csv    scores of each class
WORKDIR/checkpoints/    see `train.checkpoints`
WORKDIR/<stage>/        each stage of `config.stages`, which runs first: see `experiment.stages`
WORKDIR/...             further files of a method, see `protocols.Trainable`
"""

import contextlib
import csv
import dataclasses
import io
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ovseg_jax import config as config_lib
from ovseg_jax.errors import UserError
from ovseg_jax.experiment.changes import class_differences, config_differences
from ovseg_jax.experiment.features import cached_features
from ovseg_jax.experiment.keys import check_config
from ovseg_jax.experiment.load import CLASSES_FILE, WORDS_FILE, Run, load_run, read_classes, read_method
from ovseg_jax.experiment.stages import check_finished, run_stages
from ovseg_jax.experiment.tables import score_table
from ovseg_jax.files import forget, is_recorded, locked, read_recorded, record, write_recorded, write_whole
from ovseg_jax.parallel.sharding import make_mesh
from ovseg_jax.protocols import Classifier, Evaluator, Segmenting, Trainable, Variables
from ovseg_jax.reading import DAMAGE
from ovseg_jax.towers.prompt_file import FILE as PROMPT_FILE
from ovseg_jax.train.checkpoints import (
    disk_full_message,
    is_disk_full,
    read_config,
    with_own_text,
    write_config,
)
from ovseg_jax.train.loop import Fit, fit
from ovseg_jax.train.progress import clock
from ovseg_jax.vocab.classes import ClassList
from ovseg_jax.vocab.words import WordList

SUMMARY_FILE = "summary.json"
_log = logging.getLogger(__name__)


class Parts(NamedTuple):
    """The objects that a config describes."""

    method: Any
    words: WordList
    classes: ClassList
    mesh: Mesh


# Draws the pictures at the end of a run: (workdir, run, whether existing pictures are outdated).
Finish = Callable[[epath.Path, Run, bool], None]


def train(config: ConfigDict, workdir: epath.PathLike, *, finish: Finish | None = None) -> dict[str, Any]:
    """Trains a run from scratch or from its last checkpoint, and evaluates it at the end.

    Args:
      config: see `configs/`.
      workdir: a folder or a bucket; created if missing.
      finish: called after the final evaluation, on all processes; its exceptions are logged as warnings.

    Returns:
      The summary, which is also in `summary.json`: `steps`, `seconds`, `images_per_second`, `data_wait_seconds`, and
      "<evaluation>/<metric>" for each of `config.final_evals`. A run that was stopped by a signal returns
      {"steps": ..., "stopped": True} and writes no summary.

    Raises:
      UserError: the config, the data or a file is invalid, or the disk is full.
    """
    workdir = epath.Path(workdir)
    config = config_lib.from_json(config_lib.to_json(config))
    check_config(config)
    try:
        with _locked(workdir):
            return _train(config, workdir, finish)
    except (OSError, UserError) as error:
        if is_disk_full(error):
            raise UserError(disk_full_message(workdir)) from error
        raise


@contextlib.contextmanager
def _locked(workdir: epath.Path) -> Iterator[None]:
    """Locks the folder against other runs; the first process holds the lock, and all raise if it fails."""
    with contextlib.ExitStack() as stack:
        remedy = "wait for it, stop it, or choose another --workdir"
        _on_first_process(lambda: stack.enter_context(locked(workdir, remedy)))
        yield


def _on_first_process(action: Callable[[], Any]) -> None:
    """Runs an action on the first process while the others wait; if it raises a UserError, all processes raise one."""
    problem = None
    if jax.process_index() == 0:
        try:
            action()
        except UserError as error:
            problem = error
    if jax.process_count() > 1 and multihost_utils.broadcast_one_to_all(problem is not None):
        raise problem or UserError("the first process has stopped with an error")
    if problem:
        raise problem


def evaluate(config: ConfigDict, workdir: epath.PathLike) -> dict[str, float]:
    """Evaluates the last checkpoint in `workdir` by `config.final_evals`, or by `config.evals` if there are none.

    Method and vocabulary are those of the run; from `config` only the evaluations, their data, the mesh and the
    sharding are used.
    """
    workdir = epath.Path(workdir)
    config = config_lib.resolved(config, workdir)
    mesh = make_mesh(config.get("mesh"))
    run = load_run(workdir, mesh, rules=config.get("sharding"))
    scores, tables = run_evaluators(final_evaluators(config, run.method, mesh), run.variables)
    if jax.process_index() == 0:
        write_tables(workdir, tables)
        print(f"{workdir} at step {run.step}\n{score_table(scores)}")
    return scores


def _train(config: ConfigDict, workdir: epath.Path, finish: Finish | None) -> dict[str, Any]:
    prepare_workdir(workdir, config)
    if not run_stages(config, workdir, train):
        return {"steps": 0, "stopped": True}
    config = config_lib.resolved(config, workdir)
    from ovseg_jax.data.pipeline import train_iterator
    from ovseg_jax.data.sources.build import make_source
    from ovseg_jax.methods import training_rows

    source = make_source(config.data.train)
    parts = make_parts(config, workdir, source)
    stream = config
    if config.data.get("cache_features", 0):
        source = cached_features(config, workdir, parts, source)
        # No images are decoded any more, and each worker would hold a copy of all features.
        stream = config.copy_and_resolve_references()
        stream.data.workers = 0
    process = dict(process_index=jax.process_index(), process_count=jax.process_count())
    rows = training_rows(config, parts.method, parts.words)
    batches = lambda start: train_iterator(stream, rows, start=start, source=source, **process)
    result = fit(
        config, workdir, parts.method, batches, _evaluators(config, parts.method, parts.mesh), parts.mesh
    )
    if result.stopped:
        return {"steps": result.step, "stopped": True}
    run = Run(config, parts.method, result.state.averaged, parts.words, parts.classes, result.step)
    before = _read_summary(workdir)
    done = before is not None and before["steps"] == result.step and result.started == result.step
    # Written before the evaluation, so that they exist even if it fails.
    artifacts = parts.method.artifacts(run.variables)
    if jax.process_index() == 0:
        for name, write in artifacts.items():
            if not (done and (workdir / name).exists()):
                forget(workdir / name)
                write(workdir / name)
                if (workdir / name).is_file():  # A folder contains checksums of its own.
                    record(workdir / name)
    if before is not None and done:
        summary = before
        if jax.process_index() == 0:
            print(
                f"{workdir} has already completed its {result.step} steps; a new run needs another --workdir"
            )
    else:
        scores, tables = run_evaluators(final_evaluators(config, parts.method, parts.mesh), run.variables)
        summary = _summary(result, scores)
        if jax.process_index() == 0:
            write_tables(workdir, tables)
            _write_summary(workdir, summary)
    if finish is not None:
        _draw(finish, workdir, run, summary)
    if jax.process_index() == 0:
        _show(workdir, summary, parts.method)
    return summary


def _draw(finish: Finish, workdir: epath.Path, run: Run, summary: dict[str, Any]) -> None:
    """Draws the missing or outdated pictures of a finished run; failures are logged as warnings."""
    try:
        finish(workdir, run, summary.get("drawn") != run.step)
    except Exception as error:
        _log.warning("%s: the pictures were not drawn (%s: %s)", workdir, type(error).__name__, error)
        return
    if jax.process_index() == 0 and summary.get("drawn") != run.step:
        _write_summary(workdir, summary | {"drawn": run.step})


def _write_summary(workdir: epath.Path, summary: Mapping[str, Any]) -> None:
    write_recorded(workdir / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")


def prepare_workdir(workdir: epath.Path, config: ConfigDict) -> None:
    """Creates the folder and writes `config.json`, unless the folder holds a run of another config.

    Raises:
      UserError: it does, or a finished stage has another config; the message lists the keys that differ.
    """
    check_finished(config, workdir)
    before = read_config(workdir)
    if before is not None and (differing := config_differences(before, config)):
        raise UserError(
            f"{workdir} holds a run with another config: {'; '.join(differing)}. "
            "Choose another --workdir, or delete that folder."
        )
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        write_config(workdir, config)


def make_parts(config: ConfigDict, workdir: epath.Path, source: Any) -> Parts:
    """Creates the method of a run; for a new run, builds and saves its vocabulary first."""
    config = with_own_text(config, workdir)
    _on_first_process(lambda: _write_vocabulary(config, workdir, source))
    parts = Parts(*read_method(config, workdir), make_mesh(config.get("mesh")))
    if jax.process_index() == 0:
        parts.method.save_assets(workdir)
    return parts


def _counted(source: Any) -> ClassList:
    """Returns the classes of a source, with example counts if each example has one class."""
    if source.labels is None:
        return source.classes
    counts = source.counts
    if counts is None:
        counts = np.bincount(source.labels, minlength=len(source.classes))
    return dataclasses.replace(source.classes, examples=tuple(counts.tolist()))


def _write_vocabulary(config: ConfigDict, workdir: epath.Path, source: Any) -> None:
    _write_classes(workdir, source)
    _write_words(config, workdir, source)


def _write_words(config: ConfigDict, workdir: epath.Path, source: Any) -> None:
    """Writes the vocabulary if it is missing or damaged.

    Raises:
      UserError: the captions now give other words than at the start of the run.
    """
    from ovseg_jax.methods import method_type

    path = workdir / WORDS_FILE
    there = path.exists()
    if there and (is_recorded(path) or (is_recorded(path) is None and _reads(WordList.load, path))):
        return
    words = WordList(method_type(config.method).vocabulary(config, source)).to_json()
    if is_recorded(path, words) is False:
        raise UserError(
            f"{path} is {'damaged' if there else 'missing'} and cannot be rebuilt, since the captions have changed: "
            "choose another --workdir"
        )
    if there:
        _log.warning("%s was damaged and is made again", path)
    write_recorded(path, words)


def _reads(read: Callable[[epath.Path], Any], path: epath.Path) -> bool:
    try:
        read(path)
    except UserError:
        return False
    return True


def _write_classes(workdir: epath.Path, source: Any) -> None:
    """Writes the class list if it is missing or damaged.

    Raises:
      UserError: the classes of the data have changed since the start of the run.
    """
    path, now = workdir / CLASSES_FILE, ClassList.from_json(_counted(source).to_json())
    there = path.exists()
    if there and _reads(lambda path: read_classes(path.parent), path):
        if differing := class_differences(read_classes(workdir), now):
            raise UserError(
                f"the classes of the data have changed since {workdir} began: {'; '.join(differing)}. Restore the "
                "data, or choose another --workdir"
            )
        return
    if is_recorded(path, now.to_json()) is False:
        raise UserError(
            f"{path} is {'damaged' if there else 'missing'} and cannot be rebuilt, since the classes of the data have "
            "changed: choose another --workdir"
        )
    if there:
        _log.warning("%s was damaged and is made again", path)
    write_recorded(path, now.to_json())


def final_evaluators(config: ConfigDict, method: Any, mesh: Mesh) -> list[Any]:
    """Creates the evaluators for the end of a run."""
    return _evaluators(config, method, mesh, "final_evals" if config.get("final_evals") else "evals")


def run_evaluators(
    evaluators: Sequence[Evaluator], variables: Variables
) -> tuple[dict[str, float], dict[str, list[Any]]]:
    """Runs each evaluator and returns ("<evaluation>/<metric>" -> value, "<evaluation>-<table>" -> rows)."""
    scores: dict[str, float] = {}
    tables: dict[str, list[Any]] = {}
    for evaluator in evaluators:
        for metric, value in evaluator.run(variables).items():
            scores[f"{evaluator.name}/{metric}"] = float(value)
        for table, rows in evaluator.tables.items():
            tables[f"{evaluator.name}-{table}"] = rows
    return scores, tables


def write_tables(workdir: epath.Path, tables: Mapping[str, Sequence[Any]]) -> None:
    """Writes each table of named tuples as `tables/<name>.csv`."""
    for name, rows in tables.items():
        if not rows:
            continue
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(rows[0]._fields)
        writer.writerows(rows)
        path = workdir / "tables" / f"{name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text.getvalue(), shared=True)  # `--mode=eval` may run beside the training


def _evaluators(config: ConfigDict, method: Any, mesh: Mesh, key: str = "evals") -> list[Any]:
    from ovseg_jax.evals.registry import make_evaluators

    return make_evaluators(config, method, mesh, key)


def _read_summary(workdir: epath.Path) -> dict[str, Any] | None:
    """Reads the summary of a finished run; None if it is missing, or damaged, which is logged."""
    path = workdir / SUMMARY_FILE
    if not path.exists():
        return None
    try:
        summary = json.loads(read_recorded(path))
        if all(isinstance(summary[key], int | float) for key in _SUMMARY_KEYS):
            return summary
    except (UserError, *DAMAGE):
        pass
    _log.warning("%s is damaged and is made again", path)
    return None


_SUMMARY_KEYS = ("steps", "seconds", "images_per_second", "data_wait_seconds")


def _summary(result: Fit, scores: Mapping[str, float]) -> dict[str, Any]:
    rate, waited, seconds = result.images_per_second, result.data_wait_seconds, result.seconds
    return {
        "steps": result.step,
        "seconds": round(seconds, 1),
        "images_per_second": round(rate, 2),
        "data_wait_seconds": round(waited, 2),
        **scores,
    }


def _show(workdir: epath.Path, summary: Mapping[str, Any], method: Trainable) -> None:
    rate, waited = summary["images_per_second"], summary["data_wait_seconds"]
    took = clock(summary["seconds"])
    print(f"{summary['steps']} steps in {took}, {rate:.1f} images/s, {waited:.1f} s waiting for data")
    print(score_table({name: value for name, value in summary.items() if "/" in name}))
    if isinstance(method, Segmenting):
        print(
            f'next: python -m ovseg_jax.predict --checkpoint={workdir} --images=FILE --labels="WORDS" --out=DIR'
        )
    elif (workdir / PROMPT_FILE).exists():
        print(f"next: python -m ovseg_jax.prompts --checkpoint={workdir} --classes=FILE --out=vectors.npy")
    elif isinstance(method, Classifier):
        print(f"next: python -m ovseg_jax.score suite --checkpoint={workdir} --suite=pomp --data_dir=DIR")

"""One run, from a config to scores: its folder, its vocabulary, training, the final evaluation, the summary.

WORKDIR/config.json     the resolved config            WORKDIR/metrics.jsonl   one JSON object a line
WORKDIR/words.json      the caption vocabulary         WORKDIR/summary.json    final scores
WORKDIR/classes.json    the training data's classes    WORKDIR/tables/*.csv    IoU of each class
WORKDIR/checkpoints/    see `train.checkpoints`
WORKDIR/<stage>/        the run of each stage of `config.before`, which comes first
WORKDIR/...             what else a method leaves, see `protocols.Trainable`
"""

import csv
import dataclasses
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ovseg_jax import config as config_lib
from ovseg_jax.errors import UserError
from ovseg_jax.evals.runner import Evaluator
from ovseg_jax.experiment.features import cached_features
from ovseg_jax.parallel.sharding import DEFAULT_RULES, make_mesh
from ovseg_jax.protocols import Classifier, Segmenting, Trainable, Variables
from ovseg_jax.towers.frozen_text import FrozenText
from ovseg_jax.towers.prompt_file import FILE as PROMPT_FILE
from ovseg_jax.train.checkpoints import (
    CONFIG_FILE,
    TEXT_TOWER,
    disk_full_message,
    is_disk_full,
    load_variables,
    read_config,
    with_own_text,
    write_config,
)
from ovseg_jax.train.loop import Fit, fit
from ovseg_jax.train.progress import clock
from ovseg_jax.vocab.classes import ClassList
from ovseg_jax.vocab.words import WordList

# What may change between two starts of one run: it alters what is reported or where, never what is learned.
HARMLESS = (
    "accumulate",
    "checkpoint",
    "data.prefetch",
    "data.threads",
    "data.workers",
    "evals",
    "final_evals",
    "log_every",
    "mesh",
    "profile",
    "sharding",
    "tensorboard",
)

SUMMARY_FILE, WORDS_FILE, CLASSES_FILE = "summary.json", "words.json", "classes.json"


class Parts(NamedTuple):
    """What a config stands for, assembled."""

    method: Any
    words: WordList
    classes: ClassList
    mesh: Mesh


# Called at the end of a run to draw what a person wants to see: (config, workdir, parts, variables).
Finish = Callable[[ConfigDict, epath.Path, Parts, Variables], None]


def train(config: ConfigDict, workdir: epath.PathLike, *, finish: Finish | None = None) -> dict[str, Any]:
    """Trains, or goes on training, and evaluates at the end.

    Args:
      config: see `configs/`.
      workdir: a folder or a bucket; made where it is missing.
      finish: called after the final evaluation, on all processes.

    Returns:
      The summary, which is also in `summary.json`: `steps`, `seconds`, `images_per_second`,
      `data_wait_seconds`, and "<evaluation>/<metric>" for each of `config.final_evals`. A run that was told
      to stop returns {"steps": ..., "stopped": True} and writes no summary.

    Raises:
      UserError: for whatever the user can mend.
    """
    workdir = epath.Path(workdir)
    try:
        return _train(config_lib.from_json(config_lib.to_json(config)), workdir, finish)
    except OSError as error:
        if is_disk_full(error):
            raise UserError(disk_full_message(workdir)) from error
        raise


def evaluate(config: ConfigDict, workdir: epath.PathLike) -> dict[str, float]:
    """Runs `config.final_evals` (or `config.evals` where there are none) on the last checkpoint in `workdir`.

    The network and its vocabulary are those of the run; of `config`, only the evaluations, their data and the
    mesh are used.
    """
    workdir = epath.Path(workdir)
    config = config_lib.resolved(config, workdir)
    mesh = make_mesh(config.get("mesh"))
    trained, variables, step = load_variables(workdir, mesh=mesh, rules=config.get("sharding", DEFAULT_RULES))
    parts = load_parts(trained, workdir, mesh)
    scores, tables = run_evaluators(final_evaluators(config, parts), variables)
    if jax.process_index() == 0:
        write_tables(workdir, tables)
        print(f"{workdir} at step {step}\n{score_table(scores)}")
    return scores


def _train(config: ConfigDict, workdir: epath.Path, finish: Finish | None) -> dict[str, Any]:
    prepare_workdir(workdir, config)
    if not _train_before(config, workdir):
        return {"steps": 0, "stopped": True}
    config = config_lib.resolved(config, workdir)
    from ovseg_jax.data.pipeline import make_source, train_iterator
    from ovseg_jax.methods import training_rows

    source = make_source(config.data.train)
    parts = make_parts(config, workdir, source)
    stream = config
    if config.data.get("cache_features", 0):
        source = cached_features(config, workdir, parts, source)
        # Nothing is left to decode, and each worker would have a copy of all features.
        stream = config.copy_and_resolve_references()
        stream.data.workers = 0
    process = dict(process_index=jax.process_index(), process_count=jax.process_count())
    rows = training_rows(config, parts.method, parts.words)
    batches = lambda start: train_iterator(stream, rows, start=start, source=source, **process)
    result = fit(config, workdir, parts.method, batches, _evaluators(config, parts), parts.mesh)
    if result.stopped:
        return {"steps": result.step, "stopped": True}
    before = _read_summary(workdir)
    if before is not None and before["steps"] == result.step and result.started == result.step:
        if jax.process_index() == 0:
            print(f"{workdir} has already made its {result.step} steps; a new run needs another --workdir")
            _show(workdir, before, parts.method)
        return before
    # Before the evaluation: whatever happens there, what was learned is there.
    artifacts = getattr(parts.method, "artifacts", _no_artifacts)(result.state.averaged)
    if jax.process_index() == 0:
        for name, write in artifacts.items():
            write(workdir / name)
    scores, tables = run_evaluators(final_evaluators(config, parts), result.state.averaged)
    summary = _summary(result, scores)
    if jax.process_index() == 0:
        write_tables(workdir, tables)
        (workdir / SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n")
    if finish is not None:
        finish(config, workdir, parts, result.state.averaged)
    if jax.process_index() == 0:
        _show(workdir, summary, parts.method)
    return summary


def _no_artifacts(variables: Variables) -> dict[str, Callable[[epath.Path], None]]:
    return {}


def _train_before(config: ConfigDict, workdir: epath.Path) -> bool:
    """Trains the stages of `config.before` that are not there yet; False where one was told to stop.

    A stage that speaks of another one ("before:NAME") comes after it.
    """
    waiting = dict((config.get("before") or {}).items())
    while waiting:
        free = [name for name, stage in waiting.items() if not config_lib.needed(stage) & waiting.keys()]
        if not free:
            raise UserError(f"config.before: each of {', '.join(waiting)} waits for another one of them")
        stage = waiting.pop(free[0])
        done = _read_summary(workdir / free[0])
        if done is not None and done["steps"] >= stage.steps:
            continue
        if jax.process_index() == 0:
            print(f"first: {free[0]}, in {workdir / free[0]}", flush=True)
        if train(config_lib.resolved(stage, workdir), workdir / free[0]).get("stopped"):
            return False
        multihost_utils.sync_global_devices("the first process has written all of a stage")
    return True


def prepare_workdir(workdir: epath.Path, config: ConfigDict) -> None:
    """Makes the folder and writes `config.json`, unless another run lives there.

    Raises:
      UserError: listing the keys in which that run's config differs.
    """
    before = read_config(workdir)
    if before is not None and (differing := config_differences(before, config)):
        raise UserError(
            f"{workdir} holds a run of another config: {'; '.join(differing)}. "
            "Choose another --workdir, or delete that folder."
        )
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        write_config(workdir, config)


def config_differences(before: ConfigDict, now: ConfigDict) -> list[str]:
    """What keeps a run from going on under another config, as "key was a, is b"; [] where nothing does.

    The keys in HARMLESS may change, and `steps` may grow (a schedule over `steps` then changes with it).
    """
    old, new = _flat(before.to_dict()), _flat(now.to_dict())
    if old.get("steps", 0) <= new.get("steps", 0):
        new["steps"] = old.get("steps", new.get("steps"))
    differing = [k for k in sorted(old.keys() | new.keys()) if old.get(k, _ABSENT) != new.get(k, _ABSENT)]
    return [
        f"{key} was {old.get(key, _ABSENT)}, is {new.get(key, _ABSENT)}"
        for key in differing
        if not any(key == harmless or key.startswith(harmless + ".") for harmless in HARMLESS)
    ]


_ABSENT = "absent"


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, Mapping):
        items: Iterable[tuple[Any, Any]] = tree.items()
    elif isinstance(tree, list | tuple):
        items = enumerate(tree)
    else:
        return {prefix: json.dumps(tree)}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat.update(_flat(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def make_parts(config: ConfigDict, workdir: epath.Path, source: Any) -> Parts:
    """Assembles a run that may be new: its vocabulary is built from the captions once, and kept."""
    from ovseg_jax.methods import method_class

    new = not (workdir / WORDS_FILE).exists() or not (workdir / CLASSES_FILE).exists()
    config = with_own_text(config, workdir)
    multihost_utils.sync_global_devices("all have looked before one writes")
    if new:
        words = method_class(config).vocabulary(config, source)
        if jax.process_index() == 0:
            words.save(workdir / WORDS_FILE)
            (workdir / CLASSES_FILE).write_text(_counted(source).to_json())
        multihost_utils.sync_global_devices("vocabulary")
    parts = load_parts(config, workdir, make_mesh(config.get("mesh")))
    text = getattr(parts.method, "text", None)
    local = "://" not in str(workdir)  # A tokeniser reads local files.
    if isinstance(text, FrozenText) and local and jax.process_index() == 0:
        folder = Path(workdir) / TEXT_TOWER
        if not (folder / CONFIG_FILE).exists():
            text.save(folder)
    return parts


def _counted(source: Any) -> ClassList:
    """The classes of a source, with their numbers of examples where each example is of one class."""
    if source.labels is None:
        return source.classes
    counts = source.counts
    if counts is None:
        counts = np.bincount(source.labels, minlength=len(source.classes))
    return dataclasses.replace(source.classes, examples=tuple(counts.tolist()))


def load_parts(config: ConfigDict, workdir: epath.Path, mesh: Mesh) -> Parts:
    """Assembles a run that exists, without looking at its training data."""
    from ovseg_jax.methods import build

    path = workdir / CLASSES_FILE
    try:
        classes = ClassList.from_json(path.read_text())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read as a class list ({error}).") from error
    words = WordList.load(workdir / WORDS_FILE)
    return Parts(build(config, words, classes), words, classes, mesh)


def final_evaluators(config: ConfigDict, parts: Parts) -> list[Any]:
    """The evaluators of the end of a run."""
    return _evaluators(config, parts, "final_evals" if config.get("final_evals") else "evals")


def run_evaluators(
    evaluators: Sequence[Evaluator], variables: Variables
) -> tuple[dict[str, float], dict[str, list[Any]]]:
    """Runs each and returns ("<evaluation>/<metric>" -> value, "<evaluation>-<table>" -> rows)."""
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
        path.write_text(text.getvalue())


def score_table(scores: Mapping[str, float]) -> str:
    """A table for each evaluation: mIoU, of groups too, under both divisors and beside chance; then the rest."""
    lines = []
    for evaluation in dict.fromkeys(name.split("/")[0] for name in scores):
        own = {
            k.removeprefix(f"{evaluation}/"): v for k, v in scores.items() if k.startswith(f"{evaluation}/")
        }
        if not any("miou" in name for name in own) or any("[" in name for name in own):
            lines += _prompt_table(evaluation, own)
            continue
        lines.append(f"  {evaluation:<24}{'mIoU':>8}{'mIoU_gt':>10}{'chance':>9}")
        for name in [name for name in own if name.split("/")[0] == "miou" or name.startswith("miou@")]:
            row = [own.get(name.replace("miou", column, 1)) for column in ("miou", "miou_gt", "chance_miou")]
            cells = "".join(
                f"{'' if x is None else f'{x:.2f}':>{w}}" for x, w in zip(row, (8, 10, 9), strict=True)
            )
            lines.append(f"    {name.removeprefix('miou').lstrip('/') or 'all classes':<22}{cells}")
        rest = [name for name in own if "miou" not in name or name.startswith("grounding")]
        lines += [f"    {name:<22}{own[name]:8.2f}" for name in rest]
    return "\n".join(lines)


def _prompt_table(evaluation: str, scores: Mapping[str, float]) -> list[str]:
    """Of a classification: a line for each metric, a column for each prompt ("accuracy", "accuracy[hard]")."""
    cells: dict[str, dict[str, float]] = {}
    for key, value in scores.items():
        name, _, prompt = key.removesuffix("]").partition("[")
        cells.setdefault(name, {})[prompt] = value
    prompts = list(dict.fromkeys(prompt for row in cells.values() for prompt in row))
    lines = [f"  {evaluation:<26}" + "".join(f"{prompt:>13}" for prompt in prompts)]
    for name, row in cells.items():
        numbers = (f"{row[prompt]:>13.2f}" if prompt in row else " " * 13 for prompt in prompts)
        lines.append(f"    {name:<24}" + "".join(numbers))
    return lines


def _evaluators(config: ConfigDict, parts: Parts, key: str = "evals") -> list[Any]:
    from ovseg_jax.evals.runner import make_evaluators

    return make_evaluators(config, parts.method, parts.mesh, key)


def _read_summary(workdir: epath.Path) -> dict[str, Any] | None:
    path = workdir / SUMMARY_FILE
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except ValueError:
        return None  # A run killed while it wrote this; it is written anew.


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
        print(f"next: python -m ovseg_jax.score --checkpoint={workdir} --suite=pomp --data_dir=DIR")

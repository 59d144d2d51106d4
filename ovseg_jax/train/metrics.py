"""Metrics of a run: their accumulation and their output to `metrics.jsonl`, TensorBoard and Weights & Biases.

Every metric is a sum and a count over valid examples, which are only divided here.
"""

import contextlib
import importlib.util
import json
import logging
import math
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from etils import epath

from ovseg_jax.errors import UserError, optional
from ovseg_jax.files import write_whole
from ovseg_jax.reading import DAMAGE, parse_json, read_lines, read_text, reading, reason, short, whole

METRICS_FILE, WANDB_FILE = "metrics.jsonl", "wandb.id"
Sums = dict[str, tuple[float, float]]
_log = logging.getLogger(__name__)


def to_host(metrics: Mapping[str, tuple[Any, Any]]) -> Sums:
    """Waits for one step's (sum, count) pairs and copies them to the host in one transfer."""
    return {
        name: (float(total), float(count)) for name, (total, count) in jax.device_get(dict(metrics)).items()
    }


def add(a: Mapping[str, tuple[float, float]], b: Mapping[str, tuple[float, float]]) -> Sums:
    """Adds two sets of (sum, count) pairs; a name may be missing on either side."""
    zero = (0.0, 0.0)
    names = dict.fromkeys([*a, *b])
    return {n: (a.get(n, zero)[0] + b.get(n, zero)[0], a.get(n, zero)[1] + b.get(n, zero)[1]) for n in names}


def means(sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Divides sums by counts; names with a count of 0 are left out."""
    return {name: total / count for name, (total, count) in sums.items() if count != 0}


def not_finite(sums: Mapping[str, tuple[float, float]]) -> list[str]:
    """Lists the names whose sum or count is not finite, the terms of the loss before the totals."""
    last = ("loss", "grad_norm", "param_norm")
    names = [name for name, pair in sums.items() if not all(map(math.isfinite, pair))]
    return sorted(names, key=lambda name: last.index(name) if name in last else -1)


class MetricWriter:
    """A writer of `metrics.jsonl`: one JSON object a line, each with `step`.

    A run that resumes at step s drops the records after s, which it will write again.

    Args:
      workdir: the folder of the file.
      step: the step that the run starts from.
      tensorboard: whether to also write event files, with clu, which needs TensorFlow.
      wandb: the project of Weights & Biases that also gets the metrics; "" for none. Its own settings, such as
        WANDB_MODE=offline, hold.
      config: the run's config, for Weights & Biases.
      write: False on all processes but the first.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        step: int = 0,
        tensorboard: bool = False,
        wandb: str = "",
        config: Mapping[str, Any] | None = None,
        write: bool = True,
    ):
        self._path = epath.Path(workdir) / METRICS_FILE
        self._write = write
        self._records = [record for record in _readable(workdir) if record["step"] <= step]
        self._boards: list[Any] = [_tensorboard(workdir)] if tensorboard and write else []
        if wandb and write:
            self._boards.append(_Wandb(workdir, wandb, config or {}))
        if write and self._path.exists():
            self._rewrite()

    @property
    def records(self) -> list[dict[str, Any]]:
        """All records so far, including those of earlier starts."""
        return list(self._records)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one record; numbers that are not finite, which JSON lacks, become null."""
        record = {"step": step} | {
            name: float(value) if math.isfinite(value) else None for name, value in values.items()
        }
        self._records.append(record)
        if not self._write:
            return
        if _appendable(self._path):
            with self._path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        else:
            self._rewrite()
        finite = {name: v for name, v in record.items() if name != "step" and v is not None}
        for board in self._boards:
            board.write_scalars(step, finite)

    def has(self, step: int, prefix: str) -> bool:
        """Tells whether a record of this step has a key that starts with `prefix`."""
        return any(r["step"] == step and any(k.startswith(prefix) for k in r) for r in self._records)

    def close(self) -> None:
        """Flushes the event files, and ends the run of Weights & Biases."""
        for board in self._boards:
            board.close()

    def _rewrite(self) -> None:
        write_whole(self._path, "".join(json.dumps(record) + "\n" for record in self._records))


def _readable(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """Reads the records of a run; from a damaged file only the valid ones, with a warning."""
    try:
        return read_metrics(workdir)
    except UserError as error:
        _log.warning("%s; the readable lines are kept", error)
    path, records = epath.Path(workdir) / METRICS_FILE, []
    with reading(path):
        lines = path.read_bytes().splitlines()
    for line in lines:
        with contextlib.suppress(*DAMAGE):
            record = json.loads(line)
            whole(record["step"], "'step'")
            records.append(record)
    return records


def read_metrics(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """Reads the records of a run in order; an incomplete last line, left by a killed run, is skipped.

    Raises:
      UserError: any other line is invalid.
    """
    path = epath.Path(workdir) / METRICS_FILE
    if not path.exists():
        return []
    records = []
    lines = list(read_lines(path))
    for number, line in lines:
        with reading(f"{path}, line {number},"):
            try:
                record = parse_json(line)
            except ValueError:
                if number == lines[-1][0]:
                    break
                raise
            if not isinstance(record, dict):
                raise ValueError(f"expected an object with a step, got {short(record)}")
            whole(record.get("step"), "'step'")
            records.append(record)
    return records


def series(records: Iterable[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Returns the steps and values of one metric."""
    pairs = [(int(r["step"]), float(r[name])) for r in records if type(r.get(name)) in (int, float)]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _appendable(path: epath.Path) -> bool:
    """Tells whether the file can be appended to; files in object stores are rewritten instead."""
    return "://" not in str(path)


def _tensorboard(workdir: epath.PathLike) -> Any:
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            "tensorboard=True needs TensorFlow: pip install -e '.[tensorboard]'; metrics.jsonl is written without it."
        )
    from clu import metric_writers

    return metric_writers.SummaryWriter(str(epath.Path(workdir) / "tensorboard"))


class _Wandb:
    """A run of Weights & Biases behind two methods of clu's `metric_writers.MetricWriter`, which has none for it."""

    def __init__(self, workdir: epath.PathLike, project: str, config: Mapping[str, Any]):
        wandb = optional(
            "wandb", f"wandb={project} needs Weights & Biases: pip install -e '.[wandb]' ({{error}})"
        )
        folder = epath.Path(workdir)
        # A run that resumes goes on under its identifier; one that starts anew in a cleared folder gets another.
        name = folder / WANDB_FILE
        if not name.exists():
            write_whole(name, uuid.uuid4().hex)
        try:
            self._run = wandb.init(
                project=project,
                id=read_text(name),
                name=folder.name,
                config=dict(config),
                resume="allow",
                dir=None if "://" in str(folder) else str(folder),
            )
        except Exception as error:  # Such as no login, or no network.
            raise UserError(
                f"wandb={project}: Weights & Biases did not start ({reason(error)}); "
                "WANDB_MODE=offline needs no account"
            ) from error
        # Weights & Biases' own step must not decrease, but that of a run resumed from a checkpoint does.
        self._run.define_metric("*", step_metric="step")

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log({"step": step, **scalars})

    def close(self) -> None:
        self._run.finish()

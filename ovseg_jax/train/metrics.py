"""Numbers on their way out: to `metrics.jsonl`, and to TensorBoard where that is asked for.

Every number is a sum and a count over the examples that are there, divided once, here.
"""

import contextlib
import importlib.util
import json
import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from etils import epath

from ovseg_jax.errors import UserError
from ovseg_jax.files import write_whole
from ovseg_jax.reading import DAMAGE, parse_json, read_lines, reading, short, whole

METRICS_FILE = "metrics.jsonl"
Sums = dict[str, tuple[float, float]]
_log = logging.getLogger(__name__)


def to_host(metrics: Mapping[str, tuple[Any, Any]]) -> Sums:
    """Waits for one step's (sum, count) pairs and brings them over in one transfer."""
    return {
        name: (float(total), float(count)) for name, (total, count) in jax.device_get(dict(metrics)).items()
    }


def add(a: Mapping[str, tuple[float, float]], b: Mapping[str, tuple[float, float]]) -> Sums:
    """Adds sums to sums and counts to counts; a name may be missing on either side."""
    zero = (0.0, 0.0)
    names = dict.fromkeys([*a, *b])
    return {n: (a.get(n, zero)[0] + b.get(n, zero)[0], a.get(n, zero)[1] + b.get(n, zero)[1]) for n in names}


def means(sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Sum over count; what was never counted has no mean and is left out."""
    return {name: total / count for name, (total, count) in sums.items() if count != 0}


def not_finite(sums: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names whose sum or count is NaN or infinite, those that say most about the cause first."""
    last = ("loss", "grad_norm", "param_norm")
    names = [name for name, pair in sums.items() if not all(map(math.isfinite, pair))]
    return sorted(names, key=lambda name: last.index(name) if name in last else -1)


class MetricWriter:
    """Appends records to `metrics.jsonl`: one JSON object a line, each with `step`.

    A run that is taken up again at step s drops the records beyond s, which it is about to write once more.

    Args:
      workdir: where the file is.
      step: the step that the run starts from.
      tensorboard: also write event files with clu, which needs TensorFlow.
      write: False on all processes but the first.
    """

    def __init__(
        self, workdir: epath.PathLike, *, step: int = 0, tensorboard: bool = False, write: bool = True
    ):
        self._path = epath.Path(workdir) / METRICS_FILE
        self._write = write
        self._records = [record for record in _readable(workdir) if record["step"] <= step]
        self._board = _tensorboard(workdir) if tensorboard and write else None
        if write and self._path.exists():
            self._rewrite()

    @property
    def records(self) -> list[dict[str, Any]]:
        """All records so far, those before a restart included."""
        return list(self._records)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one record. A value that is not finite is written as null, which JSON has a word for."""
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
        if self._board is not None:
            finite = {name: v for name, v in record.items() if name != "step" and v is not None}
            self._board.write_scalars(step, finite)

    def has(self, step: int, prefix: str) -> bool:
        """Whether a record of this step has a key that starts with `prefix`."""
        return any(r["step"] == step and any(k.startswith(prefix) for k in r) for r in self._records)

    def close(self) -> None:
        """Flushes what is buffered."""
        if self._board is not None:
            self._board.close()

    def _rewrite(self) -> None:
        write_whole(self._path, "".join(json.dumps(record) + "\n" for record in self._records))


def _readable(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """The records of a run that goes on; of a damaged file those that can be read, and this is said."""
    try:
        return read_metrics(workdir)
    except UserError as error:
        _log.warning("%s; the lines that can be read are kept", error)
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
    """The records of a run, in order. A last line that a killed run left unfinished is skipped.

    Raises:
      UserError: for a broken line elsewhere.
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
    """Steps and values of one metric, for a curve."""
    pairs = [(int(r["step"]), float(r[name])) for r in records if type(r.get(name)) in (int, float)]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _appendable(path: epath.Path) -> bool:
    """Object stores have no append: there the file is written anew."""
    return "://" not in str(path)


def _tensorboard(workdir: epath.PathLike) -> Any:
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            "tensorboard=True needs TensorFlow, which is not installed; metrics.jsonl needs nothing."
        )
    from clu import metric_writers

    return metric_writers.SummaryWriter(str(epath.Path(workdir) / "tensorboard"))

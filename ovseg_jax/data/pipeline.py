"""The grain pipelines: endless training batches from any step on, and padded evaluation batches.

    source -> shuffle each epoch anew -> repeat -> (mix) -> row of a batch -> this process's share -> batch

The content of a batch depends only on (seed, batch number), not on the number of processes, workers or threads. The
step number is therefore the whole position in the data: nothing else is saved, and a run can resume with another
number of processes or workers.
"""

import atexit
import dataclasses
import functools
import itertools
import math
import os
import signal
import sys
import threading
import weakref
from collections.abc import Collection, Iterator
from typing import Any

import grain
import numpy as np
from absl import flags

from ovseg_jax.data.evaluation import eval_rows
from ovseg_jax.data.fields import FIELDS
from ovseg_jax.data.mixing import MixingOrder
from ovseg_jax.data.mixture import Mixture
from ovseg_jax.data.rows import Rows
from ovseg_jax.data.source_base import Source, check_provides
from ovseg_jax.errors import UserError

__all__ = ["eval_batches", "train_iterator", "view_batches"]


def train_iterator(
    config: Any,
    make_row: Rows,
    *,
    source: Source,
    start: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Returns this process's part of an endless stream of training batches.

    Args:
      config: `seed`, `batch_size` (over all processes) and in `data`: `views` (number of consecutive rows that show one
        example, each augmented anew; 1 by default), `workers` (processes that decode and augment; 0 uses threads of
        this process), `threads` (0 makes batches on demand) and `prefetch` (batches that each worker keeps ready).
      make_row: makes the rows.
      source: the source of the examples, that of `config.data.train`.
      start: the number of the first batch.
      process_index: the index of this process.
      process_count: the number of processes, which share each batch evenly.

    Returns:
      A grain iterator over batches of `batch_size / process_count` consecutive rows of the whole batch.

    Raises:
      UserError: the config or the data is invalid; while iterating, a file is.
    """
    data, batch_size = config["data"], int(config["batch_size"])
    if batch_size % process_count:
        raise UserError(f"batch_size={batch_size} is not a multiple of the {process_count} processes")
    share = _Share(start, batch_size, process_index, process_count)
    rows = train_rows(config, make_row, source)
    batches = grain.MapDataset.select_from_datasets([rows], share).batch(share.rows)
    iterator = iter(_in_background(batches, data))
    # An iterator with workers that is still open when Python exits prints long error messages.
    atexit.register(_close, weakref.ref(iterator))
    return iterator


def train_rows(config: Any, make_row: Rows, source: Source) -> grain.MapDataset[dict[str, np.ndarray]]:
    """Returns the endless rows that make up the batches: row i of batch b has the number b * batch_size + i.

    Raises:
      UserError: the source is empty or lacks a field that is needed; while reading rows, a file is invalid.
    """
    _check_fields(source, make_row)
    if not len(source):
        raise UserError(f"the training source {source.name!r} holds no example")
    views = int(config["data"].get("views", 1))
    places = _places(source, int(config["seed"]))
    if views > 1:
        places = grain.MapDataset.select_from_datasets([places], _Views(views))
    return places.map_with_index(_Read(source, make_row))


def view_batches(
    config: Any,
    make_row: Rows,
    source: Source,
    views: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields batches of one pass over all views of all examples; row r is view r mod `views` of its example.

    Views are augmented as in training. The last batch is filled up with the last row. Each process gets its consecutive
    part of each batch.
    """
    batch_size = int(config["batch_size"]) // process_count
    _check_fields(source, make_row)
    count = len(source) * views
    steps = -(-count // (batch_size * process_count))
    rows = (
        np.arange(steps * batch_size * process_count)
        .reshape(steps, process_count, -1)[:, process_index]
        .ravel()
    )
    places = grain.MapDataset.source(np.minimum(rows, count - 1).tolist())
    made = places.map(lambda row: make_row(row, source[row // views]))
    return iter(_in_background(made.batch(batch_size), {**_background(config["data"]), "workers": 0}))


def _check_fields(source: Source, make_row: Rows) -> None:
    for name in make_row.settings.fields:
        check_provides(source, FIELDS[name].needs, f"the batch field {name!r}")


def eval_batches(
    source: Source,
    needs: Collection[str],
    config: Any,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    limit: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields batches of equal shapes of one pass over this process's share of a source.

    Every process gets the same number of batches; rows beyond the last example have `example_mask` False.
    Batch i of all processes together holds the examples from i * batch_size * process_count on, in order.

    Args:
      source: the data.
      needs: the fields that the evaluator needs of it, which decide what the rows hold, see `evaluation.eval_rows`.
      config: in `data`: `image_size`; `label_size` (height, width of the label canvas) and `max_segments`, by default
        those that the source's largest example needs; `threads`.
      batch_size: rows of each process's batch.
      process_index: the index of this process.
      process_count: the number of processes.
      limit: use only the first so many examples.

    Raises:
      UserError: the source lacks a field, a file is invalid, or a label is larger than `data.label_size`.
    """
    data = config["data"]
    count = len(source) if limit is None else min(int(limit), len(source))
    per_step = batch_size * process_count
    numbers = np.arange(math.ceil(count / per_step) * per_step)
    numbers = np.where(numbers < count, numbers, -1).reshape(-1, process_count, batch_size)[:, process_index]
    check_provides(source, needs, "this evaluation")
    rows = grain.MapDataset.source(numbers.ravel().tolist()).map(eval_rows(needs, data, source))
    return iter(_in_background(rows.batch(batch_size), {**_background(data), "workers": 0}))


def _places(source: Source, seed: int) -> grain.MapDataset:
    """Returns endless positions in the source, reshuffled every epoch; a mixture draws by its weights."""
    if not isinstance(source, Mixture):
        return grain.MapDataset.range(len(source)).shuffle(seed % 2**32).repeat()
    starts = np.cumsum([0, *map(len, source.sources)])
    parts = [
        grain.MapDataset.range(int(start), int(end)).shuffle((seed + 1000 * k) % 2**32).repeat()
        for k, (start, end) in enumerate(itertools.pairwise(starts), 1)
    ]
    return grain.MapDataset.select_from_datasets(parts, MixingOrder(source.weights, seed))


class _Share(grain.transforms.DatasetSelectionMap):
    """The rows of one process: a consecutive part of each batch, from batch `start` on."""

    def __init__(self, start: int, batch_size: int, process_index: int, process_count: int):
        self.rows = batch_size // process_count
        self._batch_size, self._first = batch_size, start * batch_size + process_index * self.rows

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, int]:
        batch, row = divmod(index, self.rows)
        return 0, self._first + batch * self._batch_size + row


class _Views(grain.transforms.DatasetSelectionMap):
    """A selection that repeats each position `views` times."""

    def __init__(self, views: int):
        self._views = views

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, int]:
        return 0, index // self._views


@dataclasses.dataclass(frozen=True)
class _Read:
    """Reads and transforms an example in one step, because grain measures the size of what passes between steps."""

    source: Source
    make_row: Rows

    def __call__(self, index: int, place: int) -> dict[str, np.ndarray]:
        return self.make_row(index, self.source[int(place)])


def _background(data: Any) -> dict[str, int]:
    return {
        key: int(data.get(key, default)) for key, default in (("workers", 0), ("threads", 2), ("prefetch", 4))
    }


def _in_background(batches: grain.MapDataset, data: Any) -> grain.IterDataset:
    """Prepares batches ahead of their use, in threads or in worker processes."""
    options = _background(data)
    threads = options["threads"]
    reading = grain.ReadOptions(
        num_threads=threads, prefetch_buffer_size=options["prefetch"] if threads else 0
    )
    stream = batches.to_iter_dataset(reading)
    if not options["workers"]:
        return stream
    _let_grain_read_its_flags()
    workers = grain.MultiprocessingOptions(
        num_workers=options["workers"], per_worker_buffer_size=options["prefetch"]
    )
    return stream.mp_prefetch(workers, worker_init_fn=_start_worker)


def _close(iterator: weakref.ref) -> None:
    if (open_iterator := iterator()) is not None:
        open_iterator.close()


def _let_grain_read_its_flags() -> None:
    """Marks grain's flags as parsed: where nobody parses flags, as in a notebook, its workers would fail."""
    if not flags.FLAGS.is_parsed():
        for name in flags.FLAGS:
            if name.startswith("grain_"):
                flags.FLAGS[name].present = 1


def _start_worker(index: int, count: int) -> None:
    """Sets up a worker process, which must neither touch an accelerator nor outlive its parent."""
    del index, count
    # grain imports JAX, which must not open the device that the parent process trains on.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # A terminal or scheduler signals the whole process group. The parent still needs batches to finish its step and
    # save, and closes its workers itself; the timer ends a worker whose parent does not.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: _exit_after(60.0))
    threading.Thread(target=_exit_with, args=(os.getppid(),), daemon=True).start()


def _exit_after(seconds: float) -> None:
    timer = threading.Timer(seconds, functools.partial(os._exit, 0))
    timer.daemon = True
    timer.start()


def _exit_with(parent: int) -> None:
    """Exits when the parent is gone: a killed parent cannot close its workers, which would wait for ever."""
    while os.getppid() == parent:
        threading.Event().wait(2.0)
    os._exit(1)

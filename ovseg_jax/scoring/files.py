"""Files of predictions and truths: matched by name, read in parallel, and a record of what was left out."""

import argparse
import contextlib
import ctypes
import functools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple, TypeVar

from etils import epath
from tqdm import tqdm

from ovseg_jax.errors import UserError
from ovseg_jax.reading import first_twice, read_lines, reading

T = TypeVar("T")
S = TypeVar("S")

_CHUNK = 16  # items that a worker takes at once
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_FEW = 64  # items for which starting workers takes longer than the work


class Fault(UserError):
    """A fault of one item, for which `--missing=skip` leaves it out.

    Attributes:
      reason: the kind of the fault, under which items are counted.
    """

    def __init__(self, reason: str, sentence: str):
        super().__init__(sentence)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason, str(self))


class Skips:
    """The items that were left out, or the refusal to leave any out.

    Attributes:
      names: the names of the items, by reason.
    """

    def __init__(self, missing: str = "error"):
        """Sets what happens to a faulty item: "error" or "skip", the values of `--missing`."""
        self.names: dict[str, list[str]] = {}
        self._strict = missing == "error"

    def add(self, names: Sequence[str], fault: UserError) -> None:
        """Records items as left out.

        Args:
          names: the items; nothing happens if there are none.
          fault: what is wrong with them; a `Fault`, or the error of a file that cannot be read.

        Raises:
          UserError: `fault`, if nothing may be left out.
        """
        if not names:
            return
        if self._strict:
            raise UserError(f"{fault}; --missing=skip leaves out what is faulty") from fault
        reason = fault.reason if isinstance(fault, Fault) else "unreadable"
        self.names.setdefault(reason, []).extend(names)


class Pair(NamedTuple):
    """A prediction and its truth.

    Attributes:
      name: the path of the truth in its folder, without its suffix.
      prediction: the file of the prediction.
      truth: the file of the truth.
    """

    name: str
    prediction: str
    truth: str


def add_file_flags(parser: argparse.ArgumentParser, parallel: bool = True) -> None:
    """Adds the flags for faulty items and, if `parallel`, for the number of processes."""
    parser.add_argument(
        "--missing",
        choices=("error", "skip"),
        default="error",
        help="for items that cannot be scored, such as a truth without a prediction: error (default) stops, skip "
        "leaves them out and counts them",
    )
    if parallel:
        parser.add_argument(
            "--workers",
            type=int,
            metavar="N",
            help="processes that work at once (default: one for each core); the result does not depend on it",
        )


def workers_of(arguments: argparse.Namespace) -> int:
    """Returns the number of processes that `--workers` asks for.

    Raises:
      UserError: it is less than 1.
    """
    if arguments.workers is not None and arguments.workers < 1:
        raise UserError(f"--workers={arguments.workers} is less than 1")
    if arguments.workers is not None:
        return arguments.workers
    # Only Linux tells on how many of the cores this process may run.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def list_files(path: str, flag: str, suffixes: Collection[str], ending: str = "") -> dict[str, str]:
    """Returns the files of a folder and its subfolders by their path in it, without suffix and ending; sorted.

    Hidden files and folders are left out.

    Args:
      path: the folder; or one file, whose name is "".
      flag: the flag that names it, for errors.
      suffixes: the suffixes of files that count, lower case with a dot.
      ending: the end of the names that count, such as "_gtFine_labelTrainIds.png", in place of `suffixes`.

    Raises:
      UserError: there is no such folder, no file in it counts, or two have the same name.
    """
    root, found = epath.Path(path), dict[str, str]()
    with reading(path, flag):
        if root.is_file():
            return {"": path}
        if not root.is_dir():
            raise UserError(f"{flag}={path} is neither a folder nor a file")
        for file in sorted(_walk(root)):
            stem, suffix = os.path.splitext(file)
            if (ending and not file.endswith(ending)) or (not ending and suffix.lower() not in suffixes):
                continue
            name = file.removesuffix(ending) if ending else stem
            if name in found:
                raise UserError(
                    f"{flag}={path} holds both {os.path.basename(found[name])} and {file}: keep one of them"
                )
            found[name] = str(root / file)
    if not found:
        kinds = f"name that ends in {ending}" if ending else f"suffix {', '.join(sorted(suffixes))}"
        raise UserError(f"{flag}={path} holds no file with the {kinds}")
    return found


def _walk(root: epath.Path) -> Iterator[str]:
    """Yields the paths of all files below a folder, relative to it."""
    folders = [""]
    while folders:
        folder = folders.pop()
        for entry in (root / folder).iterdir() if "://" in str(root) else os.scandir(root / folder):
            if not entry.name.startswith("."):
                name = f"{folder}/{entry.name}".lstrip("/")
                if entry.is_dir():
                    folders.append(name)
                else:
                    yield name


def pair_files(
    predictions: dict[str, str], truths: dict[str, str], skips: Skips, listed: Sequence[str] | None = None
) -> list[Pair]:
    """Matches predictions with truths, sorted by name.

    Files match by their path in the folder; where no path agrees, by the last part of it, if that is unique. Two single
    files match.

    Args:
      predictions: see `list_files`; of `--pred`.
      truths: the same of `--gt`.
      skips: takes what has no partner.
      listed: the names to be scored, see `read_list`; other files then count neither as scored nor as left out.

    Raises:
      UserError: nothing matches, or something has no partner and `skips` does not allow it.
    """
    if predictions.keys() == truths.keys() == {""}:
        return [Pair(os.path.splitext(os.path.basename(truths[""]))[0], predictions[""], truths[""])]
    if not predictions.keys() & truths.keys():
        last = [
            {os.path.basename(name): file for name, file in side.items()} for side in (predictions, truths)
        ]
        if len(last[0]) == len(predictions) and len(last[1]) == len(truths):
            predictions, truths = last
    if listed is not None:
        known = {os.path.basename(name): name for name in truths}
        wanted = [name if name in truths else known.get(name, name) for name in listed]
        absent = [name for name in wanted if name not in truths]
        skips.add(absent, lone("no truth", absent, len(wanted), "names in --list have no truth"))
        truths = {name: truths[name] for name in wanted if name in truths}
        predictions = {name: predictions[name] for name in truths if name in predictions}
    without = [name for name in truths if name not in predictions]
    if len(without) == len(truths):
        raise UserError(
            f"no prediction has the name of a truth: --pred holds {_first(predictions)}, --gt {_first(truths)}; "
            "for endings that differ score semantic has --pred_suffix and --gt_suffix"
        )
    skips.add(without, lone("no prediction", without, len(truths), "truths have no prediction"))
    surplus = [name for name in predictions if name not in truths]
    skips.add(surplus, lone("no truth", surplus, len(predictions), "predictions have no truth"))
    return [Pair(name, predictions[name], truths[name]) for name in sorted(truths) if name in predictions]


def _first(names: dict[str, str]) -> str:
    if names.keys() == {""}:
        return "one file"
    return f"{next(iter(names))!r} and so on" if names else "none of the names in --list"


def lone(reason: str, names: Sequence[str], total: int, have: str) -> Fault:
    """Returns the fault of names that have no partner: "2 of 9 images have no prediction, such as 'a'"."""
    return Fault(reason, f"{len(names)} of {total} {have}, such as {names[0]!r}" if names else "")


def read_list(path: str, suffixes: Collection[str]) -> list[str]:
    """Reads the names of images, one a line, with or without a suffix.

    Raises:
      UserError: the file cannot be read, is empty, or has a name twice.
    """
    names = []
    with reading(path, "the list"):
        for _, line in read_lines(path):
            stem, suffix = os.path.splitext(line.strip())
            names.append(stem if suffix.lower() in suffixes else line.strip())
        if not names:
            raise ValueError("it names no image")
        if (twice := first_twice(names)) is not None:
            raise ValueError(f"it names {twice!r} twice")
    return names


def results(
    function: Callable[[T], S], items: Sequence[T], skips: Skips, *, workers: int, unit: str = "image"
) -> Iterator[tuple[T, S]]:
    """Calls a function for each item in parallel and yields item and result, in the items' order.

    Sums over the results thus do not depend on the number of workers. A progress bar is shown on a terminal.

    Args:
      function: a function of a module, or a `partial` of one. A `UserError` that it raises goes to `skips`.
      items: its arguments; each has the attribute `name`, or is its own name.
      skips: takes items whose call failed.
      workers: the number of processes.
      unit: what an item is, for the progress bar.

    Raises:
      UserError: a call failed and `skips` does not allow it; the first in the items' order.
    """
    with contextlib.ExitStack() as stack:
        if workers > 1 and len(items) > _FEW:
            context = multiprocessing.get_context("fork" if _can_fork() else "spawn")
            pool = stack.enter_context(
                ProcessPoolExecutor(
                    workers, mp_context=context, initializer=_start_worker, initargs=(function, items)
                )
            )
            stack.callback(pool.shutdown, wait=False, cancel_futures=True)
            found = pool.map(_call, range(len(items)), chunksize=_CHUNK)
        else:
            _keep_memory()
            found = map(functools.partial(_guarded, function), items)
        try:
            bar = tqdm(zip(items, found, strict=True), total=len(items), unit=unit, disable=None)
            for item, result in bar:
                if isinstance(result, UserError):
                    skips.add([str(getattr(item, "name", item))], result)
                else:
                    yield item, result
        except BrokenProcessPool:
            raise UserError(
                f"one of the {workers} processes that read files ended, perhaps because memory ran out: try --workers=1"
            ) from None


def _can_fork() -> bool:
    """Tells whether processes can be forked, which start at once: safe only where no thread may hold a lock."""
    # The thread of tqdm only redraws bars, of which the new processes have none.
    others = [
        t
        for t in threading.enumerate()
        if t is not threading.main_thread() and not type(t).__module__.startswith("tqdm")
    ]
    return sys.platform == "linux" and not others and not {"jax", "tensorstore"} & sys.modules.keys()


def _guarded(function: Callable[[T], S], item: T) -> S | UserError:
    try:
        return function(item)
    except UserError as error:
        return error


_WORK: tuple[Callable[[Any], Any], Sequence[Any]]


def _start_worker(function: Callable[[Any], Any], items: Sequence[Any]) -> None:
    """Stores function and items in a worker, which is then sent indices alone; a forked one inherits the items."""
    global _WORK
    _WORK = function, items
    # Ctrl-C reaches all processes; the parent ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _keep_memory()


def _keep_memory() -> None:
    """Lets glibc keep freed memory for the next picture.

    By default it returns large arrays to the system, which clears each page again: a third of the time of a picture.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for option, size in ((_MMAP_THRESHOLD, 1 << 25), (_TRIM_THRESHOLD, 1 << 28)):
            mallopt(option, size)


def _call(index: int) -> Any:
    function, items = _WORK
    return _guarded(function, items[index])

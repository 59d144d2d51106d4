"""Apache Beam: its options, its runners, its workers' output, and a bar of what is finished."""

import contextlib
import importlib.util
import logging
import os
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

from tqdm import tqdm

from ovseg_jax.errors import UserError
from ovseg_jax.reading import reason


def check_beam(what: str, modules: Sequence[str] = ("apache_beam",)) -> None:
    """Raises a UserError if a package of the extra "prepare" is missing."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise UserError(f"{what} needs the package {module}: pip install -e '.[prepare]'")


def pipeline_options(runner: str, workers: int, given: Sequence[str]) -> Any:
    """Returns Beam's options, and raises a UserError for one that Beam does not know."""
    silence_beam()
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.runners import create_runner

    flags = list(given)
    if runner == "direct":
        count = workers or os.cpu_count() or 1
        mode = "in_memory" if count == 1 else "multi_processing"
        flags += [f"--direct_num_workers={count}", f"--direct_running_mode={mode}"]
    else:
        if workers:
            raise UserError(f"--workers is for the direct runner: {runner} has options of its own")
        try:
            create_runner(runner)
        except (ValueError, ImportError) as error:
            raise UserError(f"--runner={runner}: {reason(error)}") from error
    options = PipelineOptions(flags)
    known = options.get_all_options()
    for flag in given:
        name = re.match(r"--(?:no_)?([a-zA-Z]\w*)", flag)
        if flag.startswith("-") and (name is None or name[1] not in known):
            raise UserError(f"Beam has no option {flag.partition('=')[0]}")
    return options


def run_elements(
    function: Callable[..., None], elements: Sequence[Any], options: Any, runner: str, *more: Any
) -> None:
    """Calls a function for each element on a runner's workers.

    Args:
      function: takes an element and `more`; defined in a module, so that workers can import it.
      elements: the elements.
      options: see `pipeline_options`.
      runner: "direct", or the name of a Beam runner.
      *more: further arguments of the function.

    Raises:
      UserError: a worker of the direct runner was killed, or a runner's server cannot be downloaded.
    """
    import apache_beam as beam

    # By the name DirectRunner, Beam may download another runner, Prism.
    runner = "FnApiRunner" if runner == "direct" else runner
    try:
        with _watched(), beam.Pipeline(runner=runner, options=options) as pipeline:
            _ = pipeline | beam.Create(list(elements)) | beam.Map(function, *more)
    except RuntimeError as error:
        if "job server jar" not in str(error):
            raise
        option = f"--{runner.removesuffix('Runner').lower()}_job_server_jar"
        text = f"--runner={runner}: {reason(error)}; Beam's option {option}=FILE takes one from this machine"
        raise UserError(text) from error


@contextlib.contextmanager
def _watched() -> Iterator[None]:
    """Raises a UserError if a worker of the direct runner is killed, for which Beam would wait for ever.

    The main thread gets it by a signal, which wakes it while it waits.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, killed = threading.excepthook, list[str]()

    def hook(args: threading.ExceptHookArgs) -> None:
        found = re.search(r"Worker subprocess exited with return code (-?\d+)", str(args.exc_value))
        if found is None:
            before(args)
        elif found[1] not in ("130", "-2") and not killed:  # of an interruption, which this process gets too
            killed.append(found[1])
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    def stop(*_: Any) -> None:
        raise UserError(
            f"a worker of the direct runner ended with the status {killed[0]}; 137 is often a lack of memory, of which "
            "fewer --workers take less"
        )

    of_signal = signal.signal(signal.SIGUSR1, stop)
    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before
        signal.signal(signal.SIGUSR1, of_signal)


@contextlib.contextmanager
def quiet_workers() -> Iterator[TextIO]:
    """Yields the terminal's stderr, and hides the output of processes that start in the context.

    Beam's workers print dozens of lines each. An exception gets the last of them as a note.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as log, os.fdopen(kept, "w", errors="replace") as terminal:
        os.dup2(log.fileno(), 2)
        try:
            yield terminal
        except Exception as error:
            log.seek(max(0, log.tell() - 4000))
            error.add_note(log.read().decode(errors="replace"))
            raise
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)


@contextlib.contextmanager
def progress(title: str, total: int, finished: Callable[[], int], terminal: TextIO) -> Iterator[None]:
    """Shows how many shards are finished, whatever runner writes them.

    Args:
      title: in front of the bar.
      total: the number of shards.
      finished: counts those that are finished.
      terminal: where to draw the bar.
    """
    ended = threading.Event()

    def watch() -> None:
        with tqdm(total=total, initial=finished(), unit="shard", desc=title, file=terminal) as bar:
            while True:
                last = ended.wait(1.0)
                bar.update(finished() - bar.n)
                if last:
                    return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def silence_beam() -> None:
    """Hides the log messages of Beam and TensorFlow Datasets, those at import included."""
    for name in ("absl", "apache_beam"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.disable(logging.WARNING)
    try:
        import apache_beam  # noqa: F401
    finally:
        logging.disable(logging.NOTSET)

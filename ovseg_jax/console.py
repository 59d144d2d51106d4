"""Manners of the entry modules: what the libraries may print, and a user's mistake as one sentence."""

import logging
import sys
import threading
from types import TracebackType

from absl import logging as absl_logging

from ovseg_jax.errors import UserError


def quieten() -> None:
    """Leaves the libraries' warnings, not their diary, and not the errors that Orbax both logs and raises."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    logging.getLogger("absl").addFilter(_is_not_of_orbax)
    for name in ("jax", "grain", "etils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if sys.excepthook is not _print_unless_late:
        sys.excepthook = _print_unless_late


def complain(error: UserError) -> int:
    """Prints the sentence; returns the exit status."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    return 2


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname


def _print_unless_late(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    # When a save fails, the threads of the array writer still report to an event loop that is gone by then.
    late = isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
    if not (late and threading.current_thread() is not threading.main_thread()):
        sys.__excepthook__(kind, error, trace)

"""Manners of the entry modules: what the libraries may print, and a user's mistake as one sentence."""

import logging
import os
import sys
from pathlib import Path
from typing import Any

import jax
from absl import logging as absl_logging

from ovseg_jax.errors import UserError


def quieten() -> None:
    """Leaves the libraries' warnings, not their diary, and not the errors that Orbax both logs and raises."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    logging.getLogger("absl").addFilter(_is_not_of_orbax)
    for name in ("jax", "grain", "etils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Of a save that fails, asyncio would log each part that nobody asked for again.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = _ignore_late


def speak() -> None:
    """Shows what the package itself logs: a line on stderr, of the first process only.

    Each is said once: what is logged while a program is traced comes as often as JAX traces it.
    """
    handler, ours = logging.StreamHandler(), logging.getLogger("ovseg_jax")
    said: set[str] = set()
    handler.addFilter(lambda record: jax.process_index() == 0 and not _known(record.getMessage(), said))
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    ours.propagate = False


def _known(text: str, said: set[str]) -> bool:
    known = text in said
    said.add(text)
    return known


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs, in JAX_COMPILATION_CACHE_DIR or the user's cache folder.

    Not those of several CPU devices: out of the cache they come without the order of their collectives (jaxlib 0.10),
    and the devices wait for each other for ever. The processes have to be joined before.
    """
    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        jax.config.update("jax_enable_compilation_cache", False)
    elif "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(base) / "ovseg_jax" / "xla"))


def complain(error: UserError) -> int:
    """Prints the sentence; returns the exit status."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    return 2


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname


def _ignore_late(unraisable: Any) -> None:
    # When a save fails, the threads of the array writer still report to an event loop that is gone by then.
    error = unraisable.exc_value
    if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
        sys.__unraisablehook__(unraisable)

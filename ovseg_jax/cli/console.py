"""Manners of the commands: what the libraries may print, mistakes as one sentence, exit statuses."""

import argparse
import atexit
import contextlib
import importlib.util
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ovseg_jax.errors import UserError

FAILED, INTERRUPTED = 1, 130
"""Exit statuses of a mistake, which one sentence on stderr names, and of Ctrl-C."""

# Of each kind of address that can be read, the package that does it.
_BUCKETS = {"gs": "gcsfs", "s3": "s3fs"}
_CLIENTS = frozenset(("aiohttp", "botocore", "fsspec", "gcsfs", "google", "requests", "s3fs"))


class Parser(argparse.ArgumentParser):
    """The flags of a command; a mistake in them is one sentence."""

    def __init__(self, verb: str, description: str):
        super().__init__(
            prog=f"python -m ovseg_jax.{verb}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raises the mistake, which `guarded` prints."""
        raise UserError(f"{message}; {self.prog} --help lists the flags")


def run_command(
    parser: Callable[[], argparse.ArgumentParser],
    run: Callable[[argparse.Namespace], int | None],
    argv: Sequence[str] | None = None,
) -> int:
    """Parses the arguments and runs a command.

    Args:
      parser: makes the parser of its flags.
      run: the command; it returns an exit status, or None for 0.
      argv: the arguments; by default those of the process.

    Returns:
      The exit status, see `guarded`.
    """

    def call() -> int:
        arguments = parser().parse_args(argv)
        check_addresses({f"--{key}": value for key, value in vars(arguments).items()})
        silence()
        return run(arguments) or 0

    return guarded(call)


def start(main: Callable[[], int]) -> NoReturn:
    """Runs a command's `main` as a process of its own."""

    def call() -> int:
        ensure_home()
        use_compilation_cache()
        code = main()
        sys.stdout.flush()
        return code

    sys.exit(guarded(call))


def guarded(call: Callable[[], int]) -> int:
    """Calls, and turns what a person has to know into one sentence on stderr.

    Returns:
      What `call` returns; FAILED where it raised a UserError, or an error of the disk or of a bucket; INTERRUPTED at
      Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        # A name that the terminal cannot show is shown escaped.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        return call()
    except UserError as error:
        return print_error(error)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr, flush=True)
        return INTERRUPTED
    except BrokenPipeError:  # The reader of stdout is gone, as of `... | head`: nobody is there to be told.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        return print_error(UserError(describe_os_error(error)))
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in _CLIENTS:
            raise
        return print_error(UserError(f"the bucket cannot be reached: {' '.join(str(error).split())}"))


def print_error(error: UserError) -> int:
    """Prints the sentence; returns the exit status."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    return FAILED


def describe_os_error(error: OSError) -> str:
    """The file and what the system says of it."""
    text = " ".join(str(error.strerror or error).split())
    return f"{error.filename}: {text}" if error.filename and error.strerror else text


def check_addresses(values: Mapping[str, Any]) -> None:
    """Raises a UserError for an address that cannot be read: of an unknown kind, or of a package that is missing.

    Args:
      values: texts, or trees of them, by the names of what they were given for.
    """
    for name, value in _texts(values):
        for scheme in re.findall(r"(?:^|[=,])([A-Za-z][\w+.-]*)://", value):
            if scheme not in _BUCKETS:
                known = " or ".join(f"{bucket}://" for bucket in _BUCKETS)
                raise UserError(
                    f"{name}={value}: {scheme}:// cannot be read: download it first, or name a bucket with {known}"
                )
            if importlib.util.find_spec(_BUCKETS[scheme]) is None:
                raise UserError(
                    f"{name}={value}: {scheme}:// needs {_BUCKETS[scheme]}: pip install -e '.[buckets]'"
                )


def _texts(tree: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(tree, str):
        yield name, tree
    elif isinstance(tree, Mapping | list | tuple):
        items = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
        for key, value in items:
            yield from _texts(value, f"{name}.{key}" if name else str(key))


def silence() -> None:
    """Leaves the libraries' warnings, not their progress, and not the errors that Orbax both logs and raises."""
    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.WARNING)
    logging.getLogger("absl").addFilter(_is_not_of_orbax)
    for name in ("jax", "grain", "etils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Of a save that fails, asyncio would log each part that nobody asked for again; gcsfs each attempt.
    for name in ("asyncio", "gcsfs"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _ignore_late


def setup_logging() -> None:
    """Shows what the package itself logs: a line on stderr, of the first process only.

    Each line is shown once: what is logged while a program is traced comes as often as JAX traces it.
    """
    import jax

    handler, ours = logging.StreamHandler(), logging.getLogger("ovseg_jax")
    shown: set[str] = set()
    handler.addFilter(lambda record: jax.process_index() == 0 and not _known(record.getMessage(), shown))
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    ours.propagate = False


def _known(text: str, shown: set[str]) -> bool:
    known = text in shown
    shown.add(text)
    return known


def ensure_home() -> None:
    """Gives a process whose user has no home, as in many containers, a temporary one: libraries fail without."""
    if os.path.expanduser("~") == "~":
        home = tempfile.mkdtemp()
        atexit.register(shutil.rmtree, home, ignore_errors=True)
        os.environ["HOME"] = home


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs, in JAX_COMPILATION_CACHE_DIR or the user's cache folder.

    Not those of several CPU devices: out of the cache they come without the order of their collectives (jaxlib 0.10),
    and the devices wait for each other for ever. The processes have to be joined before. Where the folder cannot be
    written, as of a user without a home, nothing is kept.
    """
    import jax

    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    given = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if given and "://" in given:
        return
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(given) if given else Path(base) / "ovseg_jax" / "xla"
    if (base.startswith("~") and not given) or not _is_writable(folder):
        jax.config.update("jax_enable_compilation_cache", False)
    elif not given:
        jax.config.update("jax_compilation_cache_dir", str(folder))


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname


def _ignore_late(unraisable: Any) -> None:
    # When a save fails, the threads of the array writer still report to an event loop that is gone by then.
    error = unraisable.exc_value
    if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
        sys.__unraisablehook__(unraisable)

"""Shared parts of all commands: quiet libraries, errors as one sentence, exit statuses, the compilation cache."""

import argparse
import atexit
import contextlib
import ctypes
import gc
import importlib.util
import logging
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ovseg_jax.errors import UserError
from ovseg_jax.files import keep_newest

# Characters of an error, which may quote a file or a flag; lists of known keys have up to 1,500.
_LONGEST = 3000
FAILED, INTERRUPTED = 1, 130
"""Exit statuses: of an error, printed as one sentence on stderr, and of Ctrl-C."""

_MMAP_THRESHOLD, _LARGE = -3, 4 << 20  # of glibc's malloc.h; bytes
# A compilation that is shorter than this setting is not cached. The default is a second, but a start has dozens of
# shorter ones, 1.5 s together.
_LEAST = "jax_persistent_cache_min_compile_time_secs"
# Of all programs that are kept; 700 small ones took 51 MB.
_MOST_BYTES = 1 << 30
# JAX's event at the end of a compilation, and the seconds of one that takes much memory.
_COMPILED, _LONG = "/jax/core/compile/backend_compile_duration", 0.5
# The package that reads each supported kind of address.
_BUCKETS = {"gs": "gcsfs", "s3": "s3fs"}
# The buckets' clients try again for minutes where there is no network.
_SECONDS_TO_REACH = 20
_CLIENTS = frozenset(("aiohttp", "botocore", "fsspec", "gcsfs", "google", "requests", "s3fs"))


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence."""

    def __init__(self, verb: str, description: str):
        super().__init__(
            prog=f"python -m ovseg_jax.{verb}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raises a UserError with the message, which `guarded` prints."""
        raise UserError(f"{message}; {self.prog} --help lists the flags")


class NameOrList(argparse.Action):
    """Stores a name; for "list" it prints all names and exits, whatever else is missing."""

    def __init__(self, option_strings: Sequence[str], dest: str, listed: Callable[[], str], **options: Any):
        super().__init__(option_strings, dest, **options)
        self._listed = listed

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        """Stores the name, or prints all names and exits."""
        if values == "list":
            print(self._listed())
            parser.exit(0)
        setattr(namespace, self.dest, values)


class LazyParser(Parser):
    """The parser of a subcommand, which adds its description and flags when it is used.

    A command with many subcommands thus imports only what the chosen one needs.
    """

    def __init__(self, prog: str, fill: Callable[[argparse.ArgumentParser], None], **_: Any):
        super().__init__(prog.removeprefix("python -m ovseg_jax."), "")
        self._fill: Callable[[argparse.ArgumentParser], None] | None = fill

    def fill(self) -> None:
        """Adds the description and the flags, once."""
        if self._fill is not None:
            self._fill(self)
            self._fill = None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parses the arguments.

        Raises:
          UserError: an argument is unknown or invalid.
        """
        self.fill()
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return found, rest


def run_command(
    parser: Callable[[], argparse.ArgumentParser],
    run: Callable[[argparse.Namespace], int | None],
    argv: Sequence[str] | None = None,
) -> int:
    """Parses the arguments and runs a command.

    Args:
      parser: creates the command's parser.
      run: the command; it returns an exit status, or None for 0.
      argv: the arguments; by default those of the process.

    Returns:
      The exit status, see `guarded`.
    """

    def call() -> int:
        for word in sys.argv[1:] if argv is None else argv:
            # Mostly a variable of the shell that is not set; as a path it would be the current folder.
            if re.fullmatch(r"(--\w+=)?\s*", str(word)):
                raise UserError(f"the argument {word!r} is empty: give it a value, or leave it out")
        arguments = parser().parse_args(argv)
        values = {f"--{key}": value for key, value in vars(arguments).items()}
        check_addresses(values)
        silence()
        check_reachable(values)
        return run(arguments) or 0

    return guarded(call)


def start(main: Callable[[], int], compiles: bool = True) -> NoReturn:
    """Runs a command's `main` as this process and exits with its status.

    Args:
      main: runs the command.
      compiles: whether it runs programs of JAX, which is then imported to set its cache.
    """

    def call() -> int:
        # Imports and traces create many objects that stay: to look for cycles among them took 0.3 s of a start.
        gc.set_threshold(20_000, 20, 20)
        ensure_home()
        if compiles:
            use_compilation_cache()
        code = main()
        sys.stdout.flush()
        return code

    sys.exit(guarded(call))


def guarded(call: Callable[[], int]) -> int:
    """Calls a function and prints its expected errors as one sentence on stderr.

    Returns:
      The result of `call`; FAILED if it raised a UserError, or an error of the disk or of a bucket; INTERRUPTED
      after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        # Characters that the terminal's encoding lacks are escaped instead of raising an error.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        return call()
    except UserError as error:
        return print_error(error)
    except KeyboardInterrupt as stop:
        print(f"stopped; {str(stop) or 'the same command continues from here'}", file=sys.stderr, flush=True)
        return INTERRUPTED
    except BrokenPipeError:  # The reader of stdout has ended, as in `... | head`: nobody reads a message.
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
    """Prints an error on stderr, without the middle of what it quotes at length, and returns the exit status."""
    text = str(error)
    text = text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    print(f"error: {text}", file=sys.stderr, flush=True)
    return FAILED


def describe_os_error(error: OSError) -> str:
    """Returns the file of an OSError and the system's message."""
    text = " ".join(str(error.strerror or error).split())
    return f"{error.filename}: {text}" if error.filename and error.strerror else text


def check_addresses(values: Mapping[str, Any]) -> None:
    """Raises a UserError for an address of an unsupported kind, or one whose package is missing.

    Args:
      values: texts, or trees of texts, by the flag or key that they belong to.
    """
    for name, value in _texts(values):
        for address in _addresses(value):
            scheme = address.partition("://")[0]
            if scheme not in _BUCKETS:
                known = " or ".join(f"{bucket}://" for bucket in _BUCKETS)
                raise UserError(
                    f"{name}={value}: {scheme}:// is not supported: download it first, or use a bucket with {known}"
                )
            if importlib.util.find_spec(_BUCKETS[scheme]) is None:
                raise UserError(
                    f"{name}={value}: {scheme}:// needs {_BUCKETS[scheme]}: pip install -e '.[buckets]'"
                )


def check_reachable(values: Mapping[str, Any]) -> None:
    """Raises a UserError for an address of a bucket that does not answer within seconds.

    One address of each bucket is looked up; whether it exists does not matter.

    Args:
      values: as for `check_addresses`, which they have passed.
    """
    asked = set()
    for name, value in _texts(values):
        for address in _addresses(value):
            bucket = "/".join(address.split("/")[:3])
            if bucket not in asked:
                asked.add(bucket)
                _look_up(name, address)


def _look_up(name: str, address: str) -> None:
    """Looks up an address in a thread of its own, which is abandoned after `_SECONDS_TO_REACH`."""
    from etils import epath

    failed: list[Exception] = []

    def call() -> None:
        try:
            epath.Path(address).exists()
        except Exception as error:  # The clients share no type of error.
            failed.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(_SECONDS_TO_REACH)
    if thread.is_alive():
        raise UserError(
            f"{name}: {address} did not answer within {_SECONDS_TO_REACH} seconds: check the network and the "
            "credentials"
        )
    if failed:
        raise UserError(f"{name}: {address} cannot be reached: {' '.join(str(failed[0]).split())}")


def _addresses(text: str) -> list[str]:
    """Finds the addresses in a flag's value, such as "folder,data_dir=gs://bucket/data"."""
    return re.findall(r"(?:^|[=,])([A-Za-z][\w+.-]*://[^,;]*)", text)


def _texts(tree: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(tree, str):
        yield name, tree
    elif isinstance(tree, Mapping | list | tuple):
        items = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
        for key, value in items:
            yield from _texts(value, f"{name}.{key}" if name else str(key))


def silence() -> None:
    """Hides the libraries' progress messages, and errors that Orbax both logs and raises; warnings stay."""
    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.WARNING)
    logging.getLogger("absl").addFilter(_is_not_of_orbax)
    for name in ("jax", "grain", "etils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # After a save that failed, asyncio would log every part that nobody awaited, and gcsfs every attempt.
    for name in ("asyncio", "gcsfs"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _ignore_late


def setup_logging() -> None:
    """Shows the package's own log messages on stderr, in the first process only.

    Each line is shown once, since JAX may trace a function, and log its messages, several times.
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
    """Creates a temporary home folder where the user has none, as in many containers: libraries need one."""
    if os.path.expanduser("~") == "~":
        home = tempfile.mkdtemp()
        atexit.register(shutil.rmtree, home, ignore_errors=True)
        os.environ["HOME"] = home


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs, in JAX_COMPILATION_CACHE_DIR or the user's cache folder.

    Programs for several CPU devices are not kept: when loaded from the cache they lose the order of their collectives
    (jaxlib 0.10) and deadlock. Call it after `jax.distributed.initialize`. If the folder cannot be written, as for a
    user without a home, nothing is kept.

    When the process ends, programs in the user's cache folder that were not used for the longest time are removed
    beyond `_MOST_BYTES`. JAX's own bound would need a package more, a lock for each program, and a folder that never
    was without it.
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
        return
    if not given:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        atexit.register(keep_newest, folder, "*-cache", _MOST_BYTES)
    if _LEAST.upper() not in os.environ:
        jax.config.update(_LEAST, 0)


def texts_folder() -> Path | None:
    """Returns the folder for features of texts beside the compiled programs; None where these are not kept."""
    import jax

    config: Any = jax.config
    folder = config.jax_compilation_cache_dir
    if not folder or "://" in folder or not config.jax_enable_compilation_cache:
        return None
    return Path(folder) / "texts"


def return_compilers_memory() -> None:
    """Lets glibc return the memory of XLA's compiler to the system before the compiled program takes its own.

    For the paper's network on a CPU that is 0.6 GiB, which would stay in use until the end. Blocks of some MiB, such as
    the masks of a tile, are returned as soon as they are freed; else each thread keeps some of them. Not for
    training, which allocates such blocks in every step: the system clears their pages anew each time.
    """
    import jax

    try:
        library = ctypes.CDLL("libc.so.6")
        trim = library.malloc_trim
        library.mallopt(_MMAP_THRESHOLD, _LARGE)
    except (OSError, AttributeError):  # another C library
        return

    def after(event: str, duration_secs: float, **_: str | int) -> None:
        if event == _COMPILED and duration_secs > _LONG:
            trim(0)

    jax.monitoring.register_event_duration_secs_listener(after)


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
    # After a failed save, the threads of the array writer still report to an event loop that is already closed.
    error = unraisable.exc_value
    if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
        sys.__unraisablehook__(unraisable)

"""Readers of files from outside: any fault of a file becomes one UserError that names the file.

A reader decodes under `with reading(path):` and states what it expects through `text`, `whole`, `numbers`, `objects`,
`texts` and `column`, whose ValueErrors it turns into a UserError.
"""

import contextlib
import errno
import json
import lzma
import os
import pickle
import re
import stat
import struct
import tarfile
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import IO, Any, TypeVar

import numpy as np
from etils import epath

from ovseg_jax.errors import UserError

T = TypeVar("T")

DAMAGE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    lzma.LZMAError,
    pickle.UnpicklingError,
    struct.error,
    tarfile.TarError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
"""The exceptions that decoders raise for a file that is truncated, altered or of another format."""

INT64 = 2**63 - 1
_LARGEST = float(np.finfo(np.float32).max)
_SURROGATE = re.compile("[\ud800-\udfff]")
_REQUIRED: Any = object()
_LONGEST = 500  # characters of a reason, which may quote a file


@contextlib.contextmanager
def reading(path: Any, what: str = "") -> Iterator[None]:
    """Turns an error inside the block, which decodes one file, into a UserError that names the file.

    Args:
      path: the file.
      what: the file's role in the message, such as "the mask".

    Raises:
      UserError: in place of any of `DAMAGE`, and if the file is a named pipe; those raised inside pass as they are.
    """
    try:
        _refuse_pipe(path)
        yield
    except DAMAGE as error:
        raise UserError(f"{what} {path} cannot be read: {reason(error)}".lstrip()) from error


def open_binary(path: epath.PathLike) -> IO[bytes]:
    """Opens a file for reading.

    Raises:
      OSError: it cannot be opened, or is a named pipe.
    """
    _refuse_pipe(path)
    return epath.Path(path).open("rb")


def read_bytes(path: epath.PathLike) -> bytes:
    """Reads a file.

    Raises:
      OSError: it cannot be read, or is a named pipe.
    """
    with open_binary(path) as file:
        return file.read()


def _refuse_pipe(path: Any) -> None:
    """Raises an OSError for a named pipe, for whose writer a reader would wait without end.

    Pipes that a shell opens in /dev have a writer.
    """
    if not isinstance(path, str | os.PathLike) or os.fspath(path).startswith("/dev/"):
        return
    try:
        is_pipe = stat.S_ISFIFO(os.stat(path).st_mode)
    except (OSError, ValueError):  # Opening it raises a better error; `path` may also be an address.
        return
    if is_pipe:
        raise OSError(errno.EINVAL, "it is a named pipe, not a file", os.fspath(path))


def reason(error: BaseException) -> str:
    """Returns the first line of an exception's message, in plain words for the common exceptions."""
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 text (byte 0x{error.object[error.start]:02x} at {error.start})"
    if isinstance(error, json.JSONDecodeError):
        return f"it is not valid JSON: {error}"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, IsADirectoryError):
        return "it is a folder, not a file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if isinstance(error, KeyError) and "://" in str(error):
        return f"addresses like {error} are not supported: download the file first"
    if isinstance(error, KeyError):
        return f"it has no {error}"
    first = str(error).strip().partition("\n")[0]
    first = first if len(first) <= _LONGEST else f"{first[: _LONGEST - 3]}..."
    return _SURROGATE.sub("\ufffd", first) or f"it is damaged ({type(error).__name__})"


def read_text(path: epath.PathLike, what: str = "") -> str:
    """Reads a text file, UTF-8 or UTF-16 with a byte order mark, which is removed; line ends become \\n.

    Raises:
      UserError: it cannot be read, or is not text.
    """
    with reading(path, what):
        data = read_bytes(path)
        wide = data.startswith((b"\xff\xfe", b"\xfe\xff"))
        found = data.decode("utf-16" if wide else "utf-8-sig")
        if "\0" in found:
            raise ValueError("it holds zero bytes, so it is not text")
        return found.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: epath.PathLike, what: str = "") -> Iterator[tuple[int, str]]:
    """Yields the lines of a text file that are not blank, with their numbers from 1.

    Raises:
      UserError: it cannot be read, or a line is not text.
    """
    with reading(path, what):
        with open_binary(path) as file:
            wide = file.read(2) in (b"\xff\xfe", b"\xfe\xff")
        if wide:
            yield from ((n, line) for n, line in enumerate(read_text(path).split("\n"), 1) if line.strip())
            return
        number = 0
        with open_binary(path) as file:
            for raw in file:
                raw = raw.removeprefix(b"\xef\xbb\xbf") if not number else raw
                for piece in raw.removesuffix(b"\n").removesuffix(b"\r").split(b"\r"):
                    number += 1
                    try:
                        line = piece.decode()
                    except UnicodeDecodeError as error:
                        raise ValueError(f"line {number}: {reason(error)}") from error
                    if "\0" in line:
                        raise ValueError(f"line {number} holds zero bytes, so it is not text")
                    if line.strip():
                        yield number, line


def parse_json(content: str) -> Any:
    """Parses JSON and refuses an object in which a key occurs twice.

    Raises:
      ValueError: it is not JSON, or a key occurs twice.
    """
    return json.loads(content, object_pairs_hook=_object)


def read_json(path: epath.PathLike, what: str = "") -> Any:
    """Reads a JSON file.

    Raises:
      UserError: it cannot be read, is not JSON, or an object in it holds a key twice.
    """
    with reading(path, what):
        return parse_json(read_text(path, what))


def read_npz(path: epath.PathLike, what: str = "") -> dict[str, np.ndarray]:
    """Reads all arrays of an .npz file.

    Raises:
      UserError: it cannot be read, or holds Python objects.
    """
    with reading(path, what), open_binary(path) as file:
        if file.read(2) != b"PK":  # NumPy takes anything else for a pickle
            raise ValueError("it is not an .npz file")
        file.seek(0)
        data = np.load(file, allow_pickle=False)
        with data:
            found = dict(data.items())
        for name, values in found.items():
            # NumPy does not check texts, and Python raises a SystemError for a code that is no character.
            if values.dtype.kind == "U" and values.size and values.dtype.itemsize:
                codes = (
                    np.ascontiguousarray(values).ravel().view(values.dtype.byteorder.replace("|", "=") + "u4")
                )
                if codes.max() > 0x10FFFF:
                    raise ValueError(f"the array {name!r} holds codes that are no characters")
        return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"the key {first_twice(key for key, _ in pairs)!r} occurs twice in one object")
    return found


def tar_files(file: Any) -> Iterator[tarfile.TarInfo]:
    """Yields the regular files of a tar that is not compressed, given as an open binary file.

    Raises:
      ValueError: it is damaged or cut off, or holds a sparse file.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while entry := archive.next():
            archive.members = []  # type: ignore[attr-defined]  # or it would keep all of them
            if entry.isfile():
                if entry.issparse():
                    raise ValueError(f"its member {short(entry.name)} is a sparse file: unpack it")
                if entry.offset_data + entry.size > size:
                    raise ValueError(f"it is cut off inside its member {short(entry.name)}")
                yield entry
        # tarfile takes a damaged header for the end.
        file.seek(archive.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise ValueError(f"it is cut off or damaged at byte {archive.offset}")


def first_twice(items: Iterable[T]) -> T | None:
    """Returns the first item that occurred before, or None."""
    seen: set[T] = set()
    for item in items:
        if item in seen:
            return item
        seen.add(item)
    return None


def short(value: Any) -> str:
    """Returns a value's repr, cut to 60 characters, for error messages."""
    found = repr(value)
    return found if len(found) <= 60 else f"{found[:57]}..."


def text(value: Any, name: str) -> str:
    """Checks that a value is a text and returns it, with lone surrogates replaced.

    Raises:
      ValueError: it is not a text.
    """
    if type(value) is not str:
        raise ValueError(f"{name}: expected a text, got {short(value)}")
    return value if value.isascii() else _SURROGATE.sub("\ufffd", value)


def array(value: Any, name: str) -> list[Any]:
    """Checks that a value is a list and returns it.

    Raises:
      ValueError: it is not a list.
    """
    if not isinstance(value, list):
        raise ValueError(f"{name}: expected a list, got {short(value)}")
    return value


def texts(value: Any, name: str) -> list[str]:
    """Checks that a value is a text or a list of texts and returns a list.

    Raises:
      ValueError: it is neither.
    """
    found = value if isinstance(value, list) else [value]
    if wrong := [item for item in found if type(item) is not str]:
        raise ValueError(f"{name}: expected a text or a list of texts, got {short(wrong[0])}")
    return [text(item, name) for item in found]


def whole(value: Any, name: str, low: int = 0, high: int = INT64) -> int:
    """Checks that a value is a whole number from `low` to `high` and returns it.

    Raises:
      ValueError: it is not.
    """
    if type(value) is not int or not low <= value <= high:
        limits = f"of at least {low}" if high == INT64 else f"from {low} to {high}"
        raise ValueError(f"{name}: expected a whole number {limits}, got {short(value)}")
    return value


def flag(value: Any, name: str) -> bool:
    """Checks that a value is true, false, 0 or 1 and returns it as a bool.

    Raises:
      ValueError: it is not.
    """
    if type(value) not in (bool, int) or value not in (0, 1):
        raise ValueError(f"{name}: expected true or false, got {short(value)}")
    return bool(value)


def number(value: Any, name: str) -> float:
    """Checks that a value is a finite number and returns it as a float.

    Raises:
      ValueError: it is not.
    """
    if type(value) not in (int, float) or not abs(value) <= _LARGEST:
        raise ValueError(f"{name}: expected a finite number, got {short(value)}")
    return float(value)


def numbers(value: Any, name: str, count: int) -> list[float]:
    """Checks that a value is a list of `count` finite numbers and returns it.

    Raises:
      ValueError: it is not.
    """
    if not isinstance(value, list) or len(value) != count:
        raise ValueError(f"{name}: expected a list of {count} numbers, got {short(value)}")
    return [number(item, name) for item in value]


def kind_and_settings(
    value: Any, kinds: Mapping[str, Mapping[str, type]], what: str
) -> tuple[str, dict[str, float | int]]:
    """Returns the name and the settings of one of some kinds, given by its name or as a mapping with `type`.

    Args:
      value: the name, or the mapping.
      kinds: for each name, the type of each setting: float, or int for a whole number of at least 1.
      what: what they are, for messages.

    Raises:
      UserError: the name or a setting is unknown, or a setting is not a number.
    """
    settings = dict(value.items()) if hasattr(value, "items") else {"type": value}
    name = settings.pop("type", None)
    if name not in kinds:
        raise UserError(f"the {what} {name!r} is not one of {', '.join(kinds)}")
    fields = kinds[name]
    for key, given in settings.items():
        if key not in fields:
            known = ", ".join(fields) or "none"
            raise UserError(f"the {what} {name!r} has no setting {key!r}; known settings: {known}")
        if isinstance(given, bool) or not isinstance(given, int | float) or given != given:
            raise UserError(f"{key} of the {what} {name!r} must be a number, not {given!r}")
        if fields[key] is int and given < 1:
            raise UserError(f"{key}={given} of the {what} {name!r} is less than 1")
    return name, {key: fields[key](given) for key, given in settings.items()}


def objects(value: Any, name: str) -> list[dict[str, Any]]:
    """Checks that a value is a list of JSON objects and returns it.

    Raises:
      ValueError: it is not.
    """
    if wrong := [item for item in array(value, name) if not isinstance(item, dict)]:
        raise ValueError(f"{name}: expected objects, got {short(wrong[0])}")
    return value


def column(
    rows: Sequence[Mapping[str, Any]],
    key: str,
    kind: Callable[..., T],
    *limits: Any,
    default: Any = _REQUIRED,
    of: str = "entry",
) -> list[T]:
    """Returns the checked value under one key of each row.

    Args:
      rows: JSON objects.
      key: the key to look up in each row.
      kind: a checking function such as `whole`, called with the value, a name for errors and `limits`.
      limits: further arguments of `kind`.
      default: replaces a missing value, unchecked; without it each row must have the key.
      of: the name of a row in errors, such as "image".

    Raises:
      ValueError: a row lacks the key, or its value is of another kind.
    """
    name, found = repr(key), []
    for k, row in enumerate(rows):
        if key not in row:
            if default is _REQUIRED:
                raise ValueError(f"{of} {k} has no {name}: {short(row)}")
            found.append(default)
            continue
        try:
            found.append(kind(row[key], name, *limits))
        except ValueError as error:
            raise ValueError(f"{of} {k}: {error}") from None
    return found

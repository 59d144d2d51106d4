"""Reads files from outside under one guard: whatever is wrong with one ends in one sentence that names it.

A reader decodes under `with reading(path):` and states what it expects through `text`, `whole`, `numbers`, `objects`,
`texts` and `column`, whose ValueErrors the guard turns into a UserError.
"""

import contextlib
import json
import lzma
import pickle
import re
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

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
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What decoders raise of a file that is cut, altered or of another kind; Pillow alone raises eight of these."""

INT64 = 2**63 - 1
_LARGEST = float(np.finfo(np.float32).max)
_SURROGATE = re.compile("[\ud800-\udfff]")
_REQUIRED: Any = object()


@contextlib.contextmanager
def reading(path: Any, what: str = "") -> Iterator[None]:
    """Turns what goes wrong inside the block, which decodes one file, into one UserError that names the file.

    Args:
      path: the file.
      what: what it is to the user, such as "the mask".

    Raises:
      UserError: in place of any of `DAMAGE`; those raised inside pass as they are.
    """
    try:
        yield
    except DAMAGE as error:
        raise UserError(f"{what} {path} cannot be read: {reason(error)}".lstrip()) from error


def reason(error: BaseException) -> str:
    """Returns the first line of what an exception says, in plain words where it is a common one."""
    if isinstance(error, UnicodeDecodeError):
        return f"it is no UTF-8 text (byte 0x{error.object[error.start]:02x} at {error.start})"
    if isinstance(error, json.JSONDecodeError):
        return f"it is not valid JSON: {error}"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, MemoryError):
        return "it asks for more memory than there is"
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, IsADirectoryError):
        return "it is a folder, not a file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if isinstance(error, KeyError) and "://" in str(error):
        return f"files of {error} are not known here: download them first"
    if isinstance(error, KeyError):
        return f"it has no {error}"
    first = str(error).strip().partition("\n")[0]
    return _SURROGATE.sub("\ufffd", first) or f"it is damaged ({type(error).__name__})"


def read_text(path: epath.PathLike, what: str = "") -> str:
    """Reads a text file: UTF-8, or UTF-16 with its mark; line ends become \\n, and a byte order mark goes.

    Raises:
      UserError: it cannot be read, or is no text.
    """
    with reading(path, what):
        data = epath.Path(path).read_bytes()
        wide = data.startswith((b"\xff\xfe", b"\xfe\xff"))
        found = data.decode("utf-16" if wide else "utf-8-sig")
        if "\0" in found:
            raise ValueError("it holds zero bytes, and is no text")
        return found.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: epath.PathLike, what: str = "") -> Iterator[tuple[int, str]]:
    """Reads the lines of a text file that are not blank, one by one, with their numbers from 1.

    Raises:
      UserError: it cannot be read, or a line is no text.
    """
    with reading(path, what):
        with epath.Path(path).open("rb") as file:
            wide = file.read(2) in (b"\xff\xfe", b"\xfe\xff")
        if wide:
            yield from ((n, line) for n, line in enumerate(read_text(path).split("\n"), 1) if line.strip())
            return
        number = 0
        with epath.Path(path).open("rb") as file:
            for raw in file:
                raw = raw.removeprefix(b"\xef\xbb\xbf") if not number else raw
                for piece in raw.removesuffix(b"\n").removesuffix(b"\r").split(b"\r"):
                    number += 1
                    try:
                        line = piece.decode()
                    except UnicodeDecodeError as error:
                        raise ValueError(f"line {number}: {reason(error)}") from error
                    if "\0" in line:
                        raise ValueError(f"line {number} holds zero bytes, and is no text")
                    if line.strip():
                        yield number, line


def parse_json(content: str) -> Any:
    """Parses JSON, of which no object holds a key twice.

    Raises:
      ValueError: it is no JSON, or a key occurs twice.
    """
    return json.loads(content, object_pairs_hook=_object)


def read_json(path: epath.PathLike, what: str = "") -> Any:
    """Reads a JSON file.

    Raises:
      UserError: it cannot be read, is no JSON, or an object in it holds a key twice.
    """
    with reading(path, what):
        return parse_json(read_text(path, what))


def read_npz(path: epath.PathLike, what: str = "") -> dict[str, np.ndarray]:
    """Reads all arrays of an .npz.

    Raises:
      UserError: it cannot be read, or holds Python objects.
    """
    with reading(path, what), epath.Path(path).open("rb") as file:
        data = np.load(file, allow_pickle=False)
        if not isinstance(data, np.lib.npyio.NpzFile):
            raise ValueError("it is no .npz")
        with data:
            return dict(data.items())


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        double = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {double!r} occurs twice in one object")
    return found


def short(value: Any) -> str:
    """Returns a value as a text of at most 60 characters, for errors."""
    found = repr(value)
    return found if len(found) <= 60 else f"{found[:57]}..."


def text(value: Any, name: str) -> str:
    """Returns a text, halves of surrogate pairs replaced.

    Raises:
      ValueError: it is none.
    """
    if type(value) is not str:
        raise ValueError(f"{name}: expected a text, got {short(value)}")
    return value if value.isascii() else _SURROGATE.sub("\ufffd", value)


def array(value: Any, name: str) -> list[Any]:
    """Returns a list.

    Raises:
      ValueError: it is none.
    """
    if not isinstance(value, list):
        raise ValueError(f"{name}: expected a list, got {short(value)}")
    return value


def texts(value: Any, name: str) -> list[str]:
    """Returns a list of texts; one text is a list of one.

    Raises:
      ValueError: it is neither.
    """
    found = value if isinstance(value, list) else [value]
    if wrong := [item for item in found if type(item) is not str]:
        raise ValueError(f"{name}: expected a text or a list of texts, got {short(wrong[0])}")
    return [text(item, name) for item in found]


def whole(value: Any, name: str, low: int = 0, high: int = INT64) -> int:
    """Returns a whole number from `low` to `high`.

    Raises:
      ValueError: it is none.
    """
    if type(value) is not int or not low <= value <= high:
        limits = f"of at least {low}" if high == INT64 else f"from {low} to {high}"
        raise ValueError(f"{name}: expected a whole number {limits}, got {short(value)}")
    return value


def flag(value: Any, name: str) -> bool:
    """Returns a truth value, which many files write as 0 and 1.

    Raises:
      ValueError: it is none.
    """
    if type(value) not in (bool, int) or value not in (0, 1):
        raise ValueError(f"{name}: expected true or false, got {short(value)}")
    return bool(value)


def number(value: Any, name: str) -> float:
    """Returns a finite number.

    Raises:
      ValueError: it is none.
    """
    if type(value) not in (int, float) or not abs(value) <= _LARGEST:
        raise ValueError(f"{name}: expected a finite number, got {short(value)}")
    return float(value)


def numbers(value: Any, name: str, count: int) -> list[float]:
    """Returns a list of `count` finite numbers.

    Raises:
      ValueError: it is none.
    """
    if not isinstance(value, list) or len(value) != count:
        raise ValueError(f"{name}: expected a list of {count} numbers, got {short(value)}")
    return [number(item, name) for item in value]


def objects(value: Any, name: str) -> list[dict[str, Any]]:
    """Returns a list of JSON objects.

    Raises:
      ValueError: it is none.
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
    """Returns what stands under one key of each row.

    Args:
      rows: JSON objects.
      key: of theirs.
      kind: a function as `whole`, which is called with the value, a name for errors and `limits`.
      limits: its other arguments.
      of: what a row is, for errors.
      default: stands for a missing value, unchecked; without one each row has to have the key.

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

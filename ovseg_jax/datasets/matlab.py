"""Arrays in MATLAB files of version 5, read without SciPy, whose reader crashes the process on damaged files."""

import struct
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int32

from ovseg_jax.data.images import Encoded
from ovseg_jax.reading import reading

_HEADER = 128  # bytes of text and version
_ORDERS = {b"IM": "<", b"MI": ">"}
# Numbers of the format: types of elements, and classes of arrays.
_MATRIX, _COMPRESSED = 14, 15
_STRUCTURE, _NUMERIC = 2, range(6, 16)
_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
# Bytes of a decompressed variable: a label map has a few million, SVHN's training images have 225 million.
_LARGEST = 1 << 28


def read_label_map(file: Encoded, *path: str) -> Int32[np.ndarray, "h w"]:
    """Reads a label map, an array of two dimensions whose values are whole numbers from 0 to 65536.

    Args:
      file: the file.
      *path: the name of its variable, and of the fields of structures that lead to the map.

    Raises:
      UserError: the file is damaged or of another version, or has no such array.
    """
    labels, name = read_array(file, *path), repr(path[-1])
    with reading(file):
        if labels.ndim != 2 or not labels.size:
            raise ValueError(f"{name} is an array of {labels.dtype} {labels.shape}, not a label map")
        if not np.isfinite(labels).all() or ((labels < 0) | (labels > 1 << 16) | (labels % 1 != 0)).any():
            raise ValueError(f"{name} has values that are not whole numbers from 0 to 65536")
        return labels.astype(np.int32)


def read_array(file: Encoded, *path: str) -> np.ndarray:
    """Reads an array of numbers of any shape.

    Args:
      file: the file.
      *path: the name of its variable, and of the fields of structures that lead to the array.

    Raises:
      UserError: the file is damaged or of another version, or has no such array.
    """
    with reading(file):
        if len(file.data) < _HEADER or (order := _ORDERS.get(bytes(file.data[126:128]))) is None:
            raise ValueError("it is not a MATLAB file of version 5")
        return _array(_find(memoryview(file.data)[_HEADER:], order, path[0]), order, path[1:])


def _find(data: memoryview, order: str, name: str) -> memoryview:
    """Returns the content of a variable."""
    for kind, content in _elements(data, order):
        if kind == _COMPRESSED:
            unpacker = zlib.decompressobj()
            plain = unpacker.decompress(content, _LARGEST)
            if not unpacker.eof:
                raise ValueError(f"a variable is cut off, or has more than {_LARGEST} bytes")
            kind, content = next(_elements(memoryview(plain), order), (0, content))
        if kind == _MATRIX and bytes(_parts(content, order)[2][1]) == name.encode():
            return content
    raise KeyError(name)


def _elements(data: memoryview, order: str) -> Iterator[tuple[int, memoryview]]:
    """Yields the type and the content of each element."""
    at = 0
    while at + 8 <= len(data):
        kind, size = struct.unpack_from(f"{order}II", data, at)
        start, end = at + 8, at + 8 + size
        if kind >> 16:  # Four bytes or fewer stand in place of the size.
            kind, size = kind & 0xFFFF, kind >> 16
            start, end = at + 4, at + 4 + size
        if end > len(data):
            raise ValueError("it is cut off")
        yield kind, data[start:end]
        at = end if kind == _COMPRESSED else at + -(-(end - at) // 8) * 8


def _parts(content: memoryview, order: str) -> list[tuple[int, memoryview]]:
    """Returns the elements of an array: flags, dimensions, name, and what depends on its class."""
    parts = list(_elements(content, order))
    if len(parts) < 4 or not parts[0][1] or parts[1][0] != 5:
        raise ValueError("an array is damaged")
    return parts


def _array(content: memoryview, order: str, fields: Sequence[str]) -> np.ndarray:
    """Returns an array of numbers, or that in a field of a structure of one element."""
    parts = _parts(content, order)
    kind = struct.unpack_from(f"{order}I", parts[0][1])[0] & 0xFF
    shape = np.frombuffer(parts[1][1], f"{order}i4").tolist()
    if fields:
        if kind != _STRUCTURE or set(shape) != {1}:
            raise ValueError(f"the field {fields[0]!r} is not in a structure of one element")
        (length,) = struct.unpack_from(f"{order}i", parts[3][1])
        text = bytes(parts[4][1])
        names = [text[k : k + length].split(b"\0")[0] for k in range(0, len(text), max(length, 1))]
        if fields[0].encode() not in names:
            raise KeyError(fields[0])
        return _array(parts[5 + names.index(fields[0].encode())][1], order, fields[1:])
    stored, values = parts[3]
    if kind not in _NUMERIC or stored not in _TYPES:
        raise ValueError("a variable is not an array of numbers")
    return np.frombuffer(values, order + _TYPES[stored]).reshape(shape, order="F")

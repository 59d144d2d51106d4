"""Damaged files, by seed: bytes altered anywhere, or what is packed inside altered and packed again."""

import gzip
import io
import json
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

NOTHING = object()
ODD: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    255,
    2**31,
    2**63,
    2**64,
    -(2**63) - 1,
    10**30,
    10**400,
    0.5,
    -0.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    " ",
    "x",
    "1",
    "\0",
    "\ud800",
    "²",
    "../x",
    "a" * 5000,
    "\u202e\u0301",
    [],
    {},
    [None],
    [[]],
    [[[1, 2], "x"], {}],
    {"": None},
    {"id": {}, "name": []},
]
WORDS = [b"\0", b"\xff", b"\xef\xbb\xbf", b"\r", b"\n", b"\t", b":", b",", b";", b'"', b"{", b"[", b"]", b"}"]
WORDS += [
    b"NaN",
    b"Infinity",
    b"null",
    b"-1",
    b"1e999",
    b"9" * 30,
    b"9" * 5000,
    "²".encode(),
    b"\xe9",
    b"[" * 3000,
]


def mutant(rng: random.Random, name: str, data: bytes) -> bytes:
    """Returns the bytes of a file with one to three faults.

    Args:
      rng: of the seed.
      name: the file's, whose suffix says what may be packed inside.
      data: of the whole file.
    """
    for _ in range(rng.choice((1, 1, 2, 3))):
        inside = _inside(name, data) if rng.random() < 0.6 else None
        try:
            data = inside(rng, data) if inside else _bytes(rng, data)
        except (
            ValueError,
            LookupError,
            zlib.error,
            EOFError,
            OSError,
            zipfile.BadZipFile,
            struct.error,
            RuntimeError,
        ):
            data = _bytes(rng, data)  # an earlier fault has broken the packing
    return data


def _inside(name: str, data: bytes) -> Callable[[random.Random, bytes], bytes] | None:
    name = name.lower()
    if data.startswith(b"\x89PNG"):
        return _png
    if data.startswith(b"PK"):
        return _zip
    if data.startswith(b"\x1f\x8b"):
        return lambda rng, data: gzip.compress(_text(rng, gzip.decompress(data)), 1)
    if name.endswith(".safetensors"):
        return _safetensors
    if name.endswith((".json", "_metadata", "_sharding", ".zarray")):
        return _json
    if name.endswith(".jsonl"):
        return _json_lines
    return _text if name.endswith((".txt", ".tsv")) else None


def _bytes(rng: random.Random, data: bytes) -> bytes:
    out = bytearray(data)
    # Headers matter most.
    at = rng.randrange(len(out) + 1) if rng.random() < 0.7 else rng.randrange(min(len(out), 64) + 1)
    end = min(len(out), at + rng.choice((1, 2, 4, 16, 200)))
    match rng.randrange(9):
        case 0 | 1 if at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        case 2 if at < len(out):
            out[at] = rng.choice((0, 255, 127, 128, rng.randrange(256)))
        case 3:
            del out[at:end]
        case 4:
            out[at:at] = out[at:end]
        case 5:
            del out[at:]
        case 6:
            out[at:end] = rng.choice(WORDS)
        case 7:
            out[at:end] = bytes(end - at)
        case _:
            out[at:at] = rng.randbytes(rng.choice((1, 8, 100)))
    return bytes(out)


def _text(rng: random.Random, data: bytes) -> bytes:
    lines = data.split(b"\n")
    at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    match rng.randrange(6):
        case 0:
            lines[at], lines[other] = lines[other], lines[at]
        case 1:
            lines.insert(at, lines[other])
        case 2:
            del lines[at]
        case 3:
            lines[at] = rng.choice(WORDS) + lines[at]
        case 4:
            lines[at] += rng.choice(WORDS)
        case _:
            place = rng.randrange(len(lines[at]) + 1)
            lines[at] = lines[at][:place] + rng.choice(WORDS) + lines[at][place:]
    return b"\n".join(lines)


def _json(rng: random.Random, data: bytes) -> bytes:
    if rng.random() < 0.05:
        return b'{"a":' * 3000 + b"1" + b"}" * 3000
    found = json.loads(data)
    places: list[tuple[Any, Any]] = []
    stack = [found]
    while stack:
        node = stack.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            places.append((node, key))
            stack.append(node[key])
    if not places or rng.random() < 0.02:
        return json.dumps(rng.choice(ODD)).encode()
    node, key = rng.choice(places)
    match rng.randrange(6):
        case 0:
            del node[key]
        case 1 if isinstance(node, dict):
            node[json.dumps(rng.choice(ODD))[:50]] = node.pop(key)
        case 1:
            node.insert(key, node[key])
        case 2:
            other, place = rng.choice(places)
            node[key] = (
                json.loads(json.dumps(other[place])) if place in other or isinstance(other, list) else None
            )
        case _:
            node[key] = rng.choice(ODD)
    text = json.dumps(found)
    if rng.random() < 0.1 and text.startswith("{") and len(text) > 2:
        text = text[:-1] + ", " + text[1:]  # every key twice
    return text.encode()


def _json_lines(rng: random.Random, data: bytes) -> bytes:
    if rng.random() < 0.3:
        return _text(rng, data)
    lines = data.split(b"\n")
    at = rng.choice([k for k, line in enumerate(lines) if line.strip()])
    lines[at] = _json(rng, lines[at])
    return b"\n".join(lines)


def _png(rng: random.Random, data: bytes) -> bytes:
    chunks, at = [], 8
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        chunks.append([data[at + 4 : at + 8], data[at + 8 : at + 8 + length]])
        at += 12 + length
    chosen = rng.choice(chunks)
    if chosen[0] == b"IDAT" and rng.random() < 0.5:
        chosen[1] = zlib.compress(_bytes(rng, zlib.decompress(chosen[1])))
    else:
        chosen[1] = _bytes(rng, chosen[1])
    if rng.random() < 0.2:
        chunks.insert(rng.randrange(len(chunks) + 1), rng.choice(chunks))
    return data[:8] + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


def _zip(rng: random.Random, data: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [[info.filename, archive.read(info)] for info in archive.infolist()]
    chosen = rng.choice(members)
    match rng.randrange(8):
        case 0:
            members.remove(chosen)
        case 1:
            chosen[0] = rng.choice(("x", "words.npy", "../x", "a" * 300))
        case _:
            chosen[1] = _bytes(rng, chosen[1])
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, body in members:
            archive.writestr(name, body)
    return packed.getvalue()


def _safetensors(rng: random.Random, data: bytes) -> bytes:
    size = int.from_bytes(data[:8], "little")
    header = _json(rng, data[8 : 8 + size])
    return len(header).to_bytes(8, "little") + header + data[8 + size :]

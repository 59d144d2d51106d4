"""Atomic file writing, checksums, and a lock that gives a folder to one process at a time."""

import contextlib
import errno
import json
import os
import socket
import time
import zlib
from collections.abc import Iterator
from typing import Any

from etils import epath

from ovseg_jax.errors import UserError
from ovseg_jax.reading import DAMAGE, open_binary, read_bytes, reason

SUMS_FILE = "checksums.json"
LOCK_FILE = ".lock"
_CHUNK = 1 << 22


def write_whole(path: epath.PathLike, content: str | bytes) -> None:
    """Writes a temporary file and renames it, so that a reader finds the old content or the new one.

    Raises:
      UserError: the file cannot be written, such as on a full disk.
    """
    path = epath.Path(path)
    temporary = path.parent / f"{path.name}.tmp"
    try:
        if isinstance(content, str):
            content = content.encode()
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def checksum(path: epath.PathLike) -> list[int]:
    """Returns the size and the CRC-32 of a file."""
    size = crc = 0
    with open_binary(path) as file:
        while chunk := file.read(_CHUNK):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return [size, crc]


def write_recorded(path: epath.PathLike, content: str) -> None:
    """Writes a file whole, and its checksum into `checksums.json` beside it.

    A process killed between the two leaves the file without a checksum; `verify` then passes.
    """
    path = epath.Path(path)
    forget(path)
    write_whole(path, content)
    record(path)


def forget(path: epath.PathLike) -> None:
    """Removes the checksum of a file that is about to be written anew."""
    path = epath.Path(path)
    sums = _sums(path.parent)
    if sums.pop(path.name, None) is not None:
        write_whole(path.parent / SUMS_FILE, json.dumps(sums, indent=1) + "\n")


def record(path: epath.PathLike) -> None:
    """Writes the checksum of a file into `checksums.json` beside it."""
    path = epath.Path(path)
    sums = _sums(path.parent) | {path.name: checksum(path)}
    write_whole(path.parent / SUMS_FILE, json.dumps(sums, indent=1) + "\n")


def is_recorded(path: epath.PathLike, content: str | None = None) -> bool | None:
    """Tells whether a file (or its future content) has its recorded checksum; None where none is recorded."""
    path = epath.Path(path)
    known = _sums(path.parent).get(path.name)
    if known is None:
        return None
    if content is None:
        return known == checksum(path)
    return known == [len(content.encode()), zlib.crc32(content.encode())]


def verify(path: epath.PathLike) -> None:
    """Compares a file with its recorded checksum, if there is one.

    Raises:
      UserError: they differ.
    """
    path = epath.Path(path)
    if is_recorded(path) is False:
        raise UserError(
            f"{path} does not match its checksum: it is damaged, or was edited (after an edit, delete "
            f"{path.parent / SUMS_FILE})"
        )


def read_recorded(path: epath.PathLike) -> str:
    """Reads a text file and compares it with its recorded checksum, if there is one.

    Raises:
      UserError: the file is missing, is not text, or does not match its checksum.
    """
    path = epath.Path(path)
    try:
        text = read_bytes(path).decode()
        verify(path)
    except DAMAGE as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from error
    return text


def _sums(folder: epath.Path) -> dict[str, Any]:
    path = folder / SUMS_FILE
    try:
        found = json.loads(read_bytes(path)) if path.exists() else {}
        if isinstance(found, dict):
            return found
        raise ValueError("it is not a JSON object")
    except DAMAGE as error:
        raise UserError(f"{path} cannot be read: {reason(error)}; you may delete it") from error


@contextlib.contextmanager
def locked(
    folder: epath.PathLike, remedy: str = "wait for it, stop it, or choose another folder"
) -> Iterator[None]:
    """Creates a folder and keeps other processes out of it while the context lasts.

    The operating system releases the lock when the process ends, so that a lock file left by a killed process locks
    nothing. Buckets, and file systems without locks, are not locked.

    Raises:
      UserError: another process holds the lock; the message names it.
    """
    folder = epath.Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be created: {reason(error)}") from error
    if "://" in str(folder):
        yield
        return
    path = folder / LOCK_FILE
    descriptor = _lock(path, remedy)
    try:
        yield
    finally:
        if descriptor is not None:
            # Deleted before the lock is released: afterwards the file could be another process's.
            with contextlib.suppress(OSError):
                path.unlink()
            os.close(descriptor)


def _lock(path: epath.Path, remedy: str) -> int | None:
    import fcntl  # absent on Windows

    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"the folder {path.parent} cannot be written to: {reason(error)}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace").strip()
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
                raise UserError(
                    f"{path.parent} is in use by {holder or 'another process'}: {remedy}"
                ) from error
            return None  # This file system has no locks.
        with contextlib.suppress(OSError):
            # Another process may have removed the file since it was opened: a lock on it then excludes nobody.
            if os.fstat(descriptor).st_ino == os.stat(path).st_ino:
                break
        os.close(descriptor)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    with contextlib.suppress(OSError):  # On a full disk the lock works without its text.
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {since}".encode(), 0)
    return descriptor

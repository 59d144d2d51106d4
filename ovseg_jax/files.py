"""Atomic file writing, checksums, and a lock that gives a folder to one process at a time."""

import contextlib
import errno
import json
import os
import socket
import stat
import time
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from ovseg_jax.errors import UserError
from ovseg_jax.reading import DAMAGE, open_binary, read_bytes, reason

SUMS_FILE = "checksums.json"
LOCK_FILE = ".lock"
_CHUNK = 1 << 22


def write_whole(path: epath.PathLike, content: str | bytes, *, shared: bool = False) -> None:
    """Writes a temporary file and renames it, so that a reader finds the old content or the new one.

    The file that a link leads to is replaced, not the link. What lies in /dev is written to as it is.

    Args:
      path: the file.
      content: its new content; a text becomes UTF-8.
      shared: whether other processes may write the file at the same time; the last one's content then stays.

    Raises:
      UserError: the file cannot be written, such as on a full disk, or is a pipe or a device elsewhere.
    """
    content = content.encode() if isinstance(content, str) else content
    if is_device(path):
        try:
            with open(path, "ab") as device:
                device.write(content)
        except OSError as error:
            raise UserError(f"{path} cannot be written: {reason(error)}") from error
        return
    if problem := why_not_a_file(path):
        raise UserError(f"{path} cannot be written: {problem}")
    path = epath.Path(os.path.realpath(path) if os.path.islink(path) else path)
    temporary = path.parent / f"{path.name}.{f'{uuid.uuid4().hex}.' if shared else ''}tmp"
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def is_device(path: epath.PathLike) -> bool:
    """Tells whether a path is one of the system's, such as /dev/stdout, where a rename would replace it for all."""
    return os.path.abspath(path).startswith("/dev/") and not os.path.abspath(path).startswith("/dev/shm/")


def why_not_a_file(path: epath.PathLike) -> str:
    """Returns what a path is that can be neither replaced nor made, a folder, a pipe or a device; "" for all others."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # There is none, or it is an address.
        return ""
    if stat.S_ISDIR(mode):
        return "it is a folder"
    return "" if stat.S_ISREG(mode) else "it is a pipe or a device, not a file"


def file_stamp(path: epath.PathLike) -> list[int]:
    """Returns the size and modification time of a file, to detect changes; [-1, -1] if there is none."""
    try:
        if "://" in str(path):
            found = epath.Path(path).stat()
            return [int(found.length), int(found.mtime)]
        local = os.stat(path)
        return [local.st_size, local.st_mtime_ns]
    except OSError:
        return [-1, -1]


def keep_newest(folder: Path, pattern: str, most: int) -> None:
    """Removes files of a folder that were neither read nor written for the longest time, beyond `most` bytes.

    The newest one stays, whatever its size. Most systems note reading once a day.
    """
    found = []
    for path in folder.glob(pattern):
        with contextlib.suppress(OSError):  # Another process may have removed it.
            facts = path.stat()
            found.append((max(facts.st_atime, facts.st_mtime), facts.st_size, path))
    left = most
    for i, (_, size, path) in enumerate(sorted(found, reverse=True)):
        left -= size
        if left < 0 and i:
            with contextlib.suppress(OSError):
                path.unlink()


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
    with _held(folder / LOCK_FILE, folder, remedy):
        yield


@contextlib.contextmanager
def locked_file(path: epath.PathLike) -> Iterator[None]:
    """Keeps other processes from an output file and what is recorded beside it while the context lasts.

    Raises:
      UserError: another process holds the lock, or the path is a device, beside which nothing can be recorded.
    """
    if is_device(path):
        raise UserError(f"{path} is a device: give a file, since finished results are recorded beside it")
    with _held(epath.Path(f"{path}{LOCK_FILE}"), path, "wait for it, stop it, or choose another file"):
        yield


@contextlib.contextmanager
def _held(path: epath.Path, what: epath.PathLike, remedy: str) -> Iterator[None]:
    """Holds the lock of a file `path` for a folder or file `what`."""
    if "://" in str(path):
        yield
        return
    descriptor = _lock(path, what, remedy)
    try:
        yield
    finally:
        if descriptor is not None:
            # Deleted before the lock is released: afterwards the file could be another process's.
            with contextlib.suppress(OSError):
                path.unlink()
            os.close(descriptor)


def _lock(path: epath.Path, what: epath.PathLike, remedy: str) -> int | None:
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
                raise UserError(f"{what} is in use by {holder or 'another process'}: {remedy}") from error
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

"""A read-only view of a download folder in which archives look as if they were unpacked where they lie.

`train2017.zip` shows `train2017/000000000009.jpg`, as the unpacked folder does. An archive inside an archive is shown
the same way: `panoptic_annotations_trainval2017.zip` shows `annotations/panoptic_train2017/000000000009.png`.

Members are read at their place in the archive. The exceptions, `.tar.gz`, a single file as `.gz` and an archive that is
compressed inside another, have no such places: they are decompressed once, to a cache folder, and read from there.
"""

import contextlib
import fnmatch
import functools
import gzip
import io
import logging
import os
import posixpath
import re
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

import numpy as np
from etils import epath

from ovseg_jax.errors import UserError
from ovseg_jax.reading import open_binary, read_bytes, reading, reason, short, tar_files

_LOG = logging.getLogger(__name__)

CACHE = ".unpacked"
_DEEPEST = 4
_ENCRYPTED = 1
_PLAIN, _STORED, _DEFLATED = range(3)  # a span of bytes; a zip's member, stored or deflated
_DISK = -1
_RECORD = np.dtype(
    [("file", "i4"), ("at", "i8"), ("packed", "i8"), ("size", "i8"), ("crc", "u4"), ("kind", "u1")]
)
_UNPACKED = (_DISK, 0, 0, 0, 0, _PLAIN)


class Members:
    """All files below a folder, unpacked or in archives, by their path from it.

    Hidden files, `__MACOSX` and links inside archives are left out. If a member is both unpacked and packed, the
    unpacked file is read; if it is in several archives, that of the first archive in alphabetical order.

    It may be used by several threads, and pickled: a copy reads the same files without listing them again.

    Attributes:
      root: the folder.
    """

    def __init__(
        self, root: epath.PathLike, archives: Sequence[str] = ("*",), cache: epath.PathLike | None = None
    ):
        """Lists the members of the folder and of its archives.

        Args:
          root: the download folder.
          archives: patterns of the names of archives (.zip, .tar, .tar.gz, .tgz, .gz) that are shown unpacked, such
            as "VOCtrainval*.tar". Other archives are members like any file.
          cache: the folder for what must be decompressed as a whole; by default `.unpacked` in `root`. A file
            there is reused as long as its archive has the same name, size and time.

        Raises:
          UserError: the folder or an archive is missing, damaged or encrypted, or an archive has a member outside of
            its folder.
        """
        self.root = epath.Path(root)
        if not str(root) or not self.root.is_dir():
            raise UserError(f"the download folder {str(root)!r} is not a folder")
        self._cache = epath.Path(cache) if cache is not None else self.root / CACHE
        self._patterns = tuple(archives)
        self._files: list[tuple[str, str]] = []  # the file of each archive, and its name in messages
        found: dict[bytes, tuple[int, ...]] = {}
        packed = []
        for name in _walk(self.root):
            if self._is_archive(name):
                packed.append(name)
            else:
                found[_encoded(name)] = _UNPACKED
        self._on_disk = set(packed)
        for name in sorted(packed):
            self._add_archive(name, str(self.root / name), str(self.root / name), found, 1)
        self._names = np.array(sorted(found), dtype=bytes)
        self._records = np.array([found[name] for name in sorted(found)], _RECORD)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._row(name) is not None

    def names(self, folder: str = "", suffix: str = "") -> list[str]:
        """Returns the sorted names of the members below a folder, at any depth, that end with `suffix`."""
        start, end = 0, len(self._names)
        if folder and len(_encoded(folder)) >= self._names.itemsize:
            return []
        if folder:
            # "0" is the character after "/".
            start, end = np.searchsorted(self._names, [_encoded(f"{folder}/"), _encoded(f"{folder}0")])
        wanted = _encoded(suffix)
        return [_decoded(name) for name in self._names[start:end].tolist() if name.endswith(wanted)]

    def find(self, *choices: str) -> str | None:
        """Returns the name of the member whose path ends with one of `choices`; None if there is none.

        An earlier choice is preferred, then the member closest to the root.

        Raises:
          UserError: several members match that lie equally close to the root.
        """
        for choice in choices:
            wanted = _encoded(f"/{choice}")
            matching = self._names[np.char.endswith(self._names, wanted)].tolist() if len(self._names) else []
            found = [_decoded(name) for name in matching] + [choice] * (choice in self)
            if found:
                return self._closest(choice, found)
        return None

    def find_folder(self, *choices: str, suffix: str = "") -> str | None:
        """Returns the folder whose path ends with one of `choices` and that holds members with `suffix`.

        An earlier choice is preferred, then the folder closest to the root; "" is the root. A folder counts if the
        members lie directly in it. None is returned if there is no such folder.

        Raises:
          UserError: several folders match that lie equally close to the root.
        """
        folders = {posixpath.dirname(name) for name in self.names(suffix=suffix)}
        for choice in choices:
            found = [name for name in folders if name == choice or (choice and name.endswith(f"/{choice}"))]
            if found:
                return self._closest(choice, found)
        return None

    def read(self, name: str) -> bytes:
        """Reads a member.

        Raises:
          UserError: there is no such member, or it is damaged.
        """
        row = self._row(name)
        if row is None:
            raise UserError(f"{self.root} holds no {name!r}, unpacked or in an archive")
        record = self._records[row]
        place = self.where(name)
        with reading(place):
            if record["file"] == _DISK:
                return read_bytes(self.root / name)
            with open_binary(self._files[record["file"]][0]) as file:
                return _read_packed(file, record)

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """Opens a member, to read parts of it at any place; a deflated one is decompressed once, to the cache.

        Raises:
          UserError: there is no such member, or it is damaged: also in place of an error inside the block.
        """
        row = self._row(name)
        if row is None:
            raise UserError(f"{self.root} holds no {name!r}, unpacked or in an archive")
        record, place = self._records[row], self.where(name)
        path, start, size = str(self.root / name), 0, None
        if record["file"] != _DISK:
            path, start, size = self._files[record["file"]][0], int(record["at"]), int(record["size"])
        if record["kind"] != _PLAIN:
            with io.BytesIO(self.read(name)) as plain:
                path, start = self._decompressed(plain, name, place, path, int(record["size"]), ""), 0
        with reading(place), open_binary(path) as file:
            yield _part(file, start, size)

    def where(self, name: str) -> str:
        """Returns the place of a member for messages: its path, or its archive and its name there."""
        row = self._row(name)
        if row is None or self._records[row]["file"] == _DISK:
            return str(self.root / name)
        return f"{self._files[self._records[row]['file']][1]}, member {name!r},"

    def _row(self, name: str) -> int | None:
        wanted = _encoded(name)
        if len(wanted) > self._names.itemsize:
            return None  # NumPy would copy all names to widen them.
        row = int(np.searchsorted(self._names, wanted))
        return row if row < len(self._names) and self._names[row] == wanted else None

    def _closest(self, choice: str, found: Sequence[str]) -> str:
        depth = min(name.count("/") for name in found)
        closest = sorted(name for name in found if name.count("/") == depth)
        if len(closest) > 1:
            raise UserError(
                f"{self.root} holds both {closest[0]!r} and {closest[1]!r}, and only one {choice!r} can be read: "
                "move one of them elsewhere"
            )
        return closest[0]

    def _is_archive(self, name: str) -> bool:
        base = posixpath.basename(name)
        return bool(_kind(base)) and any(fnmatch.fnmatchcase(base, pattern) for pattern in self._patterns)

    def _add_archive(
        self,
        name: str,
        path: str,
        title: str,
        found: dict[bytes, tuple[int, ...]],
        depth: int,
        start: int = 0,
        size: int | None = None,
    ) -> None:
        """Adds the members of an archive, and of the archives in it.

        Args:
          name: the path of the archive from the root, as if the archives around it were unpacked.
          path: the file that holds it.
          title: its name in messages.
          found: the records of all members.
          depth: 1 for an archive on disk, 2 for one inside of it.
          start: the position of the archive in the file.
          size: its size in bytes; None for the rest of the file.
        """
        if depth > _DEEPEST:
            raise UserError(
                f"{title} lies in {_DEEPEST} archives, one inside another, which is not supported: unpack it"
            )
        if _kind(name).endswith("gz"):
            with reading(title), open_binary(path) as file:
                part = _part(file, start, size)
                length = part.seek(0, os.SEEK_END)
                part.seek(0)
                with gzip.GzipFile(fileobj=part) as unzipped:
                    suffix = ".tar" if _kind(name) == "tar.gz" else ""
                    path = self._decompressed(unzipped, name, title, path, length, suffix)
            start, size = 0, None
        number = len(self._files)
        self._files.append((path, title))
        own: dict[str, tuple[int, ...]] = {}
        inner: list[tuple[str, str, int, int | None]] = []
        with reading(title), open_binary(path) as file:
            part = _part(file, start, size)
            for raw, record, open_ in _ENTRIES[_kind(name)](part, posixpath.basename(name)):
                member = posixpath.join(posixpath.dirname(name), _inside(raw))
                kind, at, packed, length, crc = record
                if _is_hidden(member) or member in self._on_disk:
                    continue  # An unpacked archive is read in place of the packed one.
                if not self._is_archive(member):
                    own[member] = (number, start + at, packed, length, crc, kind)
                elif open_ is None:
                    inner.append((member, path, start + at, length))
                else:
                    with open_() as plain:
                        inner.append(
                            (member, self._decompressed(plain, member, title, path, length, ""), 0, None)
                        )
        shadowed = [member for member in own if found.setdefault(_encoded(member), own[member])[0] != number]
        if shadowed:
            first = found[_encoded(shadowed[0])][0]
            other = "unpacked" if first == _DISK else f"in {self._files[first][1]}"
            _LOG.warning(
                "%s: members that are also found elsewhere, and are read there: %d, such as %r, which is %s",
                title,
                len(shadowed),
                shadowed[0],
                other,
            )
        for member, inner_path, inner_start, inner_size in inner:
            inner_title = f"{title}, member {member!r}"
            self._add_archive(member, inner_path, inner_title, found, depth + 1, inner_start, inner_size)

    def _decompressed(self, plain: Any, name: str, title: str, path: str, size: int, suffix: str) -> str:
        """Writes the content of a stream into the cache, unless it is there, and returns the path of the file."""
        status = epath.Path(path).stat()
        key = zlib.crc32(
            f"{name}\n{status.length}\n{status.mtime}\n{size}".encode("utf-8", "surrogateescape")
        )
        target = self._cache / f"{key:08x}-{posixpath.basename(name)}{suffix}"
        if target.exists():
            return str(target)
        _LOG.info("decompressing %s once, to %s", title, target)
        temporary = self._cache / f"{target.name}.{os.getpid()}.tmp"
        try:
            self._cache.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as out:
                while chunk := _read_chunk(plain, title):
                    out.write(chunk)
            temporary.replace(target)
        except OSError as error:
            raise UserError(
                f"{title} must be decompressed to be read, but {self._cache} cannot be written ({reason(error)}): "
                "unpack the archive yourself, in its folder"
            ) from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        return str(target)


class _Part(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: IO[bytes], start: int, size: int):
        self._file, self._start, self._size, self._at = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError("it is cut off")  # which zipfile expects
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        data = self._file.read(max(0, min(len(buffer), self._size - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _part(file: IO[bytes], start: int, size: int | None) -> io.BufferedReader:
    """Returns a part of a file as a file; without a size, the rest of the file."""
    end = file.seek(0, os.SEEK_END)
    return io.BufferedReader(_Part(file, start, end - start if size is None else size))


def _kind(name: str) -> str:
    """Returns the kind of an archive by its name, or "" if it is none."""
    found = re.search(r"\.(zip|tar|tar\.gz|tgz|gz)$", name, re.IGNORECASE)
    return {"tgz": "tar.gz"}.get(kind := found[1].lower(), kind) if found else ""


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _encoded(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _decoded(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _walk(folder: epath.Path, prefix: str = "", around: frozenset[str] = frozenset()) -> Iterator[str]:
    """Yields the paths of all files below a folder that are not hidden; links are followed."""
    if "://" in str(folder):
        entries = [(path.name, path.is_dir()) for path in folder.iterdir()]
    else:
        real = os.path.realpath(folder)
        if real in around:
            return  # a link to a folder around it
        around |= {real}
        with reading(folder, "the folder"), os.scandir(folder) as found:
            entries = [(entry.name, entry.is_dir()) for entry in found]
    for name, is_folder in entries:
        if _is_hidden(name):
            continue
        if is_folder:
            yield from _walk(folder / name, f"{prefix}{name}/", around)
        else:
            yield prefix + name


def _inside(raw: str) -> str:
    """Returns the path of an archive's member, in one form.

    Raises:
      ValueError: it leads out of the folder in which the archive is unpacked.
    """
    path = raw.replace("\\", "/")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if not parts or ".." in parts or path.startswith("/") or re.match(r"[A-Za-z]:/", path):
        raise ValueError(f"its member {short(raw)} would lie outside of the folder")
    return "/".join(parts)


_Entry = tuple[str, tuple[int, int, int, int, int], Callable[[], Any] | None]


def _zip_entries(part: io.BufferedReader, name: str) -> Iterator[_Entry]:
    """Yields the name of each member, its record without the file, and a function that opens it."""
    try:
        archive = zipfile.ZipFile(part)
    except zipfile.BadZipFile as error:
        raise ValueError(f"it is cut off or no zip file ({error})") from error
    kinds = {zipfile.ZIP_STORED: _STORED, zipfile.ZIP_DEFLATED: _DEFLATED}
    with archive:
        for info in archive.infolist():
            if info.is_dir() or stat.S_ISLNK(info.external_attr >> 16):
                continue
            name = info.filename
            if info.flag_bits & _ENCRYPTED:
                raise ValueError(f"its member {short(name)} is encrypted: unpack it with its password")
            if info.compress_type not in kinds:
                raise ValueError(
                    f"its member {short(name)} is compressed by method {info.compress_type}, which is not supported: "
                    "unpack it"
                )
            record = (
                kinds[info.compress_type],
                info.header_offset,
                info.compress_size,
                info.file_size,
                info.CRC,
            )
            yield name, record, functools.partial(archive.open, info)


def _tar_entries(part: io.BufferedReader, name: str) -> Iterator[_Entry]:
    """Yields the name of each member and its record without the file."""
    for entry in tar_files(part):
        yield entry.name, (_PLAIN, entry.offset_data, entry.size, entry.size, 0), None


def _gz_entries(part: io.BufferedReader, name: str) -> Iterator[_Entry]:
    """Yields the one member of a decompressed `.gz`, which has the archive's name without the suffix."""
    size = part.seek(0, os.SEEK_END)
    yield name[: -len(".gz")], (_PLAIN, 0, size, size, 0), None


_ENTRIES = {"zip": _zip_entries, "tar": _tar_entries, "tar.gz": _tar_entries, "gz": _gz_entries}


def _read_chunk(plain: Any, title: str) -> bytes:
    with reading(title):
        return plain.read(1 << 20)


def _read_packed(file: IO[bytes], record: np.void) -> bytes:
    """Reads a member at its place in an archive.

    Raises:
      ValueError: it is damaged.
    """
    at, packed, size, kind = (int(record[field]) for field in ("at", "packed", "size", "kind"))
    if kind != _PLAIN:
        file.seek(at)
        header = file.read(30)
        if not header.startswith(b"PK\3\4"):
            raise ValueError("its header is damaged")
        at += 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    file.seek(at)
    data = file.read(packed)
    if len(data) < packed:
        raise ValueError("it is cut off")
    if kind == _DEFLATED:
        data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
    if kind != _PLAIN and (len(data) != size or zlib.crc32(data) != record["crc"]):
        raise ValueError("it is damaged: its size or checksum differs")
    return data

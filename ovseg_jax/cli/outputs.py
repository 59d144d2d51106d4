"""Output files of the commands: written atomically, named without clashes, never over another command's files."""

import hashlib
import json
import os
import unicodedata
import zlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from etils import epath

from ovseg_jax.errors import UserError
from ovseg_jax.files import file_stamp, is_device, why_not_a_file, write_whole
from ovseg_jax.reading import read_bytes

# File systems allow 255 bytes for a name; the rest is for suffixes such as ".overlay.png".
_LONGEST = 200


def check_out_file(path: epath.PathLike, inputs: Mapping[str, str | None], flag: str = "--out") -> None:
    """Raises a UserError if an output file cannot be written or is one of the input files.

    Args:
      path: the file.
      inputs: the input paths, by flag.
      flag: the flag that names the file.
    """
    out = os.fspath(path)
    for source, given in inputs.items():
        if given and os.path.exists(given) and os.path.exists(out) and os.path.samefile(given, out):
            raise UserError(f"{flag}={out} is also the input of {source}: choose another name")
    if "://" in out:
        return
    problem = "" if is_device(out) and not os.path.isdir(out) else why_not_a_file(out)
    place = out if is_device(out) else os.path.dirname(os.path.realpath(out))
    if not problem and not (os.access(place, os.W_OK) and (is_device(out) or os.path.isdir(place))):
        problem = f"{place} is not writable" if is_device(out) else f"{place} is not a writable folder"
    if problem:
        raise UserError(f"{flag}={out} cannot be written: {problem}")


def check_out_folder(out: epath.PathLike) -> epath.Path:
    """Creates the folder of --out if it is missing.

    Raises:
      UserError: it cannot be created, or is not writable.
    """
    out = epath.Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={out} cannot be created: {error.strerror or error}") from error
    if "://" not in str(out) and not os.access(out, os.W_OK):
        raise UserError(f"--out={out} cannot be written: it is read-only")
    return out


def output_names(
    paths: Sequence[epath.Path], known: Mapping[str, str], reserved: Collection[str]
) -> dict[str, str]:
    """Chooses the output name of each file: its stem if unique, else its whole name.

    Names differ in more than the case of letters, since some file systems ignore case.

    Args:
      paths: the files.
      known: names chosen by an earlier call, by path; they stay.
      reserved: names that must not be chosen.
    """
    names = {str(path): known[str(path)] for path in paths if str(path) in known}
    taken = {_folded(name) for name in (*reserved, *known.values())}
    new = [path for path in paths if str(path) not in known]
    chosen = {path: path.stem for path in new}
    while True:
        count = Counter(_folded(name) for name in chosen.values())
        unclear = [
            path
            for path, name in chosen.items()
            if name != path.name and (count[_folded(name)] > 1 or _folded(name) in taken)
        ]
        if not unclear:
            break
        chosen |= {path: path.name for path in unclear}
    for path, name in chosen.items():
        encoded = os.fsencode(name)
        if len(encoded) > _LONGEST:
            end = hashlib.sha256(encoded).hexdigest()[:8]
            name = encoded[: _LONGEST - 9].decode("utf-8", "ignore") + "-" + end
        free, number = name, 1
        while _folded(free) in taken:
            number += 1
            free = f"{name}-{number}"
        taken.add(_folded(free))
        names[str(path)] = free
    return names


def check_not_foreign(out: epath.PathLike, files: Collection[str], own: Collection[str]) -> None:
    """Raises a UserError if a file to be written exists and is not from an earlier call.

    Args:
      out: the folder.
      files: names of the files to be written.
      own: names of the files that an earlier call wrote.
    """
    out = epath.Path(out)
    own_folded = {_folded(name) for name in own}
    there = {_folded(path.name): path.name for path in out.iterdir()}
    foreign = [there[key] for name in files if (key := _folded(name)) in there and key not in own_folded]
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise UserError(
            f"--out={out} holds a file {foreign[0]}{more} that would be replaced: choose another --out, "
            "or add --overwrite"
        )


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


class Journal:
    """Records that a command writes one by one and reads back when it is run again.

    A file of JSON lines: first {"request": ..., ...} with everything that the records depend on, then one line for each
    record. Each line has its own checksum, "crc": one that is damaged, incomplete because the process was killed, or
    occurs twice is ignored.
    """

    def __init__(self, path: epath.PathLike):
        """Reads the records of an earlier call.

        Raises:
          UserError: the file cannot be read.
        """
        self.path = epath.Path(path)
        self.head: dict[str, Any] = {}
        self.records: list[dict[str, Any]] = []
        self._file: Any = None
        try:
            lines = read_bytes(self.path).splitlines() if self.path.exists() else []
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror or error}") from error
        for entry in map(_entry, dict.fromkeys(lines)):
            if entry is not None and self.head:
                self.records.append(entry)
            elif entry is not None:
                self.head = entry if isinstance(entry.get("request"), dict) else {}
                if not self.head:
                    return  # not a journal

    def start(self, request: Mapping[str, Any], **more: Any) -> None:
        """Starts writing; records of a different request are dropped.

        Args:
          request: everything that the records depend on, as plain values.
          **more: further entries of the first line.
        """
        if self.head.get("request") != json.loads(json.dumps(request)):
            self.records = []
        self._stop()
        self.head = {"request": dict(request), **more}
        self._write_all()
        if "://" not in str(self.path):
            self._file = self.path.open("ab")

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes a record."""
        self.records.append(dict(record))
        if self._file is not None:
            self._file.write(_line(record).encode())
            self._file.flush()
        elif len(self.records) % 50 == 0:  # Files in a bucket cannot be appended to.
            self._write_all()

    def close(self) -> None:
        """Writes the remaining records and closes the file."""
        if self._file is None:
            self._write_all()
        self._stop()

    def remove(self) -> None:
        """Closes and deletes the file."""
        self._stop()
        self.path.unlink(missing_ok=True)

    def _stop(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write_all(self) -> None:
        write_whole(self.path, "".join(map(_line, (self.head, *self.records))))


def _line(entry: Mapping[str, Any]) -> str:
    """Returns a line of a journal."""
    return json.dumps({**entry, "crc": zlib.crc32(json.dumps(entry).encode())}) + "\n"


def _entry(line: bytes) -> dict[str, Any] | None:
    """Returns the entry of a line of a journal, or None if the line is damaged."""
    try:
        entry = json.loads(line)
        crc = entry.pop("crc")
        return entry if crc == zlib.crc32(json.dumps(entry).encode()) else None
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        return None


def run_stamp(workdir: epath.PathLike, step: int | None = None) -> list[Any]:
    """Returns the step and modification time of a run's checkpoint, to detect that the run went on."""
    folder = epath.Path(workdir) / "checkpoints"
    try:
        steps = [int(path.name) for path in folder.iterdir() if path.name.isdecimal()]
    except OSError:
        return []
    chosen = step if step is not None else max(steps, default=-1)
    return [chosen, file_stamp(folder / str(chosen))[1]]

"""The base class of readers whose download is archives, or the folders that were unpacked from them."""

import json
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from ovseg_jax.data.images import Encoded, read_header, turn_mask
from ovseg_jax.datasets.base import Dataset, Option
from ovseg_jax.datasets.members import Members
from ovseg_jax.errors import UserError
from ovseg_jax.reading import reading

MISSING = Option(
    "missing",
    ("refuse", "skip"),
    "what to do about an image that is not in the download: stop, or leave it out and count it",
)
"""The option of readers whose download is often incomplete; `Packed.present` reads it."""


class Packed(Dataset):
    """A reader of a download folder; archives look as if they were unpacked.

    A subclass sets `archives`, and asks for files by the ends of their paths: they may lie at any depth of the download
    folder.

    Attributes:
      archives: patterns of the names of the archives that are shown unpacked.
      members: all files of the download folder.
    """

    archives: Sequence[str]

    def __init__(self, source: epath.PathLike, **options: str):
        super().__init__(source, **options)
        self.members = Members(self.source, self.archives)

    def stamp(self) -> dict[str, int]:
        """Returns the number of files of the download, and the sizes in bytes of those directly in its folder."""
        direct = {path.name: path.stat().length for path in self.source.iterdir() if path.is_file()}
        return {"": len(self.members), **dict(sorted(direct.items()))}

    def need(self, *choices: str) -> str:
        """Returns the name of the file whose path ends with one of `choices`.

        Raises:
          UserError: there is none, or several; the message says where the download is found.
        """
        found = self.members.find(*choices)
        if found is None:
            raise UserError(self._missing(" or ".join(choices)))
        return found

    def need_folder(self, *choices: str, suffix: str) -> str:
        """Returns the folder whose path ends with one of `choices` and that holds files with `suffix`.

        Raises:
          UserError: there is none, or several; the message says where the download is found.
        """
        found = self.members.find_folder(*choices, suffix=suffix)
        if found is None:
            raise UserError(
                self._missing(f"folder {' or '.join(c or '.' for c in choices)} with {suffix} files")
            )
        return found

    def files(self, folder: str, suffix: str) -> dict[str, str]:
        """Returns the files of a folder, at any depth, by their base names without `suffix`.

        Raises:
          UserError: two files have the same base name.
        """
        names = self.members.names(folder, suffix)
        found = {posixpath.basename(name).removesuffix(suffix): name for name in names}
        if len(found) < len(names):
            raise UserError(
                f"{self.source / folder} holds two {suffix} files of the same name in different folders"
            )
        return found

    def encoded(self, name: str) -> Encoded:
        """Reads a file, with its place for messages.

        Raises:
          UserError: there is no such file, or it is damaged.
        """
        return Encoded(self.members.where(name), self.members.read(name))

    def json(self, name: str, keep: Callable[[dict[str, Any]], Any] | None = None) -> Any:
        """Parses a JSON file.

        Args:
          name: the file.
          keep: replaces each object of the result as soon as it is parsed: large files need less memory if their many
            small objects are stored in another form.

        Raises:
          UserError: there is no such file, or it is not JSON, or `keep` raised a ValueError.
        """
        data = self.members.read(name)
        with reading(self.members.where(name)):
            written = data.decode(json.detect_encoding(data), "surrogatepass")
            del data  # Only one of both forms is in memory while objects are parsed.
            return json.loads(written, object_hook=keep)

    def lines(self, name: str) -> list[str]:
        """Returns the lines of a text file that are not blank, without white space at their ends.

        Raises:
          UserError: there is no such file, or it is not UTF-8 text.
        """
        data = self.members.read(name)
        with reading(self.members.where(name)):
            # Not splitlines: JSON may hold the other characters at which it splits, such as U+2028.
            lines = re.split(r"\r\n?|\n", data.decode("utf-8-sig"))
            return [line.strip() for line in lines if line.strip()]

    def paired(
        self, split: str, images: Mapping[str, str], masks: Mapping[str, str]
    ) -> list[tuple[str, str, str]]:
        """Returns (key, image, mask) for all images, sorted by key; masks without an image are counted in `notes`.

        Raises:
          UserError: an image has no mask.
        """
        if missing := sorted(images.keys() - masks.keys()):
            raise UserError(
                f"{self.name}: {len(missing)} of {len(images)} images of {split} have no mask, such as "
                f"{images[missing[0]]}"
            )
        if surplus := sorted(masks.keys() - images.keys()):
            self.notes.append(
                f"{split}: {len(surplus)} masks without an image were left out, such as {masks[surplus[0]]}"
            )
        return [(key, images[key], masks[key]) for key in sorted(images)]

    def present(self, split: str, wanted: Iterable[str], known: Mapping[str, str]) -> list[str]:
        """Returns the wanted keys that the download holds.

        Raises:
          UserError: some are missing, and the option `missing` is "refuse", or all are; or a key occurs twice.
        """
        wanted = list(wanted)
        if len(set(wanted)) < len(wanted):
            double = next(key for key, count in Counter(wanted).items() if count > 1)
            raise UserError(f"{self.name}: {self.source} lists the image {double!r} of {split} twice")
        found = [key for key in wanted if key in known]
        if absent := [key for key in wanted if key not in known]:
            message = f"{len(absent)} of {len(wanted)} images of {split} are not in {self.source}"
            message += f", such as {absent[0][:200]}"
            if not found or self.chosen.get(MISSING.name, "refuse") == "refuse":
                advice = (
                    ": --option=missing=skip leaves them out" if found and MISSING in self.options else ""
                )
                raise UserError(f"{self.name}: {message}{advice}")
            self.notes.append(f"{message}; they were left out")
        return found

    def upright(self, mask: np.ndarray, mask_file: Encoded, image: Encoded) -> np.ndarray:
        """Returns a mask [H W ...] of a stored image as it lies on the upright image.

        Raises:
          UserError: the image is damaged, or the mask has another size.
        """
        size, orientation = read_header(image)
        return turn_mask(mask, mask_file, image, size, orientation)

    def _missing(self, what: str) -> str:
        files = "; ".join(f"{file.file} from {file.address}" for file in self.download)
        return f"{self.name}: {self.source} holds no {what}, packed or unpacked; the download is {files}"

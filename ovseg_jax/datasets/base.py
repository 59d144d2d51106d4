"""The interface of readers of published data sets: a data set as its publishers give it, read example by example.

A reader is a class that derives from `Dataset`, and a line in `registry.DATASETS`. `entries` is called once in the main
process, lists a split and checks that every file is there; then `example` is called for each entry, in any worker. So
annotation files are only parsed once, and a worker only opens the images and masks of its own entries.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Bool, Int, Int32, Integer

from ovseg_jax.errors import UserError
from ovseg_jax.vocab.classes import ClassList


class Download(NamedTuple):
    """A file that the publishers offer.

    Attributes:
      file: its name as it is downloaded; it may lie in the source folder as it is, or unpacked.
      address: the URL of the file, or of the page where one registers for it.
      note: what it holds, or who needs it; may be empty.
    """

    file: str
    address: str
    note: str = ""


class Option(NamedTuple):
    """A choice between forms of a data set.

    Attributes:
      name: its name, as in `--option=NAME=VALUE`.
      values: the known values, the default first; () allows any text, by default "".
      about: what it chooses.
    """

    name: str
    values: tuple[str, ...]
    about: str


class Entry(NamedTuple):
    """One example of a split before its image is opened.

    Attributes:
      key: its id, unique in the split, such as the file's stem; becomes `image_id`.
      data: what `example` needs and the annotation files say, as plain JSON values (image file, categories, captions).
    """

    key: str
    data: Any


class Dataset:
    """The base class of readers of published data sets.

    A subclass sets the attributes below and defines `entries` and `example`. It must be picklable: archives are opened
    when they are read from, in each process anew. It imports neither TensorFlow nor Beam.

    Attributes:
      name: lower case with underscores, such as "coco_panoptic".
      version: of the published data and of this reader, as "1.0.0"; a change of what is written changes it.
      about: one line on what it holds.
      homepage: an address.
      licence: the licence of annotations and images in words.
      download: the files that the source folder holds.
      options: the choices that the reader offers.
      splits: the names of its splits, of letters, digits and underscores; "train" and "val" where it has such.
      provides: the fields of `data.source_base.FIELDS` that examples have; options may change it.
      classes: the classes with the publishers' ids; a subclass may set it in its constructor.
      wide: whether an image may have more than 255 segments, which are then stored in 16 bits.
      notes: sentences on what was left out or is remarkable, which `entries` adds and `prepare` prints and records.
    """

    name: str
    version: str = "1.0.0"
    about: str
    homepage: str
    licence: str
    download: tuple[Download, ...] = ()
    options: tuple[Option, ...] = ()
    splits: tuple[str, ...]
    provides: frozenset[str]
    classes: ClassList = ClassList()
    wide: bool = False

    def __init__(self, source: epath.PathLike, **options: str):
        """Checks the folder and the options.

        Args:
          source: the folder that holds the downloaded files, as archives or unpacked.
          **options: values of `options`; the others have their defaults.

        Raises:
          UserError: there is no such folder, or an option or its value is unknown.
        """
        self.source = epath.Path(source)
        if not str(source) or not self.source.is_dir():
            raise UserError(f"--source={source} is not a folder: give the one with the files of {self.name}")
        known = {option.name: option.values for option in self.options}
        for key, value in options.items():
            if key not in known:
                raise UserError(
                    f"{self.name} has no option {key!r}; its options are: {', '.join(known) or 'none'}"
                )
            if known[key] and value not in known[key]:
                raise UserError(
                    f"{self.name}: {key}={value} is unknown; its values are {', '.join(known[key])}"
                )
        self.chosen = {key: values[0] if values else "" for key, values in known.items()} | options
        self.notes: list[str] = []

    def entries(self, split: str) -> Iterator[Entry]:
        """Yields the entries of a split in a fixed order, without opening images.

        Surplus files are counted in `notes`.

        Raises:
          UserError: a file is missing or damaged; the message names it and, if it is one of many, says how many.
        """
        raise NotImplementedError

    def example(self, split: str, entry: Entry) -> dict[str, Any]:
        """Returns the fields of `provides` of one entry, as `data.source_base` defines them, with two differences.

        `image` is the encoded file as bytes, unchanged unless the official preparation resizes it; `segments` lies on
        the upright image. `isthing`, `iscrowd` and `boxes` may be left out: they follow from the classes, are False,
        and follow from the segments.

        Raises:
          UserError: a file is missing or damaged, or files disagree.
        """
        raise NotImplementedError

    def stamp(self) -> dict[str, int]:
        """Returns the size in bytes of each file of `download` in the source folder, by which changes are noticed."""
        names = (file.file for file in self.download)
        return {name: (self.source / name).stat().length for name in names if (self.source / name).is_file()}

    def check_split(self, split: str) -> None:
        """Raises a UserError if there is no such split."""
        if split not in self.splits:
            raise UserError(f"{self.name} has no split {split!r}; its splits are {', '.join(self.splits)}")


def without_hidden(
    segments: Int[np.ndarray, "h w"], count: int
) -> tuple[Int32[np.ndarray, "h w"], Bool[np.ndarray, " n"]]:
    """Numbers the segments that have a pixel anew, from 1; returns them, and which of the `count` segments they are."""
    seen = np.bincount(segments.ravel(), minlength=count + 1)[1:] > 0
    return np.concatenate([[0], np.cumsum(seen) * seen]).astype(np.int32)[segments], seen


def segments_of_map(
    labels: Integer[np.ndarray, "h w"], classes: ClassList, void: tuple[int, ...], what: str
) -> tuple[Int32[np.ndarray, "h w"], Int32[np.ndarray, "n"]]:
    """Converts a semantic map of official ids to segments, one for each class that occurs, and their classes.

    Args:
      labels: the id of each pixel's class.
      classes: the classes with these ids.
      void: values that mean no class.
      what: the name of the map, for errors.

    Returns:
      i32 [H W], 0 = void, else 1-based; and i32 [n], an index into `classes`, ascending.

    Raises:
      UserError: the map holds a value that is neither a class nor void.
    """
    index = {k: row for row, k in enumerate(classes.ids)}
    counts = np.bincount(labels.ravel(), minlength=1)
    present = [int(value) for value in np.flatnonzero(counts) if value not in void]
    if unknown := [value for value in present if value not in index]:
        raise UserError(f"{what} holds the value {unknown[0]}, which is the id of no class")
    present.sort(key=lambda value: index[value])
    number = np.zeros(len(counts), np.int32)
    number[present] = np.arange(1, len(present) + 1)
    return number[labels], np.array([index[value] for value in present], np.int32)

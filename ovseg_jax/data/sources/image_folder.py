"""Images sorted into one folder per class: ImageNet's layout, and that of torchvision's `ImageFolder`.

    DIR/train/n01440764/n01440764_10026.JPEG      or, without splits, DIR/n01440764/...
    DIR/val/n01440764/...

The name of a class is that of its folder, with `_` read as a space and "AnnualCrop" as "Annual Crop", or given by the
file `names` in one of these forms:

    n01440764: tench, Tinca tinca                 a line each; a tab or a space may replace the colon
    {"n01440764": ["tench", "Tinca tinca"]}       JSON; a single name needs no list

Folders named by WordNet ids need such a file: `names`, or one of `WORDNET_FILES` in DIR.
"""

import logging
import os
import re
from collections import Counter
from typing import Any

import numpy as np
from etils import epath

from ovseg_jax.data.images import has_image, list_folders, log_left_out, read_image, scan_images
from ovseg_jax.data.source_base import Example, Source
from ovseg_jax.errors import UserError
from ovseg_jax.reading import read_json, read_lines, reading, short, texts
from ovseg_jax.vocab.classes import ClassList, split_names

WORDNET_FILES = ("classnames.txt", "LOC_synset_mapping.txt", "words.txt")
"""Published files with names of WordNet ids: CoOp's, Kaggle's and WordNet's own."""
FOLDERS = "folders"
"""The value of `names` that keeps the names of the folders, even if they are WordNet ids."""
_LOG = logging.getLogger(__name__)
_WORDNET_ID = re.compile(r"n\d{8}")
_CAMEL_CASE = re.compile(r"([A-Z][a-z]+){2,}")


class ImageFolder(Source):
    """A split of a data set in the layout above, sorted by class and file name.

    The classes are those of `names` for which any split has a folder, in the order of `names`, or else the folders of
    all splits in alphabetical order, so that labels agree between splits. Hidden folders, and folders of other splits
    that hold no image, do not count.

    Attributes:
      name: "image_folder".
      classes: see above.
      labels: i32 [n], the class of every image.
    """

    provides = frozenset({"image", "label"})
    labels: np.ndarray

    def __init__(
        self, data_dir: epath.PathLike, split: str = "", names: epath.PathLike = "", num_classes: int = 0
    ):
        """Lists the files; images are read when they are accessed.

        Args:
          data_dir: DIR.
          split: the folder of a split in DIR; "" if the class folders lie in DIR itself.
          names: a file with the names of the class folders, which may list others, too; "folders" takes the folders'
            own, even if they are WordNet ids.
          num_classes: the required number of class folders; 0 takes any number. A config that computes its steps from
            epochs sets it, since the steps depend on it.

        Raises:
          UserError: a folder is missing, holds no class or no image, or is not in `names`; the number of class folders
            is not `num_classes`; or the folders are WordNet ids and there is no file of names.
        """
        root = epath.Path(data_dir)
        self.name, self._folder = "image_folder", root / split if split else root
        if not str(data_dir) or not self._folder.is_dir():
            raise UserError(f"image_folder: {str(self._folder)!r} is not a folder")
        own = list_folders(self._folder)
        if not own:
            raise UserError(f"{self._folder} holds no folders: each class needs a folder with its images")
        if num_classes and len(own) != num_classes:
            raise UserError(
                f"{self._folder} holds {len(own)} class folders, but num_classes={num_classes} "
                f"(configs/pomp.py computes its steps from it, so set it there: classes={len(own)})"
            )
        beside = self._folder.parent
        splits = [beside / other for other in list_folders(beside)] if split else [root]
        there = set(own)
        others = [
            (other, folder) for other in splits for folder in list_folders(other) if folder not in there
        ]
        # Folders beside the splits may hold annotations or tools, without images.
        found = there.union(folder for other, folder in others if has_image(other / folder))
        if not names and any(map(is_wordnet_id, own)):
            published = [root / file for file in WORDNET_FILES if (root / file).exists()]
            if not published:
                raise UserError(
                    f"the class folders of {self._folder} are WordNet ids, such as {own[0]}, which are no words for a "
                    f"prompt: give names=FILE, or put one of {', '.join(WORDNET_FILES)} into {root}; names={FOLDERS} "
                    "takes the ids"
                )
            names = published[0]
        if names and names != FOLDERS:
            listed = read_names(names)
            if stray := [folder for folder in own if folder not in listed]:
                raise UserError(f"{names} has no name for the folder {self._folder / stray[0]}")
            # The list may name more classes than the data has; only those with a folder count.
            by_folder = {folder: own_names for folder, own_names in listed.items() if folder in found}
            if len(by_folder) < len(listed):
                _LOG.warning(
                    "%s: %d of its %d classes have no folder",
                    names,
                    len(listed) - len(by_folder),
                    len(listed),
                )
        else:
            by_folder = {folder: (readable_name(folder),) for folder in sorted(found)}
        self._class_folders = list(by_folder)
        self.classes = ClassList.things(by_folder.values())
        self.classes.say_shared(names or self._folder)
        self._list_files(own)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        """Returns one example: `image` u8 [H W 3], `label`, `image_id`.

        Raises:
          UserError: the file is damaged.
        """
        self._check_index(index)
        label = int(self.labels[index])
        file = f"{self._class_folders[label]}/{os.fsdecode(bytes(self._files[index]))}"
        return Example(image=lambda _: read_image(self._folder / file), label=label, image_id=file)

    def _list_files(self, folders: list[str]) -> None:
        position = {folder: k for k, folder in enumerate(self._class_folders)}
        labels, files = [np.zeros(0, np.int32)], [np.zeros(0, "S1")]
        left_out: Counter[str] = Counter()
        for folder in folders:
            names, others = scan_images(self._folder / folder)
            left_out += others
            if names:
                # Names are bytes in one array: as a list of texts, the eleven million of ImageNet-21K would take a
                # gigabyte in each worker process.
                files.append(np.array([os.fsencode(name) for name in names]))
                labels.append(np.full(len(names), position[folder], np.int32))
        log_left_out(self._folder, left_out)
        self._files = np.concatenate(files)
        self.labels = np.concatenate(labels)
        if not len(self.labels):
            raise UserError(f"the class folders of {self._folder} hold no readable image")


def is_wordnet_id(name: str) -> bool:
    """Tells whether a name is a WordNet id such as "n01440764"."""
    return _WORDNET_ID.fullmatch(name) is not None


def readable_name(written: str) -> str:
    """Returns the name of a class folder or label in words: `_` becomes a space, "AnnualCrop" "Annual Crop"."""
    if _CAMEL_CASE.fullmatch(written):
        return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", written)
    return " ".join(written.replace("_", " ").split()) or written


def read_names(path: epath.PathLike) -> dict[str, tuple[str, ...]]:
    """Reads the names of each class folder from a file in one of the forms above.

    Raises:
      UserError: the file cannot be read, is not of these forms, or is empty.
    """
    what = "the class names"
    pairs: list[tuple[str, Any]]
    if epath.Path(path).suffix.lower() == ".json":
        data = read_json(path, what)
        if not isinstance(data, dict):
            raise UserError(f"{what} {path} cannot be read: expected an object, got {short(data)}")
        pairs = list(data.items())
    else:
        pairs = [_pair(line) for _, line in read_lines(path, what)]
    found: dict[str, tuple[str, ...]] = {}
    with reading(path, what):
        for folder, value in pairs:
            written = texts(value, f"the entry of {short(folder)}")
            names = [name for text in written for name in split_names(text.replace("_", " "))]
            if not names:
                raise UserError(f"{path}: the folder {short(folder)} has no name")
            if folder in found:
                raise UserError(f"{path}: the folder {short(folder)} occurs twice")
            found[folder] = tuple(dict.fromkeys(names))
    if not found:
        raise UserError(f"the file {path} lists no class")
    return found


def _pair(line: str) -> tuple[str, str]:
    """Splits a line into folder and names; if the folder holds spaces, a tab or a colon must separate it."""
    wordnet = re.match(r"\s*n\d{8}\s", line)  # A colon may follow in a name of a WordNet id.
    separator = r"\s*[\t:]\s*" if re.search(r"[\t:]", line.strip()) and not wordnet else r"\s+"
    folder, *rest = re.split(separator, line.strip(), maxsplit=1)
    return folder, rest[0] if rest else ""

"""Classification data sets of TensorFlow Datasets, read from ArrayRecord files without TensorFlow.

`tfds build NAME --file_format=array_record` prepares one.
"""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import UInt8

from ovseg_jax.data.images import read_image
from ovseg_jax.data.source_base import Example, Source
from ovseg_jax.data.sources.image_folder import (
    FOLDERS,
    WORDNET_FILES,
    is_wordnet_id,
    read_names,
    readable_name,
)
from ovseg_jax.errors import UserError, optional
from ovseg_jax.reading import reason
from ovseg_jax.vocab.classes import ClassList

NARROW = ("imagenet_a", "imagenet_r")
"""Data sets whose label feature lists all classes of ImageNet, of which they have 200."""


class TfdsImages(Source):
    """A split of a prepared TFDS data set with one label per image.

    Attributes:
      name: the name of the data set.
      classes: the names of the label feature, read as `image_folder.readable_name` does, or given by `names`.
      labels: i32 [n], read once without decoding an image.
    """

    provides = frozenset({"image", "label"})
    labels: np.ndarray

    def __init__(
        self,
        dataset: str,
        split: str,
        data_dir: str = "",
        image_key: str = "image",
        label_key: str = "label",
        names: str = "",
        present: bool | None = None,
    ):
        """Opens the files and reads the labels.

        Args:
          dataset: its name, such as "caltech101" or "imagenet2012:5.1.0".
          split: a split such as "train" or "train[:10%]".
          data_dir: the folder that holds it; "" takes the default folder of TensorFlow Datasets.
          image_key: the name of the image feature.
          label_key: the name of the class feature.
          names: a file with names for the labels, such as of WordNet ids, see `image_folder.read_names`; "folders"
            takes the labels' own, even if they are WordNet ids.
          present: whether only the labels that occur in the split are classes; by default true for `NARROW`.

        Raises:
          UserError: tensorflow_datasets is not installed, the data set does not exist or is not in ArrayRecord
            files, it has no such features, or `names` lacks a label.
        """
        tfds = _tfds()
        self.name, self._image_key = dataset, image_key

        def open_(decoders: Any) -> Any:
            return tfds.data_source(
                dataset, split=split, data_dir=data_dir or None, download=False, decoders=decoders
            )

        hint = "; tfds build NAME --file_format=array_record prepares a data set"
        with _package(f"tfds: {dataset!r}, split {split!r}, cannot be opened", hint):
            features = tfds.builder(dataset, data_dir=data_dir or None).info.features
            self._source = open_(None)
        for key in (image_key, label_key):
            if key not in features:
                raise UserError(f"tfds: {dataset} has no feature {key!r}; it has {', '.join(features)}")
        listed = getattr(features[label_key], "names", None)
        if not listed:
            raise UserError(f"tfds: the feature {label_key!r} of {dataset} is not a class label with names")
        with _package(f"tfds: the labels of {dataset}, split {split!r}, cannot be read"):
            undecoded = open_({image_key: tfds.decode.SkipDecoding()})
            self.labels = np.array([record[label_key] for record in undecoded], np.int32)
        if ((wrong := self.labels) < 0).any() or (wrong >= len(listed)).any():
            wrong = wrong[(wrong < 0) | (wrong >= len(listed))]
            raise UserError(
                f"tfds: {dataset}, split {split!r}, has the label {wrong[0]}, but only {len(listed)} classes"
            )
        if present or (present is None and re.split("[:/]", dataset)[0] in NARROW):
            kept, self.labels = np.unique(self.labels, return_inverse=True)
            self.labels = self.labels.astype(np.int32)
            listed = [listed[k] for k in kept]
        self.classes = ClassList.things(self._name(listed, names))

    def _name(self, listed: list[str], names: str) -> list[tuple[str, ...]]:
        """Returns the names of each label."""
        if names in ("", FOLDERS):
            if not names and any(map(is_wordnet_id, listed)):
                raise UserError(
                    f"tfds: the labels of {self.name} are WordNet ids, such as {listed[0]}, which are no words for a "
                    f"prompt: give names=FILE, such as {WORDNET_FILES[1]}; names={FOLDERS} takes the ids"
                )
            return [(readable_name(name),) for name in listed]
        known = read_names(names)
        if stray := [name for name in listed if name not in known]:
            raise UserError(f"{names} has no name for the label {stray[0]!r} of {self.name}")
        return [known[name] for name in listed]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        """Returns one example: `image` u8 [H W 3], `label`, `image_id`."""
        self._check_index(index)
        return Example(
            image=lambda _: self._read_image(index), label=int(self.labels[index]), image_id=str(index)
        )

    def _read_image(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
        with _package(f"tfds: the image {index} of {self.name} cannot be read"):
            return read_image(self._source[index][self._image_key])


@contextlib.contextmanager
def _package(failed: str, hint: str = "") -> Iterator[None]:
    """Turns the package's exceptions, which are of many kinds, into a UserError with their first line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{failed} ({reason(error)}){hint}") from error


def _tfds() -> Any:
    return optional(
        "tensorflow_datasets",
        "the data source 'tfds' needs a package: pip install tensorflow-datasets ({error})",
    )

"""The base class of readers: options, splits, and semantic maps as segments."""

import numpy as np
import pytest

from ovseg_jax.datasets.base import Dataset, Option, segments_of_map
from ovseg_jax.datasets.registry import DATASETS, find_dataset
from ovseg_jax.errors import UserError
from ovseg_jax.vocab.classes import ClassList


class Toy(Dataset):
    name, about, homepage, licence = "toy", "nothing", "https://example.org", "none"
    options = (Option("part", ("a", "b"), "which part"), Option("names", (), "a file"))
    splits = ("train",)
    provides = frozenset({"image"})


def test_options_have_defaults_and_are_checked(tmp_path):
    assert Toy(tmp_path).chosen == {"part": "a", "names": ""}
    assert Toy(tmp_path, part="b", names="x").chosen == {"part": "b", "names": "x"}
    with pytest.raises(UserError, match="toy: part=c is unknown; its values are a, b"):
        Toy(tmp_path, part="c")
    with pytest.raises(UserError, match="toy has no option 'size'; its options are: part, names"):
        Toy(tmp_path, size="1")
    for wrong in (tmp_path / "absent", ""):
        with pytest.raises(UserError, match="is not a folder"):
            Toy(wrong)
    with pytest.raises(UserError, match="toy has no split 'val'; its splits are train"):
        Toy(tmp_path).check_split("val")


def test_a_semantic_map_becomes_segments_in_the_order_of_the_classes():
    classes = ClassList((("wall",), ("sky",), ("dog",)), (7, 3, 300), (False, False, True))
    labels = np.array([[3, 3, 300], [0, 7, 65535]], np.uint16)
    segments, ids = segments_of_map(labels, classes, (0, 65535), "the map")
    assert ids.tolist() == [0, 1, 2]  # wall, sky, dog
    assert segments.tolist() == [[2, 2, 3], [0, 1, 0]]
    assert segments.dtype == ids.dtype == np.int32
    with pytest.raises(UserError, match="the map holds the value 65535, which is the id of no class"):
        segments_of_map(labels, classes, (0,), "the map")
    nothing, none = segments_of_map(np.full((2, 2), 255, np.uint8), classes, (255,), "the map")
    assert not nothing.any() and none.shape == (0,)


def test_every_registered_reader_says_what_it_is():
    for name in DATASETS:
        kind = find_dataset(name)
        assert kind.name == name and kind.about and kind.licence and kind.homepage.startswith("http")
        assert kind.download and all(file.address.startswith("http") for file in kind.download)
        assert kind.splits and "image" in kind.provides


def test_an_unknown_data_set_is_named():
    with pytest.raises(UserError, match="the data set 'cocoa' is not one of"):
        find_dataset("cocoa")
    assert find_dataset(f"{__name__}:Toy") is Toy

"""Every reader of the registry: its fixture becomes examples that `prepare` accepts."""

import functools
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ovseg_jax import prepare as command
from ovseg_jax.data.images import Encoded, read_image
from ovseg_jax.data.source_base import FIELDS
from ovseg_jax.data.sources.build import make_source
from ovseg_jax.datasets.base import Dataset
from ovseg_jax.datasets.fields import complete, encode, fields_of
from ovseg_jax.datasets.packed import Packed
from ovseg_jax.datasets.registry import DATASETS, describe, find_dataset
from tests.datasets import (
    test_ade20k,
    test_captions,
    test_classification_sets,
    test_coco_sets,
    test_coop_splits,
    test_imagenet,
    test_instances,
    test_pascal_context,
    test_voc,
)
from tests.datasets.packing import Files, unpacked
from tests.extras import require

FIXTURES: dict[str, tuple[Files, dict[str, str]]] = {
    "ade20k_150": (test_ade20k.BENCH, {}),
    "ade20k_847": (test_ade20k.FULL, {}),
    "coco_object": (test_coco_sets.STUFF, {}),
    "coco_panoptic": (test_coco_sets.PANOPTIC, {}),
    "coco_stuff": (test_coco_sets.STUFF, {}),
    "coco_retrieval": (test_captions.RETRIEVAL, {}),
    "coop": (test_coop_splits.PETS, {}),
    "flickr30k_retrieval": (test_captions.RETRIEVAL, {}),
    "imagenet21k": (test_imagenet.PROCESSED, {}),
    "imagenet_s": (test_imagenet.FILES, {"size": "50"}),
    "localized_narratives": (test_captions.COCO, {}),
    "lvis_v1": (test_instances.LVIS, {}),
    "objects365_v2": (test_instances.OBJECTS, {}),
    "pascal_context_59": (test_pascal_context.FILES_59, {}),
    "pascal_context_459": (test_pascal_context.FILES_459, {}),
    "voc_2012": (test_voc.FILES, {}),
}
"""The files and options of each reader that derives from `Packed`."""
CLASSIFICATION = test_classification_sets.FILES


def test_every_packed_reader_is_tried_here():
    assert {name for name in DATASETS if issubclass(find_dataset(name), Packed)} == (
        FIXTURES.keys() | CLASSIFICATION.keys()
    )


@pytest.mark.parametrize("name", DATASETS)
def test_a_reader_describes_itself(name):
    kind = find_dataset(name)
    assert kind.name == name and kind.about and kind.licence and kind.splits
    assert kind.provides <= FIELDS and all(re.fullmatch(r"\w+", split) for split in kind.splits)
    assert all(file.address.startswith("http") for file in kind.download)
    assert kind.homepage in describe(kind) and kind.homepage.startswith("http")


@pytest.fixture
def load(tmp_path: Path) -> Callable[[str], Dataset]:
    @functools.cache
    def make(name: str) -> Dataset:
        files, options = FIXTURES[name] if name in FIXTURES else (CLASSIFICATION[name](), {})
        return find_dataset(name)(unpacked(tmp_path / name, files), **options)

    return make


@pytest.mark.parametrize("name", [*FIXTURES, *CLASSIFICATION])
def test_prepare_accepts_the_examples(name, load):
    data, count = load(name), 0
    for split in data.splits:
        for entry in data.entries(split):
            whole = complete(data, entry.key, data.example(split, entry))
            assert whole.keys() >= fields_of(data)
            assert encode(entry.key, whole, data.wide)["image_id"] == entry.key
            count += 1
    assert count


def test_a_changed_download_has_another_stamp(load):
    data = load("lvis_v1")
    before = data.stamp()
    (data.source / "more.zip").write_bytes(b"x")
    assert data.stamp() == before | {"more.zip": 1}
    (data.source / "a").mkdir()
    (data.source / "a/b.jpg").write_bytes(b"x")
    assert load.__wrapped__("lvis_v1").stamp()[""] == before[""] + 2


# Of classification one of each form, since starting Beam takes seconds.
@pytest.mark.parametrize("name", [*FIXTURES, "gtsrb", "stl10", "svhn"])
def test_a_prepared_download_is_read_back(name, load, tmp_path):
    """By the command, as a user types it, over all splits; what is read back is what the reader says."""
    require("apache_beam")
    require("tensorflow_datasets")
    data, out, options = load(name), tmp_path / "out", FIXTURES.get(name, ((), {}))[1]
    chosen = [f"--option={key}={value}" for key, value in options.items()]
    assert command.main([name, f"--source={data.source}", f"--out={out}", "--workers=1", *chosen]) == 0
    for split in data.splits:
        back = make_source({"name": "prepared", "data_dir": str(out), "split": split, "verify": True})
        entries = list(data.entries(split))
        assert len(back) == len(entries) and back.classes == data.classes and back.name == name
        for k, entry in enumerate(entries):
            found, whole = back[k], complete(data, entry.key, data.example(split, entry))
            assert found["image_id"] == entry.key
            np.testing.assert_array_equal(found["image"], read_image(Encoded("", whole["image"])))
            for field in whole.keys() - {"image", "size"}:
                np.testing.assert_array_equal(found[field], whole[field])

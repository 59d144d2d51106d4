"""The contract of sources: fields read when they are asked for, defaults, and the check of what a consumer needs."""

import numpy as np
import pytest

from ovseg_jax.data.mixture import Mixture
from ovseg_jax.data.scenes.source import Scenes
from ovseg_jax.data.source_base import Example, Regions, Source, check_provides, join_regions, replaced
from ovseg_jax.data.sources.build import Cached
from ovseg_jax.errors import UserError
from ovseg_jax.vocab.classes import ClassList

CLASSES = ClassList((("sky",), ("dog",)), (1, 2), (False, True))


class Logged(Source):
    """Notes which fields are read."""

    name, classes = "logged", CLASSES
    provides = frozenset({"image", "segments", "class_ids", "boxes", "captions"})

    def __init__(self):
        self.read = []

    def __len__(self):
        return 2

    def __getitem__(self, index):
        def note(field, value):
            self.read.append(field)
            return value

        segments = np.array([[1, 1, 0], [2, 3, 3]], np.int32)
        return Example(
            image=lambda _: note("image", np.full((2, 3, 3), index, np.uint8)),
            segments=lambda _: note("segments", segments),
            class_ids=lambda _: note("class_ids", np.array([0, 1, -1], np.int32)),
            iscrowd=np.array([False, index > 0, False]),
            boxes=lambda e: note(
                "boxes", np.array([[k, k, 3, e["segments"].max()] for k in range(3)], np.float32)
            ),
            captions=lambda _: note("captions", [f"dog {index}", "a sky"]),
            image_id=str(index),
        )


def test_a_field_is_read_when_it_is_asked_for_and_once():
    source = Logged()
    example = source[0]
    assert "segments" in example and list(example)[:2] == ["image", "segments"] and source.read == []
    assert example["boxes"].shape == (3, 4) and source.read == ["segments", "boxes"]
    assert example["boxes"] is example["boxes"] and len(source.read) == 2
    other = replaced(example, class_ids=lambda e: e["segments"].max(), tags=["x"])
    assert other["class_ids"] == 3 and other["tags"] == ["x"] and other["boxes"] is example["boxes"]
    assert source.read == ["segments", "boxes"] and "tags" not in example


def test_captions_of_a_source_read_nothing_else():
    source = Logged()
    for of in (source, Cached(source), Mixture([source, source])):
        assert list(of.captions())[:4] == ["dog 0", "a sky", "dog 1", "a sky"] and set(source.read) == {
            "captions"
        }
    assert list(source.texts("tags")) == []
    scenes = Scenes("train", 2, size="tiny")
    said = [text for k in range(2) for texts in scenes[k]["region_captions"] for text in texts]
    assert list(scenes.texts("region_captions")) == said and len(said) > 2


def test_extent_and_regions_look_through_the_examples():
    source = Logged()
    assert source.extent() == (2, 3, 3) and "image" not in source.read
    regions = source.regions()
    assert regions.image.tolist() == [0, 0, 1] and regions.segment.tolist() == [0, 1, 0]
    assert regions.class_id.tolist() == [0, 1, 0] and regions.box[1].tolist() == [1, 1, 3, 3]
    assert "image" not in source.read
    nothing = join_regions([])
    assert isinstance(nothing, Regions) and nothing.box.shape == (0, 4) and nothing.image.dtype == np.int32


def test_the_check_names_source_consumer_and_what_is_missing():
    check_provides(Logged(), {"image", "captions"}, "anything")
    with pytest.raises(
        UserError, match=r"'logged' has no label and no tags, which data\.fields needs; it provides boxes"
    ):
        check_provides(Logged(), ["image", "tags", "label"], "data.fields")


def test_parts_of_a_mixture_that_lack_a_field_have_it_empty():
    class Spoken(Logged):
        name, provides = "spoken", frozenset({"image", "captions", "tags"})

        def __getitem__(self, index):
            whole = super().__getitem__(index)
            return Example(image=whole["image"], captions=whole["captions"], tags=["dog"], image_id="x")

    mixture = Mixture([Logged(), Spoken()])
    assert mixture.provides == Logged.provides | {"tags"} and mixture[0]["tags"] == ()
    bare = mixture[2]
    assert not bare["segments"].any() and bare["segments"].shape == (2, 3) and bare["tags"] == ["dog"]
    assert [len(bare[key]) for key in ("class_ids", "isthing", "iscrowd", "boxes")] == [0] * 4
    assert mixture.extent() == (2, 3, 3)
    with pytest.raises(UserError, match=r"'logged\+spoken' has no label"):
        check_provides(mixture, {"label"}, "classification")

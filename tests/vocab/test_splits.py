"""Splits of classes: published ones by name, and files that list categories."""

import dataclasses
import json
from pathlib import Path

import pytest

from ovseg_jax.errors import UserError
from ovseg_jax.vocab.classes import parse_labels
from ovseg_jax.vocab.splits import load_split, read_categories, split

FILES = Path(__file__).parents[2] / "../shared/data/classes"
needs_files = pytest.mark.skipif(not FILES.is_dir(), reason="the shared class lists are not here")

# Places of the unseen classes in the code of ZSSeg: ids - 1 of COCO-Stuff, indices of VOC.
ZSSEG = {
    "coco_stuff": [20, 24, 32, 33, 40, 56, 86, 99, 105, 123, 144, 147, 148, 168, 171],
    "voc": [15, 16, 17, 18, 19],
}


@needs_files
@pytest.mark.parametrize("name", ZSSEG)
def test_published_splits_are_zssegs(name):
    listed = read_categories(FILES / f"{name}_zsseg.json")
    classes = load_split(listed, name)
    unseen = [classes.ids[k] - (name == "coco_stuff") for k in classes.groups["unseen"]]
    assert unseen == [k for k in ZSSEG[name] if k + (name == "coco_stuff") in classes.ids]
    sizes = {"coco_stuff": (156, 15), "voc": (15, 5)}[name]
    assert (len(classes.groups["seen"]), len(classes.groups["unseen"])) == sizes
    assert sorted(classes.groups["seen"] + classes.groups["unseen"]) == list(range(len(classes)))


@needs_files
def test_files_of_other_codes():
    things = read_categories(FILES / "coco_zeroshot_48_17.json")
    assert [len(things.groups[g]) for g in ("seen", "unseen")] == [48, 17] and things.isthing[0]
    stuff = read_categories(FILES / "coco_stuff_zsseg.json")
    assert stuff.isthing == (True,) * 80 + (False,) * 91 and stuff.ids[79:81] == (90, 92)
    assert len(read_categories(FILES / "pcontext_zsseg.json")) == 59


def test_a_name_fits_however_it_is_spelled_and_other_groups_stay():
    classes = parse_labels("wall concrete; potted plant,pottedplant; dog")
    classes = split(classes, ["Wall-Concrete"])
    assert split(classes, ["pottedplant"]).groups == {"seen": (0, 2), "unseen": (1,)}
    assert load_split(classes, "dog; wall_concrete").groups["unseen"] == (0, 2)
    # What the data holds out already is not seen.
    held_out = dataclasses.replace(classes, groups={"seen": (0, 1), "held_out": (2,)})
    assert split(held_out, ["pottedplant"]).groups == {"seen": (0,), "unseen": (1,), "held_out": (2,)}


def test_a_file_says_what_is_unseen(tmp_path):
    path = tmp_path / "split.json"
    path.write_text(json.dumps({"seen": ["dog"], "unseen": [{"name": "cow", "id": 7, "isthing": 1}]}))
    assert read_categories(path).ids == (0, 7)
    assert load_split(parse_labels("cow; dog; sky"), str(path)).groups["unseen"] == (0,)
    path.write_text(json.dumps({"data": ["dog", "cow"]}))
    with pytest.raises(UserError, match="does not list unseen classes"):
        load_split(parse_labels("cow; dog"), str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zebra", "'zebra' is not one of the 3"),
        ("cow; dog; sky", "3 of 3 classes"),
        ("none.json", "cannot be read"),
    ],
)
def test_a_split_that_cannot_be(text, message):
    with pytest.raises(UserError, match=message):
        load_split(parse_labels("cow; dog; sky"), text)


@pytest.mark.parametrize(
    "data",
    [{}, [], {"a": ["x"], "b": ["y"]}, ["x", ""], [{"id": 1}], 3, {"data": [{"name": "x", "id": "?"}]}],
)
def test_files_that_are_no_category_lists(tmp_path, data):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"bad\.json (holds|cannot be read)"):
        read_categories(path)

"""Label sentences, label files, and lists of classes."""

from pathlib import Path

import numpy as np
import pytest

from ovseg_jax.errors import UserError
from ovseg_jax.vocab.classes import ClassList, as_classes, load_labels, parse_labels, read_label_file, union

LABEL_FILES = Path(__file__).parents[2] / "../shared/data/label_files"


def test_sentence():
    classes = parse_labels(" bride, woman in  white ; groom; cake ;")
    assert classes.names == (("bride", "woman in white"), ("groom",), ("cake",))
    names, owner = classes.flat()
    assert names == ["bride", "woman in white", "groom", "cake"]
    assert owner.dtype == np.int32 and owner.tolist() == [0, 0, 1, 2]
    assert classes.display(0) == "bride" and len(classes) == 3


@pytest.mark.parametrize("text", ["", "  ", ";", " , ; ", "a;;b"])
def test_empty_labels_are_an_error(text):
    with pytest.raises(UserError, match=r"no labels|has no name"):
        load_labels(text)


def test_file(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_text("# note\n0:invalid_class_id\n1:wall, walls\n\n7:arctic (type of shoe, warm),boot,boot\n")
    classes = read_label_file(path)
    assert classes.ids == (1, 7)
    assert classes.names == (("wall", "walls"), ("arctic (type of shoe, warm)", "boot"))
    assert load_labels(str(path)) == classes


def test_a_list_of_words_needs_no_ids(tmp_path):
    """In the labels of a request; a label file of a data set has ids."""
    path = tmp_path / "words.csv"
    path.write_text("# mine\n\ngolden retriever, dog\ncat\n grass \n")
    for labels in (load_labels(str(path)), as_classes(path)):
        assert labels.names == (("golden retriever", "dog"), ("cat",), ("grass",)) and labels.ids == (0, 1, 2)
    path.write_text("cat\n7:dog\n")
    with pytest.raises(UserError, match=r'words.csv, line 1: expected "id:name'):
        load_labels(str(path))
    path.write_text("# cat\n")
    with pytest.raises(UserError, match=r"words.csv lists no category"):
        load_labels(str(path))


def test_a_missing_list_or_a_folder_is_no_word(tmp_path):
    for name in ("none.csv", "none.json"):
        with pytest.raises(UserError, match="there is no such file"):
            load_labels(str(tmp_path / name))
    with pytest.raises(UserError, match="are a folder: give a label file, or words"):
        load_labels(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wall\n", "line 1"),
        ("1:a\n2:\n", "line 2"),
        ("x:a", "line 1"),
        ("1:a\n1:b", "twice"),
        ("0:invalid_class_id", "no category"),
    ],
)
def test_bad_file(tmp_path, text, message):
    path = tmp_path / "labels.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_label_file(path)
    assert str(path) in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="there is no such file"):
        load_labels(str(tmp_path / "none.txt"))


def test_json_round_trip():
    classes = ClassList((("a", "b"), ("c",)), (3, 5), (True, False), {"seen": (0,), "stuff": (1,)})
    assert ClassList.from_json(classes.to_json()) == classes


def test_inconsistent_lists_are_refused():
    with pytest.raises(ValueError, match="length"):
        ClassList((("a",),), (1, 2), (True,))
    with pytest.raises(ValueError, match="outside"):
        ClassList((("a",),), (1,), (True,), {"seen": (1,)})


def test_union_joins_by_first_name():
    a = ClassList((("dog", "puppy"), ("sky",)), (1, 2), (True, False), {"seen": (0,)})
    b = ClassList((("sky", "clouds"), ("cat",)), (1, 9), (False, True), {"seen": (1,), "stuff": (0,)})
    both = union([a, b])
    assert both.names == (("dog", "puppy"), ("sky", "clouds"), ("cat",))
    assert both.ids == (0, 1, 2) and both.isthing == (True, False, True)
    assert both.groups == {"seen": (0, 2), "stuff": (1,)}


@pytest.mark.skipif(not LABEL_FILES.is_dir(), reason="the shared label files are not here")
@pytest.mark.parametrize(
    ("name", "count", "first"),
    [
        ("coco_panoptic", 133, "person"),
        ("ade20k_847", None, "wall"),
        ("lvis_1203", 1203, "aerosol can"),
        ("pascal_ctx_459", None, "accordion"),
        ("cityscapes", 19, "road"),
    ],
)
def test_real_files(name, count, first):
    path = LABEL_FILES / f"{name}_with_prompt_eng.txt"
    classes = read_label_file(path)
    lines = [line for line in path.read_text().splitlines() if line and "invalid_class_id" not in line]
    assert len(classes) == len(lines) and count in (None, len(classes))
    assert classes.display(0) == first
    assert all(name == name.strip() and name for names in classes.names for name in names)

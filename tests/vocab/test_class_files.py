import json
from pathlib import Path

import pytest

from ovseg_jax.errors import UserError
from ovseg_jax.vocab.class_files import read_class_file
from ovseg_jax.vocab.classes import parse_labels

SHARED = Path(__file__).parents[2] / "../shared/data"


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_lines(tmp_path):
    numbered = read_class_file(
        write(tmp_path / "a.txt", "3:airplane,aeroplane\n7:invalid_class_id\n9: car\n")
    )
    assert numbered.names == (("airplane", "aeroplane"), ("car",)) and numbered.ids == (3, 9)
    plain = read_class_file(
        write(tmp_path / "b.txt", "# birds\ntench, Tinca  tinca\n\nthe film: 7\nbow (weapon)\n")
    )
    assert plain.names == (("tench", "Tinca tinca"), ("the film: 7",), ("bow (weapon)",)) and plain.ids == (
        1,
        2,
        3,
    )


def test_json(tmp_path):
    listed = read_class_file(write(tmp_path / "a.json", ["car", ["dog", "hound", "dog"]]))
    assert listed.names == (("car",), ("dog", "hound")) and listed.ids == (1, 2)
    categories = [
        {"id": 9, "name": "bow_(weapon)", "synonyms": ["bow_(weapon)", "longbow"]},
        {"id": 2, "name": "traffic light", "isthing": 0},
    ]
    for content in (categories, {"images": [], "categories": categories}):
        found = read_class_file(write(tmp_path / "b.json", content))
        assert found.names == (("traffic light",), ("bow (weapon)", "longbow"))
        assert found.ids == (2, 9) and found.isthing == (False, True)
    own = parse_labels("cow,bull; sky")
    assert read_class_file(write(tmp_path / "classes.json", own.to_json())) == own


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "\n# nothing\n", "lists no class"),
        ("a.txt", "dog\n , \n", "class 2 has no name"),
        ("a.txt", "1:dog\n1:cat\n", "the id 1 occurs twice"),
        ("a.json", "[]", "lists no class"),
        ("a.json", {"categories": []}, "lists no class"),
        ("a.json", parse_labels("a").to_json().replace('"a"', ""), "a category without any name"),
        ("a.json", '{"names": [], "ids": [], "isthing": [], "groups": {}}', "lists no class"),
        ("a.json", {"images": []}, "neither a list"),
        ("a.json", "[", "cannot be read"),
        ("a.json", ["dog", []], "class 2 has no name"),
        ("a.json", ["dog", " "], "a name of class 2 is empty"),
        ("a.json", ["dog", 3], "class 2: expected a text or a list of texts, got 3"),
        ("a.json", [{"id": 1}], "has no 'name'"),
        ("a.json", [{"id": 1, "name": 3}], "'name': expected a text, got 3"),
        ("a.json", [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}], "same id"),
    ],
)
def test_what_is_no_class_list(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message) as caught:
        read_class_file(write(tmp_path / name, content))
    assert name in str(caught.value)


def test_a_file_that_is_missing():
    with pytest.raises(UserError, match=r"nowhere.txt cannot be read"):
        read_class_file("nowhere.txt")


@pytest.mark.skipif(not SHARED.exists(), reason="the files of the vocabulary tests are not here")
def test_published_lists(tmp_path):
    lvis = json.loads((SHARED / "classes/lvis_v1_detectron2.json").read_text())["data"]["LVIS_CATEGORIES"]
    found = read_class_file(write(tmp_path / "lvis.json", {"categories": lvis[::-1]}))
    label_file = read_class_file(SHARED / "label_files/lvis_1203_with_prompt_eng.txt")
    assert found.ids == label_file.ids == tuple(range(1, 1204))
    assert found.names[2] == label_file.names[2] == ("airplane", "aeroplane")

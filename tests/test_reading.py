"""Files from outside: text in several encodings, JSON with double keys, and one sentence for what is wrong."""

import json
import os

import numpy as np
import pytest

from ovseg_jax.data.images import list_images, read_image
from ovseg_jax.data.sources.coco import Coco
from ovseg_jax.data.sources.folder import Folder
from ovseg_jax.data.sources.image_folder import read_names
from ovseg_jax.errors import UserError
from ovseg_jax.reading import (
    column,
    numbers,
    read_json,
    read_lines,
    read_npz,
    read_text,
    reading,
    text,
    whole,
)
from ovseg_jax.vocab.class_files import read_class_file
from ovseg_jax.vocab.classes import ClassList, as_classes, load_labels, parse_labels, read_label_file, union
from ovseg_jax.vocab.splits import load_split
from ovseg_jax.vocab.vectors import read_vectors
from ovseg_jax.vocab.words import WordList


@pytest.mark.parametrize("read", [read_image, read_json, read_text, read_label_file])
def test_a_named_pipe_is_refused_instead_of_waited_for(tmp_path, read):
    path = tmp_path / "pipe.png"
    os.mkfifo(path)
    with pytest.raises(UserError, match=r"pipe\.png cannot be read: it is a named pipe, not a file"):
        read(path)


def test_sentences_hold_no_control_characters_and_are_short(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('"\x1b[2J\x00' + "a" * 9000)
    with pytest.raises(UserError) as error:
        read_json(path)
    assert str(UserError("\x1b[2J\x00a\nb")) == "\\x1b[2J\\x00a\nb"
    for name in ("\x00" * 9, "a" * 9000):
        with pytest.raises(UserError) as error, reading(path):
            raise ValueError(name)
        assert str(error.value).isprintable() and len(str(error.value)) < 700


def test_text_of_every_encoding(tmp_path):
    path = tmp_path / "a.txt"
    for data in ("möwe\nzwei", "\ufeffmöwe\r\nzwei", "möwe\rzwei"):
        path.write_bytes(data.encode())
        assert read_text(path) == "möwe\nzwei"
        assert list(read_lines(path)) == [(1, "möwe"), (2, "zwei")]
    path.write_bytes("möwe\r\n\r\nzwei".encode("utf-16"))
    assert list(read_lines(path)) == [(1, "möwe"), (3, "zwei")]
    path.write_text('["a\u2028b"]')  # which ends no line
    assert [line for _, line in read_lines(path)] == ['["a\u2028b"]']
    path.write_bytes(b"a\nb\xe9\n")
    with pytest.raises(UserError, match=r"a\.txt cannot be read: line 2: it is not UTF-8 text \(byte 0xe9"):
        list(read_lines(path))
    path.write_bytes("ab".encode("utf-16-le"))
    with pytest.raises(UserError, match="zero bytes"):
        read_text(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not valid JSON"),
        ('{"a": 1, "a": 2}', "'a' occurs twice"),
        ("[" * 100000, "nested too deeply"),
        ("9" * 5000, "4300"),
        ("[1,]", "not valid JSON"),
    ],
)
def test_json_that_is_none(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_json(tmp_path / "a.json")
    assert "a.json" in str(caught.value) and "\n" not in str(caught.value)


def test_one_sentence_for_what_is_not_there(tmp_path):
    (tmp_path / "folder").mkdir()
    for reader in (read_text, read_json, read_label_file, read_class_file, read_names, WordList.load):
        for name, message in (("none", "no such file"), ("folder", "is a folder"), ("a\0b", "null")):
            with pytest.raises(UserError, match=message):
                reader(tmp_path / name)


def test_addresses_of_unknown_schemes():
    for reader in (read_text, read_json, read_image, list_images):
        with pytest.raises(UserError, match=r"addresses like 'foo://' are not supported"):
            reader("foo://bucket/x.json")


def test_columns_are_of_one_kind():
    assert column([{"a": 1}, {}], "a", whole, default=7) == [1, 7]
    for value in (True, 1.0, -1, 2**70, "1", None, [1], float("nan")):
        with pytest.raises(ValueError, match="entry 1: 'a': expected a whole number"):
            column([{"a": 1}, {"a": value}], "a", whole)
    for value in ([1, 2], [1, float("inf")], "ab", [1, None], [True, 1, 1]):
        with pytest.raises(ValueError, match="expected"):
            numbers(value, "'b'", 2 if value != [1, 2] else 3)
    assert text("a\ud800", "b") == "a\ufffd"
    with pytest.raises(UserError, match="f: cannot be read: it has no 'k'"), reading("f:"):
        {}["k"]


@pytest.fixture
def folder(tmp_path):
    from PIL import Image

    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "images/a.png")
    mask = np.zeros((4, 4), np.uint8)
    mask[0], mask[1] = 1, 2
    Image.fromarray(mask).save(tmp_path / "masks/a.png")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("captions.jsonl", '{"image_id": "a", "captions": "a red ball"}', ["a red ball"]),
        ("captions.jsonl", '\ufeff{"file": "a.png", "captions": ["x", "y"]}\r\n', ["x", "y"]),
        ("captions.json", '{"a.png": "a red ball"}', ["a red ball"]),
        ("captions.tsv", "\ufeffa.png\ta\u2028red ball", ["a red ball"]),
        ("captions.jsonl", '{"image_id": "a", "caption": null}', "line 1"),
        ("captions.jsonl", '{"image_id": "a", "caption": NaN}', "line 1"),
        ("captions.jsonl", '{"image_id": "a", "captions": ["x", null]}', "line 1"),
        ("captions.jsonl", '{"image_id": "a", "captions": {"x": 1}}', "line 1"),
        ("captions.jsonl", '{"image_id": null, "caption": "x"}', "line 1"),
        ("captions.jsonl", '{"image_id": true, "caption": "x"}', "line 1"),
        ("captions.jsonl", '\n["a", "x"]', "line 2"),
        ("captions.jsonl", '{"image_id": "a", "caption": "x", "caption": "y"}', "line 1.*twice"),
        ("captions.json", '{"a.png": [null]}', "'a.png'"),
        ("captions.json", '{"a.png": NaN}', "'a.png'"),
        ("captions.json", '{"a.png": ["x"], "a.png": ["y"]}', "occurs twice"),
        ("segments.json", '{"a.png": {"1": null}}', "expected a text"),
        ("segments.json", '{"a.png": {"1": " "}}', "empty"),
        ("segments.json", '{"a.png": {"1": "x", "01": "y"}}', "twice"),
        ("segments.json", '{"a.png": {"0": "x"}}', '"1" to "65535"'),
        ("segments.json", '{"a.png": {"²": "x"}}', '"1" to "65535"'),
        ("segments.json", '{"a.png": {"1": "x"}, "a": {"1": "y"}}', "twice"),
        ("segments.json", '{"a.png": ["x"]}', "not of the form"),
    ],
)
def test_texts_of_a_folder(folder, name, content, expected):
    (folder / name).write_text(content, "utf-8")
    if isinstance(expected, list):
        assert Folder(folder)[0]["captions"] == expected
    else:
        with pytest.raises(UserError, match=expected) as caught:
            Folder(folder)
        assert name in str(caught.value) and "\n" not in str(caught.value)


def test_latin_1_captions_name_their_line(folder):
    for name, line in (("captions.tsv", b"a.png\tcaf\xe9"), ("captions.jsonl", b'{"caption": "caf\xe9"}')):
        (folder / name).write_bytes(b"\n" + line)
        with pytest.raises(UserError, match=f"{name} cannot be read: line 2: it is not UTF-8"):
            Folder(folder)
        (folder / name).unlink()


def test_names_in_two_spellings_of_unicode(folder):
    (folder / "images/a.png").rename(folder / "images/e\u0301.png")
    (folder / "masks/a.png").rename(folder / "masks/\u00e9.png")
    (folder / "captions.json").write_text('{"\u00e9.png": "x"}')
    example = Folder(folder)[0]
    assert example["captions"] == ["x"] and len(example["class_ids"]) == 2


def test_a_name_of_two_categories_means_one(folder, caplog):
    """Truth, prediction, mixtures and splits: the first called so, or else the first that lists it."""
    (folder / "classes.txt").write_text("1:ball,sphere\n2:grass\n3:drum,ball\n4:sphere\n")
    (folder / "segments.json").write_text('{"a.png": {"1": "ball", "2": "sphere"}}')
    source = Folder(folder)
    assert source[0]["class_ids"].tolist() == [0, 3]
    assert source.classes.names == (("ball",), ("grass",), ("drum",), ("sphere",))
    assert "names listed by several categories: 2, such as" in caplog.text
    mixed = union([parse_labels("cat,kitty; dog"), parse_labels("kitty,cub; cub; dog,pup")])
    assert mixed.names == (("cat",), ("dog", "pup"), ("kitty",), ("cub",))
    split = load_split(parse_labels("screen door,screen; screen,display; wall"), "screen")
    assert split.groups["unseen"] == (1,)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("\ufeff1:airplane,plane\r\n5:dog", ((1, 5), ("airplane", "plane"))),
        ("\ufeffairplane\ncar", ((1, 2), ("airplane",))),
        ("1: red ball\n2: blue ball\ngrass\n", "line 3"),
        ("grass\n\n2: blue ball\n", "line 3"),
        ("-1:dog\n", "line 1"),
        ("²:dog\n1:cat", "line 2"),
        ("1:dog\n²:cat", "line 2"),
        ("99999999999999999999:dog", "line 1"),
        ("1:dog\n01:cat", "line 2.*twice"),
        ("", "lists no class"),
        ("3,airplane\n5,dog", "followed by a colon, not a comma"),
    ],
)
def test_forms_of_class_files_are_not_mixed(tmp_path, content, expected):
    (tmp_path / "c.txt").write_text(content, "utf-8")
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            read_class_file(tmp_path / "c.txt")
    else:
        found = read_class_file(tmp_path / "c.txt")
        assert (found.ids, found.names[0]) == expected


def test_suffixes_in_any_case(tmp_path):
    (tmp_path / "coco.JSON").write_text('\ufeff{"categories": [{"id": 3, "name": "traffic_light"}]}')
    assert read_class_file(tmp_path / "coco.JSON").names == (("traffic light",),)
    (tmp_path / "l.TXT").write_text("7:dog")
    assert load_labels(str(tmp_path / "l.TXT")).ids == (7,)
    (tmp_path / "n.JSON").write_text('{"n01": "dog"}')
    assert read_names(tmp_path / "n.JSON") == {"n01": ("dog",)}


def test_a_newline_separates_labels():
    assert load_labels("red ball\ngrass, lawn;\r\nsky").names == (("red ball",), ("grass", "lawn"), ("sky",))
    assert load_labels("\ufeffa; b;\n").names == (("a",), ("b",))
    for labels in (" \n ", ";", "a;;b", [], [[]], ["a", []], [[" "]]):
        with pytest.raises(UserError):
            as_classes(labels)
    assert load_labels("長" * 200).names == (("長" * 200,),)  # longer than a file name may be


@pytest.mark.parametrize(
    "content", ["[]", '["<pad>", "a", "a"]', '["<pad>", " "]', '["<pad>", 3]', '{"a": 1}', "nul"]
)
def test_a_vocabulary_that_is_none(tmp_path, content):
    (tmp_path / "words.json").write_text(content)
    with pytest.raises(UserError, match=r"words\.json"):
        WordList.load(tmp_path / "words.json")


@pytest.mark.parametrize(
    "change",
    [
        {"names": ["a"]},
        {"names": [[3]]},
        {"ids": ["1"]},
        {"ids": [1.5]},
        {"isthing": ["yes"]},
        {"groups": []},
        {"groups": {"seen": [-1]}},
        {"groups": {"seen": 0}},
        {"examples": [None]},
        {"names": None},
    ],
)
def test_odd_classes_json(tmp_path, change):
    fields = json.loads(parse_labels("a").to_json()) | change
    with pytest.raises(ValueError, match=r"."):
        ClassList.from_json(json.dumps(fields))
    (tmp_path / "classes.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"classes\.json"):
        read_class_file(tmp_path / "classes.json")


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"words": np.array(["a"])},
        {"words": np.array(["a"]), "vectors": np.array([[np.nan, 1]])},
        {"words": np.array(["a"]), "vectors": np.array([["x"]])},
        {"words": np.array([1]), "vectors": np.ones((1, 2))},
        {"words": np.array(["a"], object), "vectors": np.ones((1, 2))},
        {"words": np.array("a"), "vectors": np.ones((1, 2))},
    ],
)
def test_odd_vectors(tmp_path, arrays):
    np.savez(tmp_path / "v.npz", **arrays)
    with pytest.raises(UserError, match=r"text: .*v\.npz"):
        read_vectors(tmp_path / "v.npz", "text")
    (tmp_path / "v.npz").write_bytes(b"")
    with pytest.raises(UserError, match=r"text: .*v\.npz"):
        read_vectors(tmp_path / "v.npz", "text")


@pytest.fixture
def coco(tmp_path):
    from PIL import Image

    (tmp_path / "annotations/panoptic_val").mkdir(parents=True)
    (tmp_path / "val").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "val/1.png")
    Image.new("RGB", (4, 4), (7, 0, 0)).save(tmp_path / "annotations/panoptic_val/1.png")
    return tmp_path


def coco_data():
    return {
        "images": [{"id": 1, "file_name": "1.png", "height": 4, "width": 4}],
        "categories": [{"id": 3, "name": "dog"}],
        "annotations": [
            {"image_id": 1, "file_name": "1.png", "segments_info": [{"id": 7, "category_id": 3}]}
        ],
    }


def segment(**changes):
    return lambda data: data["annotations"][0]["segments_info"][0].update(changes)


def image(**changes):
    return lambda data: data["images"][0].update(changes)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (segment(id=0), "'id': expected a whole number from 1"),
        (segment(id=-7), "'id'"),
        (segment(id=1 << 24), "'id'"),
        (segment(id=7.0), "'id'"),
        (segment(category_id=4), "the category_id 4"),
        (segment(category_id=[3]), "'category_id'"),
        (segment(iscrowd=2), "'iscrowd'"),
        (segment(bbox=[0, 0, 4]), "'bbox'"),
        (segment(bbox=[0, 0, 1e400, 4]), "'bbox'"),
        (lambda d: d["annotations"].append(d["annotations"][0]), "two annotations for the image 1"),
        (lambda d: d["annotations"][0]["segments_info"].append({"id": 7, "category_id": 3}), "the id 7"),
        (lambda d: d["annotations"][0].update(segments_info=None), "'segments_info'"),
        (lambda d: d["annotations"].append(3), "'annotations': expected objects"),
        (lambda d: d["annotations"][0].update(image_id={}), "'image_id'"),
        (lambda d: d["images"].append(d["images"][0]), "the image 1 twice"),
        (lambda d: d["categories"].append(d["categories"][0]), "the category 3 twice"),
        (lambda d: d["categories"][0].update(name=""), "empty name"),
        (lambda d: d["categories"][0].update(name=None), "'name'"),
        (lambda d: d["categories"][0].update(isthing="no"), "'isthing'"),
        (image(id="1"), "'id'"),
        (image(id=2**64), "'id'"),
        (image(height=10**12), "'height'"),
        (image(height=0), "'height'"),
        (image(width=None), "'width'"),
        (image(file_name=3), "'file_name'"),
    ],
)
def test_coco_json_is_checked(coco, edit, message):
    data = coco_data()
    (path := coco / "annotations/panoptic_val.json").write_text(json.dumps(data))
    assert Coco(coco, "val")[0]["class_ids"].tolist() == [0]
    edit(data)
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match=message) as caught:
        Coco(coco, "val")
    assert "panoptic_val.json" in str(caught.value) and "\n" not in str(caught.value)


def test_coco_captions_and_names_are_checked(coco):
    data = coco_data()
    (coco / "annotations/panoptic_val.json").write_text(json.dumps(data))
    for caption in (None, 3, ["x"], float("nan")):
        entry = {"image_id": 1, "caption": caption}
        captions = {"images": data["images"], "annotations": [entry]}
        (coco / "annotations/captions_val.json").write_text(json.dumps(captions))
        with pytest.raises(UserError, match=r"captions_val\.json .*'caption': expected a text"):
            Coco(coco, "val")
    (coco / "annotations/captions_val.json").unlink()
    image(file_name="a\0b.png")(data)
    (coco / "annotations/panoptic_val.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"listed in .* does not exist"):
        dict(Coco(coco, "val")[0])


def test_labels_with_ids_are_no_labels():
    with pytest.raises(UserError, match="have ids"):
        parse_labels("1:dog\n2:cat")
    assert parse_labels("7: the film; dog").names == (("7: the film",), ("dog",))


def test_equal_names_are_said(tmp_path, caplog):
    (tmp_path / "l.txt").write_text("1:dog\n2:dog,hound\n")
    assert read_label_file(tmp_path / "l.txt").names == (("dog",), ("dog", "hound"))
    assert "names listed by several categories: 1, such as 'dog' by 'dog', 'dog'" in caplog.text


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_text_of_an_npz_that_is_none(tmp_path, order):
    texts = np.array(["dog", "\U0010ffff"], f"{order}U3")
    np.savez(tmp_path / "a.npz", words=texts, none=np.array([], "U"), empty=np.array([""]))
    assert read_npz(tmp_path / "a.npz")["words"].tolist() == texts.tolist()
    texts.view(f"{order}u4")[4] = 0x110000
    np.savez(tmp_path / "a.npz", words=texts)
    with pytest.raises(
        UserError, match=r"a.npz cannot be read: the array 'words' holds codes that are no characters"
    ):
        read_npz(tmp_path / "a.npz")

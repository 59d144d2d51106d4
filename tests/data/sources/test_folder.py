"""A user's own folder: both kinds of masks, all forms of captions, and clear errors."""

import json

import numpy as np
import pytest
from PIL import Image

from ovseg_jax.data.sources.folder import Folder
from ovseg_jax.errors import UserError


@pytest.fixture
def root(tmp_path):
    """Three images of 8 x 10; a.jpg has a mask with the values 0, 2 and 300."""
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    for name in ("b.png", "a.jpg", "000c.jpg"):
        Image.new("RGB", (10, 8), "red").save(tmp_path / "images" / name)
    save_mask(tmp_path, np.uint16)
    return tmp_path


def save_mask(root, dtype, values=(2, 300), name="a"):
    mask = np.zeros((8, 10), dtype)
    mask[:4, :5], mask[4:, 5:] = values
    Image.fromarray(mask).save(root / f"masks/{name}.png")


def test_class_agnostic(root):
    source = Folder(str(root))
    assert [source[k]["image_id"] for k in range(3)] == ["000c", "a", "b"]
    example = source[1]
    assert (example["segments"][:4, :5] == 1).all() and (example["segments"][4:, 5:] == 2).all()
    assert example["class_ids"].tolist() == [-1, -1] and len(source.classes) == 0
    assert example["boxes"].tolist() == [[0, 0, 5, 4], [5, 4, 10, 8]]
    assert source[0]["class_ids"].shape == (0,) and source[0]["captions"] == []
    assert source.extent() == (8, 10, 2)


def test_named_segments(root):
    (root / "segments.json").write_text(json.dumps({"a.jpg": {"300": "puppy"}}))
    source = Folder(root)
    assert source.classes.names == (("puppy",),) and source[1]["class_ids"].tolist() == [-1, 0]
    (root / "classes.txt").write_text("4:sky\n9:dog,puppy\n")
    source = Folder(root)
    assert source.classes.ids == (4, 9) and source[1]["class_ids"].tolist() == [-1, 1]
    (root / "classes.txt").write_text("4:sky\n")
    with pytest.raises(UserError, match=r"the name 'puppy' of a\.jpg is not in classes\.txt"):
        Folder(root)


def test_regions_are_those_of_the_examples_without_an_image_opened(root):
    (root / "segments.json").write_text(json.dumps({"a.jpg": {"300": "puppy"}, "b.png": {"7": "sky"}}))
    save_mask(root, np.uint8, (7, 9), name="b")
    source = Folder(root)
    expected = [
        (index, segment, example["class_ids"][segment], *example["boxes"][segment])
        for index, example in enumerate(source[k] for k in range(3))
        for segment in np.flatnonzero(example["class_ids"] >= 0)
    ]
    for image in (root / "images").iterdir():
        image.write_bytes(b"")
    found = Folder(root).regions()
    rows = [
        (*row, *box) for *row, box in zip(found.image, found.segment, found.class_id, found.box, strict=True)
    ]
    assert rows == expected and len(rows) == 2
    assert Folder(root, kind="semantic").regions().box.shape == (0, 4)  # no class is listed


def test_semantic(root):
    (root / "classes.txt").write_text("0:invalid_class_id\n2:sky\n7:dog\n")
    save_mask(root, np.uint8, (2, 255))
    example = Folder(root, kind="semantic")[1]
    assert example["class_ids"].tolist() == [0] and (example["segments"] == 0).sum() == 60
    save_mask(root, np.uint16, (7, 65535))
    assert Folder(root, kind="semantic")[1]["class_ids"].tolist() == [1]
    save_mask(root, np.uint8, (2, 3))
    with pytest.raises(UserError, match=r"a\.png holds the value 3"):
        dict(Folder(root, kind="semantic")[1])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("captions.json", '{"a.jpg": ["a red wall", " a  door "], "b": "one text"}'),
        ("captions.tsv", "a.jpg\ta red wall\na\ta door\n\nb.png\tone text\n"),
        (
            "captions.jsonl",
            '{"image_id": "a", "caption": "a red wall", "annotator_id": 3}\n'
            '{"image_id": "a", "caption": "a door"}\n'
            '{"image_id": "elsewhere", "caption": "x"}\n{"file": "b.png", "captions": ["one text"]}\n',
        ),
    ],
)
def test_captions(root, name, text):
    (root / name).write_text(text)
    source = Folder(root)
    assert source[1]["captions"] == ["a red wall", "a door"] and source[2]["captions"] == ["one text"]
    assert list(source.captions()) == ["a red wall", "a door", "one text"]


def test_narratives_of_coco_count_ids_without_zeros(root):
    (root / "captions.jsonl").write_text('{"image_id": "c", "caption": "a red wall"}\n')
    assert Folder(root)[0]["captions"] == ["a red wall"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("captions.json", '{"z.jpg": ["x"]}', "no such image"),
        ("captions.json", '{"a.jpg": 3}', "a list of texts"),
        ("captions.json", "{", "not valid JSON"),
        ("captions.tsv", "a.jpg a wall\n", "line 1"),
        ("captions.jsonl", '{"image_id": "a"}\n', "line 1"),
        ("captions.jsonl", '{"image_id": "z", "caption": "x"}\n', "no caption for any image"),
        ("segments.json", '{"z.jpg": {"1": "dog"}}', "no such image"),
        ("segments.json", '{"a.jpg": {"one": "dog"}}', "expected .1. to .65535., got .one."),
    ],
)
def test_bad_texts(root, name, text, message):
    (root / name).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        Folder(root)
    assert name in str(error.value)


def test_bad_layouts(root, tmp_path):
    with pytest.raises(UserError, match="no folder images/"):
        Folder(tmp_path / "none")
    with pytest.raises(UserError, match="kind='boxes'"):
        Folder(root, kind="boxes")
    Image.new("RGB", (10, 8)).save(root / "masks/b.png")
    with pytest.raises(UserError, match=r"b\.png cannot be read: it is a picture of mode RGB"):
        dict(Folder(root)[2])
    Image.new("L", (10, 9)).save(root / "masks/b.png")
    with pytest.raises(UserError, match=r"9 x 10 .* image is 8 x 10"):
        dict(Folder(root)[2])
    (root / "masks/b.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"b\.png cannot be read"):
        dict(Folder(root)[2])
    Image.new("L", (10, 8)).save(root / "masks/z.png")
    with pytest.raises(UserError, match=r"z\.png belongs to no image"):
        Folder(root)
    (root / "masks/z.png").unlink()
    Image.new("RGB", (10, 8)).save(root / "images/a.png")
    with pytest.raises(UserError, match=r"both a\.jpg and a\.png"):
        Folder(root)

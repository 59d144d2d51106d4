"""Folders of classes: order, splits, names from files, and clear errors."""

import json

import numpy as np
import pytest
from PIL import Image

from ovseg_jax.data.sources.image_folder import ImageFolder
from ovseg_jax.errors import UserError


def save(path, colour="red", size=(6, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def root(tmp_path):
    """Two splits; `val` lacks the class zebra."""
    for name in ("train/sea_lion/b.JPEG", "train/sea_lion/a.png", "train/zebra/c.webp", "val/sea_lion/d.jpg"):
        save(tmp_path / name)
    save(tmp_path / "val/ant/e.bmp", (0, 0, 255))
    (tmp_path / "train/zebra/notes.txt").write_text("no image")
    return tmp_path


def test_classes_are_those_of_all_splits(root):
    train, val = ImageFolder(str(root), "train"), ImageFolder(root, "val")
    assert train.classes.names == val.classes.names == (("ant",), ("sea lion",), ("zebra",))
    assert train.labels.tolist() == [1, 1, 2] and val.labels.tolist() == [0, 1] and len(train) == 3
    assert train.labels.dtype == np.int32
    assert [train[k]["image_id"] for k in range(3)] == ["sea_lion/a.png", "sea_lion/b.JPEG", "zebra/c.webp"]
    example = val[0]
    assert example["label"] == 0 and example["image"].shape == (4, 6, 3)
    assert (example["image"] == (0, 0, 255)).all() and list(val.captions()) == []
    with pytest.raises(IndexError):
        val[2]


def test_without_splits(root):
    source = ImageFolder(root / "train")
    assert source.classes.names == (("sea lion",), ("zebra",)) and len(source) == 3
    assert ImageFolder(root.parent, f"{root.name}/val").classes.names == (("ant",), ("sea lion",), ("zebra",))


def test_a_file_name_of_any_letters(tmp_path):
    save(tmp_path / "möwe/ältere möwe.png")
    source = ImageFolder(tmp_path)
    assert source[0]["image_id"] == "möwe/ältere möwe.png" and source.classes.names == (("möwe",),)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("names.txt", "zebra: zebra\nsea_lion:sea lion, eared seal\n\nant:ant\nowl: owl\n"),
        ("names.txt", "zebra\tzebra\nsea_lion\tsea_lion, eared_seal\nant\tant\nowl\towl\n"),
        ("names.txt", "zebra zebra\nsea_lion sea lion, eared seal\nant ant\nowl owl\n"),
        (
            "n.json",
            json.dumps(
                {"zebra": "zebra", "sea_lion": ["sea lion", "eared seal"], "ant": "ant", "owl": "owl"}
            ),
        ),
    ],
)
def test_names_from_a_file(root, file, text):
    (root / file).write_text(text)
    source = ImageFolder(root, "val", root / file)
    assert source.classes.names == (("zebra",), ("sea lion", "eared seal"), ("ant",))  # no folder is an owl
    assert sorted(source.labels.tolist()) == [1, 2] and source[0]["image_id"] == "ant/e.bmp"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zebra: zebra\nant: ant\n", "no name for the folder .*sea_lion"),
        ("zebra: zebra\nzebra: horse\n", "'zebra' occurs twice"),
        ("zebra\n", "'zebra' has no name"),
        ("\n", "lists no class"),
    ],
)
def test_bad_names(root, text, message):
    (root / "names.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        ImageFolder(root, "train", root / "names.txt")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ('["a"]', "cannot be read"),
        ('{"a": 3}', "expected a text or a list of texts"),
        ("{}", "no class"),
    ],
)
def test_bad_json(root, text, message):
    (root / "names.json").write_text(text)
    with pytest.raises(UserError, match=message):
        ImageFolder(root, "train", root / "names.json")


def test_what_is_missing_is_named(root, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(UserError, match="is not a folder"):
        ImageFolder("")
    with pytest.raises(UserError, match="test' is not a folder"):
        ImageFolder(root, "test")
    with pytest.raises(UserError, match="holds no folder"):
        ImageFolder(empty)
    (empty / "cat").mkdir()
    with pytest.raises(UserError, match="hold no readable image"):
        ImageFolder(empty)
    with pytest.raises(UserError, match=r"names\.txt cannot be read"):
        ImageFolder(root, "train", root / "names.txt")
    photo = root / "val/sea_lion/d.jpg"
    photo.write_bytes(photo.read_bytes()[:-50])
    with pytest.raises(UserError, match=r"d\.jpg cannot be read"):
        dict(ImageFolder(root, "val")[1])

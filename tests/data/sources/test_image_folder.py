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


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("AnnualCrop", "Annual Crop"),
        ("ApplyEyeMakeup", "Apply Eye Makeup"),
        ("sea_lion", "sea lion"),
        ("Abyssinian", "Abyssinian"),
        ("YMCA", "YMCA"),
        ("707-320", "707-320"),
        ("iPhone", "iPhone"),
        ("_", "_"),
    ],
)
def test_names_are_words(tmp_path, written, name):
    save(tmp_path / written / "a.png")
    assert ImageFolder(tmp_path).classes.names == ((name,),)


def test_wordnet_ids_need_names(tmp_path):
    for wnid in ("n01440764", "n01443537"):
        save(tmp_path / "val" / wnid / "a.png")
    with pytest.raises(
        UserError, match="are WordNet ids, such as n01440764, which are no words for a prompt: give"
    ):
        ImageFolder(tmp_path, "val")
    assert ImageFolder(tmp_path, "val", "folders").classes.names == (("n01440764",), ("n01443537",))
    # Longer than what is there, as for ImageNet-A and R: 200 of ImageNet's 1,000.
    words = "".join(f"n{k:08d} class {k}, other {k}\n" for k in (1440764, *range(1443537, 1444536)))
    (tmp_path / "LOC_synset_mapping.txt").write_text(words)
    source = ImageFolder(tmp_path, "val")
    assert source.classes.names == (("class 1440764", "other 1440764"), ("class 1443537", "other 1443537"))
    assert source.labels.tolist() == [0, 1]
    (tmp_path / "names.txt").write_text("n01440764 tench\nn01443537 goldfish\nn01484850 white shark\n")
    assert ImageFolder(tmp_path, "val", tmp_path / "names.txt").classes.names == (("tench",), ("goldfish",))

"""CoOp's splits of classification sets, in the layouts that its instructions lead to."""

import pytest
from etils import epath

from ovseg_jax.datasets.coop import CoopSplit
from ovseg_jax.errors import UserError
from ovseg_jax.experiment.scores import source_of
from tests.datasets.packing import as_json, both_forms, jpeg, read_all, unpacked

SPLIT = {
    "train": [["Abyssinian_1.jpg", 0, "abyssinian"], ["boxer_2.jpg", 3, "boxer"]],
    "val": [["Abyssinian_9.jpg", 0, "abyssinian"]],
    "test": [["shiba_inu_5.jpg", 2, "shiba_inu"], ["boxer_7.jpg", 3, "boxer"]],
}
PETS = {
    "split_zhou_OxfordPets.json": as_json(SPLIT),
    "annotations/trainval.txt": b"Abyssinian_1 1 1 1\n",
    **{
        f"images/{row[0]}": jpeg(2, 3, k)
        for k, row in enumerate(row for own in SPLIT.values() for row in own)
    },
    "images/Abyssinian_3.jpg": jpeg(2, 3, 9),  # in no split
}
TEXTURES = {
    "dtd/split_zhou_DescribableTextures.json": as_json(
        {
            split: [[f"banded/banded_{k}.jpg", 0, "banded"], [f"polka-dotted/p_{k}.jpg", 1, "polka-dotted"]]
            for k, split in enumerate(SPLIT)
        }
    ),
    **{f"dtd/images/banded/banded_{k}.jpg": jpeg(2, 3, k) for k in range(3)},
    **{f"dtd/images/polka-dotted/p_{k}.jpg": jpeg(2, 3, k) for k in range(3)},
}


def test_images_in_one_folder(tmp_path):
    for folder in both_forms(
        tmp_path, PETS, {"images.tar.gz": "images/", "annotations.tar.gz": "annotations/"}
    ):
        data = CoopSplit(folder)
        assert data.classes.names == (("abyssinian",), ("shiba inu",), ("boxer",))
        assert data.classes.ids == (0, 2, 3) and data.chosen["set"] == "OxfordPets"
        found = read_all(data, "test")
        assert {key: own["label"] for key, own in found.items()} == {"shiba_inu_5.jpg": 1, "boxer_7.jpg": 2}
        assert found["boxer_7.jpg"]["image"] == PETS["images/boxer_7.jpg"]
        assert list(read_all(data, "train")) == ["Abyssinian_1.jpg", "boxer_2.jpg"] and not data.notes


def test_images_in_folders_of_classes(tmp_path):
    for folder in both_forms(tmp_path, TEXTURES, {"dtd-r1.0.1.tar.gz": "dtd/images/"}):
        data = CoopSplit(folder)
        found = read_all(data, "val")
        assert {key: own["label"] for key, own in found.items()} == {
            "banded/banded_1.jpg": 0,
            "polka-dotted/p_1.jpg": 1,
        }


def test_one_of_several_sets_is_named(tmp_path):
    folder = unpacked(tmp_path, PETS | TEXTURES)
    with pytest.raises(
        UserError, match=r"splits of DescribableTextures, OxfordPets: name one, such as --option=set=Des"
    ):
        CoopSplit(folder)
    assert len(CoopSplit(folder, set="OxfordPets").classes) == 3
    assert len(read_all(CoopSplit(folder, set="DescribableTextures"), "train")) == 2
    with pytest.raises(UserError, match=r"holds no split_zhou_EuroSAT.json, packed or unpacked"):
        CoopSplit(folder, set="EuroSAT")
    with pytest.raises(UserError, match=r"holds no split_zhou_SET.json, packed or unpacked"):
        CoopSplit(unpacked(tmp_path / "empty", {"a.jpg": b""}))


def test_missing_images_are_refused_or_counted(tmp_path):
    left = {name: content for name, content in PETS.items() if not name.endswith("Abyssinian_1.jpg")}
    folder = unpacked(tmp_path, left)
    with pytest.raises(
        UserError,
        match=r"1 of 2 images of train are not in .*such as Abyssinian_1.jpg: --option=missing=skip",
    ):
        list(CoopSplit(folder).entries("train"))
    data = CoopSplit(folder, missing="skip")
    assert list(read_all(data, "train")) == ["boxer_2.jpg"] and "they were left out" in data.notes[0]
    with pytest.raises(UserError, match="has no split 'dev'"):
        list(data.entries("dev"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "split_zhou_OxfordPets.json cannot be read: it is not valid JSON"),
        (as_json({"train": []}), "it lists no image"),
        (as_json({"train": SPLIT["train"]}), "it has no 'val'"),
        (as_json(SPLIT | {"val": [["a.jpg", 0]]}), r"expected \[path, label, name\], got \['a.jpg', 0\]"),
        (as_json(SPLIT | {"val": [["a.jpg", "0", "x"]]}), "a label: expected a whole number"),
        (as_json(SPLIT | {"val": [["a.jpg", -1, "x"]]}), "a label: expected"),
        (as_json(SPLIT | {"val": [["a.jpg", 0, "_"]]}), "a path or a name of 'val' is empty"),
        (
            as_json(SPLIT | {"val": [["a.jpg", 0, "cat"]]}),
            "a.jpg has the label 0 of 'abyssinian', but .* 'cat'",
        ),
        (as_json(SPLIT | {"val": SPLIT["val"] * 2}), "lists the image 'Abyssinian_9.jpg' of val twice"),
        (as_json(SPLIT | {"val": [["a.jpg", 0, "abyssinian"]]}), "1 of 1 images of val are not in"),
    ],
)
def test_a_damaged_split_file_is_one_sentence(tmp_path, content, message):
    folder = unpacked(tmp_path, PETS | {"split_zhou_OxfordPets.json": content})
    with pytest.raises(UserError, match=message) as found:
        read_all(CoopSplit(folder), "val")
    assert "\n" not in str(found.value)


def test_a_suite_finds_a_prepared_set(tmp_path):
    manifest = {
        "format": 1,
        "dataset": "coop",
        "provides": ["image", "label"],
        "splits": {
            split: {
                "examples": 0,
                "extent": [1, 1, 1],
                "shards": [],
                "index": {"file": "i", "bytes": 0, "sha256": ""},
            }
            for split in SPLIT
        },
    }
    unpacked(tmp_path, {"oxford_pets/manifest.json": as_json(manifest)})
    found = source_of("oxford_pets", {"metric": "per_class"}, epath.Path(tmp_path))
    assert found == {"name": "prepared", "data_dir": str(tmp_path / "oxford_pets"), "split": "test"}
    assert source_of("food101", {}, epath.Path(tmp_path)) is None

"""LVIS v1 and Objects365 v2 in their official layouts."""

import numpy as np
import pytest

from ovseg_jax.datasets.lvis import Lvis
from ovseg_jax.datasets.objects365 import Objects365
from ovseg_jax.errors import UserError
from tests.datasets.packing import as_json, both_forms, jpeg, names_of, read_all, unpacked


def rectangle(x: int, y: int, width: int, height: int) -> list[list[int]]:
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def instance(image: int, kind: int, box: list[int], **changes: object) -> dict:
    made = {"id": 1, "image_id": image, "category_id": kind, "bbox": box, "area": box[2] * box[3]}
    return made | {"segmentation": rectangle(*box)} | changes


CATEGORIES = [
    {"id": 7, "name": "zebra", "synonyms": ["zebra"], "frequency": "f", "synset": "zebra.n.01", "def": "x"},
    {"id": 3, "name": "aerosol_can", "synonyms": ["aerosol_can", "spray_can"], "frequency": "c"},
    {"id": 5, "name": "yacht", "synonyms": ["yacht"], "frequency": "r"},
]


def lvis(folder: str, numbers: list[int], annotations: list[dict], **changes: object) -> bytes:
    images = [
        {
            "id": k,
            "coco_url": f"http://images.cocodataset.org/{folder}/{k:012d}.jpg",
            "height": 20,
            "width": 30,
            "neg_category_ids": [5],
            "not_exhaustive_category_ids": [],
        }
        for k in numbers
    ]
    return as_json({"images": images, "annotations": annotations, "categories": CATEGORIES} | changes)


INSTANCES = [
    instance(9, 5, [2, 2, 4, 4]),
    instance(9, 3, [0, 0, 10, 10]),
    instance(9, 7, [2, 2, 4, 4], area=17),  # wholly covered by the first
    instance(9, 7, [20, 10, 5, 5]),
    instance(9, 7, [20, 10, 5, 5], segmentation=[[1, 2, 3, 4]]),  # no polygon
]
LVIS = {
    "lvis_v1_train.json": lvis("train2017", [9], INSTANCES),
    "lvis_v1_val.json": lvis("val2017", [4], [instance(4, 7, [0, 0, 30, 20])]),
    "train2017/000000000009.jpg": jpeg(20, 30),
    "train2017/000000000011.jpg": jpeg(20, 30),
    "val2017/000000000004.jpg": jpeg(20, 30, 1),
}
LVIS_ARCHIVES = {
    "lvis_v1_train.json.zip": "lvis_v1_train.json",
    "lvis_v1_val.json.zip": "lvis_v1_val.json",
    "train2017.zip": "train2017/",
    "val2017.zip": "val2017/",
}


def test_lvis(tmp_path):
    for folder in both_forms(tmp_path, LVIS, LVIS_ARCHIVES):
        data = Lvis(folder)
        assert data.classes.names == (("aerosol can", "spray can"), ("yacht",), ("zebra",))
        assert data.classes.ids == (3, 5, 7)
        assert data.classes.groups == {"rare": (1,), "common": (0,), "frequent": (2,)}
        found = read_all(data, "train")["000000000009"]
        assert names_of(data, found) == ["aerosol can", "zebra", "yacht"]  # the larger first
        assert found["boxes"].tolist() == [[0, 0, 10, 10], [20, 10, 25, 15], [2, 2, 6, 6]]
        expected = np.zeros((20, 30), int)
        expected[:10, :10], expected[10:15, 20:25], expected[2:6, 2:6] = 1, 2, 3
        assert (found["segments"] == expected).all()
        assert data.notes == ["train: 1 instances without a usable polygon were left out"]
        assert (read_all(data, "val")["000000000004"]["segments"] == 1).all()


def test_images_of_lvis_val_may_lie_in_train2017(tmp_path):
    files = LVIS | {"lvis_v1_val.json": lvis("train2017", [11], [])}
    found = read_all(Lvis(unpacked(tmp_path, files)), "val")
    assert list(found) == ["000000000011"] and found["000000000011"]["boxes"].shape == (0, 4)


def test_faults_of_lvis(tmp_path):
    broken = {
        "a": (b"[", "lvis_v1_train.json cannot be read"),
        "b": (
            lvis("train2017", [9], [instance(8, 7, [0, 0, 1, 1])]),
            "annotation 1 is of no listed image or category",
        ),
        "c": (
            lvis("train2017", [9], [instance(9, 8, [0, 0, 1, 1])]),
            "annotation 1 is of no listed image or category",
        ),
        "d": (
            lvis("train2017", [9], [instance(9, 7, [0, 0, 1, 1], bbox=[1])]),
            "'bbox': expected a list of 4 numbers",
        ),
        "e": (lvis("train2017", [9], [], images=[{"id": 9}]), "image 0 has no 'coco_url'"),
        "f": (
            lvis("train2017", [9, 12], []),
            "1 of 2 images of train are not in .*, such as train2017/0000",
        ),
    }
    for name, (content, message) in broken.items():
        data = Lvis(unpacked(tmp_path / name, LVIS | {"lvis_v1_train.json": content}))
        with pytest.raises(UserError, match=message):
            read_all(data, "train")
    with pytest.raises(UserError, match="two categories have the same id"):
        Lvis(
            unpacked(
                tmp_path / "g", {"lvis_v1_val.json": lvis("val2017", [], [], categories=CATEGORIES[:1] * 2)}
            )
        )
    with pytest.raises(
        UserError, match=r"holds no lvis_v1_val.json or lvis_v1_train.json, packed or unpacked"
    ):
        Lvis(unpacked(tmp_path / "h", {}))


def objects(numbers: list[int], annotations: list[dict], **changes: object) -> bytes:
    content = {
        "images": [
            {"id": k, "file_name": f"images/v1/patch8/objects365_v1_{k:08d}.jpg", "height": 20, "width": 30}
            for k in numbers
        ],
        "annotations": annotations,
        "categories": [
            {"id": 2, "name": "Moniter/TV"},
            {"id": 1, "name": "Other Shoes"},
            {"id": 3, "name": "Bakset"},
        ],
        "licenses": [{}],
    }
    return as_json(content | changes)


BOXES = [
    instance(6, 2, [1, 2, 3, 4], iscrowd=0, isfake=0),
    instance(6, 3, [25.5, 15.5, 10, 10], iscrowd=1),
    instance(6, 3, [5, 5, 0, 3]),
]
OBJECTS = {
    "train/zhiyuan_objv2_train.json": objects([6], BOXES),
    "val/zhiyuan_objv2_val.json": objects([5], []),
    "train/patch8/objects365_v1_00000006.jpg": jpeg(20, 30),
    "val/images/v1/patch8/objects365_v1_00000005.jpg": jpeg(20, 30),
}
OBJECTS_ARCHIVES = {
    "train/zhiyuan_objv2_train.tar.gz": "train/zhiyuan_objv2_train.json",
    "train/patch8.tar.gz": "train/patch8/",
    "val/images/v1/patch8.tar.gz": "val/images/v1/patch8/",
}


def test_objects365(tmp_path):
    for folder in both_forms(tmp_path, OBJECTS, OBJECTS_ARCHIVES):
        data = Objects365(folder)
        assert data.classes.names == (
            ("other shoes",),
            ("monitor", "tv"),
            ("basket",),
        ) and data.classes.ids == (1, 2, 3)
        found = read_all(data, "train")["objects365_v1_00000006"]
        assert names_of(data, found) == ["monitor", "basket"] and found["iscrowd"].tolist() == [False, True]
        assert found["boxes"].tolist() == [[1, 2, 4, 6], [25.5, 15.5, 30, 20]]  # cut at the image's edges
        assert data.notes == ["train: 1 boxes without area were left out"]
        assert list(read_all(data, "val")) == ["objects365_v1_00000005"]


def test_missing_images_of_objects365(tmp_path):
    files = OBJECTS | {"train/zhiyuan_objv2_train.json": objects([6, 7], [])}
    folder = unpacked(tmp_path, files)
    with pytest.raises(
        UserError, match=r"1 of 2 images of train are not in .*_00000007.jpg: --option=missing=skip lea"
    ):
        read_all(Objects365(folder), "train")
    data = Objects365(folder, missing="skip")
    assert list(read_all(data, "train")) == ["objects365_v1_00000006"]
    assert data.notes[0].startswith("1 of 2 images of train are not in ")
    assert data.notes[0].endswith("; they were left out")
    (folder / "train/patch8/objects365_v1_00000006.jpg").unlink()
    with pytest.raises(UserError, match=r"2 of 2 images of train are not in .*"):
        read_all(Objects365(folder, missing="skip"), "train")


def test_faults_of_objects365(tmp_path):
    for name, content, message in (
        ("a", b"\xff", "zhiyuan_objv2_train.json cannot be read"),
        ("b", objects([6], [*BOXES, instance(7, 1, [0, 0, 1, 1])]), "annotation 3, .* is of no listed image"),
        ("f", objects([6], [instance(6, 9, [0, 0, 1, 1])]), "annotation 0, .* is of no listed category"),
        (
            "g",
            objects([6], [], licenses=[{"bbox": [0] * 4, "image_id": 6, "category_id": 1}]),
            "something el",
        ),
        ("h", objects([6], [{"image_id": 6, "category_id": 1}]), "an annotation has no 'bbox'"),
        (
            "c",
            objects([6], [instance(6, 1, [0, 0, 1, 1], bbox=["a", 0, 1, 1])]),
            "'bbox': expected a finite number",
        ),
    ):
        data = Objects365(unpacked(tmp_path / name, OBJECTS | {"train/zhiyuan_objv2_train.json": content}))
        with pytest.raises(UserError, match=message):
            read_all(data, "train")
    for name, categories in (("d", [{"id": 1, "name": " / "}]), ("e", [])):
        files = OBJECTS | {"val/zhiyuan_objv2_val.json": objects([5], [], categories=categories)}
        with pytest.raises(UserError, match=r"the name ' / ' is empty|or there is none"):
            Objects365(unpacked(tmp_path / name, files))

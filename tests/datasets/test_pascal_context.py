"""PASCAL Context in its official layout: 59 classes from the merged JSON, 459 from MATLAB files."""

import io

import numpy as np
import pytest
from scipy.io import savemat

from ovseg_jax.datasets.pascal_context import PascalContext59, PascalContext459, frequent_classes
from ovseg_jax.errors import UserError
from tests.datasets.packing import as_json, both_forms, jpeg, names_of, read_all, unpacked
from tests.datasets.test_regions import encoded

VOC = "VOCdevkit/VOC2010"
IMAGES = {
    f"{VOC}/JPEGImages/2008_000002.jpg": jpeg(2, 4),
    f"{VOC}/JPEGImages/2008_000003.jpg": jpeg(2, 4, 1),
    f"{VOC}/JPEGImages/2008_000009.jpg": jpeg(2, 4, 2),  # in no split of PASCAL Context
    f"{VOC}/ImageSets/Main/train.txt": b"2008_000002\n",
    f"{VOC}/ImageSets/Main/val.txt": b"2008_000003\n",
    f"{VOC}/ImageSets/Main/cow_val.txt": b"2008_000003 -1\n",
}


def mask(*columns: int) -> dict:
    found = np.zeros((2, 4), bool)
    found[:, list(columns)] = True
    return encoded(found)


def merged(*masks: tuple[int, int, object], **changes: object) -> bytes:
    """Masks of (image, category, mask)."""
    content = {
        "images": [
            {
                "file_name": f"2008_00000{k}.jpg",
                "phase": phase,
                "height": 2,
                "width": 4,
                "image_id": 2008000000 + k,
            }
            for k, phase in ((2, "train"), (3, "val"))
        ],
        "annos_segmentation": [
            {"image_id": 2008000000 + k, "category_id": kind, "segmentation": own, "id": n}
            for n, (k, kind, own) in enumerate(masks)
        ],
        "categories": [{"category_id": 2, "name": "aeroplane"}],
    }
    return as_json(content | changes)


# Grass, then sky over half of it, then a class that is none of the 59 over the last column.
MERGED = merged((2, 187, mask(0, 1, 2, 3)), (2, 360, mask(2, 3)), (2, 1, mask(3)), (3, 458, mask(0)))
FILES_59 = IMAGES | {"trainval_merged.json": MERGED}


def test_59_classes(tmp_path):
    for folder in both_forms(tmp_path, FILES_59, {"VOCtrainval_03-May-2010.tar": "VOCdevkit/"}):
        data = PascalContext59(folder)
        found = read_all(data, "train")["2008_000002"]
        assert names_of(data, found) == ["grass", "sky"]
        assert found["segments"].tolist() == [[1, 1, 2, 0]] * 2
        assert found["image"] == IMAGES[f"{VOC}/JPEGImages/2008_000002.jpg"]
        assert names_of(data, read_all(data, "val")["2008_000003"]) == ["wood"] and not data.notes


def test_the_59_classes_have_the_numbers_of_the_459():
    classes, ids = frequent_classes()
    assert len(classes) == len(ids) == 59 and classes.ids == tuple(range(1, 60))
    assert list(ids) == sorted(ids) and ids[2] == 1 and ids[397] == 50 and classes.names[49] == ("table",)
    # The alphabet orders the numbers of the 459, so it must order these.
    assert [names[0] for names in classes.names] == sorted(names[0] for names in classes.names)
    assert sum(classes.isthing) == 37


def test_faults_of_the_59(tmp_path):
    for name, content, message in (
        ("a", b"{", r"trainval_merged.json cannot be read: it is not valid JSON"),
        ("b", b"{}", r"trainval_merged.json cannot be read: it has no 'images'"),
        ("c", merged(images=[{"phase": "train"}]), r"image 0 has no 'file_name'"),
        (
            "d",
            merged((2, 187, mask(0)), annos_segmentation=[{"image_id": 1}]),
            r"annotation 0 has no 'category_id'",
        ),
        (
            "e",
            merged((2, 187, {"size": [2, 4], "counts": "0"})),
            r"the masks of 2008_000002, cannot be read: the runs",
        ),
        (
            "f",
            merged((2, 187, {"size": [4, 2], "counts": "8"})),
            r"the masks of 2008_000002, cannot be read: a mask has",
        ),
    ):
        data = PascalContext59(unpacked(tmp_path / name, IMAGES | {"trainval_merged.json": content}))
        with pytest.raises(UserError, match=message):
            read_all(data, "train")
    left = {name: data for name, data in FILES_59.items() if not name.endswith("2008_000003.jpg")}
    with pytest.raises(UserError, match=r"1 of 1 images of val are not in .*, such as 2008_000003"):
        read_all(PascalContext59(unpacked(tmp_path / "g", left)), "val")


def mat(values: object, **options: object) -> bytes:
    out = io.BytesIO()
    savemat(out, {"LabelMap": np.asarray(values)}, **options)
    return out.getvalue()


LABELS = np.array([[2, 2, 459, 0], [2, 1, 459, 0]], np.uint16)
NAMES = "".join(
    f"{k}: { {1: 'accordion', 2: 'aeroplane', 459: 'wool'}.get(k, f'name {k}') }\n" for k in range(1, 460)
)
FILES_459 = IMAGES | {
    "labels.txt": NAMES.encode(),
    "trainval/2008_000002.mat": mat(LABELS, do_compression=True),
    "trainval/2008_000003.mat": mat(LABELS),
}


def test_459_classes(tmp_path):
    archives = {"VOCtrainval_03-May-2010.tar": "VOCdevkit/", "trainval.tar.gz": "trainval/"}
    for folder in both_forms(tmp_path, FILES_459, archives):
        data = PascalContext459(folder)
        assert len(data.classes) == 459 and data.classes.ids == tuple(range(1, 460))
        for split, key in (("train", "2008_000002"), ("val", "2008_000003")):
            found = read_all(data, split)[key]
            assert names_of(data, found) == ["accordion", "aeroplane", "wool"]
            assert found["segments"].tolist() == [[2, 2, 3, 0], [2, 1, 3, 0]]


def test_faults_of_the_459(tmp_path):
    where = "trainval/2008_000002.mat"
    for name, content, message in (
        ("a", FILES_459[where][:150], r"2008_000002.mat cannot be read"),
        ("b", b"", r"2008_000002.mat cannot be read"),
        ("c", b"\x89HDF\r\n\x1a\n" + bytes(200), r"2008_000002.mat cannot be read"),
        ("d", mat([[460] * 4] * 2), r"2008_000002.mat holds the value 460, which is the id of no class"),
        ("e", mat([[0.5] * 4] * 2), r"'LabelMap' has values that are not whole numbers"),
        ("f", mat([[np.nan] * 4] * 2), r"'LabelMap' has values that are not whole numbers"),
        ("g", mat(np.zeros((2, 4, 2))), r"'LabelMap' is an array of float64 \(2, 4, 2\)"),
        ("h", mat(np.zeros((3, 4))), r"2008_000002.mat is 3 x 4"),
    ):
        data = PascalContext459(unpacked(tmp_path / name, FILES_459 | {where: content}))
        with pytest.raises(UserError, match=message):
            read_all(data, "train")
    for name, content in (("i", b"aeroplane\n"), ("j", b"1: a\n1: b\n"), ("k", b"")):
        with pytest.raises(
            UserError, match=r"labels.txt cannot be read: expected lines such as '2: aeroplane'"
        ):
            PascalContext459(unpacked(tmp_path / name, FILES_459 | {"labels.txt": content}))
    left = {name: data for name, data in FILES_459.items() if name != where}
    with pytest.raises(UserError, match=r"1 of 1 images of train have no label map, such as 2008_000002"):
        read_all(PascalContext459(unpacked(tmp_path / "l", left)), "train")

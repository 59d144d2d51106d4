"""PASCAL VOC 2012 and SBD in their official layouts."""

import io

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from scipy.sparse import csc_matrix

from ovseg_jax.datasets.voc import NAMES, Voc2012
from ovseg_jax.errors import UserError
from tests.datasets.packing import both_forms, jpeg, names_of, png, read_all, unpacked

VOC, SBD = "VOCdevkit/VOC2012", "benchmark_RELEASE/dataset"


def palette(values: object) -> bytes:
    image = Image.fromarray(np.asarray(values, np.uint8))
    image.putpalette([7 * k % 256 for k in range(768)])
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def mat(values: object) -> bytes:
    """A map as SBD stores it: a structure with the map, boundaries of each class and the classes."""
    boundaries = np.empty((20, 1), object)
    boundaries[:] = [[csc_matrix(np.eye(2))]] * 20
    content = {"Segmentation": np.asarray(values), "Boundaries": boundaries, "CategoriesPresent": [[15]]}
    out = io.BytesIO()
    savemat(out, {"GTcls": content}, do_compression=True)
    return out.getvalue()


# SBD has an image of VOC's train, one of its val, and one that VOC only has without a map.
FILES = {
    f"{VOC}/ImageSets/Segmentation/train.txt": b"2007_000032\n",
    f"{VOC}/ImageSets/Segmentation/val.txt": b"2007_000033\n",
    f"{VOC}/ImageSets/Segmentation/trainval.txt": b"2007_000032\n2007_000033\n",
    f"{VOC}/ImageSets/Main/train.txt": b"2008_000009\n",
    f"{VOC}/SegmentationClass/2007_000032.png": palette([[0, 1, 255, 15], [0, 1, 255, 15]]),
    f"{VOC}/SegmentationClass/2007_000033.png": palette([[20] * 4] * 2),
    f"{VOC}/SegmentationObject/2007_000032.png": palette([[0, 1, 255, 2], [0, 1, 255, 2]]),
    **{
        f"{VOC}/JPEGImages/{key}.jpg": jpeg(2, 4, k)
        for k, key in enumerate(("2007_000032", "2007_000033", "2008_000002", "2008_000009"))
    },
    f"{SBD}/train.txt": b"2008_000002\n2007_000032\n",
    f"{SBD}/val.txt": b"2007_000033\n",
    f"{SBD}/cls/2007_000032.mat": mat(np.full((2, 4), 3, np.uint8)),
    f"{SBD}/cls/2007_000033.mat": mat(np.full((2, 4), 3, np.uint8)),
    f"{SBD}/cls/2008_000002.mat": mat(np.array([[0, 20, 20, 0], [0, 5, 5, 0]], np.uint8)),
    f"{SBD}/img/2008_000002.jpg": jpeg(2, 4, 7),
}
ARCHIVES = {"VOCtrainval_11-May-2012.tar": "VOCdevkit/", "benchmark.tgz": "benchmark_RELEASE/"}


def test_voc_and_sbd(tmp_path):
    for folder in both_forms(tmp_path, FILES, ARCHIVES):
        data = Voc2012(folder)
        found = read_all(data, "train")
        assert list(found) == ["2007_000032"] and not data.notes
        first = found["2007_000032"]
        assert names_of(data, first) == ["aeroplane", "person"]
        assert first["segments"].tolist() == [[0, 1, 0, 2]] * 2
        assert first["image"] == FILES[f"{VOC}/JPEGImages/2007_000032.jpg"]
        assert names_of(data, read_all(data, "val")["2007_000033"]) == ["tv monitor"]
        more = read_all(data, "trainaug")
        assert list(more) == ["2007_000032", "2008_000002"]
        np.testing.assert_array_equal(more["2007_000032"]["segments"], first["segments"])
        assert names_of(data, more["2008_000002"]) == ["bottle", "tv monitor"]
        assert more["2008_000002"]["segments"].tolist() == [[0, 2, 2, 0], [0, 1, 1, 0]]
        assert more["2008_000002"]["image"] == FILES[f"{VOC}/JPEGImages/2008_000002.jpg"]


AUGMENTED = {
    "SegmentationClassAug/2007_000032.png": png([[0, 2, 255, 15]] * 2),
    "SegmentationClassAug/2007_000033.png": png([[0, 0, 255, 255]] * 2),
    "SegmentationClassAug/2008_000002.png": png([[5, 5, 0, 0]] * 2),
    "__MACOSX/SegmentationClassAug/._2007_000032.png": b"",
}


def test_augmented_maps(tmp_path):
    archives = {
        "VOCtrainval_11-May-2012.tar": "VOCdevkit/",
        "SegmentationClassAug.zip": "SegmentationClassAug/",
    }
    files = {name: data for name, data in FILES.items() if not name.startswith("benchmark")} | AUGMENTED
    for folder in both_forms(tmp_path, files, archives):
        data = Voc2012(folder, maps="augmented")
        found = read_all(data, "trainaug")
        assert {key: names_of(data, own) for key, own in found.items()} == {
            "2007_000032": ["bicycle", "person"],
            "2008_000002": ["bottle"],
        }
        assert found["2007_000032"]["segments"].tolist() == [[0, 1, 0, 2]] * 2 and not data.notes
        assert not read_all(data, "val")
        assert data.notes == ["val: 1 images without a labelled pixel were left out, such as 2007_000033"]
        with_background = Voc2012(folder, maps="augmented", background="class")
        assert names_of(with_background, read_all(with_background, "val")["2007_000033"]) == ["background"]
    with pytest.raises(
        UserError, match=r"holds no folder VOC2012/SegmentationClassAug or Seg.*Aug.zip from http"
    ):
        read_all(Voc2012(unpacked(tmp_path / "own", FILES), maps="augmented"), "val")


def test_background_is_void_or_a_class(tmp_path):
    data = Voc2012(unpacked(tmp_path, FILES), background="class")
    assert len(data.classes) == 21 and data.classes.ids == tuple(range(21)) and not data.classes.isthing[0]
    found = read_all(data, "train")["2007_000032"]
    assert names_of(data, found) == ["background", "aeroplane", "person"]
    assert found["segments"].tolist() == [[1, 2, 0, 3]] * 2  # the border stays void
    assert Voc2012(tmp_path).classes.ids == tuple(range(1, 21))


def test_the_split_of_zero_shot(tmp_path):
    for background, count in (("void", 15), ("class", 16)):
        classes = Voc2012(unpacked(tmp_path, FILES), zero_shot="yes", background=background).classes
        unseen = [classes.display(k) for k in classes.withheld()]
        assert unseen == ["potted plant", "sheep", "sofa", "train", "tv monitor"]
        assert len(classes.groups["seen"]) == count
    assert len(NAMES) == 20 and sorted(NAMES) == NAMES


def test_faults_of_voc(tmp_path):
    mask, sbd = f"{VOC}/SegmentationClass/2007_000032.png", f"{SBD}/cls/2008_000002.mat"
    for k, (name, content, message) in enumerate(
        (
            (mask, png([[21] * 4] * 2), "2007_000032.png holds the value 21, which is the id of no class"),
            (mask, palette([[0] * 4]), "2007_000032.png is 1 x 4"),
            (mask, b"", "2007_000032.png cannot be read"),
            (sbd, FILES[sbd][:200], "2008_000002.mat cannot be read"),
            (sbd, mat(np.full((2, 4), 21)), "2008_000002.mat holds the value 21"),
            (sbd, mat(np.full((2, 4), -1.5)), "'Segmentation' has values that are not whole numbers"),
            (sbd, mat(np.zeros((2, 4, 2))), r"'Segmentation' is an array of float64 \(2, 4, 2\)"),
            (sbd, mat(np.zeros((3, 4))), "2008_000002.mat is 3 x 4"),
            (f"{VOC}/JPEGImages/2008_000002.jpg", b"x", "2008_000002.jpg cannot be read"),
            (f"{SBD}/val.txt", b"\xff", "val.txt cannot be read: it is not UTF-8"),
            (f"{SBD}/val.txt", b"2009_1\n", "1 of 3 images of trainaug are not in .*, such as 2009_1"),
        )
    ):
        with pytest.raises(UserError, match=message):
            read_all(Voc2012(unpacked(tmp_path / str(k), FILES | {name: content})), "trainaug")
    out = io.BytesIO()
    savemat(out, {"GTinst": 1})
    with pytest.raises(UserError, match=r"2008_000002.mat cannot be read: it has no 'GTcls'"):
        read_all(Voc2012(unpacked(tmp_path / "inst", FILES | {sbd: out.getvalue()})), "trainaug")
    for k, name in enumerate((mask, sbd)):
        left = {own: content for own, content in FILES.items() if own != name}
        with pytest.raises(
            UserError, match=r"1 of 2 images of trainaug have no map, such as 200\d_00000?3?2"
        ):
            read_all(Voc2012(unpacked(tmp_path / f"left{k}", left)), "trainaug")
    alone = {name: content for name, content in FILES.items() if not name.startswith("benchmark")}
    data = Voc2012(unpacked(tmp_path / "alone", alone))
    assert len(read_all(data, "train")) == 1
    with pytest.raises(
        UserError,
        match=r"holds no VOC2012/dataset/train.txt or dataset/train.txt, .*benchmark.tgz",
    ):
        read_all(data, "trainaug")

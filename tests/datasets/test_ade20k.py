"""ADE20K in its official layout: 150 classes in three forms, and the full data set with 847."""

import io
import pickle

import numpy as np
import pytest
from PIL import Image

from ovseg_jax.datasets import ade20k
from ovseg_jax.datasets.ade20k import THINGS, Ade20k150, Ade20kFull, full_ids, resize_linear, resize_nearest
from ovseg_jax.errors import UserError
from tests.datasets.packing import both_forms, jpeg, names_of, png, read_all, unpacked

SPACED = (22, 24, 25, 26, 27)  # a space before the tab, as published
INFO = "Idx\tRatio\tTrain\tVal\tName\n" + "".join(
    f"{k}{' ' * (k in SPACED)}\t0.1\t1\t1\t{ {1: 'wall', 13: 'person, individual', 3: 'sky'}.get(k, f'class {k}') }\n"
    for k in range(1, 151)
)
# Rows: sky, sky, person 1 and 2; the instance map has a person over the sky and misses another.
SEMANTIC = [[3, 3, 13, 13], [1, 1, 13, 0]]
CLASSES = [[0, 0, 4, 4], [0, 4, 0, 0]]  # 4 = person of the instance annotations
INSTANCES = [[0, 0, 1, 1], [0, 7, 0, 0]]
BENCH = {
    "ADEChallengeData2016/objectInfo150.txt": INFO.encode(),
    "ADEChallengeData2016/sceneCategories.txt": b"ADE_train_00000001 airport_terminal\n",
    "ADEChallengeData2016/images/training/ADE_train_00000001.jpg": jpeg(2, 4),
    "ADEChallengeData2016/images/validation/ADE_val_00000001.jpg": jpeg(2, 4, 1),
    "ADEChallengeData2016/annotations/training/ADE_train_00000001.png": png(SEMANTIC),
    "ADEChallengeData2016/annotations/validation/ADE_val_00000001.png": png(SEMANTIC),
    "annotations_instance/training/ADE_train_00000001.png": png(
        np.stack([CLASSES, INSTANCES, INSTANCES], -1) * [1, 1, 0]
    ),
    "annotations_instance/validation/ADE_val_00000001.png": png(np.zeros((2, 4, 3))),
}
ARCHIVES = {
    "ADEChallengeData2016.zip": "ADEChallengeData2016/",
    "annotations_instance.tar": "annotations_instance/",
}


def test_semantic(tmp_path):
    for folder in both_forms(tmp_path, BENCH, ARCHIVES):
        data = Ade20k150(folder)
        assert len(data.classes) == 150 and data.classes.names[12] == ("person", "individual")
        assert sum(data.classes.isthing) == 100 and not data.classes.isthing[0]
        found = read_all(data, "train")["ADE_train_00000001"]
        assert found["image"] == BENCH["ADEChallengeData2016/images/training/ADE_train_00000001.jpg"]
        assert names_of(data, found) == ["wall", "sky", "person"]
        assert found["segments"].tolist() == [[2, 2, 3, 3], [1, 1, 3, 0]]
        assert list(read_all(data, "val")) == ["ADE_val_00000001"] and not data.notes


def test_panoptic_lays_instances_over_stuff(tmp_path):
    for folder in both_forms(tmp_path, BENCH, ARCHIVES):
        data = Ade20k150(folder, kind="panoptic")
        found = read_all(data, "train")["ADE_train_00000001"]
        assert names_of(data, found) == ["wall", "sky", "person", "person"]
        # The person of the semantic map that no instance covers is void, as in the official preparation.
        assert found["segments"].tolist() == [[2, 2, 3, 3], [1, 4, 0, 0]]
        nothing = read_all(data, "val")["ADE_val_00000001"]
        assert names_of(data, nothing) == ["wall", "sky"] and nothing["segments"].max() == 2


def test_stuff_below_instances_is_left_out(tmp_path):
    files = BENCH | {
        "annotations_instance/validation/ADE_val_00000001.png": png(np.tile([4, 1, 0], (2, 4, 1)))
    }
    data = Ade20k150(unpacked(tmp_path, files), kind="panoptic")
    found = read_all(data, "val")["ADE_val_00000001"]
    assert names_of(data, found) == ["person"] and (found["segments"] == 1).all()


def test_instances(tmp_path):
    for folder in both_forms(tmp_path, BENCH, ARCHIVES):
        data = Ade20k150(folder, kind="instances")
        assert data.classes.ids == THINGS and all(data.classes.isthing)
        found = read_all(data, "train")["ADE_train_00000001"]
        assert names_of(data, found) == ["person", "person"]
        assert found["segments"].tolist() == [[0, 0, 1, 1], [0, 2, 0, 0]]


def test_faults_of_the_benchmark(tmp_path):
    def without(*names):
        return {name: data for name, data in BENCH.items() if not name.endswith(names)}

    with pytest.raises(
        UserError, match=r"ade20k_150: .* holds no objectInfo150.txt, packed or unpacked; the download "
    ):
        Ade20k150(unpacked(tmp_path / "a", without("objectInfo150.txt")))
    with pytest.raises(UserError, match="expected a table of 150 classes"):
        Ade20k150(
            unpacked(
                tmp_path / "b", BENCH | {"ADEChallengeData2016/objectInfo150.txt": b"1\t0.1\t1\t1\twall\n"}
            )
        )
    semantic = Ade20k150(unpacked(tmp_path / "c", without("annotations/training/ADE_train_00000001.png")))
    with pytest.raises(UserError, match=r"no folder annotations/training with .png files"):
        list(semantic.entries("train"))
    more = {"ADEChallengeData2016/images/training/ADE_train_00000002.jpg": jpeg(2, 4)}
    with pytest.raises(
        UserError, match=r"1 of 2 images of train have no mask, such as .*ADE_train_00000002.jpg"
    ):
        list(Ade20k150(unpacked(tmp_path / "d", BENCH | more)).entries("train"))
    surplus = {"ADEChallengeData2016/annotations/training/ADE_train_00000009.png": png(SEMANTIC)}
    data = Ade20k150(unpacked(tmp_path / "e", BENCH | surplus))
    assert len(read_all(data, "train")) == 1
    assert data.notes == [
        "train: 1 masks without an image were left out, such as "
        "ADEChallengeData2016/annotations/training/ADE_train_00000009.png"
    ]
    mask = "ADEChallengeData2016/annotations/training/ADE_train_00000001.png"
    for name, content, message in (
        (
            "f",
            png([[151] * 4] * 2),
            r"ADE_train_00000001.png holds the value 151, which is the id of no class",
        ),
        ("g", png(np.ones((4, 4))), r"ADE_train_00000001.png is 4 x 4"),
        ("h", BENCH[mask][:-20], r"the mask .*ADE_train_00000001.png cannot be read"),
    ):
        data = Ade20k150(unpacked(tmp_path / name, BENCH | {mask: content}))
        with pytest.raises(UserError, match=message):
            read_all(data, "train")
    both = {"annotations_instance/training/ADE_train_00000001.png": png([[[4, 1, 0], [5, 1, 0]] * 2] * 2)}
    data = Ade20k150(unpacked(tmp_path / "i", BENCH | both), kind="panoptic")
    with pytest.raises(UserError, match=r"instance 1 has the classes \[4, 5\], but needs one of 1..100"):
        read_all(data, "train")
    with pytest.raises(UserError, match="has no split 'test'"):
        list(data.entries("test"))


def object_names() -> list[str]:
    names = [f"thing {k}" for k in range(1, 3200)]
    for k, name in {2978: "wall", 312: "building, edifice", 2420: "sky"}.items():
        names[k - 1] = name
    return names


def index(names: list[str], **changes: object) -> bytes:
    folder = "ADE20K_2021_17_01/images/ADE/{}/urban/street"
    content = {
        "filename": ["ADE_train_00000001.jpg", "ADE_val_00000002.jpg"],
        "folder": [folder.format("training"), folder.format("validation")],
        "objectnames": names,
        "objectPresence": np.zeros((3, 2)),
    }
    return pickle.dumps(content | changes)


def seg(labels: np.ndarray) -> bytes:
    labels = np.asarray(labels)
    return png(np.stack([labels // 256 * 10, labels % 256, np.zeros_like(labels)], -1))


LABELS = np.array([[2978, 2978, 312], [0, 2, 2420]])  # 2 is none of the 847 classes.
FULL = {
    "ADE20K_2021_17_01/index_ade20k.pkl": index(object_names()),
    "ADE20K_2021_17_01/images/ADE/training/urban/street/ADE_train_00000001.jpg": jpeg(2, 3),
    "ADE20K_2021_17_01/images/ADE/training/urban/street/ADE_train_00000001_seg.png": seg(LABELS),
    "ADE20K_2021_17_01/images/ADE/training/urban/street/ADE_train_00000001/instance_000_ADE_train_00000001.png": b"",
    "ADE20K_2021_17_01/images/ADE/training/urban/street/ADE_train_00000001.json": b"{}",
    "ADE20K_2021_17_01/images/ADE/validation/urban/street/ADE_val_00000002.jpg": jpeg(600, 700),
    "ADE20K_2021_17_01/images/ADE/validation/urban/street/ADE_val_00000002_seg.png": seg(
        np.repeat([[2978, 312]], 600, 0).repeat(350, 1)
    ),
}
SEG = "ADE20K_2021_17_01/images/ADE/training/urban/street/ADE_train_00000001_seg.png"


def test_the_full_data_set(tmp_path):
    for folder in both_forms(tmp_path, FULL, {"someone_1a2b3c.zip": "ADE20K_2021_17_01/"}):
        data = Ade20kFull(folder)
        assert len(data.classes) == 847 and data.classes.ids == tuple(range(1, 848))
        assert data.classes.names[:3] == (("wall",), ("building", "edifice"), ("sky",))
        found = read_all(data, "train")["ADE_train_00000001"]
        assert names_of(data, found) == ["wall", "building", "sky"]
        assert found["segments"].tolist() == [[1, 1, 2], [0, 0, 3]]
        assert (
            found["image"]
            == FULL["ADE20K_2021_17_01/images/ADE/training/urban/street/ADE_train_00000001.jpg"]
        )
        large = read_all(data, "val")["ADE_val_00000002"]
        with Image.open(io.BytesIO(large["image"])) as image:
            assert image.size == (597, 512) and image.format == "JPEG"  # 700 / 600 * 512 = 597.3
        assert (
            large["segments"].shape == (512, 597) and large["segments"][0].tolist() == [1] * 299 + [2] * 298
        )


def test_the_847_numbers_are_those_of_the_release():
    numbers = full_ids()
    assert len(set(numbers)) == 847 and numbers[:5] == (2978, 312, 2420, 2855, 2131) and numbers[-1] == 3148


def test_names_may_count_from_zero(tmp_path):
    data = Ade20kFull(
        unpacked(tmp_path, FULL | {"ADE20K_2021_17_01/index_ade20k.pkl": index(["-", *object_names()])})
    )
    assert data.classes.names[1] == ("building", "edifice")


class Program:
    def __reduce__(self):
        return (print, ("a pickle ran a program",))


def test_faults_of_the_full_data_set(tmp_path, capsys):
    where = "ADE20K_2021_17_01/index_ade20k.pkl"
    for name, content, message in (
        ("a", index(["wall"] * 3200), "lists other objects than release 2021_17_01"),
        ("b", FULL[where][:60], r"index_ade20k.pkl cannot be read"),
        (
            "c",
            pickle.dumps({"filename": Program()}),
            r"it holds builtins.print, which is neither an array nor a plain",
        ),
        ("d", index(object_names(), folder=["a"]), "'filename' and 'folder' differ in length"),
        ("e", index(object_names(), filename=[1, 2]), "'filename' does not only hold texts"),
    ):
        with pytest.raises(UserError, match=message):
            Ade20kFull(unpacked(tmp_path / name, FULL | {where: content}))
    assert not capsys.readouterr().out
    left = {name: data for name, data in FULL.items() if not name.endswith("ADE_train_00000001.jpg")}
    with pytest.raises(UserError, match=r"1 of 1 images of train are not in .*, such as .*_00000001.jpg"):
        read_all(Ade20kFull(unpacked(tmp_path / "f", left)), "train")
    left = {name: data for name, data in FULL.items() if name != SEG}
    with pytest.raises(UserError, match=r"1 of 1 images of train have no mask"):
        read_all(Ade20kFull(unpacked(tmp_path / "g", left)), "train")


@pytest.mark.parametrize("protocol", [2, 3, 5])
def test_an_index_of_arrays_is_read(tmp_path, protocol):
    arrays = pickle.loads(index(np.array(object_names()), folder=["x/images"]))
    arrays["filename"] = np.array(["ADE_val_00000002.jpg"], object)
    arrays = pickle.dumps(arrays, protocol)
    assert (
        len(Ade20kFull(unpacked(tmp_path, FULL | {"ADE20K_2021_17_01/index_ade20k.pkl": arrays})).classes)
        == 847
    )


@pytest.mark.parametrize("size", [(7, 5), (3, 11), (10, 10)])
def test_resizing_is_that_of_opencv(size):
    """OpenCV's rules in float64: pixel centres at halves, edges repeated, no average; the nearest rounds down."""
    image = np.random.default_rng(0).integers(0, 255, (9, 13, 3)).astype(np.uint8)
    expected = np.zeros((*size, 3))
    for y in range(size[0]):
        for x in range(size[1]):
            v, u = (y + 0.5) * 9 / size[0] - 0.5, (x + 0.5) * 13 / size[1] - 0.5
            for row in range(9):
                for column in range(13):
                    near = max(0, 1 - abs(min(max(v, 0), 8) - row)) * max(
                        0, 1 - abs(min(max(u, 0), 12) - column)
                    )
                    expected[y, x] += near * image[row, column].astype(np.float64)
    assert np.abs(resize_linear(image, *size) - expected).max() <= 0.501
    nearest = [
        [image[int(y * 9 / size[0]), int(x * 13 / size[1]), 0] for x in range(size[1])]
        for y in range(size[0])
    ]
    assert resize_nearest(image[..., 0], *size).tolist() == nearest
    assert ade20k._resized(600, 700) == (512, 597) and ade20k._resized(900, 600) == (768, 512)

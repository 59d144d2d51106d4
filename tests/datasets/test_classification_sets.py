"""Classification sets in their official layouts, held to torchvision's readers of the same files where it has one."""

import csv
import functools
import gzip
import io
import json
import math
import struct
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from ovseg_jax.data.images import Encoded, read_image
from ovseg_jax.datasets.base import Dataset
from ovseg_jax.datasets.registry import DATASETS, find_dataset
from ovseg_jax.errors import UserError
from ovseg_jax.experiment.scores import CROSS_DATASET, CROSS_DOMAIN, UMG_CLIP
from tests.datasets.packing import Files, both_forms, jpeg, png, read_all, unpacked
from tests.extras import require

RNG = np.random.default_rng(0)


def lines_of(package_file: str) -> list[tuple[str, str]]:
    path = Path(find_dataset("gtsrb").__module__.replace(".", "/")).parent / package_file
    lines = (Path(__file__).parents[2] / path).read_text("utf-8").splitlines()
    return [tuple(line.split(" ", 1)) for line in lines if line[0] != "#"]


COUNTRIES = [code for code, _ in lines_of("country211.txt")]
SIGNS = [folder for folder, _ in lines_of("gtsrb.txt")]
ONE, PPM = jpeg(3, 4), io.BytesIO()
Image.fromarray(RNG.integers(0, 255, (3, 4, 3), dtype=np.uint8)).save(PPM, "PPM")


def country211() -> Files:
    folders = {"train": 0, "valid": 1, "test": 2}
    return {
        f"country211/{folder}/{code}/{k}{code.lower()}.jpg": jpeg(2, 3, k)
        for folder, k in folders.items()
        for code in COUNTRIES
    }


def rendered_sst2() -> Files:
    return {
        f"rendered-sst2/{folder}/{kind}/{k}.png": png(np.full((4, 5), 9 * k))
        for folder in ("train", "valid", "test")
        for kind, k in (("negative", 1), ("positive", 2), ("positive", 3))
    }


def resisc45() -> Files:
    folders = [name.replace(" ", "_") for name in find_dataset("resisc45").class_folders(None).values()]
    return {f"NWPU-RESISC45/{own}/{own}_00{k}.jpg": jpeg(2, 2, k) for own in folders for k in (1, 2)}


def objectnet() -> Files:
    labels = {"air_freshener": "Air freshener", "alarm_clock": "Alarm clock", "t-shirt": "T-shirt"}
    shared = {"T-shirt": "jersey, T-shirt, tee shirt", "Alarm clock": "analog clock; digital clock"}
    return {
        "objectnet-1.0/mappings/folder_to_objectnet_label.json": json.dumps(labels).encode(),
        "objectnet-1.0/mappings/objectnet_to_imagenet_1k.json": json.dumps(shared).encode(),
        **{f"objectnet-1.0/images/{own}/{k}d.png": png(np.full((5, 5), k)) for own in labels for k in (1, 2)},
    }


def fgvc_aircraft() -> Files:
    data = "fgvc-aircraft-2013b/data"
    return {
        f"{data}/variants.txt": b"707-320\n727-200\nF/A-18\nModel B200\n",
        f"{data}/families.txt": b"Boeing 707\n",
        f"{data}/images_variant_train.txt": b"0000001 707-320\n",
        f"{data}/images_variant_val.txt": b"0000002 F/A-18\n",
        f"{data}/images_variant_test.txt": b"0000004 Model B200\n0000003 727-200\n",
        **{f"{data}/images/000000{k}.jpg": jpeg(4, 6, k) for k in range(1, 6)},  # of which one is in no list
    }


def gtsrb() -> Files:
    table = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\r\n"
    table += "00000.ppm;53;54;6;5;48;49;16\r\n00001.ppm;42;45;5;5;36;40;1\r\n"
    return {
        **{f"GTSRB/Training/{own}/00000_0000{k}.ppm": PPM.getvalue() for own in SIGNS for k in (0, 1)},
        **{f"GTSRB/Training/{own}/GT-{own}.csv": b"Filename;Width\r\n" for own in SIGNS},
        **{f"GTSRB/Final_Test/Images/0000{k}.ppm": PPM.getvalue() for k in (0, 1)},
        "GTSRB/Final_Test/Images/GT-final_test.test.csv": b"Filename;Width\r\n",
        "GT-final_test.csv": table.encode(),
    }


def voc_xml(*objects: tuple[str, int, int, int, int]) -> bytes:
    found = "".join(
        f"<object><name>{name}</name><difficult>1</difficult><bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax>"
        f"<ymax>{y1}</ymax></bndbox><part><name>head</name><bndbox><xmin>1</xmin></bndbox></part></object>"
        for name, x0, y0, x1, y1 in objects
    )
    return f"<annotation><folder>VOC2007</folder>{found}</annotation>".encode()


def voc2007() -> Files:
    sets = {"train": 1, "val": 2, "test": 3}
    top = "VOCdevkit/VOC2007"
    return {
        **{f"{top}/ImageSets/Main/{split}.txt": f"00000{k}\n".encode() for split, k in sets.items()},
        **{f"{top}/ImageSets/Main/dog_{split}.txt": f"00000{k}  1\n".encode() for split, k in sets.items()},
        **{f"{top}/JPEGImages/00000{k}.jpg": jpeg(20, 30, k) for k in sets.values()},
        f"{top}/Annotations/000001.xml": voc_xml(("aeroplane", 1, 1, 30, 20)),
        f"{top}/Annotations/000002.xml": voc_xml(("dog", 5, 6, 7, 8)),
        f"{top}/Annotations/000003.xml": voc_xml(("tvmonitor", 2, 3, 21, 17), ("person", 8, 1, 30, 20)),
    }


def pixels(count: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(math.prod(shape)).integers(0, 256, (count, *shape), dtype=np.uint8)


def cifar(labels: np.ndarray, images: np.ndarray) -> bytes:
    """Labels [N L] and images [N 32 32 3] as one file."""
    return np.hstack(
        [labels.astype(np.uint8), images.transpose(0, 3, 1, 2).reshape(len(labels), -1)]
    ).tobytes()


def cifar10() -> Files:
    images, names = pixels(12, 32, 32, 3), "airplane automobile bird cat deer dog frog horse ship truck"
    batches = [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]
    return {
        "cifar-10-batches-bin/batches.meta.txt": ("\n".join(names.split()) + "\n\n").encode(),
        "cifar-10-batches-bin/readme.html": b"<html>",
        **{
            f"cifar-10-batches-bin/{name}.bin": cifar(np.array([[k], [9 - k]]), images[2 * k : 2 * k + 2])
            for k, name in enumerate(batches)
        },
    }


def cifar100() -> Files:
    names = [f"thing_{k}" for k in range(100)]
    return {
        "cifar-100-binary/fine_label_names.txt": ("\n".join(names) + "\n").encode(),
        "cifar-100-binary/coarse_label_names.txt": b"fish\n",
        "cifar-100-binary/train.bin": cifar(np.array([[11, 19], [0, 99]]), pixels(2, 32, 32, 3)),
        "cifar-100-binary/test.bin": cifar(np.array([[7, 49]]), pixels(1, 32, 32, 3)),
    }


def stl10() -> Files:
    found = {"stl10_binary/class_names.txt": "\n".join(STL).encode(), "stl10_binary/unlabeled_X.bin": b"x"}
    for split, labels in (("train", [1, 10]), ("test", [3])):
        images = pixels(len(labels), 96, 96, 3)
        found[f"stl10_binary/{split}_X.bin"] = images.transpose(0, 3, 2, 1).tobytes()
        found[f"stl10_binary/{split}_y.bin"] = bytes(labels)
    return found


STL = "airplane bird car cat deer dog horse monkey ship truck".split()


def mnist() -> Files:
    found = {}
    for part, labels in (("train", [5, 0, 4]), ("t10k", [7, 2])):
        count = len(labels)
        images = struct.pack(">IIII", 2051, count, 28, 28) + pixels(count, 28, 28).tobytes()
        found[f"{part}-images-idx3-ubyte.gz"] = gzip.compress(images)
        found[f"{part}-labels-idx1-ubyte.gz"] = gzip.compress(struct.pack(">II", 2049, count) + bytes(labels))
    return found


def fer2013(file: str = "fer2013/fer2013.csv") -> Files:
    usages = ("Training", "Training", "PublicTest", "PrivateTest", "PrivateTest")
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    columns = ["emotion", "pixels", "Usage"] if "fer2013" in file else ["emotion", " Usage", " pixels"]
    writer.writerow(columns)
    for k, (usage, image) in enumerate(zip(usages, pixels(5, 48, 48), strict=True)):
        row = {"emotion": k + 1, "Usage": usage, "pixels": " ".join(map(str, image.ravel()))}
        writer.writerow([row[column.strip()] for column in columns])
    return {file: out.getvalue().encode()}


def svhn() -> Files:
    found = {}
    for split, labels in (("train", [1, 10, 9]), ("test", [10, 3])):
        out = io.BytesIO()
        images = pixels(len(labels), 32, 32, 3).transpose(1, 2, 3, 0)
        savemat(out, {"X": images, "y": np.array(labels, np.uint8)[:, None]}, do_compression=True)
        found[f"{split}_32x32.mat"] = out.getvalue()
    return found


def pcam() -> Files:
    h5py = require("h5py")
    found = {}
    for part, labels in (("train", [0, 1]), ("valid", [1]), ("test", [1, 0, 1])):
        contents = {"x": pixels(len(labels), 96, 96, 3), "y": np.array(labels, np.uint8).reshape(-1, 1, 1, 1)}
        for key, content in contents.items():
            out = io.BytesIO()
            with h5py.File(out, "w") as file:
                file.create_dataset(key, data=content, chunks=(1, *content.shape[1:]), compression="gzip")
            found[f"camelyonpatch_level_2_split_{part}_{key}.h5.gz"] = gzip.compress(out.getvalue())
    return found


WNIDS = [f"n{k:08d}" for k in range(1440764, 1440764 + 1000)]
CLASSNAMES = "".join(f"{wnid} class {k} (a, b)\n" for k, wnid in enumerate(WNIDS)).encode()


def wordnet(folder: str, wnids: list[str], suffix: str) -> Files:
    return {f"{folder}/{wnid}/{wnid}_1{suffix}": ONE for wnid in wnids} | {"classnames.txt": CLASSNAMES}


MAKERS = {
    "cifar10": (cifar10, {"cifar-10-binary.tar.gz": "cifar-10-batches-bin/"}),
    "cifar100": (cifar100, {"cifar-100-binary.tar.gz": "cifar-100-binary/"}),
    "country211": (country211, {"country211.tgz": "country211/"}),
    "fer2013": (fer2013, {"fer2013.tar.gz": "fer2013/"}),
    "fgvc_aircraft": (fgvc_aircraft, {"fgvc-aircraft-2013b.tar.gz": "fgvc-aircraft-2013b/"}),
    "gtsrb": (
        gtsrb,
        {
            "GTSRB-Training_fixed.zip": "GTSRB/Training/",
            "GTSRB_Final_Test_Images.zip": "GTSRB/Final_Test/",
            "GTSRB_Final_Test_GT.zip": "GT-final_test.csv",
        },
    ),
    "imagenet_a": (lambda: wordnet("imagenet-a", WNIDS[::5], ".jpg"), {"imagenet-a.tar": "imagenet-a/"}),
    "imagenet_r": (lambda: wordnet("imagenet-r", WNIDS[:200], ".jpg"), {"imagenet-r.tar": "imagenet-r/"}),
    "imagenet_sketch": (lambda: wordnet("sketch", WNIDS, ".JPEG"), {"ImageNet-Sketch.zip": "sketch/"}),
    "imagenet_v2": (
        lambda: (
            {f"imagenetv2-matched-frequency-format-val/{k}/{k:03d}abc.jpeg": ONE for k in range(1000)}
            | {"classnames.txt": CLASSNAMES}
        ),
        {"imagenetv2-matched-frequency.tar.gz": "imagenetv2-matched-frequency-format-val/"},
    ),
    "mnist": (mnist, {}),
    "objectnet": (objectnet, {}),
    "pcam": (pcam, {}),
    "rendered_sst2": (rendered_sst2, {"rendered-sst2.tgz": "rendered-sst2/"}),
    "resisc45": (resisc45, {"NWPU-RESISC45.zip": "NWPU-RESISC45/"}),
    "stl10": (stl10, {"stl10_binary.tar.gz": "stl10_binary/"}),
    "svhn": (svhn, {}),
    "voc2007": (voc2007, {"VOCtrainval-2007.tar": "VOCdevkit/"}),
}
"""The files of each set, and what of them its official archives hold."""
FILES = {name: functools.cache(make) for name, (make, _) in MAKERS.items()}


def read(folder: Path, name: str, split: str, **options: str) -> list[tuple[np.ndarray, int]]:
    data = find_dataset(name)(folder, **options)
    examples = read_all(data, split).values()
    return [(read_image(Encoded("", own["image"])), own["label"]) for own in examples]


def counts(data: Dataset) -> dict[str, int]:
    return {split: len(list(data.entries(split))) for split in data.splits}


def test_the_suites_have_a_reader_for_each_set():
    """Those of CoOp's splits are read by `coop`, under the names of their split files."""
    coop = {"caltech101", "dtd", "eurosat", "sun397"}
    assert set(UMG_CLIP) - DATASETS.keys() == coop
    assert set(CROSS_DATASET) - DATASETS.keys() - coop == {
        *("oxford_pets", "stanford_cars", "flowers102", "food101", "ucf101")
    }
    assert set(CROSS_DOMAIN) <= DATASETS.keys()


@pytest.mark.parametrize("name", MAKERS)
def test_both_forms_of_a_download_are_the_same(name, tmp_path):
    archives = MAKERS[name][1]
    files = FILES[name]()
    first = None
    for folder in both_forms(tmp_path, files, archives):
        data = find_dataset(name)(folder)
        found = {split: read_all(data, split) for split in data.splits}
        assert all(found.values()) and (first is None or first == found)
        first = first or found


SPLITS = {"train": "train", "val": "valid", "test": "test"}


def torchvision_pairs(datasets: ModuleType, name: str, root: Path, split: str) -> list[tuple[Any, int]]:
    """What torchvision reads of the same files."""
    train = split == "train"
    made = {
        "country211": lambda: datasets.Country211(root, SPLITS[split]),
        "fer2013": lambda: datasets.FER2013(root, split),
        "fgvc_aircraft": lambda: datasets.FGVCAircraft(root, split, "variant"),
        "gtsrb": lambda: datasets.GTSRB(root, split),
        "mnist": lambda: datasets.MNIST(root, train),
        "pcam": lambda: datasets.PCAM(root, split),
        "rendered_sst2": lambda: datasets.RenderedSST2(root, split),
        "stl10": lambda: datasets.STL10(root, split),
        "svhn": lambda: datasets.SVHN(root, split),
    }[name]()
    return [made[k] for k in range(len(made))]


# The folder that torchvision looks for below its root.
ROOTS = {"gtsrb": "gtsrb", "mnist": "MNIST/raw", "pcam": "pcam"}
IN_TORCHVISION = "country211 fer2013 fgvc_aircraft gtsrb mnist pcam rendered_sst2 stl10 svhn".split()


@pytest.mark.parametrize("name", IN_TORCHVISION)
def test_torchvision_reads_the_same(name, tmp_path, monkeypatch):
    datasets = require("torchvision.datasets")
    for module in ("fer2013", "stl10", "svhn", "mnist"):  # the files are not those of the checksums
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda *args, **options: True)
    plain = {
        file.removesuffix(".gz"): gzip.decompress(data) if file.endswith(".gz") else data
        for file, data in FILES[name]().items()
    }
    folder = unpacked(tmp_path / ROOTS.get(name, ""), plain)
    for split in find_dataset(name).splits:
        if (name, split) == ("fer2013", "val"):
            continue
        theirs = torchvision_pairs(datasets, name, tmp_path, split)
        ours = read(folder, name, split)
        assert len(ours) == len(theirs) > 0
        pairs = [(np.asarray(image.convert("RGB")), int(label)) for image, label in theirs]
        key = lambda pair: (pair[1], pair[0].tobytes())
        for (mine, label), (other, expected) in zip(
            sorted(ours, key=key), sorted(pairs, key=key), strict=True
        ):
            assert label == expected
            np.testing.assert_array_equal(mine, other)


def test_cifar_is_in_the_order_of_its_files(tmp_path):
    """torchvision reads the pickles, which are another download."""
    folder = unpacked(tmp_path, FILES["cifar10"]() | FILES["cifar100"]())
    images = pixels(12, 32, 32, 3)
    train, test = read(folder, "cifar10", "train"), read(folder, "cifar10", "test")
    assert [label for _, label in train] == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5]
    np.testing.assert_array_equal([image for image, _ in train + test], images)
    data = find_dataset("cifar10")(folder)
    assert data.classes.display(1) == "automobile" and len(data.classes) == 10
    hundred = find_dataset("cifar100")(folder)
    assert [label for _, label in read(folder, "cifar100", "train")] == [19, 99]
    np.testing.assert_array_equal(read(folder, "cifar100", "test")[0][0], pixels(1, 32, 32, 3)[0])
    assert hundred.classes.display(19) == "thing 19" and hundred.about != data.about


def test_names_of_classes():
    names = lambda name: [own[0] for own in find_dataset(name).classes.names]
    assert names("mnist") == list("0123456789") and names("svhn")[0] == "zero"
    assert find_dataset("fer2013").classes.names[5] == ("surprised", "shocked", "spooked")
    assert len(COUNTRIES) == 211 and sorted(COUNTRIES) == COUNTRIES
    assert dict(lines_of("country211.txt"))["BQ"] == "Bonaire, Saint Eustatius and Saba"
    assert [f"{k:05d}" for k in range(43)] == SIGNS and lines_of("gtsrb.txt")[14][1] == "stop"


def test_folders_of_other_classes_are_counted(tmp_path):
    files = FILES["rendered_sst2"]() | {"rendered-sst2/test/neutral/1.png": png([[1]])}
    data = find_dataset("rendered_sst2")(unpacked(tmp_path, files))
    assert counts(data) == {"train": 3, "val": 3, "test": 3}
    assert data.notes == [
        "rendered-sst2/test: 1 images in other folders were left out, such as rendered-sst2/test/neutral/1.png"
    ]


def test_objectnet_keeps_the_classes_of_imagenet(tmp_path):
    data = find_dataset("objectnet")(unpacked(tmp_path, FILES["objectnet"]()))
    assert data.classes.names == (("alarm clock",), ("t-shirt",))
    found = read_all(data, "test")
    assert {key: own["label"] for key, own in found.items()} == {
        "alarm_clock/1d.png": 0,
        "alarm_clock/2d.png": 0,
        "t-shirt/1d.png": 1,
        "t-shirt/2d.png": 1,
    }
    assert "2 images in other folders" in data.notes[0]


def test_a_list_chooses_aerial_images(tmp_path):
    folder = unpacked(tmp_path / "data", FILES["resisc45"]())
    chosen = tmp_path / "resisc45-test.txt"
    chosen.write_text("wetland_001.jpg\nsea_ice_002.jpg\n")
    data = find_dataset("resisc45")(folder, list=str(chosen))
    found = read_all(data, "test")
    assert {key: data.classes.display(own["label"]) for key, own in found.items()} == {
        "wetland/wetland_001.jpg": "wetland",
        "sea_ice/sea_ice_002.jpg": "sea ice",
    }
    chosen.write_text("wetland_009.jpg\nsea_ice_002.jpg\n")
    with pytest.raises(UserError, match=r"1 of 2 images of test are not in .*such as wetland_009.jpg"):
        list(data.entries("test"))
    assert counts(find_dataset("resisc45")(folder)) == {"test": 90}


def test_objects_of_voc_are_cut_out(tmp_path):
    files = FILES["voc2007"]()
    data = find_dataset("voc2007")(unpacked(tmp_path, files))
    found = read_all(data, "test")
    assert {key: data.classes.display(own["label"]) for key, own in found.items()} == {
        "000003-0": "tvmonitor",
        "000003-1": "person",
    }
    whole = Image.open(io.BytesIO(files["VOCdevkit/VOC2007/JPEGImages/000003.jpg"]))
    cut = Image.open(io.BytesIO(found["000003-0"]["image"]))
    np.testing.assert_array_equal(np.asarray(cut), np.asarray(whole.crop((2, 3, 21, 17))))


def test_the_folders_of_imagenet_v2_are_numbers(tmp_path):
    folder = unpacked(tmp_path, FILES["imagenet_v2"]())
    data = find_dataset("imagenet_v2")(folder)
    found = read_all(data, "test")
    assert found["37/037abc"]["label"] == 37 and data.classes.display(37) == "class 37 (a, b)"
    assert found["999/999abc"]["label"] == 999
    (folder / "classnames.txt").unlink()
    (folder / "words.txt").write_bytes(CLASSNAMES + b"n99999999 thing\n")
    with pytest.raises(
        UserError, match=r"words.txt names 1001 ids: imagenet_v2 needs the 1000 of ImageNet-1k"
    ):
        find_dataset("imagenet_v2")(folder)


def test_classes_of_a_test_set_are_its_folders(tmp_path):
    folder = unpacked(tmp_path, FILES["imagenet_a"]())
    data = find_dataset("imagenet_a")(folder)
    assert len(data.classes) == 200 and data.classes.display(1) == "class 5 (a, b)"
    assert read_all(data, "test")[f"{WNIDS[10]}/{WNIDS[10]}_1"]["label"] == 2


def test_fer2013_in_its_other_file(tmp_path):
    first = unpacked(tmp_path / "a", FILES["fer2013"]())
    other = unpacked(tmp_path / "b", fer2013("icml_face_data.csv"))
    for split in ("train", "val", "test"):
        for (a, b), (c, d) in zip(read(first, "fer2013", split), read(other, "fer2013", split), strict=True):
            np.testing.assert_array_equal(a, c)
            assert b == d
    assert len(read(first, "fer2013", "test")) == 3
    assert [label for _, label in read(first, "fer2013", "test", test="private")] == [4, 5]


CUT = {
    "cifar10": "cifar-10-batches-bin/test_batch.bin",
    "mnist": "t10k-images-idx3-ubyte.gz",
    "stl10": "stl10_binary/test_X.bin",
    "svhn": "test_32x32.mat",
    "pcam": "camelyonpatch_level_2_split_test_x.h5.gz",
    "fgvc_aircraft": "fgvc-aircraft-2013b/data/images_variant_test.txt",
    "gtsrb": "GT-final_test.csv",
    "voc2007": "VOCdevkit/VOC2007/Annotations/000003.xml",
    "objectnet": "objectnet-1.0/mappings/folder_to_objectnet_label.json",
    "fer2013": "fer2013/fer2013.csv",
}


@pytest.mark.parametrize("name", CUT)
def test_a_file_that_is_cut_off_or_missing_is_one_sentence(name, tmp_path):
    file, files = CUT[name], FILES[name]()
    for k, content in enumerate((files[file][: len(files[file]) * 2 // 3], b"\xff\xfe<html>")):
        with pytest.raises(UserError, match=file.removesuffix(".gz").replace(".", r"\.")) as found:
            read(unpacked(tmp_path / str(k), files | {file: content}), name, "test")
        assert "\n" not in str(found.value)
    left = {own: content for own, content in files.items() if own != file}
    with pytest.raises(
        UserError, match=r"holds no .*, packed or unpacked; the download is|of test are not in"
    ):
        read(unpacked(tmp_path / "left", left), name, "test")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("country211", {"country211/test/ZW/2zw.jpg": None}, "1 of 211 classes have no image in .*/test/ZW"),
        (
            "imagenet_r",
            {f"imagenet-r/{WNIDS[0]}/{WNIDS[0]}_1.jpg": None},
            "holds 199 class folders .* has 200",
        ),
        (
            "imagenet_a",
            {"classnames.txt": None},
            "holds no classnames.txt or LOC_synset_mapping.txt or words.txt",
        ),
        ("imagenet_a", {"classnames.txt": CLASSNAMES[:200]}, "classnames.txt has no name for n0144"),
        (
            "mnist",
            {"t10k-labels-idx1-ubyte.gz": gzip.compress(bytes(10))},
            "it begins with 0000000000000000, not",
        ),
        (
            "mnist",
            {"t10k-labels-idx1-ubyte.gz": gzip.compress(struct.pack(">II", 2049, 2) + bytes([1, 10]))},
            "gives image 1 the label 10, which is none of 0 to 9",
        ),
        (
            "stl10",
            {"stl10_binary/test_y.bin": bytes([1, 1])},
            "it has 2 labels for the 1 images of test_X.bin",
        ),
        ("stl10", {"stl10_binary/test_y.bin": bytes([0])}, "gives image 0 the label -1"),
        ("cifar10", {"cifar-10-batches-bin/batches.meta.txt": b"cat\n"}, "label 5, which is none of 0 to 0"),
        ("cifar10", {"cifar-10-batches-bin/test_batch.bin": b""}, "its size is not that of whole images"),
        (
            "fgvc_aircraft",
            {"fgvc-aircraft-2013b/data/images_variant_test.txt": b"0000004 Kite\n"},
            "expected a number and a variant of variants.txt, got '0000004 Kite'",
        ),
        (
            "fgvc_aircraft",
            {"fgvc-aircraft-2013b/data/images/0000003.jpg": None},
            "1 of 2 images of test are not in .*such as 0000003: --option=missing=skip",
        ),
        (
            "gtsrb",
            {"GT-final_test.csv": b"Filename;ClassId\n00000.ppm;43\n"},
            "the class 43 is none of 0 to 42",
        ),
        (
            "voc2007",
            {CUT["voc2007"]: voc_xml(("dog", 5, 6, 5, 9))},
            "the box 5, 6, 5, 9 of its object 0 is empty",
        ),
        (
            "voc2007",
            {CUT["voc2007"]: voc_xml(("head", 1, 1, 5, 9))},
            "000003.xml cannot be read: it has no 'head'",
        ),
        ("voc2007", {"VOCdevkit/VOC2007/JPEGImages/000003.jpg": b"x"}, "000003.jpg cannot be read"),
        ("fer2013", {CUT["fer2013"]: b"emotion,pixels,Usage\n7,1 2,PublicTest\n"}, "image 0 the label 7"),
        ("fer2013", {CUT["fer2013"]: b"emotion,pixels,Usage\n1,1 2,PublicTest\n"}, "cannot reshape"),
    ],
)
def test_faults_of_classification_sets(name, changes, message, tmp_path):
    files = FILES[name]() | changes
    folder = unpacked(tmp_path, {file: content for file, content in files.items() if content is not None})
    with pytest.raises(UserError, match=message) as found:
        read(folder, name, "test")
    assert "\n" not in str(found.value)

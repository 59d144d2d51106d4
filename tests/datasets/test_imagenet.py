"""ImageNet-S and ImageNet-21K in their official layouts, with names for WordNet ids."""

import numpy as np
import pytest

from ovseg_jax.datasets.imagenet import ImageNet21k, ImageNetS
from ovseg_jax.errors import UserError
from tests.datasets.packing import both_forms, jpeg, names_of, png, read_all, unpacked

WNIDS = [f"n{k:08d}" for k in range(1440764, 1440764 + 50)]
WORDS = "".join(f"{wnid}\tname {k}, other {k}\n" for k, wnid in enumerate(WNIDS, 1)) + "n09999999\tnothing\n"
MASK = np.array([[1, 1, 50, 0], [300, 1000, 1000, 50]])


def colours(labels: np.ndarray) -> bytes:
    return png(np.stack([labels % 256, labels // 256, np.zeros_like(labels)], -1))


def imagenet_s() -> dict[str, bytes]:
    files = {"words.txt": WORDS.encode()}
    for wnid in WNIDS:
        for folder, name in (("train-semi", f"{wnid}_18"), ("validation", f"ILSVRC2012_val_{wnid[1:]}")):
            files[f"ImageNetS50/{folder}/{wnid}/{name}.JPEG"] = jpeg(2, 4)
            files[f"ImageNetS50/{folder}-segmentation/{wnid}/{name}.png"] = colours(np.ones((2, 4), int))
    files[f"ImageNetS50/train/{WNIDS[0]}/{WNIDS[0]}_1.JPEG"] = jpeg(2, 4)
    files[f"ImageNetS50/validation-segmentation/{WNIDS[1]}/ILSVRC2012_val_{WNIDS[1][1:]}.png"] = colours(
        np.where(MASK == 300, 49, MASK)
    )
    return files


FILES = imagenet_s()


def test_imagenet_s(tmp_path):
    for folder in both_forms(tmp_path, FILES, {"ImageNetS50.zip": "ImageNetS50/"}):
        data = ImageNetS(folder, size="50")
        assert data.classes.ids == tuple(range(1, 51)) and data.classes.names[0] == ("name 1", "other 1")
        found = read_all(data, "val")
        assert len(found) == 50
        one = found[f"ILSVRC2012_val_{WNIDS[1][1:]}"]
        assert names_of(data, one) == ["name 1", "name 49", "name 50"]
        assert one["segments"].tolist() == [[1, 1, 3, 0], [2, 0, 0, 3]]
        train = read_all(data, "train")
        assert sorted(train) == [f"{wnid}_18" for wnid in WNIDS] and not data.notes


def test_faults_of_imagenet_s(tmp_path):
    folder = unpacked(tmp_path / "a", FILES)
    with pytest.raises(
        UserError, match=r"holds no folder ImageNetS919/train-semi with folders of .JPEG files"
    ):
        ImageNetS(folder)
    (folder / "words.txt").write_text("n01440764\ttench\n")
    with pytest.raises(UserError, match=r"words.txt has no name for n01440765 and 48 other classes"):
        ImageNetS(folder, size="50")
    (folder / "words.txt").unlink()
    with pytest.raises(
        UserError, match=r"holds no words.txt or LOC_synset_mapping.txt, packed or unpacked; the download"
    ):
        ImageNetS(folder, size="50")
    names = tmp_path / "names.txt"
    names.write_text("".join(f"{wnid} the {k}th: a thing, other\n" for k, wnid in enumerate(WNIDS)))
    assert ImageNetS(folder, size="50", names=str(names)).classes.names[3] == ("the 3th: a thing", "other")
    with pytest.raises(UserError, match=r"absent.txt cannot be read: there is no such file"):
        ImageNetS(folder, size="50", names=str(tmp_path / "absent.txt"))
    few = {name: data for name, data in FILES.items() if WNIDS[4] not in name}
    with pytest.raises(
        UserError, match=r"holds 49 class folders in train-semi and validation, but ImageNetS50 has 50"
    ):
        ImageNetS(unpacked(tmp_path / "b", few), size="50")
    mask = f"ImageNetS50/validation-segmentation/{WNIDS[0]}/ILSVRC2012_val_{WNIDS[0][1:]}.png"
    data = ImageNetS(unpacked(tmp_path / "c", FILES | {mask: colours(MASK)}), size="50")
    with pytest.raises(UserError, match=r"holds the value 300, which is the id of no class"):
        read_all(data, "val")
    (tmp_path / "c" / mask).unlink()
    with pytest.raises(UserError, match=r"1 of 50 images of val have no mask"):
        read_all(ImageNetS(tmp_path / "c", size="50"), "val")


PROCESSED = {
    "imagenet21k_resized/imagenet21k_train/n01440764/n01440764_1.JPEG": jpeg(2, 3),
    "imagenet21k_resized/imagenet21k_train/n01440766/n01440766_5.JPEG": jpeg(2, 3),
    "imagenet21k_resized/imagenet21k_val/n01440766/n01440766_7.JPEG": jpeg(2, 3),
    "imagenet21k_resized/imagenet21k_small_classes/n01440765/n01440765_2.JPEG": jpeg(2, 3),
    "words.txt": WORDS.encode(),
}


def test_processed_imagenet21k(tmp_path):
    for folder in both_forms(tmp_path, PROCESSED, {"imagenet21k_resized.tar.gz": "imagenet21k_resized/"}):
        data = ImageNet21k(folder)
        assert data.classes.names == (("name 1", "other 1"), ("name 3", "other 3"))
        assert {k: v["label"] for k, v in read_all(data, "train").items()} == {
            "n01440764_1": 0,
            "n01440766_5": 1,
        }
        assert {k: v["label"] for k, v in read_all(data, "val").items()} == {"n01440766_7": 1}
        rare = ImageNet21k(folder, form="small_classes")
        assert len(rare.classes) == 3 and len(read_all(rare, "train")) == 3
        with pytest.raises(UserError, match=r"holds no images of val \(form=whole\), packed or unpacked"):
            list(ImageNet21k(folder, form="whole").entries("val"))


WHOLE = {
    "winter21_whole/n01440764/n01440764_1.JPEG": jpeg(2, 3),
    "winter21_whole/n01440765/n01440765_9.JPEG": jpeg(2, 3),
    "words.txt": WORDS.encode(),
}


def test_whole_imagenet21k_is_a_tar_for_each_class(tmp_path):
    tars = {f"winter21_whole/{wnid}.tar": f"winter21_whole/{wnid}/" for wnid in ("n01440764", "n01440765")}
    for folder in both_forms(tmp_path, WHOLE, tars):
        data = ImageNet21k(folder, form="whole")
        found = read_all(data, "train")
        assert {key: own["label"] for key, own in found.items()} == {"n01440764_1": 0, "n01440765_9": 1}
        assert found["n01440764_1"]["image"] == WHOLE["winter21_whole/n01440764/n01440764_1.JPEG"]
    other = unpacked(tmp_path / "other", WHOLE | {"winter21_whole/cat.JPEG": b""})
    with pytest.raises(UserError, match=r"the image winter21_whole/cat.JPEG has no WordNet id in its name"):
        ImageNet21k(other, form="whole")

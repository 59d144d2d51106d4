"""COCO's layout: the real sample, and every way in which a copy of it can be broken."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ovseg_jax.data.sources.coco import Coco
from ovseg_jax.errors import UserError

SHARED = Path(__file__).parents[3] / "../shared/data"
SAMPLE = SHARED / "coco_sample"
LABELS = SHARED / "label_files/coco_panoptic_with_prompt_eng.txt"
real = pytest.mark.skipif(not SAMPLE.is_dir(), reason="the shared COCO sample is not here")


def write_coco(root, *, captions=True):
    """Two images of 12 x 16; the first has a thing, a crowd and void, the second nothing."""
    images = root / "val2017"
    masks = root / "annotations/panoptic_val2017"
    images.mkdir(parents=True)
    masks.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for k in (7, 3):
        Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(images / f"{k}.jpg")
    ids = np.zeros((12, 16), np.int64)
    ids[:6], ids[6:, 8:] = 70_000, 300
    png = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
    Image.fromarray(png).save(masks / "3.png")
    Image.fromarray(np.zeros_like(png)).save(masks / "7.png")
    info = [{"id": k, "file_name": f"{k}.jpg", "height": 12, "width": 16} for k in (7, 3)]
    segments = [
        {"id": 300, "category_id": 90, "iscrowd": 1},
        {"id": 70_000, "category_id": 5, "iscrowd": 0},
    ]
    panoptic = {
        "images": info,
        "annotations": [
            {"image_id": 7, "file_name": "7.png", "segments_info": []},
            {"image_id": 3, "file_name": "3.png", "segments_info": segments},
        ],
        "categories": [
            {"id": 5, "name": "wall-other-merged", "isthing": 0},
            {"id": 90, "name": "dog", "isthing": 1},
        ],
    }
    path = root / "annotations/panoptic_val2017.json"
    path.write_text(json.dumps(panoptic))
    if captions:
        spoken = {"images": info, "annotations": [{"image_id": 3, "caption": " a dog\nby a wall "}]}
        (root / "annotations/captions_val2017.json").write_text(json.dumps(spoken))
    return path


def change(path, edit):
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def test_small_set(tmp_path):
    write_coco(tmp_path)
    source = Coco(str(tmp_path), "val2017")
    assert len(source) == 2 and [source[k]["image_id"] for k in (0, 1)] == ["3", "7"]
    assert source.classes.names == (("wall",), ("dog",)) and source.classes.ids == (5, 90)
    assert source.classes.groups == {"thing": (1,), "stuff": (0,)}
    first = source[0]
    assert first["class_ids"].tolist() == [1, 0] and first["isthing"].tolist() == [True, False]
    assert first["iscrowd"].tolist() == [True, False]
    assert first["segments"].dtype == np.int32
    assert (first["segments"][:6] == 2).all() and (first["segments"][6:, 8:] == 1).all()
    assert (first["segments"][6:, :8] == 0).all()
    assert first["boxes"].tolist() == [[8, 6, 16, 12], [0, 0, 16, 6]]
    assert first["captions"] == ["a dog by a wall"] == list(source.captions())
    second = source[1]  # neither segments nor captions
    assert second["class_ids"].shape == (0,) and not second["segments"].any() and second["captions"] == []
    assert source.extent() == (12, 16, 2)
    with pytest.raises(IndexError):
        source[2]


def test_images_may_lie_under_images(tmp_path):
    write_coco(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "val2017").rename(tmp_path / "images/val2017")
    assert Coco(tmp_path, "val2017")[0]["image"].shape == (12, 16, 3)


def test_without_captions_or_without_masks(tmp_path):
    write_coco(tmp_path, captions=False)
    assert Coco(tmp_path, "val2017")[0]["captions"] == []
    with pytest.raises(UserError, match=r"captions_val2017\.json is missing"):
        Coco(tmp_path, "val2017", captions=True)
    write_coco(tmp_path / "b").unlink()
    alone = Coco(tmp_path / "b", "val2017", masks=False)
    assert alone[0]["captions"] and "segments" not in alone[0] and len(alone.classes) == 0


def test_label_file(tmp_path):
    write_coco(tmp_path)
    labels = tmp_path / "labels.txt"
    labels.write_text("90:dog,puppy\n5:wall,walls\n")
    assert Coco(tmp_path, "val2017", labels=labels).classes.names == (("wall", "walls"), ("dog", "puppy"))
    labels.write_text("90:dog\n")
    with pytest.raises(UserError, match="no line for category 5"):
        Coco(tmp_path, "val2017", labels=labels)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda d: d["annotations"][1]["segments_info"].pop(),
            "the PNG has a segment 70000 that the JSON lacks",
        ),
        (
            lambda d: d["annotations"][1]["segments_info"].append({"id": 9, "category_id": 5}),
            "the JSON has a segment 9 that the PNG lacks",
        ),
        (lambda d: d["images"][1].update(height=13), r"3\.jpg is 12 x 16 .* says 13 x 16"),
        (lambda d: d["images"][1].update(file_name="33.jpg"), r"33\.jpg, listed in .* does not exist"),
        (
            lambda d: d["annotations"][1].update(file_name="33.png"),
            r"33\.png cannot be read: there is no such file",
        ),
    ],
)
def test_json_and_files_disagree(tmp_path, edit, message):
    change(write_coco(tmp_path), edit)
    with pytest.raises(UserError, match=message):
        dict(Coco(tmp_path, "val2017")[0])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.pop("categories"), "no list 'categories'"),
        (lambda d: d["annotations"][0].update(image_id=99), "image_id 99"),
        (
            lambda d: d["annotations"][1]["segments_info"][0].update(category_id=6),
            "the category_id 6, which 'categories' does not list",
        ),
        (lambda d: d["images"][0].pop("height"), "no 'height'"),
    ],
)
def test_json_of_another_form(tmp_path, edit, message):
    path = write_coco(tmp_path)
    change(path, edit)
    with pytest.raises(UserError, match=message) as error:
        Coco(tmp_path, "val2017")
    assert str(path) in str(error.value)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        Coco(tmp_path / "none", "val2017")
    with pytest.raises(UserError, match="is not a folder"):
        Coco("", "val2017")
    path = write_coco(tmp_path)
    with pytest.raises(UserError, match="no images of split 'train2017'"):
        Coco(tmp_path)
    photo = tmp_path / "val2017/3.jpg"
    whole = photo.read_bytes()
    photo.write_bytes(whole[:-60])
    with pytest.raises(UserError, match=r"3\.jpg cannot be read: image file is truncated"):
        dict(Coco(tmp_path, "val2017")[0])
    photo.write_bytes(whole)
    png = tmp_path / "annotations/panoptic_val2017/3.png"
    bytes_ = png.read_bytes()
    png.write_bytes(bytes_[: len(bytes_) // 2])
    with pytest.raises(UserError, match=r"3\.png cannot be read: it is cut off"):
        dict(Coco(tmp_path, "val2017")[0])
    Image.new("RGB", (16, 13)).save(png)
    with pytest.raises(UserError, match=r"3\.png is 13 x 16 .* image is 12 x 16"):
        dict(Coco(tmp_path, "val2017")[0])
    path.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        Coco(tmp_path, "val2017")
    path.unlink()
    with pytest.raises(UserError, match="is missing"):
        Coco(tmp_path, "val2017")


@real
def test_real_sample():
    source = Coco(SAMPLE, "val2017", labels=LABELS)
    assert len(source) == 27 and len(source.classes) == 133
    truth = json.loads((SAMPLE / "annotations/panoptic_val2017.json").read_text())
    by_id = {str(a["image_id"]): a["segments_info"] for a in truth["annotations"]}
    for k in range(len(source)):
        example = source[k]
        area = np.bincount(example["segments"].ravel(), minlength=len(example["class_ids"]) + 1)[1:]
        listed = by_id[example["image_id"]]
        assert area.tolist() == [s["area"] for s in listed]
        assert [source.classes.ids[c] for c in example["class_ids"]] == [s["category_id"] for s in listed]
        boxes = np.array([s["bbox"] for s in listed], np.float32)
        boxes[:, 2:] += boxes[:, :2]
        np.testing.assert_allclose(example["boxes"], boxes, atol=1)
        assert len(example["captions"]) == 5
    plain = Coco(SAMPLE, "val2017").classes
    assert len({plain.display(k) for k in range(133)}) == 133
    assert {"wall", "tree", "window", "floor wood"} <= set(plain.index)

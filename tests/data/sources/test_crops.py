"""Segments cut out: which, where, and from what kinds of sources."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ovseg_jax.data.scenes.source import Scenes
from ovseg_jax.data.sources.build import make_source
from ovseg_jax.data.sources.coco import Coco
from ovseg_jax.data.sources.crops import Crops
from ovseg_jax.errors import UserError

SAMPLE = Path(__file__).parents[3] / "../shared/data/coco_sample"
SCENES = {"name": "scenes", "split": "test", "num_examples": 12, "image_size": 64}


def test_each_labelled_segment_once():
    crops, scenes = Crops(SCENES, min_size=1), Scenes("test", 12, 64)
    assert crops.classes.names == scenes.classes.names
    expected = []
    for index in range(12):
        example = scenes[index]
        for number, (label, box) in enumerate(
            zip(example["class_ids"], example["boxes"].astype(int), strict=True)
        ):
            part = example["image"][box[1] : box[3], box[0] : box[2]]
            expected.append((int(label), f"{example['image_id']}-{number + 1}", part))
    assert len(crops) == len(expected) and crops.labels.tolist() == [label for label, _, _ in expected]
    for index, (label, name, part) in enumerate(expected):
        example = crops[index]
        assert example["label"] == label and example["image_id"] == name
        np.testing.assert_array_equal(example["image"], part)
    with pytest.raises(IndexError):
        crops[len(crops)]
    assert list(crops.captions()) == []


def test_context_and_choice():
    plain, wide = (
        Crops(SCENES, min_size=1, things_only=True),
        Crops(SCENES, context=0.5, min_size=1, things_only=True),
    )
    assert all(plain.classes.isthing[label] for label in plain.labels) and len(plain) == len(wide)
    for index in range(len(plain)):
        small, large = plain[index]["image"].shape, wide[index]["image"].shape
        assert all(a <= b <= min(64, 2 * a) for a, b in zip(small[:2], large[:2], strict=True))
    assert any(wide[k]["image"].shape[0] == 2 * plain[k]["image"].shape[0] for k in range(len(plain)))
    big = Crops(SCENES, min_size=30)
    assert 0 < len(big) < len(Crops(SCENES, min_size=1))
    assert all(min(big[k]["image"].shape[:2]) >= 30 for k in range(len(big)))


def test_what_is_not_the_segment_is_filled():
    """ZSSeg's cut-out masks: the pixels of the segment, and one colour."""
    shown, filled = Crops(SCENES, min_size=1), Crops(SCENES, min_size=1, fill=(10.4, 200.0, 30.0))
    scenes = Scenes("test", 12, 64)
    some = 0
    for index in range(len(filled)):
        name, number = filled[index]["image_id"].rsplit("-", 1)
        example = scenes[int(name.rsplit("-", 1)[-1])]
        x0, y0, x1, y1 = example["boxes"][int(number) - 1].astype(int)
        own = example["segments"][y0:y1, x0:x1] == int(number)
        np.testing.assert_array_equal(filled[index]["image"][own], shown[index]["image"][own])
        assert (filled[index]["image"][~own] == (10, 200, 30)).all() and filled[index][
            "image"
        ].dtype == np.uint8
        some += int((~own).sum())
    assert some > 100
    with pytest.raises(UserError, match="three numbers from 0 to 255"):
        Crops(SCENES, fill=(1.0, 2.0, 300.0))


def test_unseen_classes_are_groups():
    crops = Crops(SCENES, min_size=1, unseen="grass; red ball")
    assert {crops.classes.display(k) for k in crops.classes.groups["unseen"]} == {"red ball", "grass"}
    few = make_source(
        {"name": "crops", "of": SCENES, "unseen": "grass; red ball", "group": "seen", "shots": 2}
    )
    assert not set(few.labels) & set(crops.classes.groups["unseen"])
    with pytest.raises(UserError, match="unseen class 'zebra'"):
        Crops(SCENES, unseen="zebra")


def write_coco(root, boxes=True):
    """One image of 12 x 20 with a thing, a crowd, and stuff on the rest."""
    for folder in ("val", "annotations/panoptic_val"):
        (root / folder).mkdir(parents=True)
    pixels = np.arange(12 * 20 * 3, dtype=np.uint8).reshape(12, 20, 3)
    Image.fromarray(pixels).save(root / "val/1.png")
    ids = np.full((12, 20), 9)
    ids[2:8, 3:9], ids[8:, 12:] = 5, 7
    colours = np.stack([ids, ids * 0, ids * 0], -1).astype(np.uint8)
    Image.fromarray(colours).save(root / "annotations/panoptic_val/1.png")
    segments = [
        {"id": 5, "category_id": 1, "bbox": [3, 2, 6, 6]},
        {"id": 7, "category_id": 1, "bbox": [12, 8, 8, 4], "iscrowd": 1},
        {"id": 9, "category_id": 2, "bbox": [0, 0, 20, 12]},
    ]
    if not boxes:
        segments[0].pop("bbox")
    categories = [{"id": 1, "name": "dog", "isthing": 1}, {"id": 2, "name": "sky", "isthing": 0}]
    panoptic = {
        "images": [{"id": 1, "file_name": "1.png", "height": 12, "width": 20}],
        "annotations": [{"image_id": 1, "file_name": "1.png", "segments_info": segments}],
        "categories": categories,
    }
    (root / "annotations/panoptic_val.json").write_text(json.dumps(panoptic))
    return {"name": "coco", "data_dir": str(root), "split": "val"}, pixels


def test_coco_is_indexed_by_its_boxes(tmp_path):
    config, pixels = write_coco(tmp_path)
    photo = (tmp_path / "val/1.png").read_bytes()
    (tmp_path / "val/1.png").write_bytes(b"")
    crops = Crops(config, min_size=6)  # without opening the image
    (tmp_path / "val/1.png").write_bytes(photo)
    assert crops.labels.tolist() == [0, 1]
    np.testing.assert_array_equal(crops[0]["image"], pixels[2:8, 3:9])
    np.testing.assert_array_equal(crops[1]["image"], pixels)
    np.testing.assert_array_equal(Crops(config, context=0.5, min_size=6)[0]["image"], pixels[0:11, 0:12])
    assert Crops(config, min_size=6, things_only=True).labels.tolist() == [0]


def test_without_boxes_coco_says_so(tmp_path):
    config, _ = write_coco(tmp_path, boxes=False)
    with pytest.raises(UserError, match="the segment 5 has no 'bbox'"):
        Crops(config)


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="the shared COCO sample is not here")
def test_real_regions_are_those_of_the_pixels():
    source = Coco(SAMPLE, "val2017", captions=False)
    regions = source.regions()
    rows = []
    for index in range(len(source)):
        example = source[index]
        for k in np.flatnonzero(~example["iscrowd"]):
            rows.append((index, k, example["class_ids"][k], *example["boxes"][k]))
    rows = np.array(rows)
    np.testing.assert_array_equal(
        np.stack([regions.image, regions.segment, regions.class_id], -1), rows[:, :3]
    )
    np.testing.assert_allclose(regions.box, rows[:, 3:], atol=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(of=SCENES, context=-1.0), "context=-1.0"),
        (dict(of=SCENES, min_size=0), "min_size=0"),
        (dict(of=SCENES, min_size=65), "no segment .* at least 65 x 65"),
        (
            dict(of={"name": "scene_objects", "size": "tiny"}),
            "has no boxes and no class_ids and no segments, which the source 'crops' needs",
        ),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(UserError, match=message):
        Crops(**arguments)

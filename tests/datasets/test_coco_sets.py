"""COCO's panoptic segments with captions, and COCO-Stuff, in their official layouts."""

import json
from pathlib import Path

import numpy as np
import pytest

from ovseg_jax.data.sources.coco import Coco
from ovseg_jax.datasets.coco import CocoObject, CocoPanoptic, CocoStuff, stuff_classes
from ovseg_jax.errors import UserError
from ovseg_jax.vocab.splits import load_split
from tests.datasets.packing import as_json, both_forms, jpeg, names_of, png, read_all, unpacked

SHARED = Path(__file__).parents[3] / "shared"
CATEGORIES = [
    {"id": 1, "name": "person", "isthing": 1, "supercategory": "person"},
    {"id": 199, "name": "wall-other-merged", "isthing": 0},
    {"id": 118, "name": "floor-wood", "isthing": 0},
]
GROUND, PERSON, CROWD = 3 + 256, 7 + 2 * 65536, 9


def colours(ids: object) -> bytes:
    found = np.asarray(ids)
    return png(np.stack([found % 256, found // 256 % 256, found // 65536], -1))


def info(number: int, category: int, crowd: int = 0) -> dict:
    return {"id": number, "category_id": category, "iscrowd": crowd, "bbox": [0, 0, 2, 2], "area": 4}


def panoptic(*images: tuple[int, list[dict]], **changes: object) -> bytes:
    content = {
        "info": {},
        "images": [
            {"id": k, "file_name": f"{k:012d}.jpg", "height": 2, "width": 4, "license": 1} for k, _ in images
        ],
        "annotations": [
            {"image_id": k, "file_name": f"{k:012d}.png", "segments_info": own} for k, own in images
        ],
        "categories": CATEGORIES,
    }
    return as_json(content | changes)


def spoken(*captions: tuple[int, str]) -> bytes:
    rows = [{"image_id": image, "id": k, "caption": own} for k, (image, own) in enumerate(captions)]
    return as_json({"images": [], "annotations": rows})


SEGMENTS = [info(PERSON, 1), info(GROUND, 118), info(CROWD, 1, crowd=1)]
PNG = colours([[GROUND, GROUND, PERSON, 0], [GROUND, CROWD, PERSON, PERSON]])
PANOPTIC = {
    "annotations/panoptic_train2017.json": panoptic((9, SEGMENTS), (25, [info(GROUND, 199)])),
    "annotations/panoptic_val2017.json": panoptic((139, [info(GROUND, 118)])),
    "annotations/captions_train2017.json": spoken((9, "A man.\n"), (25, "A wall."), (9, " Two  men ")),
    "annotations/captions_val2017.json": spoken((139, "A floor.")),
    "annotations/instances_val2017.json": b"{}",
    "annotations/panoptic_train2017/000000000009.png": PNG,
    "annotations/panoptic_train2017/000000000025.png": colours([[GROUND] * 4] * 2),
    "annotations/panoptic_val2017/000000000139.png": colours([[GROUND] * 4] * 2),
    "train2017/000000000009.jpg": jpeg(2, 4),
    "train2017/000000000025.jpg": jpeg(2, 4, 1),
    "val2017/000000000139.jpg": jpeg(2, 4, 2),
}
ARCHIVES = {
    "annotations/panoptic_train2017.zip": "annotations/panoptic_train2017/",
    "annotations/panoptic_val2017.zip": "annotations/panoptic_val2017/",
    "panoptic_annotations_trainval2017.zip": "annotations/panoptic_",
    "annotations_trainval2017.zip": "annotations/",
    "train2017.zip": "train2017/",
    "val2017.zip": "val2017/",
}


def test_segments_and_captions_of_an_image_are_joined(tmp_path):
    for folder in both_forms(tmp_path, PANOPTIC, ARCHIVES):
        data = CocoPanoptic(folder)
        found = read_all(data, "train")
        assert list(found) == ["000000000009", "000000000025"] and not data.notes
        first = found["000000000009"]
        assert first["image"] == PANOPTIC["train2017/000000000009.jpg"]
        assert names_of(data, first) == ["person", "floor wood", "person"]
        assert first["segments"].tolist() == [[2, 2, 1, 0], [2, 3, 1, 1]]
        assert first["iscrowd"].tolist() == [False, False, True]
        assert first["captions"] == ["A man.", "Two men"]
        assert names_of(data, found["000000000025"]) == ["wall"]
        assert read_all(data, "val")["000000000139"]["captions"] == ["A floor."]
        assert data.classes.ids == (1, 199, 118) and data.classes.isthing == (True, False, False)
        silent = CocoPanoptic(folder, captions="no")
        assert "captions" not in silent.provides | read_all(silent, "val")["000000000139"].keys()


def test_it_is_what_the_source_coco_reads(tmp_path):
    """The same files by the reader of an unpacked COCO, which computes everything on its own from the JSONs."""
    if not (sample := SHARED / "data/coco_sample").is_dir():
        pytest.skip("shared data missing")
    data, source = CocoPanoptic(sample), Coco(sample, "val2017")
    found = list(read_all(data, "val").values())
    assert len(found) == len(source) == 27 and data.classes == source.classes
    for own, other in zip(found, source, strict=False):
        assert own["captions"] == other["captions"]
        for field in ("segments", "class_ids", "iscrowd"):
            np.testing.assert_array_equal(own[field], other[field])


def test_what_is_left_out_is_counted(tmp_path):
    more = {
        "annotations/captions_val2017.json": spoken((1, "Another."), (139, " ")),
        "val2017/000000000001.jpg": jpeg(2, 4),
        "annotations/panoptic_val2017/000000000001.png": PNG,
    }
    data = CocoPanoptic(unpacked(tmp_path, PANOPTIC | more))
    assert read_all(data, "val")["000000000139"]["captions"] == []
    assert data.notes == [
        "val2017: 1 captions of images without segments were left out",
        "val2017: 1 images have no caption",
        "val: 1 images that the annotation file does not list were left out, such as val2017/000000000001.jpg",
        "val: 1 masks without an image were left out, such as annotations/panoptic_val2017/000000000001.png",
    ]


def test_a_missing_file_is_named(tmp_path):
    for k, (name, message) in enumerate(
        {
            "annotations/captions_val2017.json": r"holds no captions_val2017.json, packed or unpacked; the dow",
            "annotations/panoptic_val2017/000000000139.png": r"holds no folder panoptic_val2017 with .png files",
            "val2017/000000000139.jpg": r"holds no folder val2017 with .jpg files",
            "annotations/panoptic_val2017.json": r"holds no panoptic_val2017.json",
        }.items()
    ):
        left = {own: content for own, content in PANOPTIC.items() if own != name}
        with pytest.raises(UserError, match=message):
            read_all(CocoPanoptic(unpacked(tmp_path / str(k), left)), "val")
    for k, name in enumerate(
        ("train2017/000000000025.jpg", "annotations/panoptic_train2017/000000000025.png")
    ):
        left = {own: content for own, content in PANOPTIC.items() if own != name}
        with pytest.raises(
            UserError, match=r"1 of 2 images of train (are not in|have no mask).*000000000025"
        ):
            read_all(CocoPanoptic(unpacked(tmp_path / f"m{k}", left)), "train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "panoptic_val2017.json cannot be read: it is not valid JSON"),
        (b"[]", "panoptic_val2017.json cannot be read"),
        (panoptic((139, [info(GROUND, 2)])), "category_id 2, which 'categories' does not list"),
        (panoptic((139, [info(0, 118)])), "the id of a segment: expected a whole number"),
        (panoptic((139, [info(4, 118), info(4, 1)])), "two segments of the image 139 have the same id"),
        (panoptic((139, []), (139, [])), "it lists an image twice"),
        (panoptic((139, []), annotations=[]), "1 of 1 images have no annotation, such as 139"),
        (panoptic((139, []), images=[]), "image_id 139, which 'images' does not list"),
        (panoptic((139, [{"id": 4}])), "an entry of 'segments_info' is not a segment"),
        (panoptic((139, [info(GROUND, 118), info(4, 1)])), "the JSON has a segment 4 that the PNG lacks"),
        (panoptic((139, [])), "disagree: the PNG has a segment 259 that the JSON lacks"),
        (panoptic((139, []), categories=CATEGORIES * 2), "it lists the category 1 twice"),
    ],
)
def test_a_damaged_annotation_file_is_one_sentence(tmp_path, content, message):
    files = PANOPTIC | {"annotations/panoptic_val2017.json": content}
    with pytest.raises(UserError, match=message) as found:
        read_all(CocoPanoptic(unpacked(tmp_path, files)), "val")
    assert "panoptic_val2017.json" in str(found.value) and "\n" not in str(found.value)


def test_damaged_pictures_and_captions_are_one_sentence(tmp_path):
    for k, (name, content, message) in enumerate(
        (
            ("annotations/panoptic_val2017/000000000139.png", PNG[:60], "139.png cannot be read"),
            ("annotations/panoptic_val2017/000000000139.png", colours([[GROUND] * 4]), "139.png is 1 x 4"),
            ("val2017/000000000139.jpg", b"", "139.jpg cannot be read"),
            ("annotations/captions_val2017.json", b"{}", "it has no 'annotations'"),
            ("annotations/captions_val2017.json", spoken((139, 3)), "expected a text, got 3"),  # type: ignore
        )
    ):
        with pytest.raises(UserError, match=message):
            read_all(CocoPanoptic(unpacked(tmp_path / str(k), PANOPTIC | {name: content})), "val")
    other = panoptic((139, []), categories=CATEGORIES[:1])
    data = CocoPanoptic(unpacked(tmp_path / "o", PANOPTIC | {"annotations/panoptic_val2017.json": other}))
    with pytest.raises(UserError, match="its categories differ from those of the other split"):
        read_all(data, "train")


# person, wall-concrete and unlabelled; cow, grass and unlabelled.
STUFF = {
    "train2017/000000000009.jpg": jpeg(2, 4),
    "val2017/000000000139.jpg": jpeg(2, 4, 1),
    "stuffthingmaps/train2017/000000000009.png": png([[0, 0, 171, 255], [0, 181, 171, 255]]),
    "stuffthingmaps/val2017/000000000139.png": png([[20, 123, 123, 255]] * 2),
}


def test_stuff(tmp_path):
    # The archive of the maps holds train2017 and val2017, beside the folders of the images.
    beside = {name.removeprefix("stuffthingmaps/"): content for name, content in STUFF.items()}
    layouts = [*both_forms(tmp_path, STUFF, {"train2017.zip": "train2017/"}), tmp_path / "beside"]
    unpacked(layouts[-1], {f"images/{n}": c for n, c in beside.items() if n.endswith("jpg")})
    unpacked(layouts[-1], {f"annotations/{n}": c for n, c in beside.items() if n.endswith("png")})
    for folder in layouts:
        data = CocoStuff(folder)
        found = read_all(data, "train")["000000000009"]
        assert names_of(data, found) == ["person", "wall concrete", "wood"]
        assert found["segments"].tolist() == [[1, 1, 2, 0], [1, 3, 2, 0]]
        assert found["image"] == STUFF["train2017/000000000009.jpg"]
        assert names_of(data, read_all(data, "val")["000000000139"]) == ["cow", "grass"] and not data.notes


def test_maps_from_their_archive(tmp_path):
    from tests.datasets.packing import zipped

    maps = {n.removeprefix("stuffthingmaps/"): c for n, c in STUFF.items() if n.endswith("png")}
    images = {n: c for n, c in STUFF.items() if n.endswith("jpg")}
    folder = unpacked(
        tmp_path,
        {
            "stuffthingmaps_trainval2017.zip": zipped(maps),
            "train2017.zip": zipped({n: c for n, c in images.items() if "train" in n}),
            "val2017.zip": zipped({n: c for n, c in images.items() if "val" in n}),
        },
    )
    data = CocoStuff(folder)
    assert len(read_all(data, "train")) == len(read_all(data, "val")) == 1


def test_the_classes_of_stuff():
    classes = stuff_classes()
    assert len(classes) == 171 and classes.ids[:12] == (*range(1, 12), 13) and classes.ids[-1] == 182
    assert len({names[0] for names in classes.names}) == 171 and sum(classes.isthing) == 80
    assert not any("-" in name for (name,) in classes.names)
    groups = load_split(classes, "coco_stuff").groups
    assert (len(groups["seen"]), len(groups["unseen"]), len(groups["thing"])) == (156, 15, 80)
    assert "wall concrete" in {classes.display(k) for k in groups["unseen"]}
    if not (file := SHARED / "data/classes/coco_stuff_zsseg.json").is_file():
        pytest.skip("shared data missing")
    rows = json.loads(file.read_text())["data"]["COCO_CATEGORIES"]
    assert classes.ids == tuple(row["id"] for row in rows)
    for names, row in zip(classes.names, rows, strict=True):
        assert row["name"].replace("-", " ").removesuffix(" other").removesuffix(" stuff") == names[0]


def test_the_groups_of_zero_shot(tmp_path):
    data = CocoStuff(unpacked(tmp_path, STUFF), zero_shot="yes")
    assert len(data.classes.withheld()) == 15 and not CocoStuff(tmp_path).classes.withheld()
    unseen = [data.classes.display(k) for k in data.classes.withheld()]
    assert {"cow", "grass", "river"} <= set(unseen)


def test_faults_of_stuff(tmp_path):
    where = "stuffthingmaps/val2017/000000000139.png"
    for k, (content, message) in enumerate(
        (
            (
                png([[11, 0, 0, 0]] * 2),
                r"139.png \(less one\) holds the value 12, which is the id of no class",
            ),
            (png([[182, 0, 0, 0]] * 2), r"holds the value 183"),
            (png(np.zeros((4, 2))), "139.png is 4 x 2"),
            (b"\x89PNG", "139.png cannot be read"),
        )
    ):
        with pytest.raises(UserError, match=message):
            read_all(CocoStuff(unpacked(tmp_path / str(k), STUFF | {where: content})), "val")
    more = {"stuffthingmaps/val2017/000000000139_labelTrainIds.png": png([[0]])}
    data = CocoStuff(unpacked(tmp_path / "more", STUFF | more))
    assert len(read_all(data, "val")) == 1
    assert data.notes == [f"val: 1 masks without an image were left out, such as {next(iter(more))}"]
    left = {name: content for name, content in STUFF.items() if name != where}
    with pytest.raises(UserError, match=r"holds no folder .* with .png files, packed or unpacked"):
        read_all(CocoStuff(unpacked(tmp_path / "left", left)), "val")
    half = STUFF | {"val2017/000000000001.jpg": jpeg(2, 4)}
    with pytest.raises(UserError, match=r"1 of 2 images of val have no mask, such as val2017/000000000001"):
        read_all(CocoStuff(unpacked(tmp_path / "half", half)), "val")


def test_objects_are_the_things_of_stuff(tmp_path):
    for folder in both_forms(tmp_path, STUFF, {"train2017.zip": "train2017/"}):
        data = CocoObject(folder)
        found = read_all(data, "train")["000000000009"]
        assert names_of(data, found) == ["person"]
        assert found["segments"].tolist() == [[1, 1, 0, 0], [1, 0, 0, 0]]
        assert len(data.classes) == 80 and all(data.classes.isthing) and data.classes.ids[-1] == 90
    # As NVlabs/GroupViT's conversion writes them, beside the others.
    converted = {
        "stuffthingmaps/train2017/000000000009_instanceTrainIds.png": png([[0, 1, 80, 0], [12, 0, 0, 0]])
    }
    data = CocoObject(unpacked(tmp_path / "converted", STUFF | converted))
    found = read_all(data, "train")["000000000009"]
    assert names_of(data, found) == ["person", "stop sign", "toothbrush"]
    assert found["segments"].tolist() == [[0, 1, 3, 0], [2, 0, 0, 0]]
    for content, message in (
        ([[81, 0, 0, 0]] * 2, "holds the value 81, but those of instanceTrainIds are 0 to 80"),
    ):
        files = STUFF | {next(iter(converted)): png(content)}
        with pytest.raises(UserError, match=message):
            read_all(CocoObject(unpacked(tmp_path / "wrong", files)), "train")

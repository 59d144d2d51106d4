import json
from pathlib import Path

import numpy as np
import pytest

from ovseg_jax.errors import UserError
from ovseg_jax.evals import average_precision as ap
from ovseg_jax.evals.box_files import (
    Annotations,
    find_images,
    match_images,
    read_annotations,
    read_boxes,
)
from ovseg_jax.vocab.classes import ClassList

DOG_CAT = ClassList((("dog",), ("cat",)), (3, 9), (True, True))


def test_proposals(tmp_path):
    path = tmp_path / "boxes.json"
    entries = [
        {"image_id": 7, "bbox": [1, 2, 3, 4], "score": 0.5, "category_id": 1},
        {"image_id": 2, "bbox": [0.5, 0, 1, 1]},
        {"image_id": 7, "bbox": [0, 0, 9, 9], "score": 1},
    ]
    path.write_text(json.dumps(entries))
    found = read_boxes(path)
    assert list(found) == [2, 7]
    np.testing.assert_array_equal(found[7].boxes, [[1, 2, 3, 4], [0, 0, 9, 9]])
    np.testing.assert_array_equal(found[7].objectness, [0.5, 1])
    np.testing.assert_array_equal(found[2].objectness, [1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "cannot be read: it is not valid JSON"),
        ("[]", "is not a list of boxes"),
        ('{"annotations": []}', "is not a list of boxes"),
        ('[{"bbox": [1, 2, 3, 4]}]', "box 0 has no 'image_id'"),
        ('[{"image_id": 1, "bbox": 3}]', "box 0: 'bbox': expected a list of 4 numbers"),
        ('[{"image_id": 1, "bbox": [1, 2, 3]}]', "box 0: 'bbox': expected a list of 4 numbers"),
        ('[{"image_id": 1, "bbox": [1, 2, 0, 3]}]', "bbox of box 0 is not \\[x, y"),
        ('[{"image_id": 1, "bbox": [1, NaN, 1, 3]}]', "box 0: 'bbox': expected a finite number"),
        (
            '[{"image_id": 1, "bbox": [1, 2, 1, 3], "score": 3.5}]',
            "score of box 0 is 3.5: it must be a probability",
        ),
    ],
)
def test_what_are_no_proposals(tmp_path, content, message):
    path = tmp_path / "boxes.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_boxes(path)


def test_where_images_lie(tmp_path):
    for name in ("000000000285.jpg", "x.png", "val2017/000000000139.jpg", "12.jpeg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    images = [
        {"id": 3, "file_name": "x.png"},
        {"id": 4, "file_name": "somewhere/x.png"},
        {"id": 139, "coco_url": "http://images.cocodataset.org/val2017/000000000139.jpg"},
    ]
    ids, files = zip(*((i["id"], i.get("file_name") or i["coco_url"]) for i in images), strict=True)
    listed = Annotations({}, list(ids), list(files), DOG_CAT)
    found = find_images(tmp_path, [285, 12, "x", 3, 4, 139], listed)
    assert [Path(path).name for path in found.values()] == [
        *("000000000285.jpg", "12.jpeg", "x.png", "x.png", "x.png", "000000000139.jpg")
    ]
    with pytest.raises(UserError, match="holds no image with the id 286"):
        find_images(tmp_path, [286])
    with pytest.raises(UserError, match="is not a folder"):
        find_images(tmp_path / "x.png", [285])


def write_annotations(path, lvis=False):
    """Two images with a box each, of two categories."""
    categories = [{"id": k, "name": name} for k, name in ((3, "dog"), (9, "cat"))]
    images = [{"id": i, "width": 50, "height": 50, "file_name": f"{i}.png"} for i in (1, 2)]
    boxes = [(1, 3, [5, 5, 30, 30]), (2, 9, [10, 10, 20, 30])]
    annotations = [
        {"id": n, "image_id": i, "category_id": k, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for n, (i, k, box) in enumerate(boxes, 1)
    ]
    if lvis:
        categories = [c | {"frequency": f} for c, f in zip(categories, "fr", strict=True)]
        images = [image | {"neg_category_ids": [3, 9], "not_exhaustive_category_ids": []} for image in images]
        annotations = [a | {"segmentation": [[5, 5, 35, 5, 35, 35]]} for a in annotations]
    path.write_text(json.dumps({"images": images, "categories": categories, "annotations": annotations}))
    return [{"image_id": i, "category_id": k, "bbox": box, "score": 0.9} for i, k, box in boxes]


def precision(path, results):
    """COCO's AP, or LVIS's, of results whose image ids are those of the annotations."""
    truth = read_annotations(path, DOG_CAT)
    return ap.metrics(ap.curves(truth.data, results, "bbox", truth.rule), truth.rule, truth.frequencies)["AP"]


def change(content, change):
    """Annotations without something that tools leave out, or otherwise than the package takes them."""
    for number, entry in enumerate(content["annotations"]):
        if change == "ids from 0":
            entry["id"] = number
        elif change == "ids of text":
            entry["image_id"] = str(entry["image_id"])
            content["images"][number]["id"] = str(content["images"][number]["id"])
        elif change.startswith("no "):
            del entry[change.removeprefix("no ")]
        elif change == "null":
            entry |= {"iscrowd": None, "area": None}


@pytest.mark.parametrize(
    "kind", ["ids from 0", "ids of text", "no id", "no iscrowd", "no area", "null", "as it is"]
)
@pytest.mark.parametrize("lvis", [False, True])
def test_fields_that_are_missing_are_completed(tmp_path, kind, lvis):
    perfect = write_annotations(tmp_path / "a.json", lvis=lvis)
    content = json.loads((tmp_path / "a.json").read_text())
    change(content, kind)
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert precision(tmp_path / "a.json", perfect) == pytest.approx(100)


def test_boxes_of_images_that_the_annotations_have_under_another_kind_of_id(tmp_path):
    write_annotations(tmp_path / "a.json")
    truth = read_annotations(tmp_path / "a.json", DOG_CAT)
    boxes = lambda *ids: [{"image_id": i, "bbox": [1, 2, 3, 4]} for i in ids]
    (tmp_path / "b.json").write_text(json.dumps(boxes("2", 1, 2, 1.0)))
    found = match_images(read_boxes(tmp_path / "b.json"), truth)
    assert {key: len(p.boxes) for key, p in found.items()} == {1: 2, 2: 2}
    (tmp_path / "b.json").write_text(json.dumps(boxes(1, 3, "x")))
    with pytest.raises(
        UserError, match="boxes of the image 3 and of 1 more, which --annotations does not list"
    ):
        match_images(read_boxes(tmp_path / "b.json"), truth)


@pytest.mark.parametrize(
    ("part", "entry", "message"),
    [
        ("annotations", {"image_id": 5}, "annotation 1 refers to the image 5, which the file does not list"),
        ("annotations", {"category_id": 4}, "annotation 1 refers to the category 4, which"),
        ("annotations", {"bbox": None}, "annotation 1"),
        ("annotations", {"bbox": [1, 2, float("nan"), 4]}, "annotation 1"),
        ("annotations", {"area": "large"}, "annotation 1"),
        ("images", {"id": 1}, "two images have the same id"),
        ("images", {"id": None}, "image 1"),
        ("images", {"file_name": 7}, "image 1"),
        ("categories", {"id": "x"}, "category 1"),
        ("categories", {"id": 10**400}, "category 1: 'id'"),
        ("annotations", {"bbox": [10**400, 2, 3, 4]}, "annotation 1"),
    ],
)
def test_annotations_that_cannot_be_used(tmp_path, part, entry, message):
    write_annotations(tmp_path / "a.json")
    content = json.loads((tmp_path / "a.json").read_text())
    if entry.get("id") == 10**400:
        content["annotations"].pop()
    content[part][1:] = [content[part][1] | entry] if len(content[part]) > 1 else []
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        read_annotations(tmp_path / "a.json", DOG_CAT)

import json
from pathlib import Path

import numpy as np
import pytest

from ovseg_jax.errors import UserError
from ovseg_jax.evals.box_files import average_precision, find_images, read_boxes


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
        ("[", "cannot be read as JSON"),
        ("[]", "is no list of boxes"),
        ('{"annotations": []}', "is no list of boxes"),
        ('[{"bbox": [1, 2, 3, 4]}]', "box 0 has no 'image_id'"),
        ('[{"image_id": 1, "bbox": 3}]', "box 0 has no"),
        ('[{"image_id": 1, "bbox": [1, 2, 3]}]', "bbox of box 0 is not x, y"),
        ('[{"image_id": 1, "bbox": [1, 2, 0, 3]}]', "bbox of box 0 is not x, y"),
        ('[{"image_id": 1, "bbox": [1, NaN, 1, 3]}]', "bbox of box 0 is not x, y"),
        ('[{"image_id": 1, "bbox": [1, 2, 1, 3], "score": 3.5}]', "score of box 0 is 3.5: a probability"),
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
    found = find_images(tmp_path, [285, 12, "x", 3, 4, 139], {"images": images})
    assert [Path(path).name for path in found.values()] == [
        *("000000000285.jpg", "12.jpeg", "x.png", "x.png", "x.png", "000000000139.jpg")
    ]
    with pytest.raises(UserError, match="holds no image of the id 286"):
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


def test_average_precision(tmp_path, capsys):
    perfect = write_annotations(tmp_path / "coco.json")
    assert average_precision(tmp_path / "coco.json", perfect) == pytest.approx(
        {"AP": 100, "AP50": 100, "AP75": 100, "APs": 100}  # there are only small ones
    )
    # The dog is missed, and a better-scored box stands where no cat is: half of nothing and of a half.
    wrong = [{**perfect[1], "image_id": 1, "score": 1.0}, perfect[1]]
    assert average_precision(tmp_path / "coco.json", wrong)["AP"] == pytest.approx(25)
    assert capsys.readouterr().out == ""


def test_average_precision_of_lvis(tmp_path):
    pytest.importorskip("lvis")
    perfect = write_annotations(tmp_path / "lvis.json", lvis=True)
    found = average_precision(tmp_path / "lvis.json", perfect)
    assert found["AP"] == found["APr"] == found["APf"] == pytest.approx(100)
    assert average_precision(tmp_path / "lvis.json", perfect[:1])["AP"] == pytest.approx(50)

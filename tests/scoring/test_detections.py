"""`score instances`, `boxes` and `proposals` on files: numbers of pycocotools, and files with faults."""

import csv
import json

import numpy as np
import pytest
from detection_reference import SIDE, case, official, percent
from PIL import Image
from pycocotools import mask as coco

from ovseg_jax import score
from ovseg_jax.data.images import read_image
from ovseg_jax.evals import average_precision as ap

KEYS = {"instances": "segmentation", "boxes": "bbox"}
KIND = {"instances": "segm", "boxes": "bbox"}


def write(folder, truth, found):
    (folder / "gt.json").write_text(json.dumps(truth))
    (folder / "pred.json").write_text(json.dumps(found))


def command(folder, kind, *flags):
    return score.main([kind, f"--pred={folder}/pred.json", f"--gt={folder}/gt.json", *flags])


def report(folder, kind, *flags):
    assert command(folder, kind, f"--json={folder}/out.json", *flags) == 0
    return json.loads((folder / "out.json").read_text())


@pytest.mark.parametrize("kind", KEYS)
def test_cocos_scores_are_those_of_pycocotools(tmp_path, kind):
    truth, found = case(11)
    write(tmp_path, truth, found)
    judge = official(truth, found, KIND[kind])
    judge.summarize()
    got = report(tmp_path, kind, f"--csv={tmp_path}/out.csv")
    assert list(got["scores"]["all"]) == list(ap.NAMES["coco"])
    scores = [np.nan if x is None else x for x in got["scores"]["all"].values()]
    np.testing.assert_allclose(scores, percent(judge.stats), rtol=1e-14)
    instances = sum(not row["iscrowd"] for row in truth["annotations"])
    facts = {"images": 9, "true instances": instances, "results": len(found), "rule": "coco"}
    assert got["facts"] == facts and got["kind"] == kind
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert [row["id"] for row in rows] == ["3", "5", "7", "9"] and rows[3]["AP"] == ""
    assert sum(int(row["instances"]) for row in rows) == instances
    own = judge.eval["precision"][:, :, 1, 0, 2]
    expected = [100 * own.mean(), 100 * own[0].mean()]
    np.testing.assert_allclose([float(rows[1][name]) for name in ("AP", "AP50")], expected, rtol=1e-12)


def test_lviss_rule_is_chosen_by_the_file_or_by_name(tmp_path):
    truth, found = case(12, crowds=False, lvis=True)
    write(tmp_path, truth, found)
    assert report(tmp_path, "boxes")["facts"]["rule"] == "coco"
    for row, frequency in zip(truth["categories"], "rccf", strict=True):
        row |= {"frequency": frequency, "name": f"n{row['id']}"}
    write(tmp_path, truth, found)
    got = report(tmp_path, "boxes")
    expected = ap.metrics(ap.curves(truth, found, "bbox", "lvis"), "lvis", {3: "r", 5: "c", 7: "c", 9: "f"})
    assert {name: np.nan if x is None else x for name, x in got["scores"]["all"].items()} == pytest.approx(
        expected, nan_ok=True
    )
    assert np.isnan(expected["APf"]) and expected["APc"] > 0
    first = got["classes"][0]
    assert (first["class"], first["frequency"]) == ("n3", "r")
    known = {(i["id"], k) for i in truth["images"] for k in i["neg_category_ids"]}
    known |= {(a["image_id"], a["category_id"]) for a in truth["annotations"]}
    unlabelled = sum((row["image_id"], row["category_id"]) not in known for row in found)
    assert got["facts"]["results of classes that their image is not labelled for"] == unlabelled > 0
    plain = ap.metrics(ap.curves(truth, found, "bbox"))
    assert report(tmp_path, "boxes", "--rule=coco")["scores"]["all"]["AP"] == plain["AP"]


def test_crowds_do_not_exist_in_lvis(tmp_path):
    truth, found = case(13, crowds=True, lvis=True)
    truth["categories"] = [row | {"frequency": "r"} for row in truth["categories"]]
    write(tmp_path, truth, found)
    got = report(tmp_path, "instances")
    truth["annotations"] = [row | {"iscrowd": 0} for row in truth["annotations"]]
    write(tmp_path, truth, found)
    assert report(tmp_path, "instances") == got


@pytest.mark.parametrize("kind", KEYS)
def test_the_result_does_not_depend_on_the_number_of_processes(tmp_path, kind):
    truth, found = case(14, classes=70)
    write(tmp_path, truth, found)
    assert report(tmp_path, kind, "--workers=2") == report(tmp_path, kind, "--workers=1")


def test_masks_of_every_form_are_the_same(tmp_path):
    """A box as polygon, and as RLE with counts as a list."""
    box = [[10, 20, 40, 20, 40, 50, 10, 50]]
    counts = [10 * 100 + 20, *[30, 70] * 29, 30]
    counts.append(100 * 100 - sum(counts))
    image = {"id": "a", "height": 100, "width": 100}
    own = {"id": 0, "image_id": "a", "category_id": 1}
    for shape in (box, {"size": [100, 100], "counts": counts}):
        truth = {
            "images": [image],
            "categories": [{"id": 1, "name": "x"}],
            "annotations": [own | {"segmentation": shape}],
        }
        found = own | {"score": 0.5, "segmentation": {"size": [100, 100], "counts": counts}}
        write(tmp_path, truth, [found])
        got = report(tmp_path, "instances")
        assert got["scores"]["all"]["AP"] == pytest.approx(100)
        assert got["scores"]["all"]["APs"] == pytest.approx(100)  # 900 pixels, where there is no area
    write(tmp_path, truth, [])
    got = report(tmp_path, "instances")
    assert got["scores"]["all"]["AP"] == 0 and got["facts"]["images without a result"] == 1


def test_results_beyond_the_limit_are_counted(tmp_path):
    truth, found = case(15, images=1, classes=2)
    write(tmp_path, truth, [row | {"category_id": 3} for row in found * 6])
    assert report(tmp_path, "boxes")["facts"]["results beyond the best 100 of an image and class"] == 8


FAULTS = {
    "unknown image": (
        {"image_id": 77},
        "result 5 of {}/pred.json is of the image 77, which {}/gt.json does not list",
    ),
    "unknown category": (
        {"category_id": 4},
        "result 5 of {}/pred.json is of the category 4, which {}/gt.json lacks",
    ),
    "another size": (
        {"segmentation": {"size": [SIDE, 80], "counts": "0"}},
        "{}/pred.json: result 5: 'segmentation' is 200 x 80 (height x width), but its image is 200 x 200",
    ),
}


@pytest.mark.parametrize("reason", FAULTS)
def test_a_faulty_result_stops_or_is_left_out_and_counted(tmp_path, capsys, reason):
    truth, found = case(16)
    write(tmp_path, truth, found[:5] + found[6:])
    expected = report(tmp_path, "instances")["scores"]
    change, message = FAULTS[reason]
    found[5] = found[5] | change
    write(tmp_path, truth, found)
    capsys.readouterr()
    assert command(tmp_path, "instances") == 1
    err = capsys.readouterr().err
    assert message.replace("{}", str(tmp_path)) in err and err.count("\n") == 1
    got = report(tmp_path, "instances", "--missing=skip")
    assert got["scores"] == expected and got["skipped"] == {reason: {"count": 1, "names": ["result 5"]}}
    assert f"left out, {reason}: 1 (result 5)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("boxes", {"bbox": [1, 2, -3, 4]}, "result 5: 'bbox': expected [x, y, width, height]"),
        ("boxes", {"score": None}, "result 5: 'score': expected a finite number"),
        (
            "instances",
            {"segmentation": [[1, 2, 3, 4, 5, 6]]},
            "result 5: 'segmentation': expected a mask in RLE",
        ),
        (
            "instances",
            {"segmentation": {"size": [SIDE, SIDE], "counts": "P"}},
            "'counts': expected run lengths",
        ),
        (
            "instances",
            {"segmentation": {"size": [SIDE, SIDE], "counts": "0"}},
            "its run lengths are not of 200 x 200",
        ),
        (
            "instances",
            {"segmentation": {"size": [SIDE, SIDE], "counts": [1]}},
            "its run lengths are not of 200 x 200",
        ),
    ],
)
def test_what_is_no_result(tmp_path, capsys, kind, change, message):
    truth, found = case(17)
    found[5] = found[5] | change
    write(tmp_path, truth, found)
    assert command(tmp_path, kind, "--missing=skip") == 1
    err = capsys.readouterr().err
    assert "pred.json cannot be read: " in err and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("images", {"height": 0}, "image 0: 'height': expected a whole number from 1"),
        ("annotations", {"segmentation": []}, "annotation 0: 'segmentation': it has no polygon"),
        (
            "annotations",
            {"segmentation": [[1, 2, 3, 4]]},
            "annotation 0: 'segmentation': expected at least three",
        ),
        ("annotations", {"segmentation": [[1, 2, 3, 4, 1e9, 2]]}, "a polygon lies far outside of the image"),
        ("annotations", {"segmentation": {"size": [9, 9], "counts": "0"}}, "'segmentation' is 9 x 9 (height"),
    ],
)
def test_what_are_no_masks_of_a_truth(tmp_path, capsys, part, change, message):
    truth, found = case(18)
    truth[part][0] |= change
    write(tmp_path, truth, found)
    assert command(tmp_path, "instances") == 1
    err = capsys.readouterr().err
    assert "gt.json cannot be read: " in err and message in err and err.count("\n") == 1


@pytest.mark.parametrize("shape", ["boxes", "masks"])
def test_proposals_have_the_recall_of_pycocotools_without_categories(tmp_path, shape):
    truth, found = case(19, images=3)
    found = [row | {"score": row["score"] - n} for n in range(8) for row in found]
    found.sort(key=lambda row: row["category_id"])  # which decides between equal scores there
    kind, key = ("bbox", "bbox") if shape == "boxes" else ("segm", "segmentation")
    write(tmp_path, truth, [{k: row[k] for k in ("image_id", "score", key)} for row in found])
    recall = official(truth, found, kind, (100, 300, 1000), by_class=False).eval["recall"][:, 0]
    got = report(tmp_path, "proposals", f"--shape={shape}")
    assert len(found) / 3 > 100 and list(got["scores"]) == ["best 100", "best 300", "best 1000"]
    for m, row in enumerate(got["scores"].values()):
        expected = [np.nanmean(np.where(recall[:, a, m] < 0, np.nan, recall[:, a, m])) for a in range(4)]
        expected += [recall[t, 0, m] for t in (0, 4, 8)]
        assert list(row) == "AR ARs ARm ARl recall@0.5 recall@0.7 recall@0.9".split()
        np.testing.assert_allclose(
            [np.nan if x is None else x for x in row.values()], 100 * np.array(expected)
        )
    assert 5 < got["scores"]["best 100"]["AR"] < 100


def test_all_proposals_count_up_to_the_limit(tmp_path):
    """The box that fits is the 250th of its image."""
    image = {"id": 1}
    truth = [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 50, 50]}]
    found = [{"image_id": 1, "bbox": [200 + n, 0, 9, 9], "score": 1 - n / 1000} for n in range(249)]
    found.append({"image_id": 1, "bbox": [0, 0, 50, 40], "score": 0.1})
    write(tmp_path, {"images": [image], "categories": [{"id": 1}], "annotations": truth}, found)
    scores = report(tmp_path, "proposals")["scores"]
    assert [row["recall@0.7"] for row in scores.values()] == [0, 100, 100]
    assert scores["best 300"]["AR"] == pytest.approx(70) and scores["best 300"]["recall@0.9"] == 0
    assert scores["best 300"]["ARs"] is None and scores["best 300"]["ARm"] == pytest.approx(70)


@pytest.mark.parametrize("kind", KEYS)
def test_the_worst_images_are_listed_and_drawn(tmp_path, capsys, kind):
    """Four images: both things found, one of two, none, and one without a thing."""
    masks = np.zeros((2, 160, 240), bool)
    masks[0, 20:100, 20:100], masks[1, 40:120, 140:220] = True, True
    boxes = [[20, 20, 80, 80], [140, 40, 80, 80]]
    rle = [coco.encode(np.asfortranarray(mask)) for mask in masks.astype(np.uint8)]
    rle = [{**own, "counts": own["counts"].decode()} for own in rle]
    row = lambda image, k, **more: dict(
        image_id=image, category_id=k + 1, bbox=boxes[k], segmentation=rle[k], **more
    )
    truth = dict(
        images=[dict(id=i, file_name=f"{i}.png", height=160, width=240) for i in range(1, 5)],
        annotations=[row(i, k, id=2 * i + k, iscrowd=0, area=6400) for i in range(1, 4) for k in range(2)],
        categories=[dict(id=1, name="cat"), dict(id=2, name="dog")],
    )
    found = [row(1, 0, score=0.9), row(1, 1, score=0.8), row(2, 1, score=0.7), row(4, 0, score=0.1)]
    # The third image's cat and dog change places. Results beyond the number of instances are not drawn.
    found += [row(3, 1, score=0.6) | {"category_id": 1}, row(3, 0, score=0.5) | {"category_id": 2}]
    found += [row(1, 0, score=0.001) | {"category_id": 2}]
    write(tmp_path, truth, found)
    (tmp_path / "photos").mkdir()
    for i in range(1, 5):
        Image.fromarray(np.full((160, 240, 3), 50 * i, np.uint8)).save(tmp_path / f"photos/{i}.png")
    worst = ["3 (0.0)", "2 (50.0)", "1 (100.0)"]
    assert report(tmp_path, kind, "--worst=5")["facts"]["worst images"] == worst
    sheet, photos = f"--sheet={tmp_path}/sheet.png", f"--images={tmp_path}/photos"
    assert report(tmp_path, kind, sheet, photos, "--workers=1")["facts"]["worst images"] == worst
    drawn = read_image(tmp_path / "sheet.png")
    assert not (drawn == (220, 60, 60)).all(-1).any()
    if kind == "instances":
        assert command(tmp_path, kind, sheet) == 0
        plain = read_image(tmp_path / "sheet.png")
        red, grey = ((plain == colour).all(-1).sum() for colour in ((220, 60, 60), (225, 228, 232)))
        # Two squares of the third image and one of the second; all but six squares.
        scale = (256 / 240) ** 2
        assert abs(red - 3 * 6400 * scale) < 2500 and abs(grey - (3 * 160 * 240 - 6 * 6400) * scale) < 3000
    else:
        assert command(tmp_path, kind, sheet) == 1
        assert "--sheet of boxes needs the photographs" in capsys.readouterr().err
    (tmp_path / "photos/2.png").unlink()
    assert command(tmp_path, kind, sheet, photos) == 1
    assert "photos holds no image '2'" in capsys.readouterr().err

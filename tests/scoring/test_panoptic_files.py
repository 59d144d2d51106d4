"""`score panoptic` on files, against the loop over masks, published values, and files with faults."""

import csv
import json

import numpy as np
import panoptic_reference as reference
import pytest
from PIL import Image

from ovseg_jax import score
from ovseg_jax.data.images import read_image
from ovseg_jax.errors import UserError
from ovseg_jax.evals.panoptic_quality import RULES, matches, overlaps, tally
from ovseg_jax.scoring.panoptic import read_panoptic
from ovseg_jax.scoring.sheet import parted

CATEGORIES = [{"id": 10 + k, "name": f"c{k}", "isthing": int(k < 2)} for k in range(5)]
SCALE = 70003  # spreads ids over all three channels of the PNG


def save(path, ids):
    colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1)
    Image.fromarray(colours.astype(np.uint8)).save(path)


def write(folder, images, categories=CATEGORIES, scale=SCALE):
    """Writes images of the reference's form as truth and prediction, with ids times `scale`."""
    sides = {"pred": [], "gt": []}
    for name in sides:
        (folder / name).mkdir()
    for number, (predicted, true, predicted_class, true_class, crowds) in enumerate(images):
        for name, ids, classes in (("pred", predicted, predicted_class), ("gt", true, true_class)):
            save(folder / name / f"{number}.png", ids * scale)
            segments = [
                {
                    "id": i * scale,
                    "category_id": categories[k]["id"],
                    "area": int((ids == i).sum()),
                    "iscrowd": int(name == "gt" and i in crowds),
                }
                for i, k in classes.items()
            ]
            sides[name].append({"image_id": number, "file_name": f"{number}.png", "segments_info": segments})
    for name, annotations in sides.items():
        content = {"annotations": annotations, "categories": categories}
        (folder / f"{name}.json").write_text(json.dumps(content))


def change(folder, name, edit):
    """Edits the JSON of one side."""
    content = json.loads((folder / f"{name}.json").read_text())
    edit(content)
    (folder / f"{name}.json").write_text(json.dumps(content))


def command(folder, *flags):
    return score.main(["panoptic", f"--pred={folder}/pred.json", f"--gt={folder}/gt.json", *flags])


def report(folder, *flags):
    assert command(folder, f"--json={folder}/out.json", *flags) == 0
    return json.loads((folder / "out.json").read_text())


@pytest.mark.parametrize("rule", ["coco", "bdd100k"])
def test_files_are_scored_as_by_the_loop(tmp_path, rule):
    rng = np.random.default_rng(1)
    images = [reference.random_image(rng) for _ in range(30)]
    write(tmp_path, images)
    found = report(tmp_path, f"--rule={rule}", f"--csv={tmp_path}/out.csv")
    sums = {k: np.zeros(4) for k in range(5)}
    for image in images:
        for k, row in reference.counts(*image, rule).items():
            sums[k] += row
    for name, group in (("all", range(5)), ("things", (0, 1)), ("stuff", (2, 3, 4))):
        own = [found["scores"][name][metric] for metric in ("PQ", "SQ", "RQ")]
        np.testing.assert_allclose(own, 100 * reference.means(sums, group), rtol=1e-12)
    assert [row["classes"] for row in found["scores"].values()] == [5, 2, 3]
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert [(row["class"], row["id"], row["kind"]) for row in rows] == [
        (f"c{k}", str(10 + k), "thing" if k < 2 else "stuff") for k in range(5)
    ]
    for k, row in enumerate(rows):
        assert [int(row[x]) for x in ("TP", "FP", "FN")] == sums[k][1:].tolist()
        scores = [float(row[x]) for x in ("PQ", "SQ", "RQ")]
        np.testing.assert_allclose(scores, 100 * reference.means(sums, [k]), rtol=1e-12)
    assert found["facts"]["images"] == 30 and found["facts"]["rule"] == rule and not found["skipped"]


@pytest.mark.skipif(not reference.PUBLISHED.is_dir(), reason="no published scenes beside the repository")
def test_published_scenes_have_the_published_scores(tmp_path):
    kinds = [{"id": k, "name": str(k), "isthing": 1} for k in range(7)]
    write(tmp_path, [(*reference.published_scene(name), ()) for name in reference.SCENES], kinds, 1)
    assert report(tmp_path)["scores"]["all"]["PQ"] / 100 == pytest.approx(0.76855499, abs=5e-7)


def test_the_result_does_not_depend_on_the_number_of_processes(tmp_path):
    rng = np.random.default_rng(2)
    write(tmp_path, [reference.random_image(rng) for _ in range(70)])
    assert report(tmp_path, "--workers=1") == report(tmp_path, "--workers=2")


def test_text(tmp_path, capsys):
    whole = np.full((4, 6), 1)
    write(tmp_path, [(whole, whole, {1: 0}, {1: 0}, ())], CATEGORIES[:1])
    assert command(tmp_path) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        "class id kind PQ SQ RQ TP FP FN".split(),
        "c0 10 thing 100.00 100.00 100.00 1 0 0".split(),
        [],
        "images: 1".split(),
        "rule: coco".split(),
        "PQ SQ RQ classes".split(),
        "all 100.00 100.00 100.00 1".split(),
        "things 100.00 100.00 100.00 1".split(),
        "stuff - - - 0".split(),
    ]


def pair(folder):
    """Two images: the first is right, the second holds a wrong segment in its lower half."""
    true = np.repeat([[1], [2]], 8, 1).repeat(3, 0)
    wrong = np.where(true == 2, 3, true)
    write(
        folder,
        [
            (true, true, {1: 0, 2: 2}, {1: 0, 2: 2}, ()),
            (wrong, true, {1: 0, 3: 3}, {1: 0, 2: 2}, ()),
        ],
    )


def test_oddities_of_the_truth_are_counted(tmp_path):
    pair(tmp_path)

    def edit(content):
        first, second = (a["segments_info"] for a in content["annotations"])
        first[0]["area"] = 7
        first.append({"id": 5, "category_id": 14, "area": 3})
        del second[1]

    change(tmp_path, "gt", edit)
    found = report(tmp_path)
    assert found["facts"] == {
        "images": 2,
        "rule": "coco",
        "true segments without pixels, which are missed": 1,
        "ids in true PNGs that the JSON lacks": 1,
        "true segments whose area in the JSON is another": 1,
    }
    assert [(row["TP"], row["FP"], row["FN"]) for row in found["classes"]] == [
        *((2, 0, 0), (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
    ]


def test_unions_have_the_area_that_the_json_states(tmp_path):
    """As in panopticapi, which ADE20K's panoptic files need: things lie over stuff whose area is that of before."""
    pair(tmp_path)
    change(tmp_path, "gt", lambda c: segments(c, 0)[0].update(area=30))
    found = report(tmp_path)
    # 24 pixels of both; in the second image, IoU is 1.
    assert found["scores"]["things"]["SQ"] == pytest.approx(100 * (24 / 30 + 1) / 2)
    assert report(tmp_path, "--rule=bdd100k")["scores"]["things"]["SQ"] == 100
    change(tmp_path, "gt", lambda c: segments(c, 0)[0].update(area=48))  # an IoU of 0.5 is no match
    row = report(tmp_path)["classes"][0]
    assert (row["TP"], row["FP"], row["FN"]) == (1, 1, 1)
    change(tmp_path, "gt", lambda c: [s.pop("area") for k in range(2) for s in segments(c, k)])
    assert report(tmp_path)["scores"]["things"]["SQ"] == 100


def test_ids_of_images_may_be_texts_on_one_side(tmp_path):
    pair(tmp_path)
    expected = report(tmp_path)
    change(tmp_path, "pred", lambda c: [a.update(image_id=str(a["image_id"])) for a in c["annotations"]])
    assert report(tmp_path) == expected


def test_categories_may_be_written_with_a_point(tmp_path):
    pair(tmp_path)
    expected = report(tmp_path)
    change(
        tmp_path,
        "pred",
        lambda c: [s.update(category_id=float(s["category_id"])) for k in range(2) for s in segments(c, k)],
    )
    assert report(tmp_path) == expected


def test_pngs_may_lie_elsewhere(tmp_path):
    pair(tmp_path)
    expected = report(tmp_path)
    (tmp_path / "gt").rename(tmp_path / "masks")
    assert command(tmp_path) == 1
    assert report(tmp_path, f"--gt_masks={tmp_path}/masks") == expected


def segments(content, number):
    return content["annotations"][number]["segments_info"]


FAULTS = {
    "no prediction": (
        lambda folder: change(folder, "pred", lambda c: c["annotations"].pop()),
        "1 of 2 images have no prediction in",
    ),
    "no truth": (
        lambda folder: change(folder, "gt", lambda c: c["annotations"].pop()),
        "1 of 2 predicted images are not in",
    ),
    "unreadable": (
        lambda folder: (folder / "pred/1.png").unlink(),
        "pred/1.png cannot be read: there is no such file",
    ),
    "another size": (
        lambda folder: save(folder / "pred/1.png", np.full((3, 8), SCALE)),
        "pred/1.png is 3 x 8 (height x width), but the true",
    ),
    "JSON and PNG disagree": (
        lambda folder: change(folder, "pred", lambda c: segments(c, 1).pop()),
        f"pred/1.png, image 1: the PNG has the segment {3 * SCALE} that the JSON lacks",
    ),
    "unknown category": (
        lambda folder: change(folder, "pred", lambda c: segments(c, 1)[0].update(category_id=9)),
        "a predicted segment of the image 1 has the category_id 9, which is not among the categories of the truth",
    ),
}


@pytest.mark.parametrize("reason", FAULTS)
def test_a_faulty_image_stops_or_is_left_out_and_counted(tmp_path, capsys, reason):
    pair(tmp_path)
    damage, message = FAULTS[reason]
    damage(tmp_path)
    assert command(tmp_path) == 1
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and not out
    assert "--missing=skip leaves out what is faulty" in err
    assert command(tmp_path, "--missing=skip") == 0
    out = capsys.readouterr().out
    assert f"left out, {reason}: 1 (1)" in out and "images: 1\n" in out
    assert "all 100.00 100.00 100.00 2".split() in [line.split() for line in out.splitlines()]


def test_a_segment_that_the_predicted_png_lacks(tmp_path, capsys):
    pair(tmp_path)
    change(tmp_path, "pred", lambda c: segments(c, 0).append({"id": 9, "category_id": 10}))
    assert command(tmp_path) == 1
    assert "pred/0.png, image 0: the JSON has the segment 9 that the PNG lacks" in capsys.readouterr().err


def test_no_image_is_left(tmp_path, capsys):
    pair(tmp_path)
    for number in range(2):
        (tmp_path / f"gt/{number}.png").write_bytes(b"")
    assert command(tmp_path, "--missing=skip") == 1
    assert "no image of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.clear(), "it has no annotations, so it is not in COCO's panoptic format"),
        (lambda c: c.pop("categories"), "'categories': expected a list"),
        (lambda c: c["categories"][0].pop("isthing"), "category 0 has no 'isthing'"),
        (lambda c: c["categories"][0].update(id=11), "two categories have the same id"),
        (lambda c: c["annotations"][0].pop("file_name"), "annotation 0 has no 'file_name'"),
        (lambda c: c["annotations"][0].update(image_id=1), "it has two annotations for the image 1"),
        (
            lambda c: segments(c, 0)[0].update(category_id=9),
            "has the category_id 9, which 'categories' lacks",
        ),
        (lambda c: segments(c, 0)[0].update(id=2 * SCALE), "two segments of the image 0 have the id 140006"),
        (lambda c: segments(c, 0)[0].update(id=1 << 24), "image 0, segment 0: 'id': expected a whole number"),
        (lambda c: segments(c, 0)[0].update(iscrowd=2), "image 0, segment 0: 'iscrowd': expected true or"),
    ],
)
def test_what_is_no_panoptic_json(tmp_path, edit, message):
    pair(tmp_path)
    change(tmp_path, "gt", edit)
    with pytest.raises(UserError, match=r"gt\.json cannot be read: .*") as error:
        read_panoptic(str(tmp_path / "gt.json"))
    assert message in str(error.value)


def test_the_worst_panoptic_images_are_listed_and_drawn(tmp_path, capsys):
    left, lower = np.zeros((60, 80), int), np.zeros((60, 80), int)
    left[:, :40], left[:, 40:] = 1, 2
    lower[:30], lower[30:] = 1, 2
    twins, other = {1: 0, 2: 0}, {1: 0, 2: 3}
    void = np.where(np.arange(80) < 20, 0, left)
    images = [
        (left, left, other, other, ()),
        (left, lower, other, other, ()),  # no IoU is above 0.5
        (np.ones_like(left), left, {1: 0}, twins, ()),
        (left, void, other, other, ()),
    ]
    write(tmp_path, images)
    flags = (f"--sheet={tmp_path}/sheet.png", "--workers=1")
    worst = ["1 (0.0)", "2 (0.0)", "0 (100.0)", "3 (100.0)"]
    assert report(tmp_path, *flags)["facts"]["worst images"] == worst
    assert report(tmp_path, "--worst=2")["facts"]["worst images"] == worst[:2]
    assert "worst images" not in report(tmp_path)["facts"]
    plain = read_image(tmp_path / "sheet.png")
    # Without photographs: red where no segments match, all of two images; grey where the truth is void.
    red, grey = ((plain == colour).all(-1).sum() for colour in ((220, 60, 60), (225, 228, 232)))
    assert abs(red - 2 * 256 * 192) < 800 and abs(grey - 64 * 192) < 1000
    (tmp_path / "photos").mkdir()
    for k in range(4):
        Image.fromarray(np.full((60, 80, 3), 60 * k, np.uint8)).save(tmp_path / f"photos/{k}.jpg")
    assert command(tmp_path, *flags, f"--images={tmp_path}/photos") == 0
    drawn = read_image(tmp_path / "sheet.png")
    assert not (drawn == (220, 60, 60)).all(-1).any()
    (tmp_path / "photos/2.jpg").unlink()
    capsys.readouterr()
    assert command(tmp_path, *flags, f"--images={tmp_path}/photos") == 1
    assert "photos holds no image '2'" in capsys.readouterr().err
    for wrong, message in (
        ("--worst=0", "--worst=0 is less than 1"),
        ("--images=x", "--images is for --sheet, which is missing"),
        ("--sheet=x.jpg", "--sheet=x.jpg must end in .png"),
    ):
        assert command(tmp_path, wrong) == 1
        assert message in capsys.readouterr().err


def test_two_segments_of_a_class_are_parted_on_the_sheet():
    segments = np.repeat([[1, 1, 2, 2, 3]], 4, 0)
    classes = np.repeat([[7, 7, 7, 7, 5]], 4, 0)
    assert parted(classes, segments).tolist() == [[7, 7, -1, 7, 5]] * 4
    large = parted(
        np.repeat(np.repeat(classes, 200, 0), 200, 1), np.repeat(np.repeat(segments, 200, 0), 200, 1)
    )
    assert large.shape == (205, 256) and (large == -1).sum() == 205


def test_matches_are_those_that_the_tally_counts():
    rng = np.random.default_rng(0)
    for _ in range(30):
        predicted, true = (rng.integers(0, 5, (3, 4)).repeat(3, 0).repeat(3, 1) for _ in range(2))
        predicted = np.where(rng.random((9, 12)) < 0.8, true, predicted)
        classes = [rng.integers(0, 2, 4) for _ in range(2)]
        crowd = rng.random(4) < 0.2
        for rule in RULES:
            args = (overlaps(predicted, true), *classes, crowd, 2, rule)
            found = matches(*args)
            expected = [classes[1][t - 1] for t in found[1]]
            assert np.bincount(expected, minlength=2).tolist() == tally(*args).tp.tolist()
            for p, t in zip(*found, strict=True):
                inside, either = (predicted == p) & (true == t), (predicted == p) | (true == t)
                either &= (true > 0) | (rule != "coco")
                assert inside.sum() / either.sum() > 0.5 and classes[0][p - 1] == classes[1][t - 1]

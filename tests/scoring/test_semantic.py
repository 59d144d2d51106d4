"""`score semantic`, held to the rules of detectron2 and mmsegmentation, written anew, and to torchmetrics."""

import csv
import json

import numpy as np
import pytest
from extras import require
from PIL import Image

from ovseg_jax import score
from ovseg_jax.data.images import read_image
from ovseg_jax.scoring.label_maps import Rules, Values, count
from ovseg_jax.scoring.protocols import CONTEXT_59, PROTOCOLS, VOC


def write(folder, maps, ending=".png", palette=False):
    for name, values in maps.items():
        path = folder / f"{name}{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(np.asarray(values))
        if palette:
            picture = picture.convert("P")
            picture.putpalette(list(range(256)) * 3)
        picture.save(path)


def written(root, predictions, truths, kind=np.uint8, ending=".png"):
    for name, maps in (("pred", predictions), ("gt", truths)):
        write(root / name, {f"{k:03}": np.asarray(m).astype(kind) for k, m in enumerate(maps)}, ending)
    return root


def run(root, *flags):
    """The report of the command; --pred and --gt as `written` names them."""
    out = root / "report.json"
    given = [f"--pred={root}/pred", f"--gt={root}/gt", f"--json={out}", "--workers=1", *flags]
    assert score.main(["semantic", *given]) == 0
    return json.loads(out.read_text())


def complaint(capsys, root, *flags):
    given = [f"--pred={root}/pred", f"--gt={root}/gt", "--workers=1", *flags]
    capsys.readouterr()
    assert score.main(["semantic", *given]) == 1
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and err.count("\n") == 1
    return err


def matrix_of(predictions, truths, k):
    """Counts [truth, prediction], one pixel at a time; -1 in a truth is ignored, and in a prediction no class (K)."""
    matrix = np.zeros((k, k + 1), np.int64)
    for prediction, truth in zip(predictions, truths, strict=True):
        for p, t in zip(np.ravel(prediction), np.ravel(truth), strict=True):
            if t >= 0:
                matrix[t, p if p >= 0 else k] += 1
    return matrix


def detectron2s(matrix):
    """SemSegEvaluator.evaluate of detectron2 at present: IoU of a class counts if the class is in the truth."""
    k = len(matrix)
    hits, pos_gt = np.diag(matrix).astype(float), matrix.sum(1).astype(float)
    pos_pred = matrix[:, :k].sum(0).astype(float)
    acc, iou = np.full(k, np.nan), np.full(k, np.nan)
    acc_valid = pos_gt > 0
    acc[acc_valid] = hits[acc_valid] / pos_gt[acc_valid]
    union = pos_gt + pos_pred - hits
    iou_valid = acc_valid & (union > 0)
    iou[iou_valid] = hits[iou_valid] / union[iou_valid]
    return {
        "mIoU_gt": 100 * iou[iou_valid].sum() / iou_valid.sum(),
        "fwIoU": 100 * (iou[iou_valid] * (pos_gt / pos_gt.sum())[iou_valid]).sum(),
        "mACC": 100 * acc[acc_valid].sum() / acc_valid.sum(),
        "pACC": 100 * hits.sum() / pos_gt.sum(),
    }, 100 * iou


def mmsegmentations(matrix):
    """IoUMetric of mmsegmentation: nanmean over the classes whose union is not empty."""
    k = len(matrix)
    hits, label, guess = np.diag(matrix).astype(float), matrix.sum(1), matrix[:, :k].sum(0)
    with np.errstate(invalid="ignore"):
        iou, acc = hits / (label + guess - hits), hits / label
    return {
        "mIoU": 100 * np.nanmean(iou),
        "mACC": 100 * np.nanmean(acc),
        "pACC": 100 * hits.sum() / label.sum(),
    }, 100 * iou


def areas(rng, values, shape=(24, 31), side=6):
    """A map of areas, so that rows hold runs."""
    rows, columns = (-(-n // side) for n in shape)
    found = np.repeat(np.repeat(rng.choice(values, (rows, columns)), side, 0), side, 1)
    return found[: shape[0], : shape[1]]


def noise(rng, values, shape=(13, 17)):
    return rng.choice(values, shape)


@pytest.mark.parametrize("draw", [areas, noise])
@pytest.mark.parametrize(
    ("kind", "ending", "void", "k"),
    [
        (np.uint8, ".png", 255, 9),
        (np.uint8, ".bmp", 255, 150),
        (np.uint16, ".png", 65535, 847),
        (np.uint16, ".pgm", 65535, 300),
        (np.int32, ".tif", -1, 70000),
    ],
)
def test_scores_of_detectron2_and_mmsegmentation(tmp_path, draw, kind, ending, void, k):
    rng = np.random.default_rng(0)
    # The last classes are in no truth, and the last two in no prediction either; others are sparse.
    known = [*range(min(k - 4, 20)), k - 4]
    truths = [draw(rng, [-1, *known]) for _ in range(4)]
    predictions = [np.where(rng.random(t.shape) < 0.6, t, draw(rng, [*known, k - 3])) for t in truths]
    predictions = [np.where(p < 0, 1, p) for p in predictions]
    stored = [np.where(t < 0, void, t) for t in truths]
    written(tmp_path, predictions, stored, kind, ending)
    found = run(tmp_path, f"--num_classes={k}", f"--csv={tmp_path}/classes.csv")
    if k > 1000:  # the same classes, renumbered
        place = {value: i for i, value in enumerate([*known, k - 3, k - 2, k - 1])}
        truths, predictions = (
            [np.vectorize(lambda v: place.get(v, -1))(m) for m in s] for s in (truths, predictions)
        )
    matrix = matrix_of(predictions, truths, min(k, 1000) if k <= 1000 else len(place))
    (newer, each), (older, either) = detectron2s(matrix), mmsegmentations(matrix)
    for name, value in (newer | older).items():
        assert found["scores"]["all"][name] == pytest.approx(value, abs=1e-10), name
    assert found["scores"]["all"]["mIoU_all"] == pytest.approx(np.nansum(either) / k, abs=1e-10)
    assert found["scores"]["all"]["mIoU"] < found["scores"]["all"]["mIoU_gt"]
    facts = found["facts"]
    assert facts["classes in the truth"] == (~np.isnan(each)).sum()
    assert (
        facts["classes in truth or prediction"]
        == (~np.isnan(either)).sum()
        == facts["classes in the truth"] + 1
    )
    assert facts["labelled pixels"] == matrix.sum() and facts["ignored pixels"] == sum(
        (t < 0).sum() for t in truths
    )
    rows = list(csv.DictReader((tmp_path / "classes.csv").open()))
    assert len(rows) == k and rows == [
        {name: "" if value is None else str(value) for name, value in row.items()} for row in found["classes"]
    ]
    if k <= 1000:
        for row, value, label, guess in zip(rows, either, matrix.sum(1), matrix[:, :k].sum(0), strict=True):
            assert (row["IoU"] == "") == np.isnan(value) and (row["ACC"] == "") == (label == 0)
            assert np.isnan(value) or float(row["IoU"]) == pytest.approx(value, abs=1e-10)
            assert (int(row["pixels"]), int(row["predicted"])) == (label, guess)


def test_torchmetrics(tmp_path):
    torch, metrics = require("torch"), require("torchmetrics")
    rng = np.random.default_rng(1)
    truths = [areas(rng, [255, *range(6)]) for _ in range(5)]
    predictions = [np.where(rng.random(t.shape) < 0.5, t % 255, areas(rng, range(7))) for t in truths]
    found = run(written(tmp_path, predictions, truths), "--num_classes=8")
    joined = [
        torch.from_numpy(np.concatenate([m.ravel() for m in s]).astype(np.int64))
        for s in (predictions, truths)
    ]
    shape = {"task": "multiclass", "num_classes": 8, "ignore_index": 255}
    each = metrics.functional.jaccard_index(*joined, average="none", **shape).numpy()
    np.testing.assert_allclose([row["IoU"] or 0.0 for row in found["classes"]], 100 * each, rtol=1e-5)
    right = metrics.functional.accuracy(*joined, average="micro", **shape)
    assert found["scores"]["all"]["pACC"] == pytest.approx(100 * float(right), rel=1e-5)


def test_by_hand(tmp_path, capsys):
    truth, prediction = [[0, 0, 0, 0], [1, 1, 255, 255]], [[0, 0, 0, 2], [1, 9, 2, 2]]
    written(tmp_path, [prediction], [truth])
    assert score.main(["semantic", f"--pred={tmp_path}/pred", f"--gt={tmp_path}/gt", "--num_classes=4"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "class        IoU      ACC   pixels  predicted",
        "0          75.00    75.00        4          3",
        "1          50.00    50.00        2          1",
        "2           0.00        -        0          1",
        "3              -        -        0          0",
        "",
        "images: 1",
        "classes: 4",
        "classes in the truth: 2",
        "classes in truth or prediction: 3",
        "labelled pixels: 6",
        "ignored pixels: 2",
        "pixels predicted as no class: 1",
        "          mIoU  mIoU_gt  mIoU_all    fwIoU     mACC     pACC",
        "all      41.67    62.50     31.25    66.67    62.50    66.67",
    ]


def test_a_single_pair_of_files_and_a_palette(tmp_path):
    write(
        tmp_path, {"p": np.array([[0, 1, 1]], np.uint8), "t": np.array([[0, 1, 2]], np.uint8)}, palette=True
    )
    out = tmp_path / "r.json"
    assert not score.main(
        ["semantic", f"--pred={tmp_path}/p.png", f"--gt={tmp_path}/t.png", "--num_classes=3", f"--json={out}"]
    )
    assert [row["IoU"] for row in json.loads(out.read_text())["classes"]] == [100, 50, 0]


def scores_of(predictions, truths, k):
    """mIoU and pACC of maps of class indices, -1 for none."""
    older = mmsegmentations(matrix_of(predictions, truths, k))[0]
    return pytest.approx((older["mIoU"], older["pACC"]))


def both(found):
    return found["scores"]["all"]["mIoU"], found["scores"]["all"]["pACC"]


def pair(seed, k, shape=(9, 14)):
    """Class indices of a prediction and a truth, -1 where there is none."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(-1, k, shape)
    return np.where(rng.random(shape) < 0.6, truth, rng.integers(-1, k, shape)), truth


def test_ids_of_a_label_file(tmp_path):
    prediction, truth = pair(2, 3)
    ids = np.array([7, 3, 200, 99])  # the last is no class
    written(tmp_path, [ids[prediction]], [np.where(truth < 0, 255, ids[truth])])
    (tmp_path / "classes.txt").write_text("7:dog,hound\n3:sky\n200:tree\n")
    found = run(tmp_path, f"--classes={tmp_path}/classes.txt")
    assert both(found) == scores_of([prediction], [truth], 3)
    assert [row["class"] for row in found["classes"]] == ["dog", "sky", "tree"]
    assert found["facts"]["pixels predicted as no class"] == ((prediction < 0) & (truth >= 0)).sum() > 0


def test_a_list_of_names_counts_from_zero(tmp_path):
    prediction, truth = pair(3, 3)
    written(tmp_path, [prediction % 256], [truth % 256])
    (tmp_path / "names.txt").write_text("dog\nsky\ntree\n")
    assert both(run(tmp_path, f"--classes={tmp_path}/names.txt")) == scores_of([prediction], [truth], 3)


def test_zero_of_ade20k(tmp_path):
    prediction, truth = pair(4, 9)
    written(tmp_path, [np.maximum(prediction, 0)], [truth + 1])
    found = run(tmp_path, "--num_classes=150", "--reduce_zero_label")
    assert both(found) == scores_of([np.maximum(prediction, 0)], [truth], 150)
    assert found["facts"]["ignored pixels"] == (truth < 0).sum() > 0


def test_predictions_that_start_at_one_and_have_a_suffix(tmp_path):
    """The files of `predict`: 0 is unknown, k the k-th category."""
    prediction, truth = pair(5, 4)
    write(tmp_path / "pred", {"a": (prediction + 1).astype(np.uint8)}, ".labels.png")
    write(tmp_path / "pred", {"a": np.zeros((4, 4, 3), np.uint8)}, ".overlay.png")
    write(tmp_path / "gt", {"city/a": (truth % 256).astype(np.uint8)}, "_ids.png")
    write(tmp_path / "gt", {"city/a": np.zeros((4, 4, 3), np.uint8)}, "_color.png")
    flags = ("--pred_suffix=.labels.png", "--gt_suffix=_ids.png", "--pred_first=1", "--num_classes=4")
    assert both(run(tmp_path, *flags)) == scores_of([prediction], [truth], 4)


def test_values_that_are_ignored(tmp_path, capsys):
    prediction, truth = np.array([[0, 1, 1, 2]]), np.array([[0, 0, 65, 255]])
    written(tmp_path, [prediction], [truth])
    assert "gt/000.png has the value 65, which is neither a class nor ignored" in complaint(
        capsys, tmp_path, "--num_classes=3"
    )
    # What is named replaces the default.
    assert "has the value 255" in complaint(capsys, tmp_path, "--num_classes=3", "--ignore", "65")
    found = run(tmp_path, "--num_classes=3", "--ignore", "65", "255")
    assert found["facts"]["ignored pixels"] == 2 and found["scores"]["all"]["pACC"] == 50
    # A class of the number 255 is one, and a class may be ignored by its number.
    assert run(tmp_path, "--num_classes=256")["facts"]["ignored pixels"] == 0
    assert run(tmp_path, "--num_classes=256", "--ignore", "0")["facts"]["labelled pixels"] == 2


def test_classes_of_the_predictions_matched_by_name(tmp_path, capsys):
    """Predictions over a larger vocabulary, as in a transfer: what the data lack is wrong, or the class of --rest."""
    (tmp_path / "own.txt").write_text("0:background\n5:dog,hound\n6:sky\n")
    (tmp_path / "asked.txt").write_text("tree\nhound\nsky\ncar\n")
    truth = np.array([[0, 0, 5, 5, 6, 6, 255]])
    written(tmp_path, [np.array([[0, 3, 1, 2, 2, 77, 0]])], [truth])
    flags = (f"--classes={tmp_path}/own.txt", f"--pred_classes={tmp_path}/asked.txt")
    assert both(run(tmp_path, *flags)) == scores_of([[-1, -1, 1, 2, 2, -1, -1]], [[0, 0, 1, 1, 2, 2, -1]], 3)
    found = run(tmp_path, *flags, "--rest=background")
    assert both(found) == scores_of([[0, 0, 1, 2, 2, 0, 0]], [[0, 0, 1, 1, 2, 2, -1]], 3)
    assert found["facts"]["pixels predicted as no class"] == 0
    assert "--rest=wall is not one of the 3 classes" in complaint(capsys, tmp_path, *flags, "--rest=wall")
    (tmp_path / "asked.txt").write_text("tree\ncar\n")
    assert "asked.txt has no name of the classes, such as 'background'" in complaint(capsys, tmp_path, *flags)


def test_names_of_the_protocols():
    assert len(VOC) == 20 and len(set(VOC)) == 20 and len(CONTEXT_59) == 59 == len(set(CONTEXT_59))
    assert list(CONTEXT_59) == sorted(CONTEXT_59) and set(VOC) - set(CONTEXT_59) == {"diningtable"}


OF_CONTEXT = {"table" if name == "diningtable" else name: k for k, name in enumerate(VOC, 1)}


@pytest.mark.parametrize(
    ("protocol", "highest", "prediction_of", "ignored", "k"),
    [
        ("pas20", 19, lambda value: value, (0, 255), 20),
        ("pas21-openseg", 58, lambda value: OF_CONTEXT.get(CONTEXT_59[value], 0), (255,), 21),
        ("pas21-catseg", 58, lambda value: value + 1 if value < 20 else 0, (255,), 21),
        ("pas21-groupvit", 20, lambda value: value, (255,), 21),
    ],
)
def test_protocols(tmp_path, protocol, highest, prediction_of, ignored, k):
    """Every protocol on VOC's own maps, pixel by pixel."""
    rng = np.random.default_rng(6)
    stored = rng.choice([*range(21), 255], (23, 29))
    shown = rng.integers(0, highest + 1, stored.shape)
    truth = np.where(np.isin(stored, ignored), -1, stored - (k == 20))
    # Half of the predictions are right.
    meant = np.vectorize(prediction_of)(np.arange(highest + 1))
    for y, x in np.ndindex(stored.shape):
        if rng.random() < 0.5 and truth[y, x] >= 0:
            shown[y, x] = rng.choice(np.flatnonzero(meant == truth[y, x]))
    found = run(written(tmp_path, [shown], [stored]), f"--protocol={protocol}")
    assert both(found) == scores_of([meant[shown]], [truth], k)
    assert found["facts"]["protocol"] == protocol and found["facts"]["classes"] == k
    assert [row["class"] for row in found["classes"]] == [*(("background",) if k == 21 else ()), *VOC]
    assert protocol in PROTOCOLS and len(PROTOCOLS) == 4


def test_seen_and_unseen_classes(tmp_path):
    rng = np.random.default_rng(7)
    truth = rng.choice([*range(1, 18), 20, 255], (40, 50))
    prediction = np.where(rng.random(truth.shape) < 0.7, truth, rng.integers(1, 21, truth.shape)) - 1
    found = run(written(tmp_path, [prediction], [truth]), "--protocol=pas20", "--split=voc")["scores"]
    matrix = matrix_of([prediction], [np.where(truth == 255, -1, truth - 1)], 20)
    (_, each), (_, either) = detectron2s(matrix), mmsegmentations(matrix)
    unseen = [
        15,
        16,
        17,
        18,
        19,
    ]  # potted plant, sheep, sofa, train, tv monitor: sofa and train are in no truth
    for name, values in (("mIoU", either), ("mIoU_gt", each)):
        u, s = np.nanmean(values[unseen]), np.nanmean(np.delete(values, unseen))
        assert found["unseen"][name] == pytest.approx(u) and found["seen"][name] == pytest.approx(s)
        assert found["all"][f"h{name[1:]}"] == pytest.approx(2 * u * s / (u + s))
    assert found["unseen"]["mIoU"] < found["unseen"]["mIoU_gt"]
    assert "hIoU" not in run(tmp_path, "--protocol=pas20")["scores"]["all"]


def test_a_group_that_never_occurs_has_no_score(tmp_path):
    found = run(written(tmp_path, [[[0, 1]]], [[[0, 0]]]), "--num_classes=3", "--split=2")["scores"]
    assert found["unseen"] == {"mIoU": None, "mIoU_gt": None, "mIoU_all": 0}
    assert found["all"]["hIoU"] is None


def test_the_number_of_processes_does_not_change_the_report(tmp_path):
    rng = np.random.default_rng(8)
    truths = [areas(rng, range(5), (12, 12)) for _ in range(70)]
    predictions = [np.where(rng.random(t.shape) < 0.8, t, 0) for t in truths]
    written(tmp_path, predictions, truths)
    flags = ("--num_classes=5", "--worst=5")
    assert run(tmp_path, *flags) == run(tmp_path, *flags, "--workers=2")


def test_what_is_faulty_is_refused_or_counted(tmp_path, capsys):
    good = np.array([[0, 1], [1, 1]])
    written(tmp_path, [good] * 7, [good] * 7)
    (tmp_path / "pred/000.png").unlink()
    (tmp_path / "gt/001.png").unlink()
    write(tmp_path / "pred", {"002": np.zeros((2, 3), np.uint8)})
    write(tmp_path / "gt", {"003": np.full((2, 2), 77, np.uint8)})
    (tmp_path / "pred/004.png").write_bytes((tmp_path / "pred/005.png").read_bytes()[:-20])
    write(tmp_path / "pred", {"005": np.zeros((2, 2, 3), np.uint8)})
    assert (
        "1 of 6 truths have no prediction, such as '000'; --missing=skip leaves out what is faulty"
        in complaint(capsys, tmp_path, "--num_classes=2")
    )
    found = run(tmp_path, "--num_classes=2", "--missing=skip")
    assert {reason: left["names"] for reason, left in found["skipped"].items()} == {
        "no prediction": ["000"],
        "no truth": ["001"],
        "another size": ["002"],
        "unknown value": ["003"],
        "unreadable": ["004", "005"],
    }
    assert found["facts"]["images"] == 1 and found["scores"]["all"]["mIoU"] == 100
    given = [
        "semantic",
        f"--pred={tmp_path}/pred",
        f"--gt={tmp_path}/gt",
        "--num_classes=2",
        "--missing=skip",
    ]
    assert score.main(given) == 0
    assert "left out, unreadable: 2 (004, 005)" in capsys.readouterr().out
    for wrong, message in (
        (
            "002",
            "pred/002.png is 2 x 3 (height x width), but its truth {}/gt/002.png is 2 x 2; --missing=skip",
        ),
        ("003", "gt/003.png has the value 77, which is neither a class nor ignored: see --classes"),
        ("004", "pred/004.png cannot be read: it is cut off"),
        ("005", "pred/005.png cannot be read: it is a picture of mode RGB"),
    ):
        (tmp_path / "list.txt").write_text(f"006\n{wrong}\n")
        said = complaint(capsys, tmp_path, "--num_classes=2", f"--list={tmp_path}/list.txt")
        assert message.format(tmp_path) in said


def test_a_list_of_images(tmp_path):
    good, bad = np.array([[0, 1]]), np.array([[1, 0]])
    written(tmp_path, [good, bad, good], [good, good, good])
    (tmp_path / "val.txt").write_text("000\n002\n")
    assert run(tmp_path, "--num_classes=2", f"--list={tmp_path}/val.txt")["scores"]["all"]["pACC"] == 100


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give one of --classes=FILE, --num_classes=K and --protocol=NAME"),
        (["--num_classes=3", "--protocol=pas20"], "not --num_classes and --protocol"),
        (["--num_classes=0"], "--num_classes=0 is less than 1"),
        (["--protocol=pas20", "--ignore", "3"], "--ignore is part of --protocol=pas20"),
        (["--protocol=pas20", "--reduce_zero_label"], "--reduce_zero_label is part of --protocol=pas20"),
        (["--protocol=pas22"], "argument --protocol: invalid choice: 'pas22'"),
        (["--num_classes=3", "--split=dog"], "the unseen class 'dog' is not one of the 3 classes"),
        (["--num_classes=3", "--worst=0"], "--worst=0 is less than 1"),
        (["--num_classes=3", "--images=x"], "--images is for --sheet, which is missing"),
        (["--num_classes=3", "--sheet=x.jpg"], "--sheet=x.jpg must end in .png"),
        (["--num_classes=3", "--sheet=none/x.png"], "--sheet=none/x.png cannot be written"),
        (["--num_classes=3", "--csv=none/x.csv"], "--csv=none/x.csv cannot be written"),
        (["--num_classes=3", "--workers=0"], "--workers=0 is less than 1"),
        (["--num_classes=3", "--list=none.txt"], "none.txt cannot be read: there is no such file"),
        (["--num_classes=3", "--pred_suffix=.x.png"], "holds no file with the name that ends in .x.png"),
        (["--classes=none.txt"], "none.txt"),
    ],
)
def test_a_wrong_request_is_one_sentence(tmp_path, capsys, monkeypatch, flags, message):
    written(tmp_path, [[[0, 1]]], [[[0, 1]]])
    monkeypatch.chdir(tmp_path)
    assert message in complaint(capsys, tmp_path, *flags)


def test_nothing_to_score(tmp_path, capsys):
    written(tmp_path, [[[0, 1]], [[1, 1]]], [np.full((1, 2), 255)] * 2)
    assert "no pixel of 2 images is labelled with a class" in complaint(capsys, tmp_path, "--num_classes=2")
    for path in (tmp_path / "pred").iterdir():
        path.unlink()
    assert "--pred=" in (said := complaint(capsys, tmp_path, "--num_classes=2")) and "holds no file" in said
    assert "none is neither a folder nor a file" in complaint(
        capsys, tmp_path, f"--pred={tmp_path}/none", "--num_classes=2"
    )


def test_the_worst_images_are_listed_and_drawn(tmp_path, capsys):
    truth = np.zeros((30, 40), int)
    truth[10:20, 10:30] = 1
    half = np.where(np.arange(40) < 20, truth, 0)
    written(tmp_path, [truth, 1 - truth, half, truth], [truth, truth, truth, np.full_like(truth, 255)])
    flags = ("--num_classes=2", f"--sheet={tmp_path}/sheet.png")
    # The second is all wrong; the third has 100 of 200 pixels of class 1; the last has no labelled pixel.
    worst = ["001 (0.0)", f"002 ({100 * (0.5 + 10 / 11) / 2:.1f})", "000 (100.0)"]
    assert run(tmp_path, *flags)["facts"]["worst images"] == worst
    assert run(tmp_path, "--num_classes=2", "--worst=1")["facts"]["worst images"] == worst[:1]
    plain = read_image(tmp_path / "sheet.png")
    write(tmp_path / "photos", {f"{k:03}": np.full((30, 40, 3), 30 * k, np.uint8) for k in range(4)})
    run(tmp_path, *flags, f"--images={tmp_path}/photos")
    drawn = read_image(tmp_path / "sheet.png")
    assert min(plain.shape[:2]) > 100 and (drawn.shape != plain.shape or (drawn != plain).any())
    # Wrong pixels are red on the sheet without photographs.
    red = (plain == (220, 60, 60)).all(-1).sum()
    assert red > 0.3 * 256 * 192 and not (drawn == (220, 60, 60)).all(-1).any()
    write(tmp_path / "photos", {"001": np.zeros((4, 4, 3), np.uint8)})
    assert "photos/001.png is 4 x 4 (height x width), but its truth" in complaint(
        capsys, tmp_path, *flags, f"--images={tmp_path}/photos"
    )
    (tmp_path / "photos/001.png").unlink()
    assert "photos holds no image '001'" in complaint(capsys, tmp_path, *flags, f"--images={tmp_path}/photos")


def test_runs_and_a_histogram_of_all_pixels_agree():
    """The same pixels in areas and shuffled have the same counts."""
    rng = np.random.default_rng(9)
    truth, prediction = (areas(rng, [*range(5), 9], (40, 60), side) for side in (7, 11))
    rules = Rules(Values.of({k: k for k in range(5)}, [9]), Values.of({k: k for k in range(5)}), 5)
    order = rng.permutation(truth.size)
    shuffled = (m.ravel()[order].reshape(m.shape) for m in (prediction, truth))
    for one, other in zip(count(prediction, truth, rules), count(*shuffled, rules), strict=True):
        np.testing.assert_array_equal(one, other)

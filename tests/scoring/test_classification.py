"""`score classification`, held to counts of one image at a time, and to torchmetrics."""

import csv
import json

import numpy as np
import pytest
from extras import require

from ovseg_jax import score
from ovseg_jax.scoring.answers import read_answers


def write(path, found):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npz":
        np.savez(path, **found)
    else:
        path.write_text(json.dumps(found) if path.suffix == ".json" else found)
    return path


def run(tmp_path, pred, gt, *flags):
    given = [f"--pred={pred}", f"--gt={gt}", f"--json={tmp_path}/r.json", *flags]
    assert score.main(["classification", *given]) == 0
    return json.loads((tmp_path / "r.json").read_text())


def reference(label, ranked, k):
    """Scores of images whose classes are ranked, one image at a time."""
    right = {c: [] for c in range(k)}
    for y, order in zip(label, ranked, strict=True):
        right[y].append(order[0] == y)
    every = [r for own in right.values() for r in own]
    five = [y in list(order[:5]) for y, order in zip(label, ranked, strict=True)]
    return {
        "accuracy": pytest.approx(100 * sum(every) / len(every)),
        "accuracy@5": pytest.approx(100 * np.mean(five)) if k > 5 else None,
        "per_class": pytest.approx(100 * np.mean([sum(own) / len(own) for own in right.values() if own])),
    }


def drawn(seed, n=120, k=9):
    """Labels of unequal frequency, in which the last class lacks, and scores with some that are equal."""
    rng = np.random.default_rng(seed)
    label = np.minimum(rng.integers(0, k - 1, n), rng.integers(0, k - 1, n))
    return label, np.round(rng.normal(size=(n, k)) + 1.5 * (label[:, None] == np.arange(k)), 1)


def ranked(scores):
    return [sorted(range(len(row)), key=lambda j: (-row[j], j)) for row in scores]


NAMES = [f"class {c}" for c in "abcdefghi"]


@pytest.mark.parametrize("form", ["arrays", "named arrays", "json", "json list", "csv"])
def test_scores_of_every_form(tmp_path, form):
    label, scores = drawn(0)
    images, order = [f"{i}.jpg" for i in range(len(label))], np.random.default_rng(1).permutation(len(label))
    gt, flags = write(tmp_path / "gt.json", dict(zip(images, label.tolist(), strict=True))), []
    if form == "arrays":
        pred = write(tmp_path / "pred.npz", {"scores": scores})
    elif form == "named arrays":  # other orders of images and of classes
        turned = np.argsort(np.arange(9)[::-1])
        pred = write(
            tmp_path / "pred.npz",
            {"scores": scores[order][:, turned], "names": np.array(images)[order], "columns": turned},
        )
        scores = scores + np.linspace(1e-9, 0, 9)  # of equal scores the first class counts
        np.savez(pred, scores=scores[order][:, turned], names=np.array(images)[order], columns=turned)
    elif form == "json":
        pred = write(tmp_path / "pred.json", {images[i]: scores[i].tolist() for i in order})
    elif form == "json list":
        pred = write(tmp_path / "pred.json", scores.tolist())
    else:
        gt = write(
            tmp_path / "gt.csv",
            "image,class\n" + "".join(f"{i},{NAMES[y]}\n" for i, y in zip(images, label, strict=True)),
        )
        lines = [",".join([images[i], *map(str, scores[i])]) for i in order]
        pred = write(tmp_path / "pred.csv", "\n".join([",".join(["image", *NAMES]), *lines]) + "\n")
    found = run(tmp_path, pred, gt, *flags, f"--csv={tmp_path}/c.csv")
    assert found["scores"] == {"all": reference(label, ranked(scores), 9)}
    assert found["facts"] == {"images": 120, "classes": 9, "predictions of an unknown class": 0}
    rows = list(csv.DictReader((tmp_path / "c.csv").open()))
    if form == "named arrays":
        rows.reverse()
    assert [row["class"] for row in rows] == (NAMES if form == "csv" else [str(c) for c in range(9)])
    guess = np.array([r[0] for r in ranked(scores)])
    for c, row in enumerate(rows):
        n, right = (label == c).sum(), ((label == c) & (guess == c)).sum()
        assert (int(row["images"]), int(row["correct"])) == (n, right)
        assert row["accuracy"] == (str(100 * right / n) if n else "")


def test_torchmetrics(tmp_path):
    torch, metrics = require("torch"), require("torchmetrics")
    label, scores = drawn(2)
    label[:3] = 8  # torchmetrics counts a class without images as 0
    scores += np.random.default_rng(3).uniform(0, 0.01, scores.shape)  # without equal scores
    found = run(
        tmp_path, write(tmp_path / "p.npz", {"scores": scores}), write(tmp_path / "g.npz", {"classes": label})
    )["scores"]["all"]
    given = torch.from_numpy(scores), torch.from_numpy(label)
    for name, options in (
        ("accuracy", {"average": "micro"}),
        ("accuracy@5", {"average": "micro", "top_k": 5}),
        ("per_class", {"average": "macro"}),
    ):
        other = metrics.functional.accuracy(*given, task="multiclass", num_classes=9, **options)
        assert found[name] == pytest.approx(100 * float(other), rel=1e-5)


def test_classes_in_place_of_scores(tmp_path, capsys):
    gt = write(tmp_path / "gt.csv", "image,class\na,dog\nb,dog\nc,dog\nd,cat\n")
    pred = write(tmp_path / "pred.json", {"d": "cat", "c": "dog", "b": "hound", "a": "cat"})
    assert score.main(["classification", f"--pred={pred}", f"--gt={gt}"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "class     images  correct  accuracy",
        "cat            1        1    100.00",
        "dog            3        1     33.33",
        "",
        "images: 4",
        "classes: 2",
        "predictions of an unknown class: 1",
        "       accuracy  accuracy@5  per_class",
        "all       50.00           -      66.67",
    ]
    # A class list has more names of a class, and numbers.
    listed = write(tmp_path / "classes.txt", "4:dog,hound\n9:cat\n7:bird\n")
    found = run(tmp_path, pred, gt, f"--classes={listed}")
    assert found["scores"]["all"] == {"accuracy": 75, "accuracy@5": None, "per_class": pytest.approx(500 / 6)}
    assert found["facts"]["classes"] == 3
    numbers = write(
        tmp_path / "numbers.npz", {"classes": np.array([9, 4, 4, 9]), "names": np.array(list("abcd"))}
    )
    assert run(tmp_path, numbers, gt, f"--classes={listed}")["scores"] == found["scores"]


def test_names_of_digits_keep_their_zeros(tmp_path):
    gt = write(tmp_path / "gt.csv", "image,class\na,01\nb,1\n")
    pred = write(tmp_path / "pred.csv", "image,class\na,1\nb,1\n")
    found = run(tmp_path, pred, gt)
    assert found["scores"]["all"]["accuracy"] == 50 and found["facts"]["classes"] == 2
    as_json = write(tmp_path / "pred.json", {"a": "1", "b": "1"})
    assert run(tmp_path, as_json, gt)["scores"] == found["scores"]


def test_both_averages_over_data_sets(tmp_path):
    """Papers/000: the mean over classes for four sets and accuracy for others, or accuracy for all."""
    expected = []
    for k, name in enumerate(("oxford_pets", "eurosat", "dtd")):
        label, scores = drawn(10 + k)
        write(tmp_path / f"gt/{name}.npz", {"classes": label})
        write(tmp_path / f"pred/{name}.npz", {"scores": scores})
        expected.append(reference(label, ranked(scores), 9))
    found = run(tmp_path, tmp_path / "pred", tmp_path / "gt")
    assert list(found["scores"]) == ["dtd", "eurosat", "oxford_pets", "average of 3"]
    average = found["scores"].pop("average of 3")
    for row, own, main in zip(
        [found["scores"][name] for name in ("oxford_pets", "eurosat", "dtd")],
        expected,
        ("per_class", "accuracy", "accuracy"),
        strict=True,
    ):
        assert row == {**own, "main": own[main]}
    for key in ("accuracy", "accuracy@5", "per_class", "main"):
        assert average[key] == pytest.approx(np.mean([row[key] for row in found["scores"].values()]))
    assert average["main"] != average["accuracy"]
    assert found["facts"]["data sets"] == 3 and found["classes"][0]["class"] == "dtd/0"
    (tmp_path / "gt/oxford_pets.npz").rename(tmp_path / "gt/pets.npz")
    (tmp_path / "pred/oxford_pets.npz").rename(tmp_path / "pred/pets.npz")
    assert "main" not in run(tmp_path, tmp_path / "pred", tmp_path / "gt")["scores"]["pets"]


def test_what_is_missing_is_refused_or_counted(tmp_path, capsys):
    gt = write(tmp_path / "gt.json", {"a": 1, "b": 0, "c": 1})
    pred = write(tmp_path / "pred.json", {"a": 1, "c": 0, "x": 1})
    assert score.main(["classification", f"--pred={pred}", f"--gt={gt}"]) == 1
    assert "1 images of" in (said := capsys.readouterr().err) and "have no prediction, such as 'b'" in said
    found = run(tmp_path, pred, gt, "--missing=skip")
    assert found["skipped"] == {
        "no prediction": {"count": 1, "names": ["b"]},
        "no truth": {"count": 1, "names": ["x"]},
    }
    assert found["scores"]["all"]["accuracy"] == 50 and found["facts"]["images"] == 2
    listed = write(tmp_path / "one.txt", "1:dog\n")
    flags = ["classification", f"--pred={gt}", f"--gt={gt}", f"--classes={listed}"]
    assert score.main(flags) == 1
    assert "gt.json: 0 is not one of the 1 classes; --missing=skip" in capsys.readouterr().err
    assert run(tmp_path, gt, gt, f"--classes={listed}", "--missing=skip")["skipped"]["unknown class"][
        "names"
    ] == ["b"]


GT = {"a": 0, "b": 1}


@pytest.mark.parametrize(
    ("pred", "gt", "message"),
    [
        (GT, {"a": [1, 2], "b": [2, 1]}, "gt.json holds scores, not classes"),
        ({}, GT, "pred.json cannot be read: it holds no image"),
        (5, GT, "pred.json cannot be read: expected an object or a list, got 5"),
        ({"a": None, "b": 1}, GT, "expected a class, a text or a whole number, got None"),
        ({"a": 0.5, "b": 1}, GT, "expected a class, a text or a whole number, got 0.5"),
        ({"a": True, "b": 1}, GT, "got True"),
        ({"a": [1, 2], "b": 1}, GT, "expected a class, a text or a whole number, got [1, 2]"),
        ({"a": [1, 2], "b": [1]}, GT, "its images have 2 and 1 scores"),
        ({"a": [], "b": []}, GT, "its images have 0 and 0 scores"),
        ({"a": [1, "x"], "b": [1, 2]}, GT, "expected a score, got 'x'"),
        ({"a": [1, float("nan")], "b": [1, 2]}, GT, "it holds scores that are not finite"),
        ([0], GT, "pred.json has 1 images and {}/gt.json 2: they match by their order"),
        ({"x": 0}, GT, "2 images of {}/gt.json have no prediction, such as 'a'"),
        (
            {"a": "dog", "b": "cat"},
            GT,
            "no predicted class is one of the 2 classes, such as '0': the first is 'dog'",
        ),
        (
            {"a": [1, 2], "b": [2, 1]},
            {"a": "dog", "b": "cat"},
            "mix names and numbers of classes: give --classes=FILE",
        ),
        ({"a": [1, 2], "b": [2, 1]}, {"a": 0, "b": 2}, "gt.json: 2 is not one of the 2 classes"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path, capsys, pred, gt, message):
    pred, gt = write(tmp_path / "pred.json", pred), write(tmp_path / "gt.json", gt)
    assert score.main(["classification", f"--pred={pred}", f"--gt={gt}"]) == 1
    out, err = capsys.readouterr()
    assert not out and message.format(tmp_path) in err and err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "found", "message"),
    [
        ("a.csv", "", "expected a line of titles, such as image,class"),
        ("a.csv", "image\na\n", "expected a line of titles"),
        ("a.csv", "image,class\n", "it holds no image"),
        ("a.csv", "image,class\na,1\nb\n", "its titles are 2 cells, and its line 3 has 1"),
        ("a.csv", "image,class\na,1\na,2\n", "it names the image 'a' twice"),
        ("a.csv", "image,dog,dog\na,1,2\n", "it names the class 'dog' twice"),
        ("a.csv", "image,dog,cat\na,1,x\n", "expected a score, got 'x'"),
        ("a.csv", 'image,class\n"a,1\n', "it is not valid CSV"),
        ("a.npz", {"x": np.ones(2)}, "expected either 'classes' or 'scores', found x"),
        ("a.npz", {"classes": np.ones(2)}, "'classes' has the dtype float64 and the shape (2,)"),
        ("a.npz", {"scores": np.ones(2)}, "'scores' has the dtype float64 and the shape (2,)"),
        ("a.npz", {"scores": np.ones((2, 3)), "columns": np.arange(2)}, "not 3 texts or whole numbers"),
        ("a.npz", {"classes": np.arange(2), "names": np.arange(3)}, "not 2 texts or whole numbers"),
        ("a.txt", "a 1\n", "must end in .json, .csv or .npz"),
    ],
)
def test_what_is_no_file_of_answers(tmp_path, name, found, message):
    with pytest.raises(Exception, match=r"--pred: .*a\.") as caught:
        read_answers(write(tmp_path / name, found), "--pred:")
    assert type(caught.value).__name__ == "UserError" and message in str(caught.value)


def test_columns_that_do_not_fit_the_classes(tmp_path, capsys):
    listed = write(tmp_path / "classes.txt", "0:dog,hound\n1:cat\n")
    gt = write(tmp_path / "gt.json", ["dog", "cat"])
    for titles, message in (
        ("dog,bird", "its column 'bird' is not one of the 2 classes"),
        ("dog,hound", "two of its columns are the same class"),
    ):
        pred = write(tmp_path / "pred.csv", f"image,{titles}\na,1,0\nb,0,1\n")
        assert score.main(["classification", f"--pred={pred}", f"--gt={gt}", f"--classes={listed}"]) == 1
        assert message in capsys.readouterr().err
    pred = write(tmp_path / "pred.json", [[1, 0, 0], [0, 1, 0]])
    assert score.main(["classification", f"--pred={pred}", f"--gt={gt}", f"--classes={listed}"]) == 1
    assert "has scores of 3 classes, but there are 2" in capsys.readouterr().err
    # Fewer columns than classes are fine: the others are never predicted.
    pred = write(tmp_path / "pred.csv", "image,class,cat\na,1,0\nb,0,1\n".replace("class", "hound"))
    assert run(tmp_path, pred, gt, f"--classes={listed}")["scores"]["all"]["accuracy"] == 100

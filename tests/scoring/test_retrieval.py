"""`score retrieval`, held to a ranking of every query by itself in float64."""

import json

import numpy as np
import pytest

from ovseg_jax import score
from ovseg_jax.evals import recall


def run(tmp_path, pred, *flags, gt=None):
    np.savez(tmp_path / "pred.npz", **pred)
    given = [f"--pred={tmp_path}/pred.npz", f"--json={tmp_path}/r.json", *flags]
    if gt is not None:
        np.savez(tmp_path / "gt.npz", **gt)
        given.append(f"--gt={tmp_path}/gt.npz")
    assert score.main(["retrieval", *given]) == 0
    return json.loads((tmp_path / "r.json").read_text())


def reference(scores, owner):
    """Recalls of a score matrix [image, text], one query at a time; equal scores of others come first."""
    scores, n = np.asarray(scores, np.float64), len(scores)
    found = {}
    for way, queries in (("image to text", range(n)), ("text to image", range(len(owner)))):
        hits = {1: [], 5: [], 10: []}
        for q in queries:
            row = scores[q] if way == "image to text" else scores[:, q]
            right = [
                j for j in range(len(row)) if (owner[j] == q if way == "image to text" else j == owner[q])
            ]
            if not right:
                continue
            order = sorted(range(len(row)), key=lambda j: (-row[j], j in right))
            for k, hit in hits.items():
                hit.append(any(j in right for j in order[:k]))
        found[way] = {f"R@{k}": pytest.approx(100 * np.mean(hit)) for k, hit in hits.items()}
    return found


def vectors(seed, images, owner, dim=12, noise=1.0):
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(images, dim))
    text = image[owner] + noise * rng.normal(size=(len(owner), dim))
    scale = lambda x: x * rng.uniform(0.1, 9, (len(x), 1))
    return scale(image), scale(text)


def cosine(image, text):
    unit = lambda x: (
        np.asarray(x, np.float64) / np.linalg.norm(np.asarray(x, np.float64), axis=1, keepdims=True)
    )
    return unit(image) @ unit(text).T


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_five_captions_an_image(tmp_path, kind):
    owner = np.arange(200) // 5
    image, text = (v.astype(kind) for v in vectors(0, 40, owner))
    found = run(tmp_path, {"images": image, "texts": text}, "--captions=5")
    expected = reference(cosine(image, text), owner)
    assert found["scores"] == expected
    assert 10 < found["scores"]["text to image"]["R@1"] < found["scores"]["image to text"]["R@1"] < 100
    assert found["facts"] == {"images": 40, "texts": 200, "texts of an image": 5, "images without text": 0}


def test_any_number_of_captions_in_any_order(tmp_path, monkeypatch):
    rng = np.random.default_rng(1)
    owner = rng.integers(0, 30, 80)
    owner[owner == 7] = 8  # image 7 has no text
    image, text = vectors(1, 30, owner)
    expected = reference(cosine(image, text), owner)
    pred = {"images": image, "texts": text}
    found = run(tmp_path, pred, gt={"image_of_text": owner})
    assert found["scores"] == expected
    own = np.bincount(owner, minlength=30)
    assert found["facts"]["images without text"] == (own == 0).sum() >= 1
    assert found["facts"]["texts of an image"] == f"{own[own > 0].min()} to {own.max()}"
    ids = rng.permutation(10_000)[:30]
    for kind in (np.int64, str):
        by_id = {"image_ids": ids.astype(kind), "text_image_ids": ids[owner].astype(kind)}
        assert run(tmp_path, pred, gt=by_id) == found
    # All in one file, as scores, and in blocks of three queries.
    scores = {"scores": cosine(image, text), "image_of_text": owner}
    np.savez(tmp_path / "pred.npz", **scores)
    assert run(tmp_path, scores, f"--gt={tmp_path}/pred.npz") == found
    monkeypatch.setattr(recall, "_BLOCK", 250)
    assert run(tmp_path, pred, gt={"image_of_text": owner}) == found


def test_products_of_vectors_as_they_are(tmp_path):
    owner = np.arange(30)
    image, text = vectors(2, 30, owner)
    pred = {"images": image, "texts": text}
    found = run(tmp_path, pred, "--captions=1", "--dot")["scores"]
    assert (
        found == reference(image @ text.T, owner) and found != run(tmp_path, pred, "--captions=1")["scores"]
    )


def test_equal_scores_count_against(tmp_path, capsys):
    """A model that says the same of all pairs finds nothing; whole numbers are scores, too."""
    scores = np.zeros((3, 6), int)
    nothing = {"R@1": 0, "R@5": 100, "R@10": 100}
    found = run(tmp_path, {"scores": scores}, "--captions=2")["scores"]
    # Four texts are of other images; two images are other images.
    assert found == {"image to text": nothing, "text to image": nothing}
    scores = np.array([[2, 1, 1], [2, 2, 0], [0, 0, 5]])
    found = run(tmp_path, {"scores": scores}, "--captions=1")["scores"]
    assert found == reference(scores, np.arange(3))
    assert found["image to text"]["R@1"] == pytest.approx(200 / 3) and found["text to image"][
        "R@1"
    ] == pytest.approx(200 / 3)
    capsys.readouterr()
    assert score.main(["retrieval", f"--pred={tmp_path}/pred.npz", "--captions=1"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "images: 3",
        "texts: 3",
        "texts of an image: 1",
        "images without text: 0",
        "                     R@1      R@5     R@10",
        "image to text      66.67   100.00   100.00",
        "text to image      66.67   100.00   100.00",
    ]


ONES = np.ones((2, 3))
OF = {"image_of_text": np.arange(2)}


@pytest.mark.parametrize(
    ("pred", "gt", "flags", "message"),
    [
        ({"scores": ONES}, None, [], "give one of --gt=FILE.npz and --captions=K"),
        ({"scores": ONES}, OF, ["--captions=1"], "give one of --gt=FILE.npz and --captions=K"),
        ({"scores": ONES}, None, ["--captions=2"], "--captions=2 does not fit the 2 images and 3 texts of"),
        ({"scores": ONES}, None, ["--captions=0"], "--captions=0 does not fit"),
        ({"x": ONES}, OF, [], "expected either 'scores' or 'images' and 'texts', found x"),
        ({"scores": ONES, "texts": ONES}, OF, [], "expected either 'scores' or"),
        ({"images": ONES}, OF, [], "it has no array 'texts'"),
        ({"images": ONES, "texts": ONES[:, :2]}, OF, [], "'images' has 3 dimensions and 'texts' 2"),
        ({"images": ONES, "texts": ONES * [[1], [0]]}, OF, [], "row 1 of 'texts' has no direction"),
        (
            {"images": ONES, "texts": np.full((2, 3), np.nan)},
            OF,
            [],
            "'texts' holds numbers that are not finite",
        ),
        (
            {"scores": ONES[0]},
            OF,
            [],
            "'scores' has the dtype float64 and the shape (3,), not two dimensions",
        ),
        ({"scores": np.zeros((0, 3))}, OF, [], "the shape (0, 3), not two dimensions of numbers"),
        ({"scores": ONES.astype(str)}, OF, [], "'scores' has the dtype <U"),
        ({"scores": ONES[:, :2]}, OF, ["--dot"], "it holds scores: --dot is for vectors"),
        (
            {"scores": ONES},
            OF,
            [],
            "'image_of_text' has the dtype int64 and the shape (2,), not 3 whole numbers",
        ),
        (
            {"scores": ONES[:, :2]},
            {"image_of_text": np.array([0, 2])},
            [],
            "'image_of_text' has a value outside 0..1",
        ),
        ({"scores": ONES[:, :2]}, {"image_of_text": np.array([-1, 0])}, [], "has a value outside 0..1"),
        ({"scores": ONES[:, :2]}, {"y": ONES}, [], "expected 'image_of_text', or 'image_ids' and"),
        (
            {"scores": ONES[:, :2]},
            {"image_ids": np.array([4, 4]), "text_image_ids": np.array([4, 4])},
            [],
            "'image_ids' names an image twice",
        ),
        (
            {"scores": ONES[:, :2]},
            {"image_ids": np.array([4, 5]), "text_image_ids": np.array([4, 6])},
            [],
            "1 of 'text_image_ids' are not among 'image_ids', such as 6",
        ),
        (
            {"scores": ONES[:, :2]},
            {"image_ids": np.array([4.5, 5]), "text_image_ids": np.array([4, 5])},
            [],
            "'image_ids' has the dtype float64 and the shape (2,), not 2 whole numbers or texts",
        ),
    ],
)
def test_a_wrong_request_is_one_sentence(tmp_path, capsys, pred, gt, flags, message):
    np.savez(tmp_path / "pred.npz", **pred)
    if gt is not None:
        np.savez(tmp_path / "gt.npz", **gt)
        flags = [*flags, f"--gt={tmp_path}/gt.npz"]
    assert score.main(["retrieval", f"--pred={tmp_path}/pred.npz", *flags]) == 1
    out, err = capsys.readouterr()
    assert not out and message in err and err.startswith("error: ") and err.count("\n") == 1


def test_a_file_that_is_missing(tmp_path, capsys):
    assert score.main(["retrieval", f"--pred={tmp_path}/none.npz", "--captions=1"]) == 1
    assert "none.npz cannot be read: there is no such file" in capsys.readouterr().err

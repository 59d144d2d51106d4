"""The command, with a classifier that knows colours, and with a random one on photographs."""

import json
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_method import CLASSES, COLOURS, FAKES, ColourMethod
from ml_collections import ConfigDict
from PIL import Image

from ovseg_jax import methods, score
from ovseg_jax.experiment import box_classes
from ovseg_jax.experiment.run import CLASSES_FILE, WORDS_FILE
from ovseg_jax.files import locked_file
from ovseg_jax.train.checkpoints import Checkpoints, write_config
from ovseg_jax.train.state import TrainState
from ovseg_jax.vocab.words import WordList
from tests.methods.test_prompt_tuning import config

SAMPLE = Path(__file__).parents[2] / "../shared/data/coco_sample"
CATEGORIES = [{"id": k, "name": name} for k, name in ((4, "yellow"), (2, "red"), (7, "blue"))]


def write_run(workdir, config, words, classes, variables):
    """A run as training leaves it."""
    workdir.mkdir()
    write_config(workdir, config)
    words.save(workdir / WORDS_FILE)
    (workdir / CLASSES_FILE).write_text(classes.to_json())
    rest = {key: tree for key, tree in variables.items() if key != "params"}
    checkpoints = Checkpoints(workdir, every=0, keep=1)
    checkpoints.save(3, TrainState(jnp.int32(3), variables["params"], rest, {"none": jnp.zeros(1)}, None))
    checkpoints.close()
    return workdir


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Runs of fake methods; images of coloured boxes on black, their annotations and some proposals."""
    root = tmp_path_factory.mktemp("boxes")
    for name in ("colours", "masks"):
        own = ConfigDict({"method": name, "data": {"image_size": 8}})
        write_run(root / name, own, WordList(list(COLOURS)), CLASSES, ColourMethod().init(None))
    (root / "images").mkdir()
    rng = np.random.default_rng(0)
    images, annotations, proposals = [], [], []
    for i in range(1, 5):
        image = np.zeros((64, 96, 3), np.uint8)
        for column in range(3):
            category = CATEGORIES[rng.integers(3)]
            x, y, w, h = column * 32 + rng.integers(6), *rng.integers(4, 12, 1), *rng.integers(12, 26, 2)
            image[y : y + h, x : x + w] = COLOURS[category["name"]]
            box = [int(v) for v in (x, y, w, h)]
            number = len(annotations) + 1
            annotations.append(
                dict(
                    id=number,
                    image_id=i,
                    category_id=category["id"],
                    bbox=box,
                    area=box[2] * box[3],
                    iscrowd=0,
                )
            )
            proposals.append(dict(image_id=i, bbox=box, score=0.8))
            # The detector is less sure of half an object.
            proposals.append(dict(image_id=i, bbox=[*box[:2], box[2] // 2, box[3]], score=0.1))
        Image.fromarray(image).save(root / "images" / f"{i}.png")
        images.append(dict(id=i, width=96, height=64, file_name=f"{i}.png"))
    whole = dict(images=images, annotations=annotations, categories=CATEGORIES)
    (root / "annotations.json").write_text(json.dumps(whole))
    (root / "boxes.json").write_text(json.dumps(proposals))
    (root / "names.txt").write_text("red\nblue\n")
    return root


@pytest.fixture
def run(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(methods, "METHODS", methods.METHODS | FAKES)

    def call(**flags):
        known = {
            "checkpoint": root / "colours",
            "images": root / "images",
            "boxes": root / "boxes.json",
            "classes": root / "annotations.json",
            "out": tmp_path / "results.json",
            "batch": 16,
        }
        flags = {name: value for name, value in (known | flags).items() if value is not None}
        code = score.main(["classify_boxes", *(f"--{name}={value}" for name, value in flags.items())])
        return code, capsys.readouterr()

    return call


def read_scores(out):
    (line,) = (line for line in out.splitlines() if line.startswith("AP "))
    pairs = (pair.split() for pair in line.split("  "))
    return {name: float(score.replace("-", "nan")) for name, score in pairs}


def test_a_perfect_classifier_has_a_perfect_score(run, root, tmp_path):
    code, out = run(annotations=root / "annotations.json", template="{}")
    assert code == 0
    scores = read_scores(out.out)
    assert scores["AP"] == scores["AP50"] == scores["AP75"] == 100
    results = json.loads((tmp_path / "results.json").read_text())
    best = [r for r in results if r["score"] > 0.5]
    truth = json.loads((root / "annotations.json").read_text())["annotations"]
    key = lambda entry: (entry["image_id"], entry["category_id"], *entry["bbox"])
    assert sorted(map(key, best)) == sorted(map(key, truth))
    # sqrt(0.8 * 1) and sqrt(0.1 * 1): the classes are told apart beyond doubt.
    np.testing.assert_allclose([r["score"] for r in best], 0.8**0.5, atol=1e-3)
    assert any(abs(r["score"] - 0.1**0.5) < 1e-3 for r in results)


def test_a_prompt_that_takes_red_for_another_class(run, root):
    """The method's own prompt calls green blue: with green in place of red, no box is called blue for sure."""
    content = json.loads((root / "annotations.json").read_text())
    content["categories"][1]["name"] = "green"
    (root / "other.json").write_text(json.dumps(content))
    code, out = run(classes=root / "other.json", annotations=root / "other.json")
    assert code == 0
    assert 10 < read_scores(out.out)["AP"] < 90


def test_without_annotations(run, root, tmp_path):
    code, out = run(classes=root / "names.txt", max_boxes=2, template="{}")
    assert code == 0 and out.out.count("\n") == 1
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results) == 8 and {r["category_id"] for r in results} == {1, 2}
    assert results[0].keys() == {"image_id", "category_id", "bbox", "score"}


def test_a_command_that_was_stopped_does_the_images_that_are_missing(run, root, tmp_path, monkeypatch):
    assert run(template="{}")[0] == 0
    expected = (tmp_path / "results.json").read_text()
    (tmp_path / "results.json").unlink()
    whole, count = box_classes.detect, []

    def stopped(*args):
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(box_classes, "detect", stopped)
    assert run(template="{}")[0] == 130 and not (tmp_path / "results.json").exists()
    assert run(template="{}")[0] == 0 and len(count) == 3 + 2
    assert (tmp_path / "results.json").read_text() == expected
    assert {path.name for path in tmp_path.iterdir()} == {"results.json"}


def test_two_commands_and_one_file(run, tmp_path):
    with locked_file(tmp_path / "results.json"):
        code, out = run(template="{}")
    assert code == 1 and "results.json is in use by process" in out.err and not list(tmp_path.iterdir())
    code, out = run(template="{}", out="/dev/stdout")
    assert code == 1 and "/dev/stdout is a device: give a file" in out.err


def test_all_is_checked_before_the_model_is_loaded(run, root, tmp_path, monkeypatch):
    """F9: AP of a box of an image that the annotations lack failed when all was done."""
    content = json.loads((root / "annotations.json").read_text())
    content["images"] = content["images"][1:]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 1]
    (tmp_path / "fewer.json").write_text(json.dumps(content))
    monkeypatch.setattr(box_classes, "load_run", None)
    code, out = run(annotations=tmp_path / "fewer.json")
    assert code == 1 and "boxes of the image 1, which --annotations does not list" in out.err
    code, out = run(out=root / "boxes.json")
    assert code == 1 and "is also the input of --boxes" in out.err
    assert {path.name for path in tmp_path.iterdir()} == {"fewer.json"}


def test_images_without_boxes_count_as_missed(run, root, tmp_path):
    boxes = json.loads((root / "boxes.json").read_text())
    (tmp_path / "few.json").write_text(json.dumps([box for box in boxes if box["image_id"] < 3]))
    _, out = run(boxes=tmp_path / "few.json", annotations=root / "annotations.json", template="{}")
    assert "2 of the 4 annotated images have no boxes" in out.out
    assert "AP50 100.00" not in out.out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"checkpoint": "masks"}, "does not classify images"),
        ({"images": "nowhere"}, "is not a folder"),
        ({"boxes": "annotations.json"}, "is not a list of boxes"),
        ({"boxes": "elsewhere.json"}, "holds no image with the id 99"),
        (
            {"classes": "names.txt", "annotations": "annotations.json"},
            "has no category 1, which --classes calls 'red'",
        ),
        ({"annotations": "boxes.json"}, "needs lists of images, annotations and categories"),
        ({"batch": 0}, "--batch=0"),
        ({"max_boxes": 0}, "--max_boxes=0"),
        ({"out": "nowhere/results.json"}, "cannot be written"),
    ],
)
def test_a_wrong_request_is_one_sentence(run, root, monkeypatch, flags, message):
    monkeypatch.chdir(root)
    (root / "elsewhere.json").write_text('[{"image_id": 99, "bbox": [0, 0, 1, 1]}]')
    code, out = run(**flags)
    assert code == 1 and message in out.err and out.err.count("\n") == 1


def instances(sample):
    """The things of the sample's panoptic annotations as COCO's instances: the boxes of single objects."""
    panoptic = json.loads((sample / "annotations/panoptic_val2017.json").read_text())
    things = [c for c in panoptic["categories"] if c["isthing"]]
    known = {c["id"] for c in things}
    annotations = [
        {
            "id": s["id"],
            "image_id": a["image_id"],
            **{k: s[k] for k in ("category_id", "bbox", "area", "iscrowd")},
        }
        for a in panoptic["annotations"]
        for s in a["segments_info"]
        if s["category_id"] in known
    ]
    return {"images": panoptic["images"], "annotations": annotations, "categories": things}


@pytest.mark.skipif(not SAMPLE.exists(), reason="the sample of COCO is not here")
def test_photographs_under_a_random_classifier(run, tmp_path):
    truth = instances(SAMPLE)
    (tmp_path / "instances.json").write_text(json.dumps(truth))
    single = [a for a in truth["annotations"] if not a["iscrowd"]]
    boxes = [{"image_id": a["image_id"], "bbox": a["bbox"], "score": 1} for a in single]
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    words = WordList(sorted({word for c in truth["categories"] for word in c["name"].split()}))
    own = config(**{"loss.sample": 0})
    method = methods.build(own, words, CLASSES)
    workdir = write_run(tmp_path / "random", own, words, CLASSES, method.init(jax.random.key(0)))
    code, out = run(
        checkpoint=workdir,
        images=SAMPLE / "val2017",
        boxes=tmp_path / "boxes.json",
        classes=tmp_path / "instances.json",
        annotations=tmp_path / "instances.json",
        batch=64,
    )
    assert code == 0, out.err
    scores = read_scores(out.out)
    results = json.loads((tmp_path / "results.json").read_text())
    images = {a["image_id"] for a in single}
    count = Counter(r["image_id"] for r in results)
    assert set(count) == images and max(count.values()) == 100
    # The one box of this image has all 80 classes, with the roots of their probabilities.
    assert (
        sum(r["score"] ** 2 for r in results if r["image_id"] == 285) == pytest.approx(1) and count[285] == 80
    )
    assert {tuple(r["bbox"]) for r in results} <= {tuple(a["bbox"]) for a in single}
    # All boxes are where objects are; which of 80 names they have is left to chance.
    assert 0 < scores["AP"] <= scores["AP50"] < 30

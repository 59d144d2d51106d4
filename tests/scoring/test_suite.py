"""The command, on tiny folders, around a classifier whose answers are known."""

import csv
import json

import jax.numpy as jnp
import numpy as np
import pytest
from fake_method import CLASSES, COLOURS, FAKES, ColourClassifier, ColourMethod
from ml_collections import ConfigDict
from PIL import Image

from ovseg_jax import methods
from ovseg_jax import score as command
from ovseg_jax.experiment import scores as score
from ovseg_jax.experiment.run import CLASSES_FILE, WORDS_FILE
from ovseg_jax.files import locked_file
from ovseg_jax.train.checkpoints import Checkpoints, write_config
from ovseg_jax.train.state import TrainState
from ovseg_jax.vocab.templates import HARD
from ovseg_jax.vocab.words import WordList


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    """A run of each fake method, as training leaves it."""
    root = tmp_path_factory.mktemp("runs")
    for name, method in (("colours", ColourClassifier()), ("masks", ColourMethod())):
        workdir = root / name
        workdir.mkdir()
        write_config(workdir, ConfigDict({"method": name, "data": {"image_size": 8}}))
        WordList(list(COLOURS)).save(workdir / WORDS_FILE)
        (workdir / CLASSES_FILE).write_text(CLASSES.to_json())
        checkpoints = Checkpoints(workdir, every=0, keep=1)
        checkpoints.save(
            3, TrainState(jnp.int32(3), method.init(None)["params"], {}, {"none": jnp.zeros(1)}, None)
        )
        checkpoints.close()
    return root


@pytest.fixture
def run(workdirs, tmp_path, monkeypatch):
    monkeypatch.setattr(methods, "METHODS", FAKES)
    (tmp_path / "sets").mkdir()

    def call(**flags):
        known = {
            "checkpoint": workdirs / "colours",
            "data_dir": tmp_path / "sets",
            "out": tmp_path / "out.csv",
        }
        flags = {"batch": 4} | known | flags
        return command.main(["suite", *(f"--{name}={value}" for name, value in flags.items())])

    return call


def write_set(folder, **counts):
    """A folder of images of one colour for each class, and a dot of another."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            image = np.full((10, 12, 3), COLOURS[name], np.uint8)
            image[i % 10, 5] = COLOURS["red"]
            Image.fromarray(image).save(folder / name / f"{i}.png")


def write_suite(tmp_path, **sets):
    (tmp_path / "suite.json").write_text(json.dumps({"sets": sets}))
    return tmp_path / "suite.json"


def test_a_suite_of_folders(run, tmp_path, capsys):
    """Its own prompt takes green for blue, so the classes green and blue are one; a hard prompt is always right."""
    sets = tmp_path / "sets"
    write_set(sets / "pets" / "test", red=5, green=1, yellow=3)
    write_set(sets / "pets" / "train", red=1, green=1, yellow=1, blue=2)
    write_set(sets / "sky", n1=0)
    (sets / "sky" / "n2").mkdir()
    write_set(sets / "sky", blue=4, white=2)
    (sets / "sky" / "names.txt").write_text("n1: green\nn2: black\nblue: blue\nwhite: white\n")
    prompts = {"hard": "a photo of a {}."}
    suite = write_suite(
        tmp_path,
        pets=dict(metric="per_class", average="mine", prompts=prompts),
        gone=dict(average="mine", prompts=prompts),
        sky=dict(average="mine", prompts={**prompts, "two": ["a {}.", "the {}."]}, limit=5),
    )
    assert run(suite=suite) == 0
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["metric", "images", "classes", "score", "hard", "two", "chance"]
    # Of pets (9 test images of red, green, yellow; blue is a class of its training split) the green one is lost.
    assert lines[1] == ["pets", "per_class", "9", "4", "66.67", "100.00", "25.00"]
    assert lines[2] == ["pets", "accuracy", "9", "4", "88.89", "100.00", "25.00"]
    assert f"gone  missing: there is no folder {sets / 'gone'}" in out
    # Four of its first five images are blue, which is taken for green.
    assert lines[4] == ["sky", "accuracy", "5", "4", "20.00", "100.00", "100.00", "25.00"]
    # Both averages; "two" has none, since not every set has this prompt.
    own = "mine average of 2 of 3, main metric of each 43.33 100.00".split()
    assert lines[5:] == [own, "mine average of 2 of 3, accuracy 54.44 100.00".split()]
    with (tmp_path / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["set"], r["prompt"]) for r in rows] == [
        ("pets", ""),
        ("pets", "hard"),
        ("sky", ""),
        ("sky", "hard"),
        ("sky", "two"),
    ]
    assert float(rows[0]["accuracy"]) == pytest.approx(100 * 8 / 9)
    assert float(rows[1]["alignment"]) < float(rows[0]["alignment"])
    assert rows[0]["accuracy_5"] == "" and float(rows[0]["uniformity"]) < 0


def test_a_command_that_was_stopped_scores_what_is_missing(run, tmp_path, monkeypatch, capsys):
    for name in ("one", "two", "three"):
        write_set(tmp_path / "sets" / name, red=2, white=1)
    suite = write_suite(tmp_path, one={}, two={"prompts": {"hard": "a {}."}}, three={})
    whole, called = score.Scorer.score, []

    def stopped(self, name, *args):
        called.append(name)
        if called == ["one", "two", "three"]:
            raise KeyboardInterrupt
        return whole(self, name, *args)

    monkeypatch.setattr(score.Scorer, "score", stopped)
    assert run(suite=suite) == 130
    assert [row["set"] for row in csv.DictReader((tmp_path / "out.csv").open())] == ["one", "two", "two"]
    assert run(suite=suite) == 0 and called[3:] == ["three"]
    first = (tmp_path / "out.csv").read_text()
    assert not list(tmp_path.glob("*.jsonl"))
    assert run(suite=suite) == 0 and called[4:] == ["one", "two", "three"]
    assert (tmp_path / "out.csv").read_text() == first
    assert capsys.readouterr().out.count("three") == 2
    with locked_file(tmp_path / "out.csv"):
        assert run(suite=suite) == 1
    assert "out.csv is in use by process" in capsys.readouterr().err


def test_the_published_suite_lists_what_is_missing(run, tmp_path, capsys):
    write_set(tmp_path / "sets" / "eurosat", red=2, yellow=2)
    write_set(tmp_path / "sets" / "imagenet_a", red=2, white=2)
    assert run(suite="pomp") == 0
    out = capsys.readouterr().out
    assert out.count("missing") == 13
    assert "average of 1 of 10" in out and "average of 1 of 4" in out


def test_an_average_is_of_all_only_if_none_is_missing():
    suite = score.SUITES["cross-domain"]
    assert len(score.SUITES["cross-dataset"]) == 10 and len(suite) == 4 and len(score.SUITES["pomp"]) == 15
    assert {name for name, entry in score.SUITES["pomp"].items() if entry["metric"] == "per_class"} == {
        "caltech101",
        "oxford_pets",
        "flowers102",
        "fgvc_aircraft",
    }
    assert set(score.SUITES["pomp"]) == set(HARD)

    def found(names):
        scores = [10.0 * (i + 1) for i in range(len(names))]
        return [
            score.Score(n, "cross-domain", p, "accuracy", v, 1, 2, v, None, v, 1.0, None, 50.0)
            for n, s in zip(names, scores, strict=True)
            for p, v in (("", s), ("hard", s + 1))
        ]

    (line,) = score.averages(suite, found(list(suite)))
    assert line.split() == ["cross-domain", "average", "of", "all", "4,", "accuracy", "25.00", "26.00"]
    (line,) = score.averages(suite, found(list(suite)[:3]))
    assert "average of 3 of 4" in line and line.split()[-2:] == ["20.00", "21.00"]
    (line,) = score.averages(suite, [])
    assert line.split() == ["cross-domain", "average", "of", "0", "of", "4,", "accuracy"]


def test_the_sets_of_umg_clip_are_scored_by_accuracy_and_own_prompt():
    suite = score.SUITES["umg_clip"]
    assert len(suite) == 21 and all(entry == {"average": "umg_clip"} for entry in suite.values())
    assert set(suite) >= set(score.CROSS_DOMAIN) and len(set(suite) & set(score.CROSS_DATASET)) == 4


def test_a_set_of_tfds_and_of_a_chosen_split():
    assert score.source_of(
        "pets", {"tfds": "oxford_iiit_pet", "split": "test", "metric": "per_class"}, score.epath.Path("d")
    ) == {
        "name": "tfds",
        "dataset": "oxford_iiit_pet",
        "data_dir": "d",
        "split": "test",
    }


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"suite": "nowhere"}, "--suite=nowhere is neither a file nor one of"),
        ({"suite": "cross-domain"}, "holds none of the sets"),
        ({"suite": "wrong.json"}, "the suite wrong.json cannot be read"),
        ({"suite": "pets.json", "checkpoint": "elsewhere"}, "elsewhere holds no run"),
        ({"suite": "pets.json", "checkpoint": "MASKS"}, "method=masks, which does not classify images"),
        ({"suite": "pets.json", "batch": 0}, "--batch=0"),
        ({"suite": "pets.json", "out": "sets/pets/x/y.csv"}, "--out=sets/pets/x/y.csv cannot be written"),
        ({"suite": "metric.json"}, "metric='f1' is not one of accuracy"),
        ({"suite": "split.json"}, "is not a folder"),
        ({"suite": "dot.json"}, "pe.ts"),
        ({"suite": "number.json"}, "set 0: 'metric': expected a text, got 5"),
        ({"suite": "count.json"}, "set 0: 'limit': expected a whole number of at least 1, got 0"),
        ({"suite": "list.json"}, "'prompts': expected objects, got ['a {}.']"),
        ({"suite": "template.json"}, "the prompt 'hard': expected a text or a list of texts, got 5"),
    ],
)
def test_a_wrong_request_is_one_sentence_and_status_1(
    run, workdirs, tmp_path, monkeypatch, capsys, flags, message
):
    monkeypatch.chdir(tmp_path)
    write_set(tmp_path / "sets" / "pets", red=1, white=1)
    write_set(tmp_path / "sets" / "pe.ts", red=1, white=1)
    for name, sets in {
        "pets": {"pets": {}},
        "metric": {"pets": {"metric": "f1"}},
        "split": {"pets": {"split": "val"}},
        "dot": {"pe.ts": {}},
        "number": {"pets": {"metric": 5}},
        "count": {"pets": {"limit": 0}},
        "list": {"pets": {"prompts": ["a {}."]}},
        "template": {"pets": {"prompts": {"hard": 5}}},
        "wrong": [],
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"sets": sets}))
    if flags.get("checkpoint") == "MASKS":
        flags = flags | {"checkpoint": workdirs / "masks"}
    assert run(**flags) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1

"""The command line, on files, around a method whose answers are known."""

import json

import numpy as np
import pytest
from fake_method import CLASSES, ColourMethod, blocks, config
from PIL import Image

from ovseg_jax import predict
from ovseg_jax.errors import UserError
from ovseg_jax.inference.segmenter import Segmenter


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the command on a checkpoint that sees colours; returns its status."""

    def load(cls, workdir, step=None, *, batch_size=8):
        if str(workdir) != "run":
            raise UserError(f"{workdir} holds no run: config.json is missing.")
        method = ColourMethod()
        return cls(method, method.init(None), config(32), CLASSES, batch_size=batch_size)

    monkeypatch.setattr(Segmenter, "from_checkpoint", classmethod(load))
    (tmp_path / "in").mkdir()

    def call(**flags):
        flags = {"checkpoint": "run", "images": tmp_path / "in", "out": tmp_path / "out"} | flags
        words = [f"--{name}" if value is True else f"--{name}={value}" for name, value in flags.items()]
        return predict.main(words)

    return call


def save(path, *rows, size=(24, 40)):
    Image.fromarray(blocks(*size, *rows)).save(path)


def test_a_folder_with_a_bad_file(run, tmp_path, capsys):
    folder = tmp_path / "in"
    save(folder / "a.png", ["red", "green"])
    save(folder / "b.PNG", ["blue"], size=(30, 20))
    save(folder / "c.png", ["yellow"])
    save(folder / "a.jpg", ["white", "black"])
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:60])
    (folder / "notes.txt").write_text("not an image, and not asked for")
    assert run(labels="green,yellow; red; blue", batch=2) == 1
    out = tmp_path / "out"
    stems = ["a.jpg", "a.png", "b", "c"]
    names = {f"{s}.{end}" for s in stems for end in ("overlay.png", "labels.png", "json")} | {
        "predictions.json",
        "predictions.jsonl",
    }
    assert {p.name for p in out.iterdir()} == names
    everything = json.loads((out / "predictions.json").read_text())
    assert everything["labels"] == [["green", "yellow"], ["red"], ["blue"]]
    found = {r["stem"]: {s["category"] for s in r["segments"]} for r in everything["images"]}
    assert found == {"a.jpg": set(), "a.png": {"green", "red"}, "b": {"blue"}, "c": {"green"}}
    labels = np.asarray(Image.open(out / "a.png.labels.png"))
    assert labels.shape == (24, 40) and labels[0, 0] == 2 and labels[0, -1] == 1
    assert (np.asarray(Image.open(out / "b.labels.png")) == 3).all()
    captured = capsys.readouterr()
    assert "broken.png" in captured.err and "Traceback" not in captured.err
    assert "4 segmented, 1 could not be read" in captured.out


@pytest.mark.parametrize("flags", [{"features": True}, {"tile": "40,10"}])
def test_one_file_with_features_or_tiles(run, tmp_path, flags):
    save(tmp_path / "photo.png", ["red", "green"], size=(100, 80))
    assert run(images=tmp_path / "photo.png", **flags) == 0
    out = tmp_path / "out"
    if "features" in flags:
        features = np.load(out / "photo.features.npz")
        assert features["pixels"].shape == (32, 26, 6) and features["regions"].shape == (6, 6)
    record = json.loads((out / "photo.json").read_text())
    assert {s["category"] for s in record["segments"]} == {"red", "green"}
    assert sum(s["area"] for s in record["segments"]) + record["unknown_area"] == 8000


def test_a_label_file_gives_its_ids(run, tmp_path):
    save(tmp_path / "photo.png", ["red", "green"])
    (tmp_path / "labels.txt").write_text("7:green\n9:invalid_class_id\n12:red\n")
    assert run(images=tmp_path / "photo.png", labels=tmp_path / "labels.txt") == 0
    segments = json.loads((tmp_path / "out" / "photo.json").read_text())["segments"]
    assert {(s["category"], s["category_id"], s["id"]) for s in segments} == {("green", 1, 7), ("red", 2, 12)}


def test_labels_with_vectors(run, tmp_path):
    save(tmp_path / "photo.png", ["red", "green"])
    np.savez(tmp_path / "v.npz", words=["grass, wet", "brick"], vectors=np.eye(6)[[1, 0]])
    assert run(images=tmp_path / "photo.png", labels=tmp_path / "v.npz") == 0
    segments = json.loads((tmp_path / "out" / "photo.json").read_text())["segments"]
    assert {(s["category"], s["category_id"]) for s in segments} == {("grass, wet", 1), ("brick", 2)}
    assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())["labels"]) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"images": "nowhere"}, "no such file or folder"),
        ({}, "no image in this folder"),
        ({"checkpoint": "elsewhere", "images": "photo.png"}, "elsewhere holds no run"),
        ({"images": "photo.png", "labels": " "}, "no labels"),
        ({"images": "photo.png", "labels": "red; unicorn"}, "unicorn"),
        ({"images": "photo.png", "labels": "gone.txt"}, "gone.txt"),
        ({"images": "photo.png", "labels": "gone.npz"}, "labels: no such file: gone.npz"),
        ({"images": "photo.png", "tile": "8,9"}, "overlap"),
        ({"images": "photo.png", "batch": 0}, "--batch=0"),
        ({"images": "photo.png", "features": True, "tile": "40"}, "leave out --tile"),
        ({"images": "photo.png", "out": "photo.png/x"}, "cannot be made"),
    ],
)
def test_a_wrong_request_is_one_sentence_and_status_1(run, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    save("photo.png", ["red"])
    assert run(**flags) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_flags_that_cannot_be_parsed(run, capsys):
    for flags in [{"tile": "big"}, {"tile": "1,2,3"}, {"threshold": "high"}, {"lables": "red"}]:
        assert run(**flags) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and next(iter(flags)) in error

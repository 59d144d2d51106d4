"""The command line, on files, around a method whose answers are known."""

import io
import json
import re

import numpy as np
import pytest
from fake_method import CLASSES, COLOURS, ColourMethod, blocks, config
from PIL import Image
from pycocotools import mask as coco

from ovseg_jax import predict, score
from ovseg_jax.errors import UserError
from ovseg_jax.experiment.class_vectors import write_class_vectors
from ovseg_jax.files import locked
from ovseg_jax.inference import command
from ovseg_jax.inference.folder import coco_results
from ovseg_jax.inference.result import Result
from ovseg_jax.inference.segmenter import Segmenter
from ovseg_jax.vocab.classes import ClassList


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the command on a checkpoint that sees colours; returns its status."""

    def load(cls, workdir, step=None, *, texts=None, batch_size=8, devices=()):
        if str(workdir) != "run":
            raise UserError(f"{workdir} holds no run: config.json is missing.")
        method = ColourMethod()
        return cls(method, method.init(None), config(32), CLASSES, batch_size=batch_size, devices=devices)

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
def test_one_file_with_features_or_tiles(run, tmp_path, flags, monkeypatch):
    """Memory is returned to the system for tiles alone."""
    asked = []
    monkeypatch.setattr(command, "return_compilers_memory", lambda: asked.append(1))
    save(tmp_path / "photo.png", ["red", "green"], size=(100, 80))
    assert run(images=tmp_path / "photo.png", **flags) == 0
    assert len(asked) == ("tile" in flags)
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


def test_tasks_write_what_the_scores_read(run, tmp_path, capsys):
    """Things in two images, one of which has a number as its name; scored against themselves."""
    save(tmp_path / "in" / "000012.png", ["red", "green"])
    save(tmp_path / "in" / "b.png", ["blue", "red"], ["blue", "blue"])
    (tmp_path / "labels.txt").write_text("# things: 7 12\n7:green\n12:red\n30:blue\n")
    assert run(labels=tmp_path / "labels.txt", task="panoptic") == 0
    out, own = tmp_path / "out", "panoptic.png"
    found = json.loads((out / "panoptic.json").read_text())["annotations"]
    assert [(row["image_id"], row["file_name"]) for row in found] == [
        (12, f"000012.{own}"),
        ("b", f"b.{own}"),
    ]
    assert [{s["category_id"] for s in row["segments_info"]} for row in found] == [{7, 12}, {12, 30}]
    for row in found:
        ids = np.asarray(Image.open(out / row["file_name"])) @ np.array([1, 256, 65536])
        areas = {s["id"]: s["area"] for s in row["segments_info"]}
        assert {k: int((ids == k).sum()) for k in areas} == areas and set(np.unique(ids)) <= {0, *areas}
    categories = [
        {"id": k, "name": name, "isthing": int(k < 30)}
        for k, name in ((7, "green"), (12, "red"), (30, "blue"))
    ]
    images = [{"id": row["image_id"], "height": 24, "width": 40} for row in found]
    truth = {"images": images, "categories": categories}
    truth["annotations"] = [
        {**row, "segments_info": [{**s, "iscrowd": 0} for s in row["segments_info"]]} for row in found
    ]
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    files = [f"--pred={out / 'panoptic.json'}", f"--gt={tmp_path / 'truth.json'}"]
    capsys.readouterr()
    assert score.main(["panoptic", *files, f"--pred_masks={out}", f"--gt_masks={out}"]) == 0
    assert "100.0" in capsys.readouterr().out
    assert run(labels=tmp_path / "labels.txt", task="instance") == 0
    rows = json.loads((out / "instances.json").read_text())
    assert {(row["image_id"], row["category_id"]) for row in rows} >= {(12, 7), (12, 12), ("b", 12)}
    assert all(row["category_id"] < 30 for row in rows)  # things alone
    best = max((row for row in rows if row["image_id"] == 12), key=lambda row: row["score"])
    assert coco.decode(best["segmentation"]).shape == (24, 40)
    name = {7: "green", 12: "red"}[best["category_id"]]
    assert f"000012: {name} {best['score']:.2f}" in capsys.readouterr().out
    assert run(labels=tmp_path / "labels.txt", task="semantic") == 0
    assert json.loads((out / "predictions.json").read_text())["decision"] == "argmax"
    assert (np.asarray(Image.open(out / "000012.labels.png")) > 0).all()


def test_images_of_one_number_keep_their_names():
    """7 and 007 would be one image in COCO's files."""
    records = [{"stem": stem, "segments_info": []} for stem in ("7", "007", "12", "a")]
    rows = coco_results(records, "panoptic")["annotations"]
    assert [row["image_id"] for row in rows] == ["7", "007", 12, "a"]


def test_labels_with_vectors(run, tmp_path):
    save(tmp_path / "photo.png", ["red", "green"])
    np.savez(tmp_path / "v.npz", words=["grass, wet", "brick"], vectors=np.eye(6)[[1, 0]])
    assert run(images=tmp_path / "photo.png", labels=tmp_path / "v.npz") == 0
    segments = json.loads((tmp_path / "out" / "photo.json").read_text())["segments"]
    assert {(s["category"], s["id"]) for s in segments} == {("grass, wet", 0), ("brick", 1)}
    classes = ClassList((("grass, wet",), ("brick",)), (17, 3), (True, True))
    write_class_vectors(tmp_path / "v.npz", classes, np.eye(6, dtype=np.float32)[[1, 0]])
    assert run(images=tmp_path / "photo.png", labels=tmp_path / "v.npz") == 0
    segments = json.loads((tmp_path / "out" / "photo.json").read_text())["segments"]
    expected = {("grass, wet", 1, 17), ("brick", 2, 3)}
    assert {(s["category"], s["category_id"], s["id"]) for s in segments} == expected
    assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())["labels"]) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"images": "nowhere"}, "no such file or folder"),
        ({}, "the folder holds no readable image"),
        ({"checkpoint": "elsewhere", "images": "photo.png"}, "elsewhere holds no run"),
        ({"images": "photo.png", "labels": " "}, "is empty"),
        ({"images": "photo.png", "labels": ";"}, "no labels"),
        (
            {"images": "photo.png", "labels": "red", "threshold": "nan"},
            "threshold=nan is not a finite number",
        ),
        ({"images": "photo.png", "labels": "red; unicorn"}, "unicorn"),
        ({"images": "photo.png", "labels": "gone.txt"}, "gone.txt"),
        ({"images": "photo.png", "labels": "gone.npz"}, "gone.npz cannot be read: there is no such file"),
        ({"images": "photo.png", "tile": "8,9"}, "overlap"),
        ({"images": "photo.png", "tile": "2"}, "'2' is not the side of a tile in pixels, at least 8"),
        ({"images": "photo.png", "tile": "40,a"}, "'40,a' is not the side of a tile"),
        ({"images": "photo.png", "task": "panoptic", "decision": "argmax"}, "--task replaces --decision"),
        ({"images": "photo.png", "task": "panoptic", "tile": "40"}, "leave out --tile"),
        ({"images": "photo.png", "task": "instance", "crf": True}, "leave out the decision 'instances'"),
        ({"images": "photo.png", "batch": 0}, "--batch=0"),
        ({"images": "photo.png", "features": True, "tile": "40"}, "leave out --tile"),
        ({"images": "photo.png", "out": "photo.png/x"}, "cannot be created"),
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


def written(folder):
    """The content of each file, and when it was written."""
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_the_images_folder_as_output(run, tmp_path, capsys):
    """Nothing of the user's is replaced, and overlays are not segmented by the next run."""
    folder = tmp_path / "in"
    save(folder / "a.png", ["red", "green"])
    save(folder / "b.jpg", ["blue"])
    (folder / "a.json").write_text("mine")
    before = written(folder)
    assert run(out=folder) == 1
    error = capsys.readouterr().err
    assert "holds a file a.json that would be replaced" in error and error.count("\n") == 1
    assert written(folder) == before
    (folder / "a.json").rename(folder / "a.txt")
    for _ in range(2):
        assert run(out=folder, labels="red; green; blue") == 0
        everything = json.loads((folder / "predictions.json").read_text())
        assert [record["stem"] for record in everything["images"]] == ["a", "b"]
    assert len(list(folder.iterdir())) == 3 + 2 * 3 + 2
    # Of other labels the command's own files are replaced; what is in the way of a new image is not.
    assert run(out=folder, labels="green; blue") == 0
    (folder / "c.labels.png").write_bytes(b"mine")
    (folder / "c.labels.png").rename(tmp_path / "c")
    save(folder / "c.png", ["red"])
    (tmp_path / "c").rename(folder / "c.labels.png")
    assert run(out=folder, labels="green; blue") == 1
    assert "--overwrite" in capsys.readouterr().err
    assert run(out=folder, labels="green; blue", overwrite=True) == 1  # one of the "images" cannot be read
    assert (folder / "c.json").exists()


def test_names_that_would_be_one_file(run, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    colours = {
        "a.jpg": "red",
        "a.png": "green",
        "a.jpg.png": "blue",
        "A.bmp": "white",
        "predictions.png": "black",
    }
    for name, colour in colours.items():
        save(folder / name, [colour])
    assert run() == 0
    everything = json.loads((out / "predictions.json").read_text())
    assert len({record["stem"].lower() for record in everything["images"]}) == 5
    for record in everything["images"]:
        own = json.loads((out / f"{record['stem']}.json").read_text())
        (segment,) = own["segments"]
        assert segment["category"] == colours[record["image"].rsplit("/", 1)[1]]


def test_lists_and_folders_in_folders(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "in" / "deep").mkdir()
    paths = [tmp_path / "in" / "b.png", tmp_path / "in" / "deep" / "b.png", tmp_path / "in" / "a.png"]
    for path, colour in zip(paths, ("red", "green", "blue"), strict=True):
        save(path, [colour])
    lines = "".join(f"{path}\n\n" for path in [*paths, paths[0]])
    (tmp_path / "list.txt").write_text(lines)
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    for images in (f"@{tmp_path / 'list.txt'}", "-", tmp_path / "in" / "**" / "*.png"):
        assert run(images=images, overwrite=True) == 0
        records = json.loads((tmp_path / "out" / "predictions.json").read_text())["images"]
        found = {record["image"]: record["segments"][0]["category"] for record in records}
        assert found == dict(zip(map(str, paths), ("red", "green", "blue"), strict=True))
    for content, message in (
        ("\n", "lists no image"),
        (f"{paths[0]}\nmissing.png", "line 2 of .*'missing.png'"),
    ):
        (tmp_path / "list.txt").write_text(content)
        assert run(images=f"@{tmp_path / 'list.txt'}") == 1
        assert re.search(message, capsys.readouterr().err)
    for flags, message in (
        ({"smooth": 0.5}, "--smooth averages over the frames"),
        ({"fps": 0}, "from 0.001 to 1000"),
        ({"fps": 1e-300}, "from 0.001 to 1000"),
        ({"fps": 5, "features": True}, "leave them out for a video"),
        ({"images": "missing.mp4"}, "no such file|PyAV"),
    ):
        assert run(**flags) == 1
        assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_command_that_was_stopped_does_what_is_missing(run, tmp_path, monkeypatch, capsys, stop):
    folder, out = tmp_path / "in", tmp_path / "out"
    for i in range(6):
        save(folder / f"{i}.png", [list(COLOURS)[i]])
    whole, saved = Result.save, []

    def stopped(self, folder, stem, *args):
        saved.append(stem)  # the next one may be written at the same time
        if stem == "3" and saved.count("3") == 1:
            raise stop
        return whole(self, folder, stem, *args)

    monkeypatch.setattr(Result, "save", stopped)
    assert run(batch=2) == (130 if stop is KeyboardInterrupt else 1)
    err = capsys.readouterr().err
    assert "continues" in err.splitlines()[-1] and "Traceback" not in err
    assert stop is KeyboardInterrupt or "3 of 6 images are done" in err
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [line["stem"] for line in lines[1:]] == ["0", "1", "2"]
    done = written(out)
    (out / "1.labels.png").unlink()  # and one of its files is lost
    saved.append("again")
    assert run(batch=2) == 0
    assert sorted(saved[saved.index("again") + 1 :]) == ["1", "3", "4", "5"]
    assert "6 segmented (2 of them earlier)" in capsys.readouterr().out
    assert {name: written(out)[name] for name in done if name[0] in "02"} == {
        name: done[name] for name in done if name[0] in "02"
    }
    records = json.loads((out / "predictions.json").read_text())["images"]
    assert [r["segments"][0]["category"] for r in records] == list(COLOURS)
    # Nothing is missing now: the model is not even loaded.
    monkeypatch.setattr(Segmenter, "from_checkpoint", None)
    before, count = (out / "predictions.json").read_bytes(), len(saved)
    assert run(batch=2) == 0 and len(saved) == count
    assert (out / "predictions.json").read_bytes() == before


def test_what_has_changed_is_done_again(run, tmp_path, capsys):
    folder, out = tmp_path / "in", tmp_path / "out"
    save(folder / "a.png", ["red"])
    save(folder / "b.png", ["green"])
    there = lambda: capsys.readouterr().out.splitlines()[-1].split(";")[0]
    assert run(labels="red; green; blue") == 0 and there() == "2 segmented"
    save(folder / "a.png", ["blue"], size=(25, 40))
    save(folder / "c.png", ["red"])
    assert run(labels="red; green; blue") == 0 and there() == "3 segmented (1 of them earlier)"
    assert json.loads((out / "a.json").read_text())["segments"][0]["category"] == "blue"
    for changed in ({"labels": "red; green"}, {"labels": "red; green", "threshold": 0.5}):
        assert run(**changed) == 0 and there() == "3 segmented"


def test_a_picture_that_cannot_be_drawn_costs_nothing_else(run, tmp_path, monkeypatch, caplog):
    save(tmp_path / "in" / "a.png", ["red"])
    monkeypatch.setattr(Result, "overlay", lambda self: 1 / 0)
    assert run() == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("a.labels.png", "a.json", "predictions.json", "predictions.jsonl")
    }
    assert "a.overlay.png was not drawn: ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("size", [(1, 600), (900, 20), (1, 1), (3, 2)])
def test_pictures_of_any_shape(run, tmp_path, size, caplog):
    save(tmp_path / "in" / "a.png", ["red"], size=size)
    assert run(labels="red; green") == 0
    assert (tmp_path / "out" / "a.overlay.png").exists() and not caplog.text


def test_two_commands_and_one_folder(run, tmp_path, capsys):
    save(tmp_path / "in" / "a.png", ["red"])
    with locked(tmp_path / "out"):
        assert run() == 1
    err = capsys.readouterr().err
    assert "is in use by process" in err and err.count("\n") == 1
    assert run() == 0 and not (tmp_path / "out" / ".lock").exists()


def test_a_pattern_of_names(run, tmp_path, capsys):
    for name in ("a.jpg", "b.jpg", "c.png"):
        save(tmp_path / "in" / name, ["red"])
    assert run(images=f"{tmp_path}/in/*.jpg") == 0
    assert "2 segmented" in capsys.readouterr().out
    assert run(images=f"{tmp_path}/in/*.gif") == 1
    assert "no image matches this pattern" in capsys.readouterr().err


def test_odd_labels_and_requests(run, tmp_path, capsys):
    save(tmp_path / "in" / "a.png", ["red"])
    (tmp_path / "clip.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    for labels in ("red; red; green", "red\ngreen", "red;\n", ";".join(["red", "green"] * 1000)):
        assert run(labels=labels) == 0, labels
    capsys.readouterr()
    for flags in (
        {"labels": ""},
        {"labels": "red; (white, [black]*; water?"},
        {"images": tmp_path / "clip.mp4"},
        {"tile": "0"},
        {"tile": "-4"},
        {"images": "https://example.org/a.jpg"},
        {"labels": "https://example.org/labels.txt"},
        {"checkpoint": "https://example.org/run"},
        {"out": "ftp://example.org/out"},
    ):
        assert run(**flags) == 1, flags
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1
    assert run(tile="4096") == 0


def test_things_apart(run, tmp_path, capsys):
    """Each colour is one proposal of the fake method, so that a category is one instance."""
    save(tmp_path / "in" / "a.png", ["red", "green"])
    assert run(labels="green; red", decision="panoptic") == 0
    segments = json.loads((tmp_path / "out" / "a.json").read_text())["segments"]
    assert {(s["category"], s["instance"], s["isthing"]) for s in segments} == {
        ("green", 1, True),
        ("red", 1, True),
    }
    assert sum(s["area"] for s in segments) > 0.9 * 24 * 40
    assert run(labels="green", decision="panoptic", threshold=0.5) == 1
    assert "--decision replaces --threshold" in capsys.readouterr().err
    assert run(labels="green", decision="instances", tile=8) == 1
    assert "works on whole images" in capsys.readouterr().err
    assert run(labels="green", decision="argmax", tile=16, out=tmp_path / "tiles") == 0

"""Through the whole house: the shipped config trains on each kind of data (OpenSeg on `scenes` in tests/train); a
teacher labels captioned images, a student learns from them, and predicts."""

import json
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from ovseg_jax import predict, pseudo_label
from ovseg_jax.configs import openseg
from ovseg_jax.data.scenes.source import Scenes
from ovseg_jax.data.sources.build import make_source
from ovseg_jax.errors import UserError
from ovseg_jax.experiment.run import evaluate, train
from ovseg_jax.experiment.tables import TABLE_2
from ovseg_jax.vocab.words import WordList

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "../shared/data/coco_sample"


def shrunk(arg: str, **loss) -> ConfigDict:
    """A shipped config with two steps of a network of nothing."""
    config = openseg.get_config(arg)
    config.update(dict(steps=2, batch_size=8, log_every=1))
    config.model.update(dict(width=16, embed_dim=16, num_queries=4, decoder_layers=1, position_grid=4))
    config.model.update(dict(head_convs=1, dtype="float32"))
    config.model.backbone = dict(name="small", width=16, levels=3)
    config.loss.update(dict(group=8, **loss))
    config.data.update(dict(image_size=32, max_masks=8, workers=0, min_count=1))
    config.checkpoint.every = 2
    for evaluator in config.final_evals.values():
        evaluator.update(dict(batch_size=8, limit=8, every=0))
    config.evals = {}
    if config.data.train[0]["name"] == "scenes":
        config.data.train[0].update(num_examples=64, image_size=32)
        config.final_evals.test.source.update(num_examples=8, image_size=32)
    return config


def test_the_baseline_on_scenes(tmp_path):
    summary = train(shrunk("method=lseg"), tmp_path)
    assert summary["steps"] == 2
    assert {"test/miou", "test/miou/held_out", "test/grounding_miou"} <= summary.keys()
    assert "test/recall@0.5" not in summary  # it proposes no masks


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="the shared COCO sample is not here")
def test_coco(tmp_path):
    config = shrunk(f"data=coco,data_dir={SAMPLE},size=tiny")
    config.final_evals.validation.limit = 2
    config.final_evals.validation.batch_size = 2
    summary = train(config, tmp_path)
    assert 0 <= summary["validation/miou"] <= 100
    rows = (tmp_path / "tables" / "validation-iou.csv").read_text().splitlines()
    assert len(rows) == 1 + 133


def write_folder(root: Path, count: int) -> None:
    """Images with captions and without masks, in the layout of the README."""
    source = Scenes(split="train", num_examples=count, image_size=40)
    (root / "images").mkdir(parents=True)
    captions = {}
    for i in range(count):
        Image.fromarray(source[i]["image"]).save(root / "images" / f"{i}.png")
        captions[f"{i}.png"] = source[i]["captions"]
    (root / "captions.json").write_text(json.dumps(captions))


def write_set(root: Path, words: list[str]) -> None:
    """Two images of a labelled set, half of each one class and half the other."""
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True)
    (root / "classes.txt").write_text("".join(f"{k}:{word}\n" for k, word in enumerate(words, 1)))
    mask = np.repeat(np.uint8([[1, 2]]), 20, 1).repeat(40, 0)
    for k in range(2):
        Image.fromarray(mask * 90).convert("RGB").save(root / "images" / f"{k}.png")
        Image.fromarray(mask).save(root / "masks" / f"{k}.png")


def test_teacher_student_and_prediction(tmp_path, capsys):
    taught = train(shrunk("stage=teacher"), tmp_path / "teacher")
    assert 0 <= taught["test/recall@0.5"] <= 100 and "test/miou" not in taught

    folder = tmp_path / "mine"
    write_folder(folder, 8)
    (folder / "images" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut")
    request = [f"--checkpoint={tmp_path / 'teacher'}", f"--data_dir={folder}", "--min_area=0"]
    assert pseudo_label.main(request) == 1  # of the broken image
    assert "broken.jpg" in capsys.readouterr().err
    (folder / "images" / "broken.jpg").unlink()
    assert len(list((folder / "masks").iterdir())) == 8
    assert pseudo_label.main(request) == 0
    assert "0 masks written" in capsys.readouterr().out

    arg = f"data=folder,data_dir={folder},init=scratch,text=learned"
    train(shrunk(arg), tmp_path / "student")
    metrics = [json.loads(line) for line in (tmp_path / "student/metrics.jsonl").read_text().splitlines()]
    assert all(m["grounding_loss"] > 0 for m in metrics if "loss" in m)

    out = tmp_path / "out"
    image = folder / "images" / "0.png"
    asked = [f"--checkpoint={tmp_path / 'student'}", f"--images={image}", f"--out={out}"]
    some = WordList.load(tmp_path / "student" / "words.json").words[1:4]
    labels = f"--labels=a {some[0]}; {some[1]},{some[2]}"
    for name in TABLE_2:
        write_set(tmp_path / "sets" / name, some[:2])
    (tmp_path / "sets/PAS-20/classes.txt").write_text(f"0:background\n1:{some[0]}\n2:{some[1]}\n")
    capsys.readouterr()
    benchmark = shrunk(f"{arg},evals=benchmark,eval_sets={tmp_path / 'sets'}")
    benchmark.final_evals["PAS-20"].names.background = some[2:]  # the student knows no trees
    scores = evaluate(benchmark, tmp_path / "student")
    assert scores["PC-59/miou"] == scores["A-847/miou"] > 0
    row, values, *_ = (line.split() for line in capsys.readouterr().out.splitlines()[-4:])
    assert row == list(TABLE_2) and values[1:] == [f"{scores[f'{name}/miou']:.1f}" for name in TABLE_2]
    assert predict.main([*asked, labels, "--threshold=-1", "--features"]) == 0
    assert {p.name for p in out.iterdir()} == {
        "0.overlay.png",
        "0.labels.png",
        "0.json",
        "0.features.npz",
        "predictions.json",
        "predictions.jsonl",
    }
    assert set(np.unique(Image.open(out / "0.labels.png"))) <= {1, 2}


def test_a_stage_labels_what_the_next_one_learns_from(tmp_path, capsys):
    """A teacher, pseudo-masks, a student: one config, started anew in the middle."""
    folder = tmp_path / "mine"
    write_folder(folder, 4)
    (folder / "masks").mkdir()
    Image.fromarray(np.full((40, 40), 7, np.uint8)).save(folder / "masks" / "0.png")
    teacher = shrunk("", grounding_weight=0.0)
    teacher.final_evals = {}
    student = shrunk(f"data=folder,data_dir={folder},init=scratch,text=learned")
    mine = dict(name="folder", data_dir=str(folder))
    student.data.train = [dict(mine, masks="stage:masks")]
    labels = dict(teacher="stage:teacher", source=mine, min_area=0.0, min_confidence=0.0, shard_size=1)
    student.stages = [
        dict(name="masks", kind="pseudo_label", config=labels),
        dict(name="teacher", kind="train", config=teacher),
    ]
    broken = folder / "images" / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff\xe0 cut")
    with pytest.raises(UserError, match="1 images of folder could not be read"):
        train(student, tmp_path / "run")
    masks = tmp_path / "run" / "masks"
    shards = sorted(masks.glob("*.zip"))
    assert len(shards) == 5 and "broken.jpg" in capsys.readouterr().err
    broken.unlink()
    summary = train(student, tmp_path / "run")
    said = capsys.readouterr().out
    assert "the stage teacher" not in said and "4 images labelled" in said and summary["steps"] == 2
    assert [p.name for p in (folder / "masks").iterdir()] == ["0.png"]
    source = make_source(dict(mine, masks=str(masks)))
    assert set(np.unique(source[0]["segments"])) == {1} and len(np.unique(source[1]["segments"])) > 0
    assert "first:" not in (train(student, tmp_path / "run"), capsys.readouterr().out)[1]
    student.stages[0]["config"]["threshold"] = 0.6
    with pytest.raises(UserError, match=r"the stage masks in .* another config: threshold was absent"):
        train(student, tmp_path / "run")

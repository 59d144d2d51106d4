"""A finished run, started again after its files, its data or its pictures have changed."""

import json
import logging
import shutil

import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

from ovseg_jax.configs import openseg
from ovseg_jax.data.sources.build import make_source
from ovseg_jax.errors import UserError
from ovseg_jax.experiment.load import load_run, read_classes
from ovseg_jax.experiment.paper_report import read_scores
from ovseg_jax.experiment.run import make_parts, train
from ovseg_jax.files import locked
from tests.methods.test_prompt_tuning import config as prompt_config


def write_image(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 20, 3), np.uint8)).save(path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run, its data beside it, and its config."""
    folder = tmp_path_factory.mktemp("again")
    for k, name in enumerate(("blue kite", "old moon", "red ball")):
        for i in range(4):
            write_image(folder / "images" / name / f"{i}.png", [k, i])
    config = prompt_config(**{"batch_size": 8, "loss.sample": 0, "towers.text.layers": 1})
    source = {"name": "image_folder", "data_dir": str(folder / "images")}
    config.update(
        ConfigDict(
            dict(
                seed=0,
                steps=2,
                profile="",
                mesh=dict(data=-1, fsdp=1),
                optimizer=dict(name="sgd", learning_rate=0.1, schedule="constant", weight_decay=0.0),
                data=dict(train=[source], image_size=16, workers=0, cache_features=1),
                evals={},
                final_evals={},
                checkpoint=dict(every=0, keep=1),
                log_every=1,
            )
        )
    )
    train(config, folder / "run")
    return folder, config


@pytest.fixture
def again(finished, tmp_path):
    folder, config = finished
    shutil.copytree(folder, tmp_path / "copy")
    config = ConfigDict(config.to_dict())
    config.data.train = [{"name": "image_folder", "data_dir": str(tmp_path / "copy" / "images")}]
    path = tmp_path / "copy" / "run" / "config.json"
    path.write_text(path.read_text().replace(str(folder), str(tmp_path / "copy")))
    (tmp_path / "copy" / "run" / "checksums.json").unlink()
    train(config, tmp_path / "copy" / "run")
    return tmp_path / "copy", config


def test_other_steps(again):
    folder, config = again
    before = (folder / "run" / "config.json").read_bytes()
    config.steps = 1
    with pytest.raises(UserError, match="steps was 2, is 1"):
        train(config, folder / "run")
    assert (folder / "run" / "config.json").read_bytes() == before
    config.steps = 10  # As text it comes before 2.
    assert train(config, folder / "run")["steps"] == 10


@pytest.mark.parametrize("change", ["added", "removed", "renamed", "emptied"])
def test_other_classes(again, change, caplog):
    folder, config = again
    config.steps = 3
    images = folder / "images"
    if change == "added":
        write_image(images / "a first one" / "0.png", 1)
    elif change == "removed":
        shutil.rmtree(images / "red ball")
    elif change == "renamed":
        (images / "old moon").rename(images / "new moon")
    else:
        for path in (images / "old moon").iterdir():
            path.unlink()
    with pytest.raises(UserError, match=r"moon|first one|there were 3"):
        train(config, folder / "run")
    assert json.loads((folder / "run" / "summary.json").read_text())["steps"] == 2


def test_a_class_in_front_of_the_list_of_a_data_set_with_masks(tmp_path):
    """Masks keep the ids of the list, so that only the indices of the classes move."""
    data = tmp_path / "data"
    for name in ("images", "masks"):
        (data / name).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(data / "images/a.png")
    Image.new("L", (8, 8), 2).save(data / "masks/a.png")
    (data / "classes.txt").write_text("1:red ball\n2:grass\n")
    config = openseg.get_config(f"data=folder,data_dir={data},kind=semantic,size=tiny,method=lseg")
    run = epath.Path(tmp_path / "run")
    run.mkdir()
    for _ in range(2):  # The same list may come again.
        assert make_parts(config, run, make_source(config.data.train)).classes.ids == (1, 2)
    (data / "classes.txt").write_text("9:kite\n1:red ball\n2:grass\n")
    changed = r"there were 2 classes, now 3; names of class 0 were \('red ball',\), are \('kite',\)"
    with pytest.raises(UserError, match=changed):
        make_parts(config, run, make_source(config.data.train))
    assert read_classes(run).ids == (1, 2)


@pytest.mark.parametrize("key, value", [("dtype", "nan"), ("image_size", "x")])
def test_a_config_with_a_value_of_another_type(finished, tmp_path, key, value):
    run = tmp_path / "run"
    shutil.copytree(finished[0] / "run", run)
    (run / "checksums.json").unlink()
    content = json.loads((run / "config.json").read_text())
    content["towers"][key] = value
    (run / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"the model of .*/config\.json cannot be read: ") as error:
        load_run(run)
    assert "\n" not in str(error.value)


def test_features_of_other_images_are_computed_again(again, caplog):
    folder, config = again
    config.steps = 3
    before = np.load(folder / "run" / "features" / "features.npy")
    train(config, folder / "run")
    assert "computed again" not in caplog.text
    (folder / "images" / "old moon" / "1.png").unlink()
    write_image(folder / "images" / "old moon" / "9.png", 5)
    config.steps = 4
    train(config, folder / "run")
    after = np.load(folder / "run" / "features" / "features.npy")
    assert "computed again" in caplog.text and after.shape == before.shape and (after != before).any()
    (folder / "run" / "features" / "features.npy").write_bytes(b"cut")
    config.steps = 5
    train(config, folder / "run")
    np.testing.assert_array_equal(np.load(folder / "run" / "features" / "features.npy"), after)


@pytest.mark.parametrize("name", ["words.json", "classes.json"])
@pytest.mark.parametrize("content", [None, "", "{", "[]", '["a', "\ud83d", "null"])
def test_a_damaged_vocabulary_is_made_again_and_said(again, name, content, caplog):
    folder, config = again
    path = folder / "run" / name
    before = path.read_bytes()
    path.unlink() if content is None else path.write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(UserError, match=name):
        load_run(folder / "run")
    caplog.clear()
    train(config, folder / "run")
    assert path.read_bytes() == before and (content is None or f"{name} was damaged" in caplog.text)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"steps": 2', "\ud83d", '{"steps": "2"}', "3"])
def test_a_damaged_summary_is_made_again_and_said(again, content, caplog):
    folder, config = again
    path = folder / "run" / "summary.json"
    path.write_bytes(content.encode(errors="surrogatepass"))
    summary = train(config, folder / "run")
    assert json.loads(path.read_text()) == summary and summary["steps"] == 2
    assert "summary.json is damaged and is made again" in caplog.text


def test_an_altered_score_is_no_score(again, caplog):
    folder, config = again
    path = folder / "run" / "summary.json"
    path.unlink()
    train(config, folder / "run")
    path.write_text(path.read_text().replace('"steps": 2', '"steps": 3'))
    with pytest.raises(UserError, match=r"summary\.json does not match its checksum"):
        read_scores(path)
    assert train(config, folder / "run")["steps"] == 2
    assert "summary.json is damaged and is made again" in caplog.text and read_scores(path)["steps"] == 2


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\x00", b'{"step": 1}\n{"st', b"{}\n[]\n", b"\x00" * 100, b"3\n"]
)
def test_damaged_metrics_lose_no_run(again, content, caplog):
    folder, config = again
    path = folder / "run" / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + content)
    config.steps = 3
    train(config, folder / "run")
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps[0] == 1 and steps[-1] == 3


def test_pictures_that_are_missing_are_drawn(again, caplog):
    folder, config = again
    calls = []

    def draw(workdir, run, outdated):
        calls.append(outdated)
        if len(calls) == 1:
            raise ValueError("20 x 900 pixels")

    for _ in range(3):
        assert train(config, folder / "run", finish=draw)["steps"] == 2
    assert calls == [True, True, False]
    assert "the pictures were not drawn (ValueError: 20 x 900 pixels)" in caplog.text


def test_what_a_method_leaves_is_written_again_and_checked(again):
    folder, config = again
    path = folder / "run" / "prompt.safetensors"
    before = path.read_bytes()
    path.unlink()
    train(config, folder / "run")
    assert path.read_bytes() == before
    flipped = bytearray(before)
    flipped[-3] ^= 1
    path.write_bytes(flipped)
    config.prompt.init = str(path)
    with pytest.raises(UserError, match=r"prompt\.safetensors does not match its checksum"):
        train(config, folder / "other")


def test_two_in_one_folder(again):
    folder, config = again
    with (
        locked(folder / "run"),
        pytest.raises(UserError, match=r"run is in use by process \d+ on .*--workdir"),
    ):
        train(config, folder / "run")


def test_a_full_disk_while_the_small_files_are_written(again, monkeypatch, caplog):
    folder, config = again
    (folder / "run" / "summary.json").unlink()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("ovseg_jax.files.epath.Path.write_bytes", full, raising=False)
        patch.setattr("ovseg_jax.experiment.run._write_summary", lambda *_: full())
        with pytest.raises(UserError, match=r"the disk is full while writing to .*run"):
            train(config, folder / "run")
    logging.getLogger("ovseg_jax").handlers.clear()
    assert train(config, folder / "run")["steps"] == 2

"""The command, on files, around a teacher that sees colours."""

import numpy as np
import pytest
from fake_method import CLASSES, ColourMethod, blocks, config
from PIL import Image

from ovseg_jax import pseudo_label
from ovseg_jax.inference.segmenter import Segmenter


@pytest.fixture
def run(tmp_path, monkeypatch):
    loaded = []

    def load(cls, workdir, *, batch_size=8):
        loaded.append(workdir)
        method = ColourMethod(masks=str(workdir) != "pixels")
        return cls(method, method.init(None), config(32), CLASSES, batch_size=batch_size)

    monkeypatch.setattr(Segmenter, "from_checkpoint", classmethod(load))
    (tmp_path / "images").mkdir()

    def call(**flags):
        flags = {"checkpoint": "run", "data_dir": tmp_path} | flags
        return pseudo_label.main([f"--{name}={value}" for name, value in flags.items()])

    call.loaded = loaded
    return call


def save(path, *row):
    Image.fromarray(blocks(24, 40, row)).save(path)


def test_images_without_a_mask_get_one(run, tmp_path, capsys):
    images, masks = tmp_path / "images", tmp_path / "masks"
    for i, row in enumerate((["red"], ["red", "green"], ["blue"])):
        save(images / f"{i}.png", *row)
    save(images / "._0.png", "red")
    (images / "broken.jpg").write_bytes(b"\xff\xd8 cut")
    masks.mkdir()
    (masks / "0.txt").write_text("a note is no mask")
    Image.fromarray(np.full((24, 40), 7, np.uint8)).save(masks / "2.PNG")
    assert run(batch=2) == 1
    out = capsys.readouterr()
    assert "2 masks written" in out.out and "1 existed, 1 images skipped" in out.out
    assert "broken.jpg" in out.err
    assert {path.name for path in masks.iterdir()} == {"0.txt", "0.png", "1.png", "2.PNG"}
    assert np.unique(Image.open(masks / "0.png")).tolist() == [1]
    assert np.unique(Image.open(masks / "1.png")).tolist() == [1, 2]
    (images / "broken.jpg").unlink()
    assert run() == 0 and len(run.loaded) == 1  # nothing is left to do


def test_what_was_stopped_goes_on(run, tmp_path, monkeypatch):
    for i in range(4):
        save(tmp_path / "images" / f"{i}.png", "red")
    whole, count = Segmenter.stream_features, []

    def stopped(self, images):
        for features in whole(self, images):
            count.append(1)
            if len(count) == 3:
                raise KeyboardInterrupt
            yield features

    monkeypatch.setattr(Segmenter, "stream_features", stopped)
    assert run(batch=1) == 130
    assert sorted(path.name for path in (tmp_path / "masks").iterdir()) == ["0.png", "1.png"]
    assert run(batch=1) == 0 and len(count) == 3 + 2
    assert len(list((tmp_path / "masks").iterdir())) == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"data_dir": "nowhere"}, "has no folder images/"),
        ({"checkpoint": "pixels"}, "without mask proposals"),
        ({"threshold": 2}, "threshold=2.0 is not between 0 and 1"),
        ({"min_area": -1}, "min_area=-1.0"),
        ({"batch": 0}, "--batch=0"),
        ({"twins": 1}, "a.jpg and a.png would share the mask a.png"),
        ({"empty": 1}, "holds no readable image"),
    ],
)
def test_a_wrong_request_is_one_sentence(run, tmp_path, capsys, flags, message):
    if "empty" not in flags:
        save(tmp_path / "images" / "a.png", "red")
    if "twins" in flags:
        save(tmp_path / "images" / "a.jpg", "red")
    assert run(**{key: value for key, value in flags.items() if key not in ("twins", "empty")}) == 1
    err = capsys.readouterr().err
    assert message in err and err.count("error: ") == 1 and "Traceback" not in err

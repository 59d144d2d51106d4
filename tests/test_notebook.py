"""A notebook runs from top to bottom, shrunk; the one of POMP in train/test_stages.py, on a run that is there."""

import json
import re
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from ovseg_jax.inference.segmenter import Segmenter
from tests.extras import require
from tests.methods import test_published as towers

REPO = Path(__file__).parents[1]
SMALL = {
    "steps": 2,
    "log_every": 1,
    "batch_size": 8,
    "loss.group": 8,
    "model.width": 16,
    "model.embed_dim": 16,
    "model.backbone.width": 16,
    "checkpoint.every": 2,
}


def execute(name, workdir, settings, behind_each_cell=lambda space: None, **parameters):
    """Runs all cells of a notebook; gives the pictures that it displays."""
    cells = json.loads((REPO / "notebooks" / name).read_text())["cells"]
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in cells)
    shown = []
    space = {"display": shown.append, "__name__": "notebook"}
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        exec(compile("".join(cell["source"]), f"notebooks/{name}", "exec"), space)
        if "parameters" in cell["metadata"].get("tags", ()):
            space.update(REPO=str(REPO), WORKDIR=str(workdir), SETTINGS=settings, **parameters)
        behind_each_cell(space)
    assert all(isinstance(picture, Image.Image) for picture in shown)
    assert "summary" not in space or (workdir / "summary.json").exists()
    return shown


def shrink_openseg(space):
    if "config" in space and "summary" not in space:
        config = space["config"]
        config.data.train[0]["num_examples"] = 800  # all words occur
        config.evals.validation.source.num_examples = 8
        config.final_evals.test.source.num_examples = 8


@pytest.fixture(scope="module")
def openseg(tmp_path_factory):
    """The folder of the run of openseg.ipynb, and the pictures that it shows."""
    workdir = tmp_path_factory.mktemp("openseg") / "run"
    return workdir, execute("openseg.ipynb", workdir, SMALL, shrink_openseg)


@pytest.mark.parametrize("name", sorted(path.name for path in (REPO / "notebooks").glob("*.ipynb")))
@pytest.mark.parametrize("device", ["accel0", "vfio/0", "null"])
def test_install_cell_of_a_fresh_machine(name, device, monkeypatch):
    """In the form that Colab opens: the first cells install the checkout, with libtpu on a TPU."""
    book = json.loads((REPO / "notebooks" / name).read_text())
    assert book["metadata"]["accelerator"] == "TPU" and "colab" in book["metadata"]
    (cell,) = (text for c in book["cells"] if "pip" in (text := "".join(c["source"])) and "find_spec" in text)
    commands = []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("subprocess.run", lambda command, check: commands.append(command))
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [Path(device)] * fnmatchcase(device, pattern))
    monkeypatch.setattr("sys.path", [*sys.path])
    exec(compile(cell, name, "exec"), {"REPO": str(REPO)})
    assert commands[0][1:-1] == ["-m", "pip", "install", "-q", "-e"]
    extras = ["pretrained"] * (name == "photographs.ipynb") + ["tpu"] * (device != "null")
    assert commands[0][-1] == str(REPO) + (f"[{','.join(extras)}]" if extras else "")
    assert {*extras} <= {*re.findall(r'^    "(\w+)": \[', (REPO / "setup.py").read_text(), re.M)}


def test_openseg(openseg):
    assert len(openseg[1]) == 5


def test_features_3d(openseg):
    assert (
        len(execute("features_3d.ipynb", openseg[0], SMALL, shrink_openseg)) == 2
    )  # on the run that is there


def test_export_to_pytorch(openseg, capsys):
    require("torch")
    assert len(execute("export_to_pytorch.ipynb", openseg[0], SMALL, shrink_openseg)) == 2
    printed = capsys.readouterr().out
    assert float(re.search(r"([\d.]+)% of the pixels", printed)[1]) > 99.9 and "found without JAX" in printed


def test_photographs(tmp_path, monkeypatch):
    """By a tiny model with random weights in the published files."""
    towers.shrink(monkeypatch)
    out, weights = tmp_path / "out", str(towers.saved("tipsv2_b14")[1])
    given = dict(MODEL="tipsv2_b14", WEIGHTS=weights, OUT=str(out), LABELS="a red ball; grass,lawn; sky")
    Image.fromarray(towers.photograph(60, 90)).save(tmp_path / "photo.png")
    assert len(execute("photographs.ipynb", tmp_path, {}, PHOTOS=str(tmp_path), **given)) == 3
    record = json.loads((out / "photo0.json").read_text())
    assert {each["category"] for each in record["segments"]} <= {"person", "dog", "grass", "sky"}
    assert np.asarray(Image.open(out / "photo0.labels.png")).shape == (60, 90)


def test_pseg(tmp_path):
    def shrink(space):
        if "config" in space and "summary" not in space:
            config = space["config"]
            for source in (config.data.train[0], config.stages[0]["config"]["source"]):
                source["num_examples"] = 200  # all words occur
            config.evals.validation.source.num_examples = 8
            config.final_evals.test.source.num_examples = 8

    assert len(execute("pseg.ipynb", tmp_path / "run", SMALL, shrink)) == 7


def test_panoptic(tmp_path):
    """Also the run of configs/umg_clip.py: its second part starts from the towers of the first, and keeps them."""

    def shrink(space):
        if "config" not in space or "summary" in space:
            return
        config = space["config"]
        first = config.stages[0]["config"]
        first.update(dict(steps=1, batch_size=8, final_evals={}))
        for one in (first, config):
            one.towers.image.update(dict(width=16, depth=1, heads=2, hidden=16, embed_dim=16))
            one.towers.text.update(dict(width=16, embed_dim=16))
            one.data.train[0].update(dict(cache=False, num_examples=200))  # all words occur
            one.optimizer.warmup_steps = 0
        config.model.update(dict(width=32, mask_dim=32, layers=1, num_queries=4, ffn=16, encoder_ffn=16))
        config.loss.points = 32
        config.evals = {}
        for evaluation in config.final_evals.values():
            evaluation.update(dict(batch_size=8))
            evaluation.source.num_examples = 8

    settings = {key: x for key, x in SMALL.items() if not key.startswith(("loss", "model"))}
    assert len(execute("panoptic.ipynb", tmp_path / "run", settings, shrink)) == 5
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {"test/miou", "panoptic/pq", "instances/ap"} <= summary.keys()
    kept = Segmenter.from_checkpoint(tmp_path / "run").variables["towers"]["image"]["params"]
    first = Segmenter.from_checkpoint(tmp_path / "run" / "pretraining").variables["params"]["image"]
    jax.tree.map(np.testing.assert_array_equal, kept, first)

"""The command, on a tiny folder, with proposals and a classifier whose answers are known."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_method import CLASSES, COLOURS, FAKES, ColourClassifier, ColourMethod, blocks
from ml_collections import ConfigDict
from PIL import Image
from pycocotools import mask as coco

from ovseg_jax import methods, score
from ovseg_jax.errors import UserError
from ovseg_jax.experiment import transfer_table
from ovseg_jax.experiment.run import CLASSES_FILE, WORDS_FILE
from ovseg_jax.experiment.transfer import seen_names
from ovseg_jax.inference.pictures import draw_run
from ovseg_jax.parallel.sharding import make_mesh
from ovseg_jax.train.checkpoints import Checkpoints, load_variables, read_run, write_config
from ovseg_jax.train.state import TrainState
from ovseg_jax.vocab.classes import parse_labels
from ovseg_jax.vocab.splits import load_split
from ovseg_jax.vocab.words import WordList

SIDE = 16


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Runs of fake methods, as training leaves them, and a folder of three colours side by side."""
    root = tmp_path_factory.mktemp("transfer")
    data = root / "data"
    (data / "images").mkdir(parents=True)
    (data / "masks").mkdir()
    orders = (["red", "green", "blue"], ["blue", "red", "green"], ["green", "green", "red"])
    for i, order in enumerate(orders):
        Image.fromarray(blocks(10, 15, order)).save(data / "images" / f"{i}.png")
        ids = np.array([list(COLOURS).index(name) + 1 for name in order], np.uint8)
        Image.fromarray(np.tile(np.repeat(ids, 5), (10, 1))).save(data / "masks" / f"{i}.png")
    (data / "classes.txt").write_text("".join(f"{k}:{name}\n" for k, name in enumerate(COLOURS, 1)))
    evaluation = {"source": {"name": "folder", "data_dir": str(data), "kind": "semantic"}, "batch_size": 2}
    for name in ("masks", "pixels", "colours"):
        workdir = root / name
        workdir.mkdir()
        config = {"method": name, "data": {"image_size": SIDE}}
        write_config(
            workdir, ConfigDict(config | ({"final_evals": {"test": evaluation}} if name == "masks" else {}))
        )
        WordList(list(COLOURS)).save(workdir / WORDS_FILE)
        (workdir / CLASSES_FILE).write_text(CLASSES.to_json())
        checkpoints = Checkpoints(workdir, every=0, keep=1)
        params = ColourMethod().init(None)["params"]
        checkpoints.save(3, TrainState(jnp.int32(3), params, {}, {"none": jnp.zeros(1)}, None))
        checkpoints.close()
    return root


@pytest.fixture
def run(root, monkeypatch, capsys):
    monkeypatch.setattr(methods, "METHODS", FAKES)

    def call(**flags):
        known = {"proposals": root / "masks", "checkpoint": root / "colours"}
        code = score.main(["transfer", *(f"--{name}={value}" for name, value in (known | flags).items())])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def rows(out):
    title, *lines = out.splitlines()
    cells = {line.split()[0]: [float(cell) for cell in line.split()[1:]] for line in lines}
    return {name: dict(zip(title.split()[1:], cell, strict=True)) for name, cell in cells.items()}


def test_a_line_for_each_prompt(run):
    """The classifier's own prompt takes green for blue; a hand-written one, and the proposals, know better."""
    code, out, _ = run(ensemble=0, prompts="single; vild; learned")
    found = rows(out)
    assert code == 0 and list(found) == ["single", "vild", "learned"]
    assert found["single"]["pACC"] == found["vild"]["mIoU"] == 100 and found["learned"]["mIoU"] < 50
    assert "hIoU" not in found["single"] and found["single"]["chance"] < 10  # nothing is said to be unseen


def test_seen_and_unseen_classes_trust_different_stages(run):
    found = rows(run(ensemble=1, prompts="learned; single", split="green; blue")[1])
    assert found["single"]["hIoU"] == found["single"]["unseen"] == found["single"]["hIoU_gt"] == 100
    # Red is the proposals' to say, green and blue are the classifier's, which takes the one for the other.
    assert found["learned"]["seen"] == 100 and found["learned"]["unseen"] == pytest.approx(100 / 3, abs=0.01)
    assert found["learned"]["hIoU"] == pytest.approx(50, abs=0.01)


def test_other_data(run, root):
    given = f"folder,data_dir={root / 'data'},kind=semantic"
    assert run(data=given, prompts="single", batch=3, limit=2)[1] == run(prompts="single", limit=2)[1]


def true_masks(root):
    """The true masks of each image, and a worse one with a lower score, by the image's name."""
    for path in sorted((root / "data/masks").iterdir()):
        ids = np.array(Image.open(path))
        own = [ids == value for value in np.unique(ids)]
        yield (
            path.stem,
            np.stack([np.zeros_like(own[0]), *own]),
            np.array([0.1, *np.linspace(0.5, 1, len(own))]),
        )


def write_masks(root, json_file, folder):
    folder.mkdir()
    entries = []
    for name, masks, scores in true_masks(root):
        np.savez(folder / f"{name}.npz", masks=masks, scores=scores)
        for mask, score_ in zip(masks, scores, strict=True):
            code = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
            code = {"size": list(mask.shape), "counts": code["counts"].decode()}
            entries.append({"image_id": int(name), "segmentation": code, "score": score_})
    json_file.write_text(json.dumps(entries))
    return entries


def test_masks_of_another_program(run, root, tmp_path):
    """MaskFormer's, say: the classifier names each, and the hand-written prompt knows all colours."""
    file, folder = tmp_path / "m.json", tmp_path / "m"
    entries = write_masks(root, file, folder)
    flags = {
        "data": f"folder,data_dir={root / 'data'},kind=semantic",
        "prompts": "single; learned",
        "ensemble": 0,
    }
    code, out, err = run(proposals=file, **flags)
    assert code == 0 and rows(out)["single"]["pACC"] == 100 and rows(out)["learned"]["mIoU"] < 50 and not err
    assert run(proposals=folder, **flags)[1] == out
    file.write_text(json.dumps({"annotations": [*entries, {**entries[0], "image_id": 77}]}))
    code, again, err = run(proposals=file, **flags)
    assert (code, again) == (0, out) and "has masks for 1 images that are not evaluated" in err
    for masks, change, message in (
        ([{**entries[0], "segmentation": {"size": [20, 30], "counts": "zzz"}}], {}, "expected run lengths"),
        (
            [{**entries[0], "segmentation": {"size": [9, 9], "counts": [-9, 90]}}],
            {},
            "expected a whole number",
        ),
        (entries[:-3], {}, "has no masks for 1 of 3 images, such as '2'"),
        (entries, {"ensemble": 0.8}, "ensemble=0.8: masks in files have no scores of classes"),
        (
            [{**e, "segmentation": {"size": [5, 30], "counts": [150]}} for e in entries],
            {},
            "5 x 30 pixels, its labels",
        ),
        ([], {}, "holds no mask"),
    ):
        file.write_text(json.dumps(masks))
        code, _, err = run(proposals=file, **(flags | change))
        assert code == 1 and message in err and "Traceback" not in err


def test_a_prompt_whose_words_are_not_known_is_left_out(run, monkeypatch):
    embed = ColourClassifier.embed_phrases

    def choosy(self, variables, texts):
        if any("scene" in text for text in texts):
            raise UserError("what is a scene?")
        return embed(self, variables, texts)

    monkeypatch.setattr(ColourClassifier, "embed_phrases", choosy)
    code, out, err = run(prompts="single; vild")
    assert (
        code == 0
        and list(rows(out)) == ["single"]
        and "the prompt 'vild' is skipped: what is a scene?" in err
    )
    assert run(prompts="vild")[0] == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"proposals": "colours"}, "does not propose masks"),
        ({"proposals": "pixels", "data": "folder,data_dir=data,kind=semantic"}, "does not propose masks"),
        ({"proposals": "pixels"}, "has no segmentation evaluation"),
        ({"checkpoint": "masks"}, "does not classify images"),
        ({"prompts": " ; "}, "names no prompt"),
        ({"prompts": "a photo"}, "no {} for the class name"),
        ({"ensemble": 2}, "between 0"),
        ({"split": "zebra"}, "'zebra' is not one of the 6"),
        ({"data": "folder,here"}, "not of the form key=value"),
        ({"data": "nothing"}, "'nothing' is not one of"),
        ({"batch": 0}, "--batch=0"),
    ],
)
def test_a_wrong_request_is_one_sentence(run, root, monkeypatch, flags, message):
    monkeypatch.chdir(root)
    code, out, err = run(**flags)
    assert code == 1 and not out and message in err and err.count("\n") == 1


def test_sources_as_a_person_writes_them():
    assert transfer_table.read_source("folder,data_dir=2017,split=1")["data_dir"] == "2017"
    assert transfer_table.read_source("coco,data_dir=a,b,split=val2017,cache=true,limit=30") == {
        "name": "coco",
        "data_dir": "a,b",
        "split": "val2017",
        "cache": True,
        "limit": 30,
    }


def test_without_a_group_of_unseen_classes_none_is_seen():
    classes = parse_labels("cow,bull; dog; sky")
    assert seen_names(classes) == []
    assert seen_names(load_split(classes, "dog")) == ["cow", "bull", "sky"]


def draw(root: str, port: str, process: str) -> None:
    """One of two processes draws a run whose evaluation takes another run's masks."""
    jax.distributed.initialize(f"localhost:{port}", 2, int(process))
    methods.METHODS = FAKES
    workdir = Path(root) / "colours"
    config, (variables, _) = read_run(workdir), load_variables(workdir, mesh=make_mesh())
    source = {"name": "folder", "data_dir": f"{root}/data", "kind": "semantic"}
    evaluation = {"type": "transfer", "proposals": f"{root}/masks", "source": source}
    config = ConfigDict(config.to_dict() | {"final_evals": {"test": evaluation}})
    for path in draw_run(config, workdir, ColourClassifier(), variables):
        print("drew", path.relative_to(workdir))


def test_two_processes_draw_one_picture(root):
    """Both load the run of the masks, which waits for all processes."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    here = Path(__file__).parents[1]
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": os.pathsep.join(map(str, (here.parent, here))),
    }
    command = lambda process: [sys.executable, __file__, str(root), str(port), str(process)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen(command(process), env=env, **pipes) for process in range(2)]
    try:
        (out, err), (other, _) = (process.communicate(timeout=120) for process in running)
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], err
    drawn = [[line for line in text.splitlines() if line.startswith("drew")] for text in (out, other)]
    assert drawn == [["drew pictures/test.png"], []]
    assert Image.open(root / "colours/pictures/test.png").width > 3 * 256


if __name__ == "__main__":
    draw(*sys.argv[1:])

"""The pictures that a run leaves."""

import json

import jax
import numpy as np
import pytest
from fake_method import COLOURS, ColourClassifier, ColourMethod
from ml_collections import ConfigDict
from PIL import Image

from ovseg_jax.errors import UserError
from ovseg_jax.inference.pictures import draw_run


class AnyWords(ColourMethod):
    def embed_text(self, variables, texts):
        return {"colour": jax.numpy.eye(len(COLOURS))[np.arange(len(texts)) % len(COLOURS)]}


class WithoutPixels(AnyWords):
    """A method whose masks alone have features, as GroupViT."""

    def predict(self, variables, image, image_size):
        return super().predict(variables, image, image_size)._replace(pixels={})


def test_a_method_without_features_of_pixels_is_drawn_without_proposals(tmp_path):
    source = {"name": "scenes", "split": "test", "num_examples": 2, "image_size": 32}
    config = ConfigDict({"data": {"image_size": 32}, "final_evals": {"test": {"source": source}}})
    method = WithoutPixels(stride=2)
    (path,) = draw_run(config, tmp_path, method, method.init(None))
    assert Image.open(path).width == 3 * 256 + 2 * 10 + 48


@pytest.mark.parametrize("masks", [True, False])
def test_a_run_leaves_a_grid_for_each_evaluation_and_curves(tmp_path, masks):
    source = {"name": "scenes", "split": "test", "num_examples": 5, "image_size": 32}
    config = ConfigDict({"data": {"image_size": 32}, "final_evals": {"test": {"source": source}}})
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}) + "\n")
    method = AnyWords(stride=2, masks=masks)
    paths = draw_run(config, tmp_path, method, method.init(None), images=3)
    assert paths == [tmp_path / "pictures" / "test.png", tmp_path / "curves.png"]
    grid = Image.open(paths[0])
    columns = 3 + masks
    assert grid.width == columns * 256 + (columns - 1) * 10 + 48 and grid.height > 3 * 256


def test_an_image_of_one_column_is_drawn_with_the_others(tmp_path):
    data = tmp_path / "data"
    for name in ("images", "masks"):
        (data / name).mkdir(parents=True)
    for name, size in {"a": (64, 64), "b": (1, 600)}.items():
        Image.new("RGB", size, COLOURS["red"]).save(data / f"images/{name}.png")
        Image.new("L", size, 1).save(data / f"masks/{name}.png")
    (data / "classes.txt").write_text("1:red\n2:blue\n")
    source = {"name": "folder", "data_dir": str(data), "kind": "semantic"}
    config = ConfigDict({"data": {"image_size": 32}, "final_evals": {"test": {"source": source}}})
    method = AnyWords(stride=2)
    assert draw_run(config, tmp_path, method, method.init(None)) == [tmp_path / "pictures" / "test.png"]
    assert Image.open(tmp_path / "pictures/test.png").height > 2 * 256


def test_a_classification_leaves_features_and_prompts(tmp_path):
    folder = tmp_path / "data"
    for name in ("red", "blue", "white"):
        (folder / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(np.full((9, 9 + i, 3), COLOURS[name], np.uint8)).save(folder / name / f"{i}.png")
    evaluation = {
        "type": "classification",
        "source": {"name": "image_folder", "data_dir": str(folder)},
        "prompts": {"hard": "a photo of a {}."},
    }
    config = ConfigDict({"data": {"image_size": 8}, "final_evals": {"test": evaluation}})
    scores = {"alignment": 1.0, "uniformity": -1.0, "accuracy": 50.0}
    summary = {f"test/{key}{prompt}": value for key, value in scores.items() for prompt in ("", "[hard]")}
    method = ColourClassifier()
    pictures = tmp_path / "pictures"
    assert draw_run(config, tmp_path, method, method.init(None)) == [pictures / "test.png"]
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert draw_run(config, tmp_path, method, method.init(None)) == [
        pictures / "test.png",
        pictures / "test-prompts.png",
    ]


def test_a_picture_that_fails_costs_no_other(tmp_path, caplog):
    good = {"source": {"name": "scenes", "split": "test", "num_examples": 2, "image_size": 32}}
    bad = {"source": {"name": "folder", "data_dir": "nowhere"}}
    config = ConfigDict({"data": {"image_size": 32}, "final_evals": {"a": bad, "b": good}})
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}) + "\n")
    method = AnyWords(stride=2)
    with pytest.raises(UserError, match="nowhere"):
        draw_run(config, tmp_path, method, method.init(None), images=2)
    assert (tmp_path / "pictures/b.png").exists() and (tmp_path / "curves.png").exists()
    assert "a.png was not drawn" in caplog.text

"""The pictures that a run leaves."""

import json

import jax
import numpy as np
import pytest
from fake_method import COLOURS, ColourMethod
from ml_collections import ConfigDict
from PIL import Image

from ovseg_jax.gallery import draw_run


class AnyWords(ColourMethod):
    def embed_text(self, variables, texts):
        return jax.numpy.eye(len(COLOURS))[np.arange(len(texts)) % len(COLOURS)]


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

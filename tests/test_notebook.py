"""The notebook runs from top to bottom, shrunk by its parameters cell."""

import json
from pathlib import Path

from PIL import Image

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


def test_notebook_runs(tmp_path):
    cells = json.loads((REPO / "notebooks" / "openseg.ipynb").read_text())["cells"]
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in cells)
    shown = []
    space = {"display": shown.append, "__name__": "notebook"}
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        exec(compile("".join(cell["source"]), "notebooks/openseg.ipynb", "exec"), space)
        if "parameters" in cell["metadata"].get("tags", ()):
            space.update(REPO=str(REPO), WORKDIR=str(tmp_path / "run"), SETTINGS=SMALL)
        if "config" in space and "summary" not in space:
            config = space["config"]
            config.data.train[0]["num_examples"] = 800  # all words occur
            config.evals.validation.source.num_examples = 8
            config.final_evals.test.source.num_examples = 8
    assert len(shown) == 5 and all(isinstance(picture, Image.Image) for picture in shown)
    assert (tmp_path / "run" / "summary.json").exists()

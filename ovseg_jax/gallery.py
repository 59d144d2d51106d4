"""What a person wants to see of a finished run: predictions for each evaluation, and training curves."""

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

from ovseg_jax.curves import curves
from ovseg_jax.data.sources import Source, make_source
from ovseg_jax.data.transforms import class_map
from ovseg_jax.draw import GridRow, prediction_grid
from ovseg_jax.errors import UserError
from ovseg_jax.methods.base import Method, Variables
from ovseg_jax.segmenter import Segmenter


def draw_run(
    config: ConfigDict, workdir: epath.PathLike, method: Method, variables: Variables, *, images: int = 6
) -> list[epath.Path]:
    """Writes `pictures/<evaluation>.png` for each of `config.final_evals` (or `evals`), and `curves.png`.

    Each picture shows `images` examples, evenly spread over the source, with all of the source's classes
    asked for (argmax, nothing unknown). Classes of the group "held_out" are marked.

    Args:
      config: of the run.
      workdir: of the run, with its `metrics.jsonl`.
      method: as built for the run.
      variables: trained, on whatever devices of this process.
      images: examples in a picture.

    Returns:
      The paths written.
    """
    workdir = epath.Path(workdir)
    folder = workdir / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    segmenter = Segmenter(method, jax.device_get(variables), config)
    paths = []
    for name, evaluation in (config.get("final_evals") or config.evals).items():
        paths.append(folder / f"{name}.png")
        with paths[-1].open("wb") as f:
            _picture(segmenter, make_source(evaluation.source), name, images).save(f, "PNG")
    try:
        curves(workdir / "metrics.jsonl", workdir / "curves.png")
    except UserError:  # a run too short to have logged anything
        return paths
    return [*paths, workdir / "curves.png"]


def _picture(segmenter: Segmenter, source: Source, name: str, images: int) -> Image.Image:
    classes = source.classes
    where = np.linspace(0, len(source) - 1, min(images, len(source))).round().astype(int)
    examples = [source[int(i)] for i in where]
    pictures = [np.ascontiguousarray(example["image"]) for example in examples]
    results = segmenter.stream(pictures, classes, threshold=-np.inf, features=True)
    rows = []
    for example, result in zip(examples, results, strict=True):
        truth = class_map(example["segments"], example["class_ids"])
        proposals = result.features.proposals() if result.features else None
        rows.append(GridRow(result.image, truth, result.label_map, proposals))
    names = [classes.display(k) for k in range(len(classes))]
    return prediction_grid(rows, names, marked=classes.groups.get("held_out", ()), title=name)

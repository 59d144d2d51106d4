"""Pictures of a finished run: predictions or features for each evaluation, and training curves."""

import contextlib
import logging
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

from ovseg_jax.data.images import encode_image
from ovseg_jax.data.source_base import Source
from ovseg_jax.data.sources.build import make_source
from ovseg_jax.data.transforms import class_map
from ovseg_jax.errors import UserError
from ovseg_jax.experiment.load import Run, load_run
from ovseg_jax.experiment.transfer import rules_in
from ovseg_jax.files import write_whole
from ovseg_jax.inference.segmenter import Segmenter
from ovseg_jax.parallel.sharding import on_host
from ovseg_jax.protocols import Classifier, Segmenting, Variables, only
from ovseg_jax.reading import read_json
from ovseg_jax.towers.templates import read_templates
from ovseg_jax.viz.curves import curves
from ovseg_jax.viz.features import PromptPoint, prompts_picture, sphere_picture
from ovseg_jax.viz.segments import GridRow, prediction_grid
from ovseg_jax.vocab.classes import ClassList

_LOG = logging.getLogger(__name__)


def draw_run(
    config: ConfigDict,
    workdir: epath.PathLike,
    method: Any,
    variables: Variables,
    *,
    images: int = 6,
    again: bool = True,
) -> list[epath.Path]:
    """Draws `pictures/<evaluation>.png` for each of `config.final_evals` (or `evals`), and `curves.png`.

    The picture of a segmentation shows `images` examples, spread evenly over the source, segmented by all classes of
    the source and the evaluation's decision; classes of the groups "unseen" and "held_out" are marked. The picture of
    a classification shows features of a few classes on a sphere, and `pictures/<evaluation>-prompts.png` compares the
    prompts by their scores in `summary.json`.

    All processes must call it, since each may hold a part of the variables.

    Args:
      config: the config of the run.
      workdir: the folder of the run, with its `metrics.jsonl`.
      method: the method of the run, `Segmenting` for segmentations and a `Classifier` for classifications.
      variables: the trained variables, on any devices.
      images: the number of examples in a picture.
      again: whether to redraw existing pictures.

    Returns:
      The paths of the pictures in the first process, which writes them all.

    Raises:
      Exception: the first error of a picture that could not be drawn, after all others are drawn.
    """
    workdir = epath.Path(workdir)
    folder, paths = workdir / "pictures", []
    evaluations = config.get("final_evals") or config.evals
    if isinstance(method, Classifier) and (method.text_per_image or not method.unit_norm):
        # There is no picture of class features that depend on the image or are not unit vectors.
        evaluations = {}
    wanted = {
        name: evaluations[name] for name in evaluations if again or not (folder / f"{name}.png").exists()
    }
    if wanted:
        variables = on_host(variables)
    proposals = {
        name: load_run(
            evaluation.proposals, kind=Segmenting, key=f"{name}.proposals", lacking="does not propose masks"
        )
        for name, evaluation in wanted.items()
        if evaluation.get("type") == "transfer"
    }
    if jax.process_index():
        return []
    folder.mkdir(parents=True, exist_ok=True)
    failed: list[Exception] = []
    for name, evaluation in wanted.items():
        try:
            segmentation = evaluation.get("type") != "classification"
            draw = _draw_segmentation if segmentation else _draw_classification
            paths += draw(
                workdir, Run(config, method, variables), name, evaluation, proposals.get(name), images
            )
        except Exception as error:  # The other pictures are still drawn.
            _LOG.warning("%s was not drawn: %r", folder / f"{name}.png", error)
            failed.append(error)
    if again or not (workdir / "curves.png").exists():
        with contextlib.suppress(UserError):  # a run too short to have logged anything
            curves(workdir / "metrics.jsonl", workdir / "curves.png")
            paths.append(workdir / "curves.png")
    if failed:
        raise failed[0]
    return paths


def _draw_classification(
    workdir: epath.Path, run: Run, name: str, evaluation: ConfigDict, proposals: Run | None, images: int
) -> list[epath.Path]:
    paths = [workdir / "pictures" / f"{name}{end}.png" for end in ("", "-prompts")]
    # Drawn first, because the existence of the other picture means that both are drawn.
    if points := _prompt_points(workdir, name, evaluation):
        prompts_picture(points, name, paths[1])
    _features(run.config, evaluation, run.method, run.variables, name, paths[0])
    return paths[: 1 + bool(points)]


def _draw_segmentation(
    workdir: epath.Path, run: Run, name: str, evaluation: ConfigDict, proposals: Run | None, images: int
) -> list[epath.Path]:
    source: Any = make_source(evaluation.source)
    classes = source.classes
    if proposals is None:
        segmenter = Segmenter(run.method, run.variables, run.config)
    else:
        rules, classes = rules_in(evaluation, classes)
        segmenter = Segmenter.from_two_stages(proposals, run, classes, **rules)
    path = workdir / "pictures" / f"{name}.png"
    decision = evaluation.get("decision", "argmax")
    features = proposals is None and segmenter.has_features()
    picture = _picture(segmenter, source, classes, name, images, decision=decision, proposals=features)
    write_whole(path, encode_image(picture))
    return [path]


def _picture(
    segmenter: Segmenter,
    source: Source,
    classes: ClassList,
    name: str,
    images: int,
    *,
    decision: Any = "argmax",
    proposals: bool = True,
) -> Image.Image:
    where = np.linspace(0, len(source) - 1, min(images, len(source))).round().astype(int)
    examples = [source[int(i)] for i in where]
    pictures = [np.ascontiguousarray(example["image"]) for example in examples]
    results = segmenter.stream(pictures, classes, decision=decision, features=proposals)
    rows = []
    for example, result in zip(examples, results, strict=True):
        truth = class_map(example["segments"], example["class_ids"])
        found = result.features.proposals() if result.features else None
        rows.append(GridRow(result.image, truth, result.label_map, found))
    names = [classes.display(k) for k in range(len(classes))]
    return prediction_grid(rows, names, marked=classes.withheld(), title=name)


def _features(
    config: ConfigDict,
    evaluation: ConfigDict,
    method: Classifier,
    variables: Variables,
    name: str,
    path: epath.Path,
    classes: int = 6,
    images: int = 48,
) -> None:
    """Draws Fig. 6 of papers/000 for a few classes, spread evenly over those that occur, and a few images of each."""
    from ovseg_jax.data.evaluation import ClassifyEval
    from ovseg_jax.towers.features import class_features

    source: Any = make_source(evaluation.source)
    labels = np.asarray(source.labels)
    found = np.unique(labels)
    chosen = found[np.linspace(0, len(found) - 1, min(classes, len(found))).round().astype(int)]
    where = np.concatenate([np.flatnonzero(labels == k)[:images] for k in chosen])
    size = {"image_size": evaluation.get("image_size") or config.data.image_size}
    rows = [ClassifyEval.from_config(size, source)(int(i)) for i in where]
    embed = jax.jit(method.embed_image)
    if "feature" in rows[0]:
        seen = np.stack([row["feature"] for row in rows])
    else:
        pictures = np.stack([row["image"] for row in rows])
        parts = [embed(variables, pictures[i : i + images]) for i in range(0, len(pictures), images)]
        seen = np.concatenate([np.asarray(part) for part in parts])
    names = [source.classes.display(int(k)) for k in chosen]
    # As in the paper, the method's own prompt and one other, CoOp's if available: more would hide each other.
    others = dict((evaluation.get("prompts") or {}).items())
    other = next((k for k in ("coop", "before", "pomp", "hard", *others) if k in others), None)
    prompts: dict[str, Any] = {"own": None} | (
        {} if other is None else {other: read_templates(others[other])}
    )
    rays = {k: np.asarray(only(class_features(method, variables, names, v))) for k, v in prompts.items()}
    sphere_picture(seen, np.searchsorted(chosen, labels[where]), rays, names, name, path)


def _prompt_points(workdir: epath.Path, name: str, evaluation: ConfigDict) -> list[PromptPoint]:
    """Returns the points of Fig. 5 of papers/000 from the scores in the run's summary."""
    summary = workdir / "summary.json"
    scores = read_json(summary) if summary.exists() else {}
    scores = scores if isinstance(scores, dict) else {}
    points = []
    for prompt in ("", *(evaluation.get("prompts") or {})):
        suffix = f"[{prompt}]" if prompt else ""
        keys = [f"{name}/{metric}{suffix}" for metric in ("uniformity", "alignment", "accuracy")]
        if all(type(scores.get(key)) in (int, float) for key in keys):
            points.append(PromptPoint(prompt or "own", *(scores[key] for key in keys)))
    return points

"""Classification of a detector's boxes with a trained run, and their scores."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from ovseg_jax.cli.outputs import Journal, check_out_file, run_stamp
from ovseg_jax.errors import UserError
from ovseg_jax.evals import average_precision as ap
from ovseg_jax.evals.box_files import (
    Annotations,
    Proposals,
    find_images,
    match_images,
    read_annotations,
    read_boxes,
)
from ovseg_jax.evals.boxes import Detection, class_probability, detect, region_features
from ovseg_jax.experiment.class_vectors import TextSide, class_vectors
from ovseg_jax.experiment.load import load_run
from ovseg_jax.files import file_stamp, locked_file, write_whole
from ovseg_jax.parallel.sharding import make_mesh
from ovseg_jax.protocols import Classifier
from ovseg_jax.towers.prompt_file import Prompt
from ovseg_jax.vocab.class_files import read_class_file
from ovseg_jax.vocab.classes import ClassList


def classify_boxes(
    checkpoint: str,
    images: str,
    boxes: str,
    classes: str,
    out: str,
    prompt: Prompt | Sequence[str] | None = None,
    *,
    annotations: str | None = None,
    synonyms: str = "first",
    batch: int = 64,
    max_boxes: int | None = None,
) -> None:
    """Classifies boxes, writes the results, and prints AP and AR if there are annotations.

    The results of finished images are recorded beside `out` until all are done, so that a stopped command continues
    when it is run again.

    Args:
      checkpoint: the folder of a run that classifies images.
      images: the folder of the images.
      boxes: the file of boxes, see `read_boxes`.
      classes: the file of classes, see `read_class_file`.
      out: the file for the results, a JSON list in COCO's format.
      prompt: see `TextSide`.
      annotations: the annotation file, see `read_annotations`.
      synonyms: see `class_vectors`.
      batch: number of crops to classify at once.
      max_boxes: the maximum number of results per image; by default the number that COCO, or LVIS, evaluates.

    Raises:
      UserError: an argument or a file is invalid; all files are checked before the model is loaded.
    """
    for flag, value in (("batch", batch), ("max_boxes", max_boxes)):
        if value is not None and value < 1:
            raise UserError(f"--{flag}={value} is less than 1")
    check_out_file(out, {"--boxes": boxes, "--classes": classes, "--annotations": annotations})
    listed = read_class_file(classes)
    truth = read_annotations(annotations, listed) if annotations else None
    proposals = read_boxes(boxes)
    if truth:
        proposals = match_images(proposals, truth)
    files = find_images(images, proposals, truth)
    limit = max_boxes or ap.LIMITS[truth.rule if truth else "coco"][-1]
    with locked_file(out):
        journal = Journal(f"{out}.part.jsonl")
        journal.start(
            {
                "checkpoint": checkpoint,
                "stamp": run_stamp(checkpoint),
                "images": os.path.abspath(images),
                "boxes": [os.path.abspath(boxes), *file_stamp(boxes)],
                "classes": [listed.names, listed.ids],
                "annotations": annotations,
                "prompt": repr(prompt),
                "synonyms": synonyms,
                "limit": limit,
            }
        )
        try:
            done = {record["image_id"]: record["results"] for record in journal.records}
            waiting = {key: found for key, found in proposals.items() if key not in done}
            if waiting:
                mesh = make_mesh()
                with jax.set_mesh(mesh):
                    run = load_run(checkpoint, mesh, kind=Classifier, lacking="does not classify images")
                    text = class_vectors(TextSide(run.method, run.variables, prompt), listed, synonyms)
                    crops = [(files[key], found.boxes) for key, found in waiting.items()]
                    regions = region_features(
                        run.method.embed_image,
                        run.variables,
                        crops,
                        mesh,
                        size=int(run.config.data.image_size),
                        batch=batch,
                    )
                    scale = float(run.method.logit_scale(run.variables))
                    bar = tqdm(
                        waiting.items(), initial=len(done), total=len(proposals), unit="image", disable=None
                    )
                    for (key, found), own in zip(bar, regions, strict=True):
                        best = detect(found, class_probability(own, text, scale), limit)
                        done[key] = _rows(key, found, best, listed)
                        journal.append({"image_id": key, "results": done[key]})
        finally:
            journal.close()
        results = [result for key in proposals for result in done[key]]
        write_whole(Path(out), json.dumps(results))
        print(f"wrote {len(results)} boxes of {len(proposals)} images to {out}")
        if truth:
            print(score_boxes(truth, results))
        journal.remove()


def _rows(
    key: int | str, proposals: Proposals, best: Sequence[Detection], classes: ClassList
) -> list[dict[str, Any]]:
    """Returns the detections of an image as results of COCO."""
    return [
        {
            "image_id": key,
            "category_id": classes.ids[category],
            "bbox": proposals.boxes[box].tolist(),
            "score": score,
        }
        for box, category, score in best
    ]


def score_boxes(truth: Annotations, results: Sequence[dict[str, Any]]) -> str:
    """Formats AP and AR of boxes as text, with a note on images without boxes."""
    if not results:
        return "no box has a score above 0: AP is 0"
    numbers = truth.numbers
    found = [{**row, "image_id": numbers[str(row["image_id"])]} for row in results]
    scores = ap.metrics(ap.curves(truth.data, found, "bbox", truth.rule), truth.rule, truth.frequencies)
    cells = (f"{name} {'-' if math.isnan(value) else f'{value:.2f}'}" for name, value in scores.items())
    lines = ["  ".join(cells)]
    if missing := len(truth.ids) - len({result["image_id"] for result in results}):
        lines.append(f"{missing} of the {len(truth.ids)} annotated images have no boxes and count as missed")
    return "\n".join(lines)

"""A prompt put to detection: `python -m ovseg_jax.classify_boxes --checkpoint=WORKDIR --boxes=FILE ... --out=FILE`."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from ovseg_jax.cli.console import complain, quieten, use_compilation_cache
from ovseg_jax.errors import UserError
from ovseg_jax.evals.box_files import average_precision, find_images, is_lvis, read_boxes, read_json
from ovseg_jax.evals.boxes import class_probability, detect, region_features
from ovseg_jax.experiment.load import load_run
from ovseg_jax.parallel.sharding import make_mesh
from ovseg_jax.prompts import Side, add_flags, chosen_prompt, class_vectors
from ovseg_jax.protocols import Classifier
from ovseg_jax.vocab.class_files import read_class_file
from ovseg_jax.vocab.classes import ClassList

_DESCRIPTION = """\
Names the boxes that a detector proposes, and scores them where there are annotations.

  python -m ovseg_jax.classify_boxes --checkpoint=runs/pomp --images=val2017 --boxes=proposals.json \\
      --classes=instances_val2017.json --annotations=instances_val2017.json --out=results.json

--boxes is a JSON list of {"image_id", "bbox": [x, y, width, height], "score"}, as COCO has results; category_id is not
read. Images are found by the annotations' file names, or by their ids. --out is of the same form, with the ids of
--classes as category_id: what COCO's and LVIS's servers and tools take.
"""
LIMITS = {False: 100, True: 300}
"""Boxes of an image that COCO and (True) LVIS evaluate."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; its exit status: 0, or 2 for a wrong request."""
    arguments = _parser().parse_args(argv)
    quieten()
    try:
        _run(arguments)
        return 0
    except UserError as error:
        return complain(error)
    except OSError as error:
        return complain(UserError(f"--out={arguments.out} cannot be written: {error.strerror or error}"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ovseg_jax.classify_boxes",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="WORKDIR", help="a training run that classifies images")
    add("--images", required=True, metavar="DIR", help="the images")
    add("--boxes", required=True, metavar="FILE", help="the proposals, see above")
    add(
        "--classes",
        required=True,
        metavar="FILE",
        help="a label file, a list, or an annotation file of COCO or LVIS",
    )
    add("--out", required=True, metavar="FILE", help="the results, see above")
    add(
        "--annotations",
        metavar="FILE",
        help="score the results: AP of COCO, or of LVIS where `lvis` is installed",
    )
    add("--batch", type=int, default=64, metavar="N", help="crops at once (default %(default)s)")
    add(
        "--max_boxes",
        type=int,
        metavar="N",
        help="results an image (default 100, with annotations of LVIS 300)",
    )
    add_flags(parser)
    return parser


def _run(arguments: argparse.Namespace) -> None:
    # What can be wrong with the request is found before a model is loaded.
    for flag in ("batch", "max_boxes"):
        if (value := getattr(arguments, flag)) is not None and value < 1:
            raise UserError(f"--{flag}={value}: at least 1")
    prompt = chosen_prompt(arguments)
    classes = read_class_file(arguments.classes)
    annotations = read_annotations(arguments.annotations, classes) if arguments.annotations else {}
    proposals = read_boxes(arguments.boxes)
    files = find_images(arguments.images, proposals, annotations)
    limit = arguments.max_boxes or LIMITS[is_lvis(annotations)]
    mesh = make_mesh()
    results: list[dict[str, Any]] = []
    with jax.set_mesh(mesh):
        stage = load_run(arguments.checkpoint, mesh, kind=Classifier, lacking="classifies no images")
        text = class_vectors(Side(stage.method, stage.variables, prompt), classes, arguments.synonyms)
        scale = float(stage.method.logit_scale(stage.variables))
        features = region_features(
            stage.method.embed_image,
            stage.variables,
            [(files[key], found.boxes) for key, found in proposals.items()],
            mesh,
            size=int(stage.config.data.image_size),
            batch=arguments.batch,
        )
        bar = tqdm(proposals.items(), unit="image", disable=None, dynamic_ncols=True)
        for (key, found), regions in zip(bar, features, strict=True):
            for box, k, score in detect(found, class_probability(regions, text, scale), limit):
                bbox = found.boxes[box].tolist()
                results.append({"image_id": key, "category_id": classes.ids[k], "bbox": bbox, "score": score})
    Path(arguments.out).write_text(json.dumps(results))
    print(f"wrote {len(results)} boxes of {len(proposals)} images into {arguments.out}")
    if annotations:
        _judge(arguments.annotations, annotations, results)


def read_annotations(path: str, classes: ClassList) -> dict[str, Any]:
    """An annotation file of COCO or LVIS whose categories these classes are.

    Raises:
      UserError: it cannot be read, or has no category with the id of a class.
    """
    found = read_json(path)
    if not isinstance(found, dict) or not all(
        found.get(key) for key in ("images", "annotations", "categories")
    ):
        raise UserError(f"--annotations={path} has no images, annotations or categories")
    known = {category["id"] for category in found["categories"]}
    if strange := [k for k, number in enumerate(classes.ids) if number not in known]:
        number, name = classes.ids[strange[0]], classes.display(strange[0])
        raise UserError(
            f"--annotations={path} has no category {number}, the {name!r} of --classes: take --classes={path}"
        )
    return found


def _judge(path: str, annotations: dict[str, Any], results: list[dict[str, Any]]) -> None:
    if not results:
        print("no box has a score above 0: AP is 0")
        return
    try:
        scores = average_precision(path, results)
    except ImportError as error:
        print(f"AP of LVIS needs its package ({error}): pip install lvis")
        return
    missing = len(
        {image["id"] for image in annotations["images"]} - {result["image_id"] for result in results}
    )
    print("  ".join(f"{name} {value:.2f}" for name, value in scores.items()))
    if missing:
        print(
            f"{missing} of the {len(annotations['images'])} annotated images have no boxes, and count as missed"
        )


if __name__ == "__main__":
    use_compilation_cache()
    sys.exit(main())

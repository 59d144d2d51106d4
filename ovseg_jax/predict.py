"""Segments files by words: `python -m ovseg_jax.predict --checkpoint=WORKDIR --images=PHOTOS --out=DIR`."""

import argparse
import collections
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8
from tqdm import tqdm

from ovseg_jax.cli.console import complain, quieten, use_compilation_cache
from ovseg_jax.data.images import list_images, read_image
from ovseg_jax.errors import UserError
from ovseg_jax.inference.segmenter import UNKNOWN_BELOW, Segmenter
from ovseg_jax.vocab.classes import ClassList, load_labels
from ovseg_jax.vocab.vectors import ClassVectors

_DESCRIPTION = """\
Segments an image, or every image of a folder, by the words you give.

  python -m ovseg_jax.predict --checkpoint=runs/openseg --images=wedding.jpg \\
      --labels="bride,woman in white; groom; cake" --out=out

For each image NAME it writes into --out
  NAME.overlay.png   the image under its segments, with names and a legend
  NAME.labels.png    the label map: 0 = unknown, k = the k-th category (16 bits above 255 categories)
  NAME.json          category, score, area, box and COCO RLE mask of each segment
  NAME.features.npz  with --features: pixels, embedding [h w D], masks [N h w], regions [N D] in float16
and predictions.json, the segments of all images.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; its exit status: 0, 1 if some images could not be read, 2 for a wrong request."""
    arguments = _parser().parse_args(argv)
    quieten()
    try:
        return _predict(arguments)
    except UserError as error:
        return complain(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ovseg_jax.predict",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="WORKDIR", help="the folder (or bucket) of a training run")
    add("--images", required=True, metavar="PATH", help="an image, or a folder of images")
    add("--out", required=True, metavar="DIR", help="where to write; made if missing")
    add(
        "--labels",
        metavar="TEXT|FILE",
        help="';' between categories, ',' between the names of one; or a file of lines 'id:name,name,...', or "
        "an .npz of names and vectors (ovseg_jax.prompts); "
        "by default the classes that the model was trained with",
    )
    add(
        "--threshold",
        type=float,
        metavar="T",
        help=f"pixels with a lower confidence are unknown (default {UNKNOWN_BELOW}; with --proposals, whose scores are "
        "shares of all classes, none are)",
    )
    add(
        "--tile",
        type=_tile,
        metavar="SIZE[,OVERLAP]",
        help="see larger images in overlapping tiles of SIZE pixels, in more detail (overlap: a quarter)",
    )
    add(
        "--proposals",
        metavar="WORKDIR",
        help="a run that proposes masks, for a --checkpoint that classifies images, such as a prompt's",
    )
    add(
        "--ensemble",
        type=float,
        metavar="W",
        help="with --proposals: w of ovseg_jax.transfer, where no class is seen unless the run says which are not; "
        "0: --checkpoint alone names (default 0.8)",
    )
    add(
        "--fill",
        choices=("mean", "zero"),
        help="with --proposals: colour around a cut-out mask (default mean)",
    )
    add("--features", action="store_true", help="also write text-aligned features; not with --tile")
    add("--batch", type=int, default=8, metavar="N", help="images or tiles at once (default %(default)s)")
    add("--step", type=int, metavar="N", help="the checkpoint of this step (default: the latest)")
    return parser


def _tile(text: str) -> tuple[int, int]:
    parts = [int(part) for part in text.split(",")]
    if len(parts) == 1:
        parts.append(parts[0] // 4)
    if len(parts) != 2:
        raise ValueError
    return parts[0], parts[1]


def _segmenter(arguments: argparse.Namespace) -> Segmenter:
    rules = {key: value for key in ("ensemble", "fill") if (value := getattr(arguments, key)) is not None}
    if not arguments.proposals:
        if rules:
            raise UserError(f"--{next(iter(rules))} is of use with --proposals alone")
        return Segmenter.from_checkpoint(arguments.checkpoint, arguments.step, batch_size=arguments.batch)
    if arguments.step is not None:
        raise UserError("--step does not go with --proposals: the latest checkpoints are taken")
    return Segmenter.from_two_stages(
        arguments.proposals, arguments.checkpoint, batch_size=arguments.batch, **rules
    )


def _predict(arguments: argparse.Namespace) -> int:
    # What can be wrong with the request is found before the model is loaded.
    if arguments.features and arguments.tile:
        raise UserError(
            "--features are those of the whole image: leave out --tile, or cut the images yourself"
        )
    if arguments.features and arguments.proposals:
        raise UserError("--features are those of one model: leave out --proposals")
    if arguments.threshold is None:
        arguments.threshold = -1.0 if arguments.proposals else UNKNOWN_BELOW
    vectors = ClassVectors.of(arguments.labels)
    labels = load_labels(arguments.labels) if arguments.labels is not None and vectors is None else None
    paths = image_files(arguments.images)
    out = epath.Path(arguments.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={out} cannot be made: {error.strerror or error}") from error
    segmenter = _segmenter(arguments)

    reader = _Reader(paths)
    records = []
    with tqdm(total=len(paths), unit="image", disable=None, dynamic_ncols=True) as bar:
        reader.report = lambda error: (bar.update(), bar.write(f"skipped: {error}", sys.stderr))
        results = segmenter.stream(
            reader,
            vectors or labels,
            threshold=arguments.threshold,
            tile=arguments.tile,
            features=arguments.features,
        )
        for result in results:
            path, stem = reader.done.popleft()
            bar.set_postfix_str(path.name, refresh=False)
            result.save(out, stem)
            if result.features is not None:
                result.features.save(out / f"{stem}.features.npz")
            records.append({"image": str(path), "stem": stem, **result.record()})
            bar.update()
    classes = vectors.classes if vectors else labels or segmenter.classes
    summary = {
        "checkpoint": str(arguments.checkpoint),
        "threshold": arguments.threshold,
        "labels": _listed(classes),
    }
    (out / "predictions.json").write_text(json.dumps(summary | {"images": records}, indent=1) + "\n")
    _tell(records, out, reader.skipped)
    return 1 if reader.skipped else 0


def image_files(path: epath.PathLike) -> list[epath.Path]:
    """The image itself, or the images of a folder (not of folders in it) by name.

    Raises:
      UserError: there is nothing, or no image in the folder.
    """
    path = epath.Path(path)
    if not path.is_dir():
        if not path.exists():
            raise UserError(f"--images={path}: there is no such file or folder")
        return [path]
    files = list_images(path)
    if not files:
        raise UserError(f"--images={path}: no image in this folder that can be read")
    return files


class _Reader:
    """Reads files one after the other, skips the bad ones and remembers which came through."""

    def __init__(self, paths: Sequence[epath.Path]):
        # a.jpg and a.png would write to the same files
        count = collections.Counter(path.stem for path in paths)
        self.files = [(path, path.stem if count[path.stem] == 1 else path.name) for path in paths]
        self.done: collections.deque[tuple[epath.Path, str]] = collections.deque()
        self.skipped = 0
        self.report: Callable[[UserError], Any] = print

    def __iter__(self) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        for path, stem in self.files:
            try:
                image = read_image(path)
            except UserError as error:
                self.skipped += 1
                self.report(error)
                continue
            self.done.append((path, stem))
            yield image


def _listed(classes: ClassList | None) -> list[list[str]]:
    return [list(names) for names in classes.names] if classes else []


def _tell(records: list[dict], out: epath.Path, skipped: int) -> None:
    for record in records[:10]:
        total = record["height"] * record["width"]
        found = ", ".join(f"{s['category']} {s['area'] / total:.0%}" for s in record["segments"][:6])
        print(f"{record['stem']}: {found or 'unknown'}")
    if len(records) > 10:
        print(f"... and {len(records) - 10} more")
    bad = f", {skipped} could not be read" if skipped else ""
    print(f"{len(records)} segmented{bad}; see {out}")


if __name__ == "__main__":
    use_compilation_cache()
    sys.exit(main())

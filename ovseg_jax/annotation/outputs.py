"""The files of an annotated data set, written from its records once the scores of all images are known.

OUT/images/NAME.*            links to the images, or PNGs of a source that has no image files
OUT/masks, segments.json, classes.txt, captions.json     the layout of `data.sources.folder`
OUT/regions/NAME.json        UMG-41M's layout, see `data.sources.region_json`
OUT/panoptic.json, panoptic/NAME.png                     COCO's panoptic format
OUT/statistics.json, statistics.png                      Tables 1, 11, 12 and Figure 6 of papers/003
OUT/sheet.png, worst.png     images drawn at random, and those with the least stable masks, or the lowest captions
OUT/failed.json              the images that could not be annotated, with the reason
"""

import concurrent.futures
import functools
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Int32

from ovseg_jax.annotation.run import Images, Job, image_names, read_records
from ovseg_jax.annotation.statistics import Statistics, draw_statistics
from ovseg_jax.annotation.steps import merge_panoptic, score_floor
from ovseg_jax.annotation.workflow import Record, Rules
from ovseg_jax.data.images import encode_image, encode_mask, read_header
from ovseg_jax.data.source_base import Source
from ovseg_jax.data.sources.build import make_source
from ovseg_jax.data.transforms import segment_boxes
from ovseg_jax.errors import UserError
from ovseg_jax.files import write_whole
from ovseg_jax.viz.segments import GridRow, prediction_grid

SHOWN = 12  # images of a sheet


class Floors(NamedTuple):
    """The minimum scores of captions of images, of labels of regions and of captions of regions."""

    captions: float
    labels: float
    region_captions: float


class Final(NamedTuple):
    """What is kept of a record.

    Attributes:
      record: the record, with the captions and regions that are kept; those with a segment have its number, "segment".
      segments: 0 = void, numbered from 1.
      names: the class of each segment.
      isthing: whether each is a thing.
      dropped: counts of what was dropped, by the reason.
    """

    record: Record
    segments: Int32[np.ndarray, "h w"]
    names: list[str]
    isthing: list[bool]
    dropped: dict[str, int]


class Summary(NamedTuple):
    """What a call did.

    Attributes:
      made: images annotated by this call.
      there: images that had a record before.
      failed: the reason for each image that could not be annotated.
      statistics: the content of statistics.json.
    """

    made: int
    there: int
    failed: dict[str, str]
    statistics: dict[str, Any]


def floors_of(records: Iterator[Record], rules: Rules) -> tuple[Floors, dict[str, bool]]:
    """Computes the minimum scores over all records; returns them, and for each class whether it is a thing."""
    scores: tuple[list[float], list[float], list[float]] = [], [], []
    things: dict[str, bool] = {}
    for record in records:
        scores[0].extend(c[2] for c in record["captions"] if len(c) > 2)
        for region in record["regions"]:
            scores[1].extend([region["label_score"]] if "label_score" in region else [])
            scores[2].extend(c[2] for c in region["captions"] if len(c) > 2)
            things[region["label"]] = things.get(region["label"], False) or region["isthing"]
        for stuff in record["stuff"]:
            things.setdefault(stuff["label"], False)
    cuts = (
        (rules.caption_quantile, rules.caption_score),
        (rules.region_quantile, rules.region_score),
        (rules.region_quantile, rules.region_score),
    )
    floors = Floors(
        *(
            score_floor(np.array(own, np.float64), *map(float, cut))
            for own, cut in zip(scores, cuts, strict=True)
        )
    )
    return floors, dict(sorted(things.items()))


def finish(record: Record, floors: Floors, rules: Rules) -> Final:
    """Drops captions, regions and masks by the rules, and merges the masks to segments."""
    captions = _kept(record["captions"], floors.captions)
    regions = [
        {**region, "captions": _kept(region["captions"], floors.region_captions)}
        for region in record["regions"]
        if region.get("label_score", floors.labels) >= floors.labels
    ]
    size = (record["size"][0], record["size"][1])
    steady = [k for k, region in enumerate(regions) if region.get("stability", -1.0) >= rules.stability]
    things, stuff = (
        _masks([row["mask"] for row in rows], size)
        for rows in ([regions[k] for k in steady], record["stuff"])
    )
    segments, chosen = merge_panoptic(
        things,
        np.array([regions[k]["score"] for k in steady], np.float64),
        stuff,
        np.array([row["score"] for row in record["stuff"]], np.float64),
        size,
        float(rules.visible),
        int(rules.stuff_area),
    )
    names, isthing = [], []
    for number, k in enumerate(chosen, 1):
        row = regions[steady[k]] if k < len(steady) else record["stuff"][k - len(steady)]
        names.append(row["label"])
        isthing.append(k < len(steady))
        if k < len(steady):
            row["segment"] = number
    masked = sum("mask" in region for region in regions)
    dropped = {
        "captions": len(record["captions"]) - len(captions),
        "regions": len(record["regions"]) - len(regions),
        "unstable_masks": masked - len(steady),
        "hidden_masks": len(steady) + len(record["stuff"]) - len(chosen),
    }
    return Final({**record, "captions": captions, "regions": regions}, segments, names, isthing, dropped)


def _kept(captions: Sequence[Sequence[Any]], floor: float) -> list[Any]:
    return [caption for caption in captions if len(caption) < 3 or caption[2] >= floor]


def _masks(codes: Sequence[str], size: tuple[int, ...]) -> Any:
    from pycocotools import mask as coco

    if not codes:
        return np.zeros((0, *size), bool)
    coded = [{"size": list(size), "counts": code.encode()} for code in codes]
    return np.moveaxis(coco.decode(coded), 2, 0).astype(bool)


def regions_json(record: Record) -> dict[str, Any]:
    """Returns an image's annotations in UMG-41M's layout, with the scores beside them."""
    keys = ("bbox", "label", "score", "isthing", "stability", "segment")
    return {
        "captions": [caption[0] for caption in record["captions"]],
        "caption_scores": [caption[2] for caption in record["captions"] if len(caption) > 2],
        "tags": record["tags"],
        "regions": [
            {
                **{key: region[key] for key in keys if key in region},
                "tags": [region["label"]],
                "captions": [caption[0] for caption in region["captions"]],
            }
            for region in record["regions"]
        ],
    }


def panoptic_rows(final: Final, ids: Mapping[str, int]) -> list[dict[str, Any]]:
    """Returns COCO's `segments_info` of an image.

    Args:
      final: the image.
      ids: the id of each class.
    """
    areas = np.bincount(final.segments.ravel(), minlength=len(final.names) + 1)[1:]
    boxes = segment_boxes(final.segments, len(final.names)).astype(int).tolist()
    return [
        {
            "id": number,
            "category_id": ids[name],
            "isthing": int(thing),
            "iscrowd": 0,
            "area": int(area),
            "bbox": [x0, y0, x1 - x0, y1 - y0],
        }
        for number, (name, thing, area, (x0, y0, x1, y1)) in enumerate(
            zip(final.names, final.isthing, areas, boxes, strict=True), 1
        )
    ]


def write_outputs(job: Job) -> Summary:
    """Writes all files from the records, of this call and of earlier ones.

    Raises:
      UserError: no image has a record, an image has another size than when it was annotated, or a file cannot be
        written.
    """
    out, source = epath.Path(job.out), make_source(job.source)
    index = {name: k for k, name in enumerate(image_names(source))}
    done: set[str] = set()
    errors: dict[str, str] = {}

    def whole() -> Iterator[Record]:
        done.clear()
        for record in read_records(out):
            name = record["image"]
            if "error" in record:
                errors[name] = record["error"]
            elif name in index and name not in done:
                done.add(name)
                yield record

    floors, things = floors_of(whole(), job.rules)
    failed = {name: errors[name] for name in sorted(errors.keys() & index.keys() - done)}
    write_whole(out / "failed.json", json.dumps(failed, indent=1) + "\n")
    if not done:
        reason = ", such as {}: {}".format(*next(iter(failed.items()))) if failed else ""
        raise UserError(f"none of the {len(index)} images could be annotated{reason}")
    for folder in ("images", "masks", "regions", "panoptic"):
        (out / folder).mkdir(exist_ok=True)
    masked = bool(job.plugs.get("masks") or job.plugs.get("stuff"))
    ids = {name: k for k, name in enumerate(things, 1)}
    statistics, rows, quality = Statistics(), _Rows(), {}
    write = functools.partial(_write_image, out, source, index, floors, job.rules, masked)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        # A few at a time: `map` would read all records at once.
        for part in _parts(whole(), 64):
            for file, final in pool.map(write, part):
                statistics.add(final.record, final.dropped)
                rows.add(file, final, ids)
                quality[final.record["image"]] = _quality(final.record)
    _write_lists(out, rows, things, ids, masked)
    found = {"failed": len(failed), **statistics.result(), "least_scores": floors._asdict()}
    write_whole(out / "statistics.json", json.dumps(found, indent=1) + "\n")
    draw_statistics(found, out / "statistics.png")
    names = sorted(quality)
    random = [names[k] for k in np.random.default_rng(0).permutation(len(names))[:SHOWN]]
    worst = sorted(names, key=lambda name: quality[name])[:SHOWN]
    shown = {r["image"]: finish(r, floors, job.rules) for r in whole() if r["image"] in {*random, *worst}}
    for file, chosen in (("sheet.png", random), ("worst.png", worst)):
        _write_sheet(out / file, [shown[name] for name in chosen], source, index, [*things])
    return Summary(0, 0, failed, found)


class _Rows:
    """The entries of the files that list all images."""

    def __init__(self) -> None:
        self.captions: dict[str, list[str]] = {}
        self.segments: dict[str, dict[str, str]] = {}
        self.images: list[dict[str, Any]] = []
        self.panoptic: list[dict[str, Any]] = []

    def add(self, file: str, final: Final, ids: Mapping[str, int]) -> None:
        """Adds an image; `file` is the name of its file."""
        name, (height, width) = final.record["image"], final.record["size"]
        number = int(name) if name.isdecimal() and name.isascii() else name
        self.captions[file] = [caption[0] for caption in final.record["captions"]]
        self.segments[file] = {str(k): label for k, label in enumerate(final.names, 1)}
        self.images.append({"id": number, "file_name": file, "height": height, "width": width})
        rows = panoptic_rows(final, ids)
        self.panoptic.append({"image_id": number, "file_name": f"{name}.png", "segments_info": rows})


def _parts(records: Iterator[Record], size: int) -> Iterator[list[Record]]:
    while part := list(itertools.islice(records, size)):
        yield part


def _write_image(
    out: epath.Path,
    source: Source,
    index: Mapping[str, int],
    floors: Floors,
    rules: Rules,
    masked: bool,
    record: Record,
) -> tuple[str, Final]:
    """Writes the files of an image; returns the name of the image file, and what is kept of the record."""
    name = record["image"]
    final = finish(record, floors, rules)
    file = _link_image(out / "images", source, index[name], name, tuple(record["size"]))
    write_whole(out / "regions" / f"{name}.json", json.dumps(regions_json(final.record)))
    if masked:
        write_whole(out / "masks" / f"{name}.png", encode_mask(final.segments))
        colours = np.stack([final.segments >> shift & 255 for shift in (0, 8, 16)], -1).astype(np.uint8)
        write_whole(out / "panoptic" / f"{name}.png", encode_image(colours))
    return file, final


def _link_image(folder: epath.Path, source: Source, index: int, name: str, size: tuple[int, int]) -> str:
    """Links an image file into a folder, or writes a PNG of it; returns its name there.

    Raises:
      UserError: the file has another size than when it was annotated.
    """
    if isinstance(source, Images):
        path = source.files[index]
        if (found := read_header(path)[0]) != size:
            raise UserError(
                f"{path} is {found[0]} x {found[1]} (height x width), but it was {size[0]} x {size[1]} when it was "
                "annotated: choose another --out"
            )
        target = folder / path.name
        if "://" in str(folder) or "://" in str(path):
            if not target.exists():
                path.copy(target)
        elif not target.exists():
            target.unlink(missing_ok=True)  # a link whose target was deleted
            os.symlink(os.path.abspath(path), target)
        return path.name
    target = folder / f"{name}.png"
    if not target.exists():
        write_whole(target, encode_image(source[index]["image"]))
    return target.name


def _write_lists(
    out: epath.Path, rows: _Rows, things: Mapping[str, bool], ids: Mapping[str, int], masked: bool
) -> None:
    """Writes the files that list all images."""
    write_whole(out / "captions.json", json.dumps(rows.captions) + "\n")
    if not masked or not things:
        return
    numbers = " ".join(str(ids[name]) for name, thing in things.items() if thing)
    classes = [f"# things: {numbers}", *(f"{k}:{name}" for name, k in ids.items())]
    write_whole(out / "classes.txt", "\n".join(classes) + "\n")
    write_whole(out / "segments.json", json.dumps(rows.segments) + "\n")
    categories = [{"id": k, "name": name, "isthing": int(things[name])} for name, k in ids.items()]
    content = {"images": rows.images, "annotations": rows.panoptic, "categories": categories}
    write_whole(out / "panoptic.json", json.dumps(content) + "\n")


def _quality(record: Record) -> float:
    """Returns the mean stability of an image's masks, else the mean score of its captions."""
    steady = [region["stability"] for region in record["regions"] if "stability" in region]
    scores = [caption[2] for caption in record["captions"] if len(caption) > 2]
    return float(np.mean(steady or scores or [0.0]))


def _write_sheet(
    path: epath.Path, finals: Sequence[Final], source: Source, index: Mapping[str, int], names: Sequence[str]
) -> None:
    """Draws images with their segments, or without any with their boxes, and a caption or the tags of each."""
    rows = []
    for final in finals:
        record = final.record
        classes = np.array([-1, *(names.index(name) for name in final.names)], np.int32)
        drawn = classes[final.segments]
        if not final.names:
            area = lambda region: np.subtract(region["bbox"][2:], region["bbox"][:2]).prod()
            for region in sorted(record["regions"], key=area, reverse=True):
                x0, y0, x1, y1 = (round(x) for x in region["bbox"])
                drawn[y0:y1, x0:x1] = names.index(region["label"])
        said = record["captions"][0][0] if record["captions"] else ", ".join(record["tags"])
        image = source[index[record["image"]]]["image"]
        rows.append(GridRow(image, None, drawn, caption=f"{record['image']}: {said}"))
    write_whole(path, encode_image(prediction_grid(rows, names, second="annotation")))

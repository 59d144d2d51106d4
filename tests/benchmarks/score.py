"""Time of `score` on files, beside the way of the field's own scripts on the same files, in turns.

    python tests/benchmarks/score.py semantic|panoptic [--images=1000] [--classes=150] [--rounds=5] [--workers=2]

semantic  label maps of 512 x 683 with `classes` classes (PNG; 8 bits below 255 classes, else 16), against the loop of
          detectron2's SemSegEvaluator: one process, both maps as int64, and a histogram of (classes + 1)^2 cells an
          image. `ratio` leaves out that it also encodes every predicted class as runs; `ratio_with_runs` counts that,
          as measured on the first hundred images.
panoptic  JSON and PNGs of 512 x 683 with about 16 segments, against the loop of panopticapi: both PNGs as uint32
          colours, np.unique of the predicted ids and of the pairs of ids, dictionaries of segments. Once in one
          process, and once in `workers` processes, as panopticapi itself runs.

Both sides read all files anew in each turn; the files stay in the system's cache. Prints one JSON line; `ratio` is the
median of theirs over ours by the clock. `processor_ratio` is that of the processor's time, of all processes of a side
together: on idle cores `ratio` is up to `workers` times as high, if the other side is one process.
"""

import argparse
import contextlib
import functools
import io
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as masks

from ovseg_jax import score

HEIGHT, WIDTH = 512, 683


def areas(rng: np.random.Generator, count: int, side: int = 40) -> np.ndarray:
    """A map of areas with wavy outlines, of values below `count`."""
    values = rng.integers(0, count, (HEIGHT // side + 2, WIDTH // side + 2))
    whole = np.repeat(np.repeat(values, side, 0), side, 1)[:HEIGHT, :WIDTH]
    wave = (8 * np.sin(np.arange(WIDTH) / 17)).astype(int)
    return whole[(np.arange(HEIGHT)[:, None] + wave) % HEIGHT, np.arange(WIDTH)]


def write_label_maps(folder: Path, images: int, classes: int) -> None:
    """Truths of which a twelfth is void, and predictions that are right in three quarters of the areas."""
    rng = np.random.default_rng(0)
    kind, void = (np.uint8, 255) if classes < 255 else (np.uint16, 65535)
    for name in ("pred", "gt"):
        (folder / name).mkdir()
    for i in range(images):
        truth = areas(rng, classes)
        prediction = np.where(areas(rng, 4) == 0, areas(rng, classes), truth)
        truth = np.where(areas(rng, 12) == 0, void, truth)
        Image.fromarray(prediction.astype(kind)).save(folder / f"pred/{i}.png")
        Image.fromarray(truth.astype(kind)).save(folder / f"gt/{i}.png")


def detectron2s_way(folder: Path, classes: int, limit: int | None = None, runs: bool = False) -> float:
    """mIoU over the classes in the truth; with `runs`, every predicted class is also encoded as runs of pixels."""
    void = 255 if classes < 255 else 65535
    matrix = np.zeros((classes + 1, classes + 1), np.int64)
    for path in sorted((folder / "gt").iterdir())[:limit]:
        prediction = np.array(Image.open(folder / "pred" / path.name), dtype=int)
        truth = np.array(Image.open(path), dtype=int)
        for label in np.unique(prediction) if runs else ():
            mask = (prediction == label).astype(np.uint8)
            masks.encode(np.array(mask[:, :, None], order="F"))
        truth[truth == void] = classes
        matrix += np.bincount(
            (classes + 1) * prediction.reshape(-1) + truth.reshape(-1), minlength=matrix.size
        ).reshape(matrix.shape)
    inside = matrix.diagonal()[:-1].astype(float)
    label, guess = matrix[:-1, :-1].sum(0), matrix[:-1, :-1].sum(1)
    return float(100 * np.mean((inside / np.maximum(label + guess - inside, 1))[label > 0]))


def scored(kind: str, folder: Path, flags: list[str], ending: str = "") -> dict[str, Any]:
    """The scores of the command, run in this process."""
    out = folder / "scores.json"
    inputs = [f"--pred={folder}/pred{ending}", f"--gt={folder}/gt{ending}"]
    with contextlib.redirect_stdout(io.StringIO()):
        code = score.main([kind, *inputs, f"--json={out}", *flags])
    assert code == 0
    return json.loads(out.read_text())["scores"]


def turns(ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Seconds of both sides and their ratio, by the clock and of the processor, which other work changes less."""
    clock: dict[Callable[[], Any], list[float]] = {ours: [], theirs: []}
    processor: dict[Callable[[], Any], list[float]] = {ours: [], theirs: []}
    for _ in range(rounds):
        for side in clock:
            start, before = time.perf_counter(), processor_seconds()
            side()
            clock[side].append(time.perf_counter() - start)
            processor[side].append(processor_seconds() - before)
    ratios = [b / a for a, b in zip(clock[ours], clock[theirs], strict=True)]
    of_processor = [b / a for a, b in zip(processor[ours], processor[theirs], strict=True)]
    return {
        "ours_seconds": round(statistics.median(clock[ours]), 3),
        "theirs_seconds": round(statistics.median(clock[theirs]), 3),
        "ratio": round(statistics.median(ratios), 2),
        "lowest": round(min(ratios), 2),
        "highest": round(max(ratios), 2),
        "ours_processor": round(statistics.median(processor[ours]), 3),
        "theirs_processor": round(statistics.median(processor[theirs]), 3),
        "processor_ratio": round(statistics.median(of_processor), 2),
    }


def processor_seconds() -> float:
    """Time of this process and of those that it started, which count when they have ended."""
    while multiprocessing.active_children():  # reaps them
        time.sleep(0.01)
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(use.ru_utime + use.ru_stime for use in both)


def semantic(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Label maps."""
    write_label_maps(folder, args.images, args.classes)
    flags = [f"--num_classes={args.classes}", f"--workers={args.workers}"]
    ours = lambda: scored("semantic", folder, flags)["all"]["mIoU_gt"]
    theirs = lambda: detectron2s_way(folder, args.classes)
    assert abs(ours() - theirs()) < 1e-9
    found = turns(ours, theirs, args.rounds)
    start = time.perf_counter()
    detectron2s_way(folder, args.classes, 100, runs=True)
    whole = (time.perf_counter() - start) * args.images / min(args.images, 100)
    return found | {"ratio_with_runs": round(whole / found["ours_seconds"], 1)}


def write_panoptic(folder: Path, images: int, classes: int) -> None:
    """Truths of which a tenth is void, and predictions of which three quarters are right."""
    rng = np.random.default_rng(0)
    sides: dict[str, list[Any]] = {"pred": [], "gt": []}
    for i in range(images):
        truth = areas(rng, 17, 60)
        kinds = rng.integers(0, classes, (2, 17))
        maps = {"gt": truth, "pred": np.where(areas(rng, 4, 60) == 0, areas(rng, 17, 60), truth)}
        for side, numbers in maps.items():
            (folder / side).mkdir(exist_ok=True)
            ids = np.append(0, rng.choice(1 << 24, 16, replace=False))
            colours = np.stack([ids >> shift & 255 for shift in (0, 8, 16)], -1).astype(np.uint8)
            Image.fromarray(colours[numbers]).save(folder / f"{side}/{i}.png")
            area = np.bincount(numbers.ravel(), minlength=17).tolist()
            wrong = (rng.random(17) < 0.1) & (side == "pred")
            infos = [
                {
                    "id": int(ids[k]),
                    "category_id": int(kinds[int(wrong[k]), k]),
                    "area": area[k],
                    "iscrowd": 0,
                }
                for k in range(1, 17)
                if area[k]
            ]
            sides[side].append({"image_id": i, "file_name": f"{i}.png", "segments_info": infos})
    categories = [{"id": k, "name": str(k), "isthing": k % 2} for k in range(classes)]
    for side, annotations in sides.items():
        content = {"annotations": annotations, "categories": categories}
        (folder / f"{side}.json").write_text(json.dumps(content))


def counted_by_panopticapis_way(folder: Path, pairs: Sequence[tuple[Any, Any]]) -> dict[int, np.ndarray]:
    """Sum of IoU, TP, FP and FN of each class."""
    counts: dict[int, np.ndarray] = defaultdict(lambda: np.zeros(4))
    for truth, guess in pairs:
        maps = []
        for side, annotation in (("gt", truth), ("pred", guess)):
            colours = np.array(Image.open(folder / side / annotation["file_name"]), dtype=np.uint32)
            maps.append(colours[:, :, 0] + 256 * colours[:, :, 1] + 256 * 256 * colours[:, :, 2])
        true, found = ({row["id"]: row for row in side["segments_info"]} for side in (truth, guess))
        areas = dict(zip(*np.unique(maps[1], return_counts=True), strict=True))
        joint = maps[0].astype(np.uint64) * (1 << 24) + maps[1].astype(np.uint64)
        shared = {
            divmod(key, 1 << 24): n for key, n in zip(*np.unique(joint, return_counts=True), strict=True)
        }
        hits: tuple[set[int], set[int]] = (set(), set())
        for (t, p), pixels in shared.items():
            if t in true and p in found and true[t]["category_id"] == found[p]["category_id"]:
                iou = pixels / (areas[p] + true[t]["area"] - pixels - shared.get((0, p), 0))
                if iou > 0.5:
                    counts[true[t]["category_id"]] += [iou, 1, 0, 0]
                    hits[0].add(t)
                    hits[1].add(p)
        for t, row in true.items():
            counts[row["category_id"]] += [0, 0, 0, t not in hits[0]]
        for p, row in found.items():
            counts[row["category_id"]] += [
                0,
                0,
                p not in hits[1] and shared.get((0, p), 0) / areas[p] <= 0.5,
                0,
            ]
    return dict(counts)


def panopticapis_way(folder: Path, workers: int) -> float:
    """PQ over all classes."""
    truth, guess = (
        json.loads((folder / f"{side}.json").read_text())["annotations"] for side in ("gt", "pred")
    )
    pairs = list(zip(truth, guess, strict=True))
    if workers == 1:
        parts = [counted_by_panopticapis_way(folder, pairs)]
    else:
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            shares = [
                pairs[k * len(pairs) // workers : (k + 1) * len(pairs) // workers] for k in range(workers)
            ]
            parts = pool.starmap(counted_by_panopticapis_way, [(folder, share) for share in shares])
    total: dict[int, np.ndarray] = defaultdict(lambda: np.zeros(4))
    for part in parts:
        for k, row in part.items():
            total[k] = total[k] + row
    return float(100 * np.mean([iou / (tp + fp / 2 + fn / 2) for iou, tp, fp, fn in total.values()]))


def panoptic(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Panoptic files."""
    write_panoptic(folder, args.images, args.classes)
    ours = lambda: scored("panoptic", folder, [f"--workers={args.workers}"], ".json")["all"]["PQ"]
    ways = {
        f"theirs_{n}_processes": functools.partial(panopticapis_way, folder, n) for n in {1, args.workers}
    }
    assert all(abs(ours() - way()) < 1e-9 for way in ways.values())
    return {name: turns(ours, way, args.rounds) for name, way in ways.items()}


KINDS = {"semantic": semantic, "panoptic": panoptic}


def main() -> None:
    """Writes the files and prints the measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--classes", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = KINDS[args.kind](Path(folder), args)
    print(json.dumps({**vars(args), **found}))


if __name__ == "__main__":
    main()

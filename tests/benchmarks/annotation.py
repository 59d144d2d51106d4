"""The annotation workflow: UMG-CLIP trained on annotated `scenes` beside the truth, and the speed of annotating.

    python tests/benchmarks/annotation.py --out=runs/annotation [--rows=truth,perfect,erring,filtered] [--seeds=0,1,2]
    python tests/benchmarks/annotation.py --out=runs/speed --speed=1000

Rows of the first: `scenes` as it is, but for tags of regions, which are their classes; annotated by plugs that know
the truth; by plugs that err (corners of boxes off by up to 30% of the sides, 20% of the labels and 30% of the
captions those of other scenes, masks that fill a box that is far off); the same with the filters, whose scores are
those of a small tower trained on other scenes, seed 1. A row annotates once, prints how much is wrong, and trains
`configs/umg_clip.py` for each seed; what is finished is read, not repeated. --share makes all trainings shorter,
--images takes fewer images. The second annotates scenes by tiny random models of each kind, and prints images a
second and the share of each kind in the time.
"""

import argparse
import json
import shutil
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

from etils import epath

from ovseg_jax.annotation import workflow
from ovseg_jax.annotation.run import RECORDS, Runner, annotate_source
from ovseg_jax.annotation.workflow import Rules
from ovseg_jax.cli.console import use_compilation_cache
from ovseg_jax.configs import umg_clip
from ovseg_jax.data.scenes.source import Scenes
from ovseg_jax.data.sources.build import make_source
from ovseg_jax.experiment.run import train
from tests.annotation.scene_plugs import perfect

METRICS = {
    "R@1": "pretraining/retrieval/R@1",
    "PQ": "panoptic/pq",
    "AP": "instances/ap",
    "mIoU, seen": "test/miou/seen",
    "held out": "test/miou/held_out",
    "stuff": "test/miou/stuff",
}
ERRORS = {
    "captions": dict(others=0.3),
    "boxes": dict(off=0.3, mislabelled=0.2),
    "region_captions": dict(others=0.3),
}
OPEN = Rules(stuff_regions=True, score_regions=True, caption_quantile=0.0, region_quantile=0.0, stability=0.0)
FILTERS = OPEN._replace(caption_quantile=0.3, region_quantile=0.25, stability=0.8)


def source(images: int, seed: int = 0) -> dict[str, Any]:
    return dict(name="scenes", split="train", num_examples=images, image_size=64, seed=seed)


def run(config: Any, folder: Path, share: float) -> dict[str, float]:
    """Trains a config, with its stage, for a share of their steps; returns its summary with that of its stage."""
    if not (folder / "summary.json").exists():
        for one in (config, *(stage["config"] for stage in config.get("stages") or ())):
            one.steps, one.evals = max(1, round(share * one.steps)), {}
            one.optimizer.warmup_steps = min(one.optimizer.get("warmup_steps", 0), one.steps // 2)
        print(f"$ {folder}", flush=True)
        train(config, epath.Path(folder))
    found = json.loads((folder / "summary.json").read_text())
    first = folder / "pretraining" / "summary.json"
    more = json.loads(first.read_text()) if first.exists() else {}
    return found | {f"pretraining/{key}": value for key, value in more.items()}


def scorer(out: Path, images: int, share: float) -> str:
    """Trains the towers that score texts, on scenes of another seed; returns their folder."""
    config = umg_clip.get_config("adapt=none,seed=9")
    config.data.train = [dict(source(images, seed=1), cache=True)]
    run(config, out / "scorer", share)
    return str(out / "scorer")


def annotated(row: str, out: Path, images: int, share: float) -> Path:
    """Annotates the training images; `erring` and `filtered` have the same records."""
    plugs = perfect(**(ERRORS if row != "perfect" else {}))
    rules = Rules(stuff_regions=True) if row == "perfect" else FILTERS if row == "filtered" else OPEN
    if row != "perfect":
        plugs["scores"] = [dict(name="towers", model=scorer(out, images, share), batch=64)]
    folder, other = out / row / "data", out / ("erring" if row == "filtered" else "filtered") / "data"
    if row != "perfect" and (other / "statistics.json").exists() and not (folder / RECORDS).exists():
        shutil.copytree(other / RECORDS, folder / RECORDS)
    start = time.time()
    done = annotate_source(source(images), plugs, rules, folder, batch=32)
    print(
        f"{row}: {done.made} images annotated in {time.time() - start:.0f} s; dropped {done.statistics['dropped']}"
    )
    print(f"{row}: {what_is_wrong(folder, images)}", flush=True)
    classes = Scenes(image_size=64).classes
    # With synonyms as `scenes` has them, and without its held-out classes, which the method must not take for trained.
    known = [k for k in range(len(classes)) if k not in classes.groups["held_out"]]
    things = " ".join(str(classes.ids[k]) for k in known if classes.isthing[k])
    lines = [f"{classes.ids[k]}:{','.join(classes.names[k])}" for k in known]
    (folder.parent / "labels.txt").write_text("\n".join([f"# things: {things}", *lines]) + "\n")
    return folder


def what_is_wrong(folder: Path, images: int) -> str:
    """The share of wrong texts and masks among those that are kept, and how many of the right ones are."""
    truth, kept, right, there = Scenes("train", images, 64), Counter(), Counter(), Counter()
    read = make_source(dict(name="folder", data_dir=str(folder)))
    of_image = {read[k]["image_id"]: read[k] for k in range(len(read))}
    for k in range(images):
        example = truth[k]
        names = [truth.classes.names[c][0] for c in example["class_ids"]]
        told = json.loads((folder / "regions" / f"{example['image_id']}.json").read_text())
        true = {"captions": example["captions"], "labels": names}
        true["region captions"] = [text for own in example["region_captions"] for text in own]
        said = {"captions": told["captions"], "labels": [region["label"] for region in told["regions"]]}
        said["region captions"] = [text for region in told["regions"] for text in region["captions"]]
        for kind, texts in said.items():
            kept[kind] += len(texts)
            right[kind] += sum(text in true[kind] for text in texts)
            there[kind] += len(true[kind])
        found = of_image[example["image_id"]]["segments"]
        kept["masks"] += found.max()
        there["masks"] += len(names)
        masks = [(found == n, example["segments"]) for n in range(1, found.max() + 1)]
        right["masks"] += sum(any(_iou(m, t == n) > 0.9 for n in range(1, t.max() + 1)) for m, t in masks)
    cells = (
        f"{kind} {100 * (1 - right[kind] / kept[kind]):.1f}% of {kept[kind] / there[kind]:.2f}"
        for kind in kept
    )
    return "wrong: " + ", ".join(cells) + " of the true number"


def _iou(a: Any, b: Any) -> float:
    return (a & b).sum() / (a | b).sum()


def train_row(row: str, seed: int, out: Path, images: int, share: float) -> dict[str, float]:
    """Trains UMG-CLIP on a row's data."""
    config = umg_clip.get_config(f"seed={seed}")
    first = config.stages[0]["config"]
    if row == "truth":
        own = dict(source(images), name="tests.annotation.scene_plugs:ClassTags", cache=True)
        config.data.train = first.data.train = [own]
    else:
        folder = annotated(row, out, images, share)
        regions = dict(
            name="region_json", data_dir=f"{folder}/regions", images=f"{folder}/images", cache=True
        )
        masks = dict(name="folder", data_dir=str(folder), labels=f"{folder.parent}/labels.txt", cache=True)
        first.data.train, config.data.train = [regions], [masks]
    return run(config, out / row / f"seed-{seed}", share)


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """Means and half the range over seeds."""
    lines = ["| data | " + " | ".join(METRICS) + " |", "|---" * (1 + len(METRICS)) + "|"]
    for row, runs in found.items():
        cells = []
        for key in METRICS.values():
            values = [one[key] for one in runs]
            spread = f" ± {(max(values) - min(values)) / 2:.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def speed(out: Path, images: int, workers: int) -> None:
    """Annotates scenes by tiny random models of every kind, and prints where the time goes."""
    from tests.annotation import tiny_models
    from tests.extras import require

    torch = require("torch")
    require("torchvision")
    torch.manual_seed(1)
    build = lambda name: tiny_models.FAMILIES[name](out / "models" / name)
    named = "red ball; grass; sky"
    plugs = {
        "captions": [dict(name="blip2", model=build("blip2"), longest=8, batch=32)],
        "boxes": [
            dict(name="owlv2", model=build("owlv2"), labels=named, threshold=0.3),
            dict(name="rt_detr", model=build("rt_detr"), threshold=0.3),
        ],
        "region_captions": [dict(name="blip2", model=build("blip2"), longest=8, batch=32)],
        "masks": [dict(name="sam2", model=build("sam2"))],
        "stuff": [dict(name="mask2former", model=build("mask2former"), threshold=0.1, things=1)],
    }
    spent: Counter[str] = Counter()
    plain = workflow.Annotator._call

    def timed(self: Any, kind: str, *given: Any) -> Any:
        start = time.perf_counter()
        try:
            return plain(self, kind, *given)
        finally:
            spent[kind] += time.perf_counter() - start

    workflow.Annotator._call = timed
    shutil.rmtree(out / "data", ignore_errors=True)
    runner = Runner("direct", workers) if workers else Runner()
    start = time.perf_counter()
    done = annotate_source(
        source(images), plugs, Rules(), out / "data", batch=16, shard_size=100, runner=runner
    )
    total = time.perf_counter() - start
    print(
        f"{images} images in {total:.1f} s, {images / total:.1f} images/s; {done.statistics['regions']} regions"
    )
    for kind, seconds in spent.most_common():
        print(f"  {kind}: {100 * seconds / total:.0f}%")


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", default="truth,perfect,erring,filtered")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument(
        "--only_data", action="store_true", help="annotates and trains nothing but the scorer"
    )
    parser.add_argument("--speed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0)
    arguments = parser.parse_args()
    use_compilation_cache()
    if arguments.speed:
        speed(arguments.out, arguments.speed, arguments.workers)
        return
    more = arguments.out, arguments.images, arguments.share
    if arguments.only_data:
        for row in arguments.rows.split(","):
            annotated(row, *more)
        return
    found = {
        row: [train_row(row, int(seed), *more) for seed in arguments.seeds.split(",")]
        for row in arguments.rows.split(",")
    }
    print(table(found))


if __name__ == "__main__":
    main()

"""A method on `scenes` beside what it is compared with, over seeds: the tables of the README.

    python tests/benchmarks/scenes.py --out=runs/benchmark [--method=pomp] [--seeds=0,1,2] [--config.KEY=VALUE ...]
    python tests/benchmarks/scenes.py --out=runs/captions --method=captions [--seeds=0,1,2] [--steps=2500]
    python tests/benchmarks/scenes.py --out=runs/umg_clip --method=umg_clip [--seeds=0,1,2] [--config.KEY=VALUE ...]

OpenSeg stands beside its ceiling and chance: LSeg+ is the same network, steps and data, supervised by the class of
every pixel. POMP's prompt stands beside others of the same towers, and beside what it becomes, and a prompt from noise
does, where they are tuned on segments of the segmentation's own training data (papers/000, table 4). Each run is the
command that a user types; one that is finished is read, not repeated. The rows of --method=captions are those of
papers/004, table 8: 200 images with masks, and 9,800 more with captions alone. Those of --method=umg_clip are the four
of papers/003, table 7, adapted to masks without adapters as there, and the last one with adapters.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from etils import epath

METRICS = {
    "seen": "test/miou/seen",
    "held out": "test/miou/held_out",
    "stuff": "test/miou/stuff",
    "all": "test/miou",
    "Grounding": "test/grounding_miou",
    "recall@0.5": "test/recall@0.5",
    "recall@0.7": "test/recall@0.7",
    "recall@0.9": "test/recall@0.9",
}
PROMPT_METRICS = {
    "seen": "test/accuracy@seen",
    "held out": "test/accuracy@held_out",
    "all": "test/accuracy",
    "alignment": "test/alignment",
    "uniformity": "test/uniformity",
    "segmentation, mIoU": "segmentation/miou",
    "hIoU": "segmentation/hiou",
    "pACC": "segmentation/pacc",
}
PROMPTS = {
    "POMP": "",
    "POMP without correction": "[uncorrected]",
    "CoOp on 100 classes": "[coop]",
    "hard prompt": "[hard]",
    "prompt ensemble": "[ensemble]",
}
CAPTION_ROWS = {
    "masks and captions of 200 images": "images=200",
    "their captions alone": "images=200,mask_weight=0",
    "and captions of 9,800 more": "images=200,captioned=9800",
    "and pseudo-masks of these": "images=200,captioned=9800,pseudo=true",
}
LOSS_METRICS = {
    "classification, seen": "pretraining/classification/accuracy@seen@own",
    "held out": "pretraining/classification/accuracy@held_out@own",
    "R@1": "pretraining/retrieval/R@1",
    "patches, mIoU": "pretraining/test/miou",
    "PQ": "panoptic/pq",
    "AP": "instances/ap",
    "mIoU, seen": "test/miou/seen",
    "held out ": "test/miou/held_out",
    "stuff": "test/miou/stuff",
}
LOSS_ROWS = {
    "image captions": "losses=image_captions,adapters=False",
    "and region captions": "losses=captions,adapters=False",
    "and image tags": "losses=image_tags,adapters=False",
    "and region tags": "adapters=False",
    "and adapters": "adapters=True",
}
ROOT = Path(__file__).parents[2]


def run(name: str, config: str, seed: int, out: Path, overrides: list[str]) -> dict[str, float]:
    """Trains one model and returns its summary."""
    workdir = out / f"{name}-{seed}"
    config = f"{ROOT}/configs/{config},seed={seed}"
    command = [
        sys.executable,
        "-m",
        "ovseg_jax.main",
        f"--config={config}",
        f"--workdir={workdir}",
        *overrides,
    ]
    print("$ " + " ".join(command[1:]), flush=True)
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return json.loads((workdir / "summary.json").read_text())


def run_with_stage(name: str, config: str, seed: int, out: Path, overrides: list[str]) -> dict[str, float]:
    """Trains one model of UMG-CLIP and returns its summary, with that of its pre-training."""
    summary = run(name, config, seed, out, overrides)
    first = json.loads((out / f"{name}-{seed}" / "pretraining" / "summary.json").read_text())
    return summary | {f"pretraining/{key}": value for key, value in first.items()}


def run_caption_row(arg: str, steps: int, workdir: Path) -> dict[str, float]:
    """Trains one row of table 8, and its teacher, for so many steps each; returns its summary."""
    from configs import openseg
    from ovseg_jax.experiment.run import train

    config = openseg.get_config(arg)
    stages = [stage["config"] for stage in config.get("stages") or () if stage["kind"] == "train"]
    for one in (config, *stages):
        one.steps, one.evals = steps, {}
    print(f"$ {workdir.name}: {arg}", flush=True)
    train(config, epath.Path(workdir))
    return json.loads((workdir / "summary.json").read_text())


def row(name: str, runs: list[dict[str, float]], keys: list[str]) -> str:
    """Mean and half the range over seeds of each metric."""
    cells = []
    for key in keys:
        values = [run[key] for run in runs if key in run]
        if not values:
            cells.append("-")
            continue
        spread = (max(values) - min(values)) / 2
        digits = 2 if "alignment" in key or "uniformity" in key else 1
        mean = f"{statistics.mean(values):.{digits}f}"
        cells.append(f"{mean} ± {spread:.{digits}f}" if len(values) > 1 else mean)
    return f"| {name} | " + " | ".join(cells) + " |"


def prompt_lines(runs: list[dict[str, float]]) -> list[str]:
    """A line for each prompt."""
    lines = [f"| test, {len(runs)} seeds | " + " | ".join(PROMPT_METRICS) + " |"]
    lines.append("|---" * (len(PROMPT_METRICS) + 1) + "|")
    for name, suffix in PROMPTS.items():
        lines.append(row(name, runs, [key + suffix for key in PROMPT_METRICS.values()]))
    chance = [
        "test/chance"
        if key == "test/accuracy"
        else key.replace("/miou", "/chance_miou")
        if "miou" in key
        else ""
        for key in PROMPT_METRICS.values()
    ]
    return [*lines, row("chance", runs[:1], chance)]


def write(out: Path, lines: list[str], summaries: dict[str, list[dict[str, float]]]) -> None:
    """Leaves the table and the summaries in OUT."""
    (out / "table.md").write_text("\n".join(lines) + "\n")
    (out / "summaries.json").write_text(json.dumps(summaries, indent=1) + "\n")
    print("\n".join(lines))


def main() -> None:
    """Prints a markdown table, and writes it with every summary to OUT."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--method", default="openseg", choices=("openseg", "pomp", "captions", "umg_clip"))
    parser.add_argument("--steps", type=int, default=2500, help="of each run of --method=captions")
    args, overrides = parser.parse_known_args()
    seeds, out = [int(s) for s in args.seeds.split(",")], args.out.absolute()
    if args.method == "pomp":
        summaries = {"pomp": [run("pomp", "pomp.py:method=pomp", seed, out, overrides) for seed in seeds]}
        for init in ("prompt", "noise"):
            tune = f"pomp_segments.py:run={out}/pomp-{{}}" + ",init=noise" * (init == "noise")
            name = f"tuned-{init}"
            summaries[name] = [run(name, tune.format(seed), seed, out, []) for seed in seeds]
        lines = prompt_lines(summaries["pomp"])
        segmentation = [key if key.startswith("segmentation") else "" for key in PROMPT_METRICS.values()]
        for init, name in (("prompt", "POMP, tuned on segments"), ("noise", "noise, tuned on segments")):
            lines.insert(-1, row(name, summaries[f"tuned-{init}"], segmentation))
        write(out, lines, summaries)
        return
    if args.method == "umg_clip":
        summaries = {
            name: [run_with_stage(f"row{k}", f"umg_clip.py:{arg}", seed, out, overrides) for seed in seeds]
            for k, (name, arg) in enumerate(LOSS_ROWS.items())
        }
        lines = [f"| test, {len(seeds)} seeds | " + " | ".join(LOSS_METRICS) + " |"]
        lines.append("|---" * (len(LOSS_METRICS) + 1) + "|")
        lines += [row(name, runs, list(LOSS_METRICS.values())) for name, runs in summaries.items()]
        write(out, lines, summaries)
        return
    if args.method == "captions":
        summaries = {
            name: [
                run_caption_row(f"{arg},seed={seed}", args.steps, out / f"row{k}-{seed}") for seed in seeds
            ]
            for k, (name, arg) in enumerate(CAPTION_ROWS.items())
        }
        lines = [f"| test, {len(seeds)} seeds | " + " | ".join(METRICS) + " |"]
        lines.append("|---" * (len(METRICS) + 1) + "|")
        lines += [row(name, runs, list(METRICS.values())) for name, runs in summaries.items()]
        write(out, lines, summaries)
        return
    summaries = {
        m: [run(m, f"openseg.py:method={m}", seed, out, overrides) for seed in seeds]
        for m in ("openseg", "lseg")
    }

    keys = list(METRICS.values())
    chance = [key.replace("test/miou", "test/chance_miou") if "test/miou" in key else "" for key in keys]
    lines = [f"| test, {len(seeds)} seeds | " + " | ".join(METRICS) + " |", "|---" * (len(METRICS) + 1) + "|"]
    lines += [row("OpenSeg", summaries["openseg"], keys), row("ceiling (LSeg+)", summaries["lseg"], keys)]
    lines.append(row("chance", summaries["openseg"][:1], chance))
    share = [
        statistics.mean(r[k] for r in summaries["openseg"]) / statistics.mean(r[k] for r in summaries["lseg"])
        for k in keys[:2]
    ]
    seconds = [round(r["seconds"]) for runs in summaries.values() for r in runs]
    lines.append(
        f"\nOpenSeg reaches {share[0]:.0%} of the ceiling on seen and {share[1]:.0%} on held-out pairs;"
    )
    lines.append(f"wall seconds of each run, OpenSeg then LSeg+: {', '.join(map(str, seconds))}.")
    write(out, lines, summaries)


if __name__ == "__main__":
    main()

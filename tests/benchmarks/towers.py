"""Time of an image tower here and in transformers (PyTorch), eager and compiled, on the same cores.

    python tests/benchmarks/towers.py [--towers=clip_vitb16,tipsv2_b14] [--batches=1,8] [--rounds=5] [--busy]

Random weights in float32, images to all tokens: a single image, and as many windows as sliding over one takes. Each
side is a process of its own; they take turns. With `--busy`, for a machine that does other work too, times are those of
the processor; best on one core, by `taskset -c 0`. PyTorch needs `pip install -e '.[torch]'`.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))


def ours(tower: str, size: int):
    """A function from images to tokens."""
    import jax
    import jax.numpy as jnp

    from ovseg_jax.kernels.cpu_convs import fast_on_cpu, one_by_one
    from ovseg_jax.models.vit import PRESETS, ViT

    vit = ViT(**PRESETS[tower])
    variables = jax.jit(vit.init)(jax.random.key(0), jnp.zeros((1, size, size, 3)))
    # As `Clip.embed_both` does.
    forward = jax.jit(fast_on_cpu(lambda v, x: one_by_one(lambda y: vit.apply(v, y)[1], x)))
    return lambda x: jax.block_until_ready(forward(variables, x))


def theirs(tower: str, size: int, compiled: bool):
    """The same of transformers."""
    import torch

    from tests.extras import require

    transformers = require("transformers")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if tower.startswith("tips"):
        model = transformers.Tipsv2VisionModel(transformers.Tipsv2VisionConfig(image_size=448, patch_size=14))
        more = {}
    else:
        model = transformers.CLIPVisionModel(
            transformers.CLIPVisionConfig(
                hidden_size=768, intermediate_size=3072, num_attention_heads=12, image_size=224, patch_size=16
            )
        )
        more = dict(interpolate_pos_encoding=True)
    model = model.eval()
    forward = torch.compile(model) if compiled else model

    def run(x):
        with torch.no_grad():
            return forward(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), **more).last_hidden_state.numpy()

    return run


def work(side: str, tower: str, size: int, busy: bool, pipe) -> None:
    """Answers each batch size with seconds."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    run = ours(tower, size) if side == "ours" else theirs(tower, size, side == "compiled")
    while (batch := pipe.recv()) is not None:
        images = np.random.default_rng(0).normal(size=(batch, size, size, 3)).astype(np.float32)
        clock = time.process_time if busy else time.perf_counter
        began = clock()
        run(images)
        pipe.send(clock() - began)


def main() -> None:
    """Prints a markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--towers", default="clip_vitb16,tipsv2_b14")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--size", type=int, default=448)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--busy", action="store_true")
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    print("| tower | images | side | s | of ours | first, s |")
    print("|---" * 6 + "|")
    for tower in args.towers.split(","):
        sides = {}
        for side in ("ours", "eager", "compiled"):
            sides[side], other = context.Pipe()
            context.Process(target=work, args=(side, tower, args.size, args.busy, other), daemon=True).start()
            other.close()
        for batch in map(int, args.batches.split(",")):
            times = {side: [] for side in sides}
            for _ in range(args.rounds + 1):
                for side, pipe in sides.items():
                    pipe.send(batch)
                    times[side].append(pipe.recv())
            for side, found in times.items():
                ratio = statistics.median(a / b for a, b in zip(found[1:], times["ours"][1:], strict=True))
                print(
                    f"| {tower} | {batch} | {side} | {statistics.median(found[1:]):.3f} | {ratio:.2f} "
                    f"| {found[0]:.1f} |",
                    flush=True,
                )
        for pipe in sides.values():
            pipe.send(None)


if __name__ == "__main__":
    main()

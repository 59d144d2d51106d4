"""Time of the best of many names for every pixel, beside scoring all of them, and whether both are equal to the bit.

    python tests/benchmarks/many_names.py [--checkpoint=WORKDIR | --pixels=sure] [--names=20000] [--size=640]
        [--rounds=3]

Without a checkpoint: random masks and weights of 128 proposals, the worst case, in which no name can be left out. With
one, of a run on `scenes`: a validation image a round; names are its classes and combinations of three of its words.
With `--pixels`, features of 28 x 28 pixels with 512 channels, each `random` or near one of 16 names (`sure`).
Measured is the way from scores of proposals to a label map of SIZE x SIZE pixels, without the network, in turns, in
seconds of the processor, since other work on a machine slows the turns by different amounts.
"""

import argparse
import itertools
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))


def random_cases(names: int):
    """Yields weights and mask logits."""
    rng = np.random.default_rng(0)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    while True:
        weights = unit(rng.normal(size=(names, 512))) @ unit(rng.normal(size=(128, 512))).T
        yield (
            jnp.asarray(weights, jnp.float32),
            jnp.asarray(3 * rng.normal(size=(128, 160, 160)), jnp.float32),
        )


def pixel_cases(names: int, sure: bool):
    """Yields the vectors of names and pixel features."""
    rng = np.random.default_rng(0)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    while True:
        text = unit(rng.normal(size=(names, 512)) + 1.5 * rng.normal(size=512))
        pixels = unit(rng.normal(size=(28, 28, 512)))
        if sure:
            own = rng.integers(0, names, (4, 4)).repeat(7, 0).repeat(7, 1)
            pixels = unit(text[own] + pixels)
        yield jnp.asarray(text, jnp.float32), jnp.asarray(np.moveaxis(pixels, -1, 0), jnp.float32)


def trained_cases(checkpoint: str, names: int, rounds: int):
    """Yields those of a run's validation images."""
    from ovseg_jax import Segmenter
    from ovseg_jax.data.scenes.source import Scenes
    from ovseg_jax.decisions.maps import vocabulary_of
    from ovseg_jax.vocab.classes import as_classes

    segmenter = Segmenter.from_checkpoint(checkpoint)
    classes = [group[0] for group in segmenter.classes.names]
    words = sorted({word for name in classes for word in name.split()})
    more = [" ".join(three) for three in itertools.combinations(words, 3)]
    np.random.default_rng(0).shuffle(more)
    labels = as_classes([[name] for name in (classes + more)[:names]])
    text, vocabulary = segmenter.embed(labels), vocabulary_of(labels)
    settings = dict(segmenter.config.data.train[0])
    source = Scenes("validation", rounds, settings["image_size"], settings["size"])
    for i in range(rounds):
        batch = next(segmenter.stream_batches([source[i]["image"]]))
        layers = segmenter._layers(jax.tree.map(lambda x: x[:1], batch.prediction), text, vocabulary)
        yield layers.weights, layers.maps


def main() -> None:
    """Prints a markdown table."""
    from ovseg_jax.decisions import maps

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="")
    parser.add_argument("--pixels", default="", choices=("", "random", "sure"))
    parser.add_argument("--names", type=int, default=20_000)
    parser.add_argument("--size", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    cases = (
        trained_cases(args.checkpoint, args.names, args.rounds)
        if args.checkpoint
        else random_cases(args.names)
    )
    if args.pixels:
        cases = pixel_cases(args.names, args.pixels == "sure")
    cases = list(itertools.islice(cases, args.rounds))
    side = jnp.int32(args.size)
    rows, columns = (
        maps.upsampling(args.size, cells, args.size, side, side) for cells in cases[0][1].shape[1:]
    )
    functions = {}
    for key, count, least in (
        ("150 names", 150, 1 << 30),
        (f"{args.names} names, all scored", args.names, 1 << 30),
        (f"{args.names} names, bounded", args.names, 1),
    ):
        maps.MANY = least
        views = jnp.ones((1, count), bool)
        run = jax.jit(
            lambda w, x, v=views: maps.best_names(
                w[: v.shape[1]], x, rows, columns, v, logits=not args.pixels
            )
        )
        functions[key] = run.lower(*cases[0]).compile()
    times, found = ({key: [] for key in functions} for _ in range(2))
    for case in [cases[0], *cases]:
        for key, run in functions.items():
            began = time.process_time()
            result = [np.asarray(x) for x in run(*case)]
            times[key].append(time.process_time() - began)
            found[key].append(result)
    print("| names | s an image | of all scored | different winners |\n|---|---|---|---|")
    _, full, _ = functions
    for key in functions:
        ratios = [a / b for a, b in zip(times[key][1:], times[full][1:], strict=True)]
        different = sum(
            int((a != b).sum())
            for x, y in zip(found[key], found[full], strict=True)
            for a, b in zip(x, y, strict=True)
        )
        print(
            f"| {key} | {statistics.median(times[key][1:]):.2f} | {statistics.median(ratios):.3f} | "
            f"{'-' if key == '150 names' else different} |"
        )


if __name__ == "__main__":
    main()

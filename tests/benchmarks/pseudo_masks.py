"""Generators of pseudo-masks beside each other, as papers/002, Table 1: oracle mIoU on `scenes`, and time an image.

    python tests/benchmarks/pseudo_masks.py [--images=500] [--batch=128] [--tower=DIR]

The oracle gives each cluster of an image the class of most of its pixels. Times are of one compiled call for a whole
batch, the best of three: by the clock, and processor time over all cores, which other work on the machine changes
little; that of compiling and the first call stands beside them. A tower without weights (--tower=DIR gives it some) is
only timed, on noise of 224 pixels.
"""

import argparse
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ovseg_jax.configs import common
from ovseg_jax.data.sources.build import make_source
from ovseg_jax.evals.confusion import Counts, scores
from ovseg_jax.models.pseudo_masks import PseudoMaskGenerator, build_generator
from ovseg_jax.pretrained.generator import generator_weights

PIXELS = dict(features="colour", space="rgb", blur=0.0, position=0.0)
OURS = dict(features="colour")
# "H/8" is the size at which Table 1 clusters pixels: at 64 pixels, 64 tokens.
GENERATORS: dict[str, dict[str, Any]] = {
    "pixels, k-means, H/8, K=8": dict(PIXELS, stride=8, clusters=8),
    "pixels, k-means, H/2, K=8": dict(PIXELS, stride=2, clusters=8),
    "pixels, normalised cuts, H/8, K=8": dict(PIXELS, stride=8, clusters=8, gamma=20.0),
    "pixels, normalised cuts, H/4, K=8": dict(PIXELS, stride=4, clusters=8, gamma=20.0),
    "blurred colours and places, K=4": dict(OURS, clusters=4),
    "blurred colours and places, K=6": dict(OURS, clusters=6),
    "blurred colours and places, K=6, k-means++ (configs/pseg.py)": dict(OURS, clusters=6, start="kmeans++"),
    "blurred colours and places, K=8": dict(OURS, clusters=8),
    "blurred colours and places, K=8, k-means++": dict(OURS, clusters=8, start="kmeans++"),
    "blurred colours and places, normalised cuts, H/4, K=8": dict(OURS, stride=4, clusters=8, gamma=20.0),
}
TOWERS = {
    "DINO ViT-S/16 at 224, K=8": dict(features="tower", backbone=dict(name="dino_vits16"), clusters=8),
    "DINO ViT-S/8 at 224, K=8": dict(features="tower", backbone=dict(name="dino_vits8"), clusters=8),
}


def measure(generator: PseudoMaskGenerator, variables: Mapping[str, Any], images: np.ndarray) -> str:
    """Milliseconds an image, by the clock and of processors, and seconds for compiling and the first batch."""
    inputs = jnp.asarray(images), jnp.full((len(images), 2), images.shape[1])
    segments = jax.jit(lambda variables, *inputs: generator.apply(variables, *inputs, method="segments"))
    clock, processors = [], []
    for _ in range(4):
        start = time.perf_counter(), time.process_time()
        jax.block_until_ready(segments(variables, *inputs))
        clock.append(time.perf_counter() - start[0])
        processors.append(time.process_time() - start[1])
    each = [f"{1000 * min(took[1:]) / len(images):.2f}" for took in (clock, processors)]
    return f"{each[0]} | {each[1]} | {clock[0]:.1f}"


def oracle(generator: PseudoMaskGenerator, source: Any, images: np.ndarray) -> dict[str, float]:
    """mIoU where each cluster of an image takes the class of most of its pixels."""
    count = len(source.classes)
    confusion = np.zeros((count, count), np.int64)  # truth, prediction
    inputs = jnp.asarray(images), jnp.full((len(images), 2), images.shape[1])
    segments = np.asarray(jax.jit(lambda *inputs: generator.apply({}, *inputs, method="segments"))(*inputs))
    for index, clusters in enumerate(segments):
        example = source[index]
        truth = np.concatenate([[-1], example["class_ids"]])[example["segments"]]
        own = truth >= 0
        votes = np.zeros((256, count), np.int64)
        np.add.at(votes, (clusters[own], truth[own]), 1)
        np.add.at(confusion, (truth[own], votes.argmax(1)[clusters[own]]), 1)
    counts = Counts(np.diag(confusion), confusion.sum(1), confusion.sum(0))
    return scores(counts, source.classes.groups)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--tower_batch", type=int, default=8, help="images of a batch of the towers")
    parser.add_argument("--tower", default="", help="a folder of DINO's weights, to time with")
    args = parser.parse_args()
    source = make_source(common.scenes("test", args.images))
    images = np.stack([source[index]["image"] for index in range(args.images)])
    print("| masks | seen | held out | stuff | all | ms an image | CPU ms | compile, s |")
    print("|---|---|---|---|---|---|---|---|")
    for name, config in GENERATORS.items():
        generator = build_generator(config)
        times = measure(generator, {}, np.resize(images, (args.batch, *images.shape[1:])))
        found = oracle(generator, source, images)
        groups = [found[f"miou{group}"] for group in ("/seen", "/held_out", "/stuff", "")]
        print(f"| {name} | {' | '.join(f'{x:.1f}' for x in groups)} | {times} |", flush=True)
    noise = np.random.default_rng(0).integers(0, 256, (args.tower_batch, 224, 224, 3), np.uint8)
    for name, config in TOWERS.items():
        generator = build_generator(config)
        if args.tower:
            variables = generator_weights(generator, args.tower)
        else:
            shapes = jax.eval_shape(generator.init, jax.random.key(0), noise[:1], jnp.full((1, 2), 224))
            rng = np.random.default_rng(0)
            variables = jax.tree.map(lambda x, rng=rng: rng.normal(0, 0.02, x.shape).astype(x.dtype), shapes)
        print(f"| {name} | - | - | - | - | {measure(generator, variables, noise)} |", flush=True)


if __name__ == "__main__":
    main()

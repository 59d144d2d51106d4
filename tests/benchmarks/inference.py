"""Images a second from picture to label map: OpenSeg here, and exported to PyTorch, on the same cores.

    python tests/benchmarks/inference.py [--backbones=resnet50,efficientnet_b7] [--classes=150,847,20000]
        [--sides=jax,eager,compiled] [--rounds=3]

The paper's network (configs/openseg.py, data=coco) with random weights in float32 segments photographs of 480 x 640
random pixels on its canvas of 640 x 640. A side is ours (`jax`), the export as it is (`eager`) or with its network
behind `torch.compile` (`compiled`), each a process of its own; they take turns, image by image, so that whatever
slows the machine slows all of them. Printed are the median time of an image for each number of classes and its ratio
to the first side's, that of the network alone, the time until the first image was there (compilation), and how
far confidences are from the first side's, at most (random weights give all pixels one label, so labels would show
nothing). On a GPU: `--device=cuda`. PyTorch needs `pip install -e '.[torch]'`.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))


def names(count: int) -> list[str]:
    """Words for classes: of letters, as a tagger wants them."""
    return ["q" + "".join(chr(97 + i // 26**k % 26) for k in range(4)) for i in range(count)]


def build(backbone: str, words: list[str], device: str, saved: Path | None = None):
    """Our segmenter, with random weights or saved ones."""
    import jax

    from ovseg_jax.inference.segmenter import Segmenter
    from ovseg_jax.methods import build
    from ovseg_jax.vocab.classes import as_classes
    from ovseg_jax.vocab.words import WordList
    from tests.benchmarks.step import load_config

    config = load_config(f"configs/openseg.py:data=coco,backbone={backbone},init=scratch,text=learned")
    config.model.mask_scale = 2.5  # As after training, masks are mostly 0 or 1.
    if device == "cpu":
        config.model.dtype = "float32"
    classes = as_classes(";".join(words[:2]))
    method = build(config, WordList(words), classes)
    variables = jax.jit(method.init)(jax.random.key(0))
    if saved:
        leaves = [np.load(saved)[f"arr_{i}"] for i in range(len(jax.tree.leaves(variables)))]
        variables = jax.tree.unflatten(jax.tree.structure(variables), leaves)
    return Segmenter(method, variables, config, classes)


def prepare(backbone: str, words: list[str], device: str, folder: Path) -> None:
    """Writes variables, and their export."""
    import jax

    from ovseg_jax import export

    segmenter = build(backbone, words, device)
    leaves, structure = jax.tree.flatten(segmenter.variables)
    rng = np.random.default_rng(0)
    leaves = [np.asarray(x) * rng.uniform(0.8, 1.2, x.shape).astype(x.dtype) for x in leaves]
    np.savez(folder / "variables.npz", *leaves)
    segmenter.variables = jax.tree.unflatten(structure, leaves)
    export.to_folder(segmenter, folder, np.dtype("float32"))


def work(side: str, backbone: str, words: list[str], device: str, folder: Path, pipe) -> None:
    """One side: answers each (number of classes, number of the image) with seconds and confidences; 0 classes:
    the network alone."""
    if device == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
    if side == "jax":
        import jax

        segmenter = build(backbone, words, device, folder / "variables.npz")
        canvas = segmenter.config.data.image_size
        batch = np.zeros((1, canvas, canvas, 3), np.uint8), np.full((1, 2), canvas, np.int32)
        network = lambda: jax.block_until_ready(segmenter._predict(segmenter.variables, *batch))
    else:
        import torch

        import ovseg_jax.torch

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        segmenter = ovseg_jax.torch.load(folder, device)
        if side == "compiled":
            segmenter.net = torch.compile(segmenter.net)
        canvas = segmenter.canvas
        batch = (
            torch.zeros(1, 3, canvas, canvas, dtype=torch.uint8, device=device),
            torch.tensor([[canvas] * 2]),
        )

        def network():
            with torch.no_grad():
                segmenter.net(batch[0], batch[1].to(device)).pixel_embed.cpu()

    while (asked := pipe.recv()) is not None:
        count, i = asked
        image = np.random.default_rng(i).integers(0, 256, (480, 640, 3), np.uint8)
        labels = ";".join(words[:count])
        began = time.perf_counter()
        result = segmenter.segment(image, labels).confidence if count else network()
        pipe.send((time.perf_counter() - began, result if count else None))


def main() -> None:
    """Prints a markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbones", default="resnet50,efficientnet_b7")
    parser.add_argument("--classes", default="150,847,20000")
    parser.add_argument("--sides", default="jax,eager,compiled")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args()
    counts = [0, *map(int, args.classes.split(","))]
    context = multiprocessing.get_context("spawn")
    print("| backbone | classes | side | s an image | images/s | time | first image, s | confidence off by |")
    print("|---" * 8 + "|")
    for backbone in args.backbones.split(","):
        with tempfile.TemporaryDirectory() as name:
            shared = (backbone, names(max(counts)), args.device, Path(name))
            preparing = context.Process(target=prepare, args=shared)
            preparing.start()
            preparing.join()
            if preparing.exitcode:
                sys.exit("the model could not be made")
            sides = {}
            for side in args.sides.split(","):
                sides[side], theirs = context.Pipe()
                context.Process(target=work, args=(side, *shared, theirs), daemon=True).start()
                theirs.close()
            for count in counts:
                answers = {side: [] for side in sides}
                for i in range(args.rounds + 1):
                    for side, pipe in sides.items():
                        pipe.send((count, i))
                        answers[side].append(pipe.recv())
                reference = None
                for side, answer in answers.items():
                    seconds = statistics.median(time for time, _ in answer[1:])
                    first = answer[0][0]
                    reference = reference or (seconds, answer)
                    pairs = zip(answer, reference[1], strict=True) if count else ()
                    off = max((np.abs(a[1] - b[1]).max() for a, b in pairs), default=0.0)
                    print(
                        f"| {backbone} | {count or 'network alone'} | {side} | {seconds:.2f} | {1 / seconds:.2f} "
                        f"| {seconds / reference[0]:.2f} | {first:.1f} | {off:.1e} |",
                        flush=True,
                    )
            for pipe in sides.values():
                pipe.send(None)


if __name__ == "__main__":
    main()

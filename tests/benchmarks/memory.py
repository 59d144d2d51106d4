"""Peak memory of `predict --tile` on a photograph, by the paper's network with random weights.

    python tests/benchmarks/memory.py [--backbone=resnet50] [--size=3648x5472] [--tile=640] [--out=DIR]

The run, in float32, is written into --out, by default a temporary folder, once; the photograph shows random colours.
Printed are the peak of the resident memory of the whole command, compilation included (without a cache of compiled
programs), its seconds of the processor, and the checksum of the label map.
"""

import argparse
import hashlib
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))


def prepare(folder: Path, backbone: str) -> None:
    """Writes a run of no steps."""
    import jax.numpy as jnp
    from etils import epath

    from ovseg_jax.experiment.load import CLASSES_FILE
    from ovseg_jax.train.checkpoints import Checkpoints, write_config
    from ovseg_jax.train.state import TrainState
    from ovseg_jax.vocab.word_tokenizer import WORDS_FILE
    from ovseg_jax.vocab.words import WordList
    from tests.benchmarks.inference import build, names

    words = names(150)
    segmenter = build(backbone, words, "cpu")
    write_config(epath.Path(folder), segmenter.config)
    WordList(words).save(epath.Path(folder) / WORDS_FILE)
    (folder / CLASSES_FILE).write_text(segmenter.classes.to_json())
    rest = {key: tree for key, tree in segmenter.variables.items() if key != "params"}
    checkpoints = Checkpoints(epath.Path(folder), every=0, keep=1)
    checkpoints.save(
        0, TrainState(jnp.int32(0), segmenter.variables["params"], rest, {"none": jnp.zeros(1)}, None)
    )
    checkpoints.close()


def main() -> None:
    """Prints the figures."""
    from tests.benchmarks.inference import names

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--size", default="3648x5472")
    parser.add_argument("--tile", default="640")
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.out or temporary)
        run, image, out = folder / args.backbone, folder / f"{args.size}.png", folder / f"{args.size}.out"
        if not run.exists():
            run.mkdir(parents=True)
            process = multiprocessing.get_context("spawn").Process(target=prepare, args=(run, args.backbone))
            process.start()
            process.join()
        height, width = map(int, args.size.split("x"))
        pixels = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
        Image.fromarray(pixels).resize((width, height)).save(image)
        shutil.rmtree(out, ignore_errors=True)
        labels = ";".join(names(150))
        flags = [f"--checkpoint={run}", f"--images={image}", f"--labels={labels}", f"--tile={args.tile}"]
        command = [sys.executable, "-m", "ovseg_jax.predict", *flags, f"--out={out}"]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = usage.ru_utime + usage.ru_stime
        print(f"peak {usage.ru_maxrss / 2**20:.2f} GiB, {seconds:.0f} s of the processor, status {status}")
        for path in sorted(out.glob("*.labels.png")):
            print(hashlib.sha256(path.read_bytes()).hexdigest(), path.name)


if __name__ == "__main__":
    main()

"""Writes a trained model for others: `python -m ovseg_jax.export --checkpoint=WORKDIR --to=torch --out=DIR`."""

import argparse
import os
from collections.abc import Sequence

from ovseg_jax.cli.console import Parser, run_command, start
from ovseg_jax.errors import UserError

_DESCRIPTION = """\
Writes a trained model for programs that do not have JAX, or not this library.

  python -m ovseg_jax.export --checkpoint=runs/openseg --to=torch --out=exported

  torch       model.safetensors and config.json, which `ovseg_jax.torch.load(DIR)` runs without JAX; a frozen text
              tower in text_tower/; of a CLIP's two towers also clip/, for transformers.CLIPModel.from_pretrained
  onnx        the same, and its network as model.onnx, for any number of images
  stablehlo   model.stablehlo, which takes any number of images and names on CPU, CUDA and TPU, and its
              parameters in model.safetensors; example.py shows how it is run with JAX alone
  big_vision  model.npz, all parameters by their paths; of a ViT and a SigLIP text tower also towers.npz, by the
              names of big_vision's two-tower models (which have none for CLIP's norm before the blocks)

Files that are in --out already are replaced with --overwrite alone.
--dtype=bfloat16 or float16 halves the file; how much the prediction changes by that is measured and printed.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return run_command(parser, _run, argv)


def parser() -> Parser:
    """Returns the command's flags."""
    parser = Parser("export", _DESCRIPTION)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="WORKDIR", help="the folder of a training run")
    add("--to", required=True, choices=("torch", "onnx", "stablehlo", "big_vision"))
    add("--out", required=True, metavar="DIR", help="where to write; made if missing")
    add("--overwrite", action="store_true", help="replace files that are there")
    add("--step", type=int, metavar="N", help="the checkpoint of this step (default: the latest)")
    add(
        "--last",
        action="store_true",
        help="the last parameters of a run with optimizer.ema, not their average",
    )
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    return parser


def _run(arguments: argparse.Namespace) -> None:
    from ovseg_jax.inference.export import export_model
    from ovseg_jax.inference.segmenter import Segmenter

    if os.path.realpath(arguments.out) == os.path.realpath(arguments.checkpoint):
        raise UserError(f"--out={arguments.out} is the run itself: choose another folder")
    load = lambda: Segmenter.from_checkpoint(
        arguments.checkpoint, arguments.step, averaged=not arguments.last
    )
    print(export_model(load, arguments.to, arguments.out, arguments.dtype, overwrite=arguments.overwrite))


if __name__ == "__main__":
    start(main)

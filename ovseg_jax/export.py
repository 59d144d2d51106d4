"""The command that exports a model: `python -m ovseg_jax.export --checkpoint=WORKDIR --to=torch --out=DIR`."""

import argparse
import os
from collections.abc import Sequence

from ovseg_jax.cli.console import Parser, run_command, start
from ovseg_jax.errors import UserError
from ovseg_jax.inference.model_flags import add_model_flags, check_model_flags, pretrained_arguments

_DESCRIPTION = """\
Exports a trained or published model for programs without JAX or without this library.

  python -m ovseg_jax.export --checkpoint=runs/openseg --to=torch --out=exported
  python -m ovseg_jax.export --model=tipsv2_l14 --to=torch --out=exported

  torch       model.safetensors and config.json, which `ovseg_jax.torch.load(DIR)` runs without JAX; a text tower,
              frozen or trained, goes into text_tower/; a CLIP's two towers also into clip/, for transformers.CLIPModel
  onnx        the same, and the network as model.onnx, for any batch size
              (both: openseg, lseg, pseg, upernet, maskformer, mask2former, fcclip, umg_clip and clip_dense)
  stablehlo   model.stablehlo, for any number of images and names on CPU, CUDA and TPU, and its parameters in
              model.safetensors; example.py shows how to run it with JAX alone
  big_vision  model.npz with all parameters by their paths; a ViT with a SigLIP text tower also as towers.npz, with
              the names of big_vision's two-tower models (which lack CLIP's norm before the blocks)

Files in --out are only replaced with --overwrite.
--dtype=bfloat16 or float16 halves the file; the resulting change of the prediction is measured and printed.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    return run_command(parser, _run, argv)


def parser() -> Parser:
    """Returns the command's parser."""
    parser = Parser("export", _DESCRIPTION)
    add = parser.add_argument
    add("--checkpoint", metavar="WORKDIR", help="the folder of a training run")
    add_model_flags(parser)
    add("--to", required=True, choices=("torch", "onnx", "stablehlo", "big_vision"))
    add("--out", required=True, metavar="DIR", help="the output folder, created if missing")
    add("--overwrite", action="store_true", help="replace existing files")
    add("--step", type=int, metavar="N", help="the checkpoint of this step (default: the latest)")
    add(
        "--last",
        action="store_true",
        help="for a run with optimizer.ema: the last parameters, not their average",
    )
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    return parser


def _run(arguments: argparse.Namespace) -> None:
    from ovseg_jax.inference.export import export_model
    from ovseg_jax.inference.segmenter import Segmenter

    check_model_flags(arguments, ("step",))
    if arguments.checkpoint and os.path.realpath(arguments.out) == os.path.realpath(arguments.checkpoint):
        raise UserError(f"--out={arguments.out} is the folder of --checkpoint: choose another folder")
    if arguments.model and arguments.last:
        raise UserError("--last needs --checkpoint")

    def load() -> Segmenter:
        if arguments.model:
            return Segmenter.from_pretrained(**pretrained_arguments(arguments))
        return Segmenter.from_checkpoint(arguments.checkpoint, arguments.step, averaged=not arguments.last)

    print(export_model(load, arguments.to, arguments.out, arguments.dtype, overwrite=arguments.overwrite))


if __name__ == "__main__":
    start(main)

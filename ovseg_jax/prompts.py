"""Vectors of class names: `python -m ovseg_jax.prompts --checkpoint=WORKDIR --classes=FILE --out=FILE.npy`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ovseg_jax.cli.console import Parser, run_command, start
from ovseg_jax.errors import UserError

_DESCRIPTION = """\
Writes the unit vectors of classes under a learned or a hand-written prompt, for programs that classify by them.

  python -m ovseg_jax.prompts --checkpoint=runs/pomp --classes=lvis_v1_val.json --out=lvis.npy
  python -m ovseg_jax.prompts --prompt=prompt.safetensors --towers=hf:openai/clip-vit-base-patch16 \\
      --text_tower=clip_vitb16 --classes=names.txt --out=vectors.npz
  python -m ovseg_jax.prompts --checkpoint=runs/pomp --out=prompt.pth.tar

--out=FILE.npy          [C D] float32, a row for each class: Detic's ZEROSHOT_WEIGHT_PATH, which adds the background
--out=FILE.npz          `words` [C], `ids` [C] and `vectors` [C D]: --labels of predict, for a model of the same text
                        tower; and of single words, text.vectors of a config
--out=FILE.pth.tar      the prompt itself, as amazon-science/prompt-pretraining has it; .safetensors is our own form
--classes               a label file, a file with a line for each class, a JSON list, an annotation file of COCO or LVIS
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return run_command(parser, _run, argv)


def parser() -> Parser:
    """Returns the command's flags."""
    from ovseg_jax.cli.prompt_flags import add_prompt_flags

    parser = Parser("prompts", _DESCRIPTION)
    add = parser.add_argument
    add("--out", required=True, metavar="FILE", help="where to write, see above")
    add("--classes", metavar="FILE", help="the classes, see above")
    add("--checkpoint", metavar="WORKDIR", help="a training run of a classifier: its towers and its prompt")
    add(
        "--towers", metavar="INIT", help="in place of a run: the weights of a text tower, a folder or hf:NAME"
    )
    add(
        "--text_tower",
        metavar="NAME",
        help="with --towers: what they are the weights of, such as clip_vitb16",
    )
    add_prompt_flags(parser)
    return parser


def _run(arguments: argparse.Namespace) -> None:
    import jax

    from ovseg_jax.cli.outputs import check_out_file
    from ovseg_jax.cli.prompt_flags import chosen_prompt
    from ovseg_jax.experiment import class_vectors as vectors_of
    from ovseg_jax.parallel.sharding import make_mesh
    from ovseg_jax.towers.prompt_file import Prompt, is_prompt_file, save_original, save_prompt
    from ovseg_jax.vocab.class_files import read_class_file

    # Mistakes in the request are found before a model is loaded.
    out = Path(arguments.out)
    prompt = chosen_prompt(arguments)
    check_out_file(out, {"--classes": arguments.classes, "--prompt": arguments.prompt})
    if is_prompt_file(arguments.out):
        if prompt is None and arguments.checkpoint:
            prompt = vectors_of.prompt_of_run(arguments.checkpoint, make_mesh())
        if not isinstance(prompt, Prompt):
            raise UserError(
                f"--out={out} is a prompt: say --checkpoint=WORKDIR or --prompt=FILE, whose it is"
            )
        (save_prompt if out.suffix == ".safetensors" else save_original)(out, prompt)
        print(f"wrote the prompt {list(prompt.context.shape)} into {out}")
        return
    if out.suffix not in (".npy", ".npz"):
        raise UserError(f"--out={out}: known are .npy, .npz, .safetensors and .pth.tar")
    if not arguments.classes:
        raise UserError("say --classes=FILE: vectors of which classes?")
    given = [bool(arguments.checkpoint), bool(arguments.towers), bool(arguments.text_tower)]
    if given not in ([True, False, False], [False, True, True]):
        raise UserError("say --checkpoint=WORKDIR, or --towers=INIT with --text_tower=NAME")
    if arguments.towers and prompt is None:
        raise UserError(
            "--towers: which prompt? say --prompt=FILE, --template='a photo of a {}.' or --ensemble"
        )
    classes = read_class_file(arguments.classes)
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        if arguments.checkpoint:
            side = vectors_of.text_side_of_run(arguments.checkpoint, mesh, prompt)
        else:
            side = vectors_of.text_side_of_towers(arguments.text_tower, arguments.towers, prompt or ())
        vectors = vectors_of.class_vectors(side, classes, arguments.synonyms)
    vectors_of.write_class_vectors(out, classes, vectors)
    print(f"wrote {list(vectors.shape)} {vectors.dtype} into {out}")


if __name__ == "__main__":
    start(main)

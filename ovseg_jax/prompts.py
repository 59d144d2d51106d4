"""The command that writes class vectors: `python -m ovseg_jax.prompts --checkpoint=DIR --classes=FILE --out=FILE`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ovseg_jax.cli.console import Parser, run_command, start
from ovseg_jax.errors import UserError

_DESCRIPTION = """\
Writes the unit vectors of class names under a learned or hand-written prompt, for use as a zero-shot classifier.

  python -m ovseg_jax.prompts --checkpoint=runs/pomp --classes=lvis_v1_val.json --out=lvis.npy
  python -m ovseg_jax.prompts --prompt=prompt.safetensors --towers=hf:openai/clip-vit-base-patch16 \\
      --text_tower=clip_vitb16 --classes=names.txt --out=vectors.npz
  python -m ovseg_jax.prompts --checkpoint=runs/pomp --out=prompt.pth.tar

--out=FILE.npy          [C D] float32, a row for each class: Detic's ZEROSHOT_WEIGHT_PATH, which adds the background
--out=FILE.npz          `words` [C], `ids` [C] and `vectors` [C D]: for --labels of ovseg_jax.predict with a model of
                        the same text tower, or, with single words, for text.vectors of a config
--out=FILE.pth.tar      the prompt itself, in the format of amazon-science/prompt-pretraining
--out=FILE.safetensors  the prompt itself, in this library's format
--classes               a label file, a file with a line for each class, a JSON list, an annotation file of COCO or LVIS
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    return run_command(parser, _run, argv)


def parser() -> Parser:
    """Returns the command's parser."""
    from ovseg_jax.cli.prompt_flags import add_prompt_flags

    parser = Parser("prompts", _DESCRIPTION)
    add = parser.add_argument
    add("--out", required=True, metavar="FILE", help="the output file, see above")
    add("--classes", metavar="FILE", help="the classes, see above")
    add("--checkpoint", metavar="WORKDIR", help="a training run of a classifier: its towers and its prompt")
    add(
        "--towers", metavar="INIT", help="in place of a run: the weights of a text tower, a folder or hf:NAME"
    )
    add(
        "--text_tower",
        metavar="NAME",
        help="with --towers: the architecture of the text tower, such as clip_vitb16",
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

    # Errors in the request are reported before a model is loaded.
    out = Path(arguments.out)
    prompt = chosen_prompt(arguments)
    check_out_file(out, {"--classes": arguments.classes, "--prompt": arguments.prompt})
    if is_prompt_file(arguments.out):
        if prompt is None and arguments.checkpoint:
            prompt = vectors_of.prompt_of_run(arguments.checkpoint, make_mesh())
        if not isinstance(prompt, Prompt):
            raise UserError(f"--out={out} is a prompt file: give --checkpoint=WORKDIR or --prompt=FILE")
        (save_prompt if out.suffix == ".safetensors" else save_original)(out, prompt)
        print(f"wrote the prompt {list(prompt.context.shape)} into {out}")
        return
    if out.suffix not in (".npy", ".npz"):
        raise UserError(f"--out={out} must end in .npy, .npz, .safetensors or .pth.tar")
    if not arguments.classes:
        raise UserError("--classes=FILE is missing: it lists the classes whose vectors to write")
    given = [bool(arguments.checkpoint), bool(arguments.towers), bool(arguments.text_tower)]
    if given not in ([True, False, False], [False, True, True]):
        raise UserError("give either --checkpoint=WORKDIR, or --towers=INIT with --text_tower=NAME")
    if arguments.towers and prompt is None:
        raise UserError(
            "--towers needs a prompt: give --prompt=FILE, --template='a photo of a {}.' or --ensemble"
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

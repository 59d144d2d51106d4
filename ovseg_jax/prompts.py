"""Vectors of class names: `python -m ovseg_jax.prompts --checkpoint=WORKDIR --classes=FILE --out=FILE.npy`."""

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from ovseg_jax.cli.console import complain, quieten, use_compilation_cache
from ovseg_jax.errors import UserError
from ovseg_jax.evals.classification import class_features
from ovseg_jax.experiment.load import load_run
from ovseg_jax.models.text_towers import CLIPText, text_tower
from ovseg_jax.parallel.sharding import make_mesh
from ovseg_jax.pretrained.load import load
from ovseg_jax.protocols import Classifier, Variables
from ovseg_jax.towers.clip import Clip
from ovseg_jax.towers.packed_text import stacked
from ovseg_jax.towers.prompt_file import FILE, Prompt, is_prompt_file, load_prompt, save_original, save_prompt
from ovseg_jax.towers.templates import IMAGENET, read_templates
from ovseg_jax.vocab.class_files import read_class_file
from ovseg_jax.vocab.classes import ClassList
from ovseg_jax.vocab.words import WordList

_DESCRIPTION = """\
Writes the unit vectors of classes under a learned or a hand-written prompt, for programs that classify by them.

  python -m ovseg_jax.prompts --checkpoint=runs/pomp --classes=lvis_v1_val.json --out=lvis.npy
  python -m ovseg_jax.prompts --prompt=prompt.safetensors --towers=hf:openai/clip-vit-base-patch16 \\
      --text_tower=clip_vitb16 --classes=names.txt --out=vectors.npz
  python -m ovseg_jax.prompts --checkpoint=runs/pomp --out=prompt.pth.tar

--out=FILE.npy          [C D] float32, a row for each class: Detic's ZEROSHOT_WEIGHT_PATH, which adds the background
--out=FILE.npz          `words` [C] and `vectors` [C D]: --labels of predict, for a model of the same text tower;
                        and of single words, text.vectors of a config
--out=FILE.pth.tar      the prompt itself, as amazon-science/prompt-pretraining has it; .safetensors is our own form
--classes               a label file, a file with a line for each class, a JSON list, an annotation file of COCO or LVIS
"""
SYNONYMS = ("first", "average")


class Side(NamedTuple):
    """What makes vectors of names: arguments of `class_features`.

    Attributes:
      method: a classifier, or `Clip` alone.
      variables: its variables.
      prompt: what the names stand in; None for the method's own prompt.
    """

    method: Any
    variables: Variables
    prompt: Prompt | Sequence[str] | None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; its exit status: 0, or 2 for a wrong request."""
    arguments = _parser().parse_args(argv)
    quieten()
    try:
        _run(arguments)
        return 0
    except UserError as error:
        return complain(error)
    except OSError as error:
        return complain(UserError(f"--out={arguments.out} cannot be written: {error.strerror or error}"))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say what names stand in, and how the names of one class make one vector."""
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument(
        "--prompt", metavar="FILE", help="a learned prompt: prompt.safetensors or model.pth.tar-20"
    )
    prompt.add_argument(
        "--template", metavar="TEXT|NAME|FILE", help="a hand-written one, as 'a photo of a {}.'"
    )
    prompt.add_argument(
        "--ensemble", action="store_true", help=f"the mean over CLIP's {len(IMAGENET)} templates"
    )
    parser.add_argument(
        "--synonyms",
        choices=SYNONYMS,
        default=SYNONYMS[0],
        help="of a class with several names, the vector of the first or the mean of all (default %(default)s)",
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ovseg_jax.prompts",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
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
    add_flags(parser)
    return parser


def _run(arguments: argparse.Namespace) -> None:
    # What can be wrong with the request is found before a model is loaded.
    out = Path(arguments.out)
    prompt = chosen_prompt(arguments)
    if is_prompt_file(arguments.out):
        _convert(arguments, prompt, out)
        return
    if out.suffix not in (".npy", ".npz"):
        raise UserError(f"--out={out}: known are .npy, .npz, .safetensors and .pth.tar")
    if not arguments.classes:
        raise UserError("say --classes=FILE: vectors of which classes?")
    if bool(arguments.checkpoint) == bool(arguments.towers) or bool(arguments.towers) != bool(
        arguments.text_tower
    ):
        raise UserError("say --checkpoint=WORKDIR, or --towers=INIT with --text_tower=NAME")
    if arguments.towers and prompt is None:
        raise UserError(
            "--towers: which prompt? say --prompt=FILE, --template='a photo of a {}.' or --ensemble"
        )
    classes = read_class_file(arguments.classes)
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        if arguments.checkpoint:
            stage = load_run(arguments.checkpoint, mesh, kind=Classifier, lacking="classifies no images")
            side = Side(stage.method, stage.variables, prompt)
        else:
            side = Side(*text_side(arguments.text_tower, arguments.towers), prompt)
        vectors = class_vectors(side, classes, arguments.synonyms)
    with out.open("wb") as file:
        if out.suffix == ".npy":
            np.save(file, vectors)
        else:
            np.savez(file, words=np.array([classes.display(k) for k in range(len(classes))]), vectors=vectors)
    print(f"wrote {list(vectors.shape)} {vectors.dtype} into {out}")


def chosen_prompt(arguments: argparse.Namespace) -> Prompt | Sequence[str] | None:
    """What the flags of `add_flags` say; None where they say nothing.

    Raises:
      UserError: a prompt or a template that cannot be read.
    """
    if arguments.prompt:
        return load_prompt(arguments.prompt)
    return (
        IMAGENET if arguments.ensemble else read_templates(arguments.template) if arguments.template else None
    )


def class_vectors(side: Side, classes: ClassList, synonyms: str = "first") -> Float[np.ndarray, "c d"]:
    """A unit vector for each class.

    Args:
      side: what makes vectors of names.
      classes: the classes.
      synonyms: of a class with several names, "first" takes the first; "average" the mean of the unit vectors of all,
        normalised.
    """
    embed = functools.partial(class_features, side.method, side.variables, templates=side.prompt)
    if synonyms == "first":
        return np.asarray(embed([classes.display(k) for k in range(len(classes))]), np.float32)
    names, owner = classes.flat()
    each = np.asarray(embed(names), np.float32)
    total = np.zeros((len(classes), each.shape[1]), np.float32)
    np.add.at(total, owner, each)
    return total / np.linalg.norm(total, axis=1, keepdims=True)


def text_side(name: str, init: str) -> tuple[Clip, dict[str, Any]]:
    """The text half of published CLIP towers, and its weights.

    Raises:
      UserError: an unknown text tower, or one that is not of CLIP's kind; weights that cannot be read.
    """
    tower = text_tower(name)
    if not isinstance(tower, CLIPText):
        raise UserError(f"--text_tower={name} is not of CLIP's kind")
    # No image is looked at.
    image = {"name": "small", "embed_dim": tower.embed_dim}
    clip = Clip(ConfigDict({"image": image, "text": {"name": name}, "init": init}), WordList([]))
    shapes = jax.eval_shape(lambda: clip.text.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    return clip, {"text": stacked(load(init, clip.text, shapes)["params"])}


def _convert(arguments: argparse.Namespace, prompt: Prompt | Sequence[str] | None, out: Path) -> None:
    """The prompt of a file or a run, in the form that the suffix of `out` names."""
    if arguments.checkpoint and prompt is None:
        stage = load_run(arguments.checkpoint, make_mesh(), kind=Classifier, lacking="classifies no images")
        if not hasattr(stage.method, "artifacts") or FILE not in stage.method.artifacts(stage.variables):
            raise UserError(
                f"--checkpoint={arguments.checkpoint}: method={stage.config.method} learns no such prompt"
            )
        prompt = stage.method.whole_prompt(stage.variables)
    if not isinstance(prompt, Prompt):
        raise UserError(f"--out={out} is a prompt: say --checkpoint=WORKDIR or --prompt=FILE, whose it is")
    (save_prompt if out.suffix == ".safetensors" else save_original)(out, prompt)
    print(f"wrote the prompt {list(prompt.context.shape)} into {out}")


if __name__ == "__main__":
    use_compilation_cache()
    sys.exit(main())

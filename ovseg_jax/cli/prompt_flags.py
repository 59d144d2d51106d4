"""Command-line flags that choose the prompt around class names."""

import argparse
from collections.abc import Sequence

from ovseg_jax.towers.prompt_file import Prompt, load_prompt
from ovseg_jax.towers.templates import read_templates
from ovseg_jax.vocab.templates import IMAGENET

SYNONYMS = ("first", "average")


def add_prompt_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for the prompt and for the handling of several names of a class."""
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument(
        "--prompt", metavar="FILE", help="a learned prompt: prompt.safetensors or model.pth.tar-20"
    )
    prompt.add_argument(
        "--template", metavar="TEXT|NAME|FILE", help="a hand-written prompt, such as 'a photo of a {}.'"
    )
    prompt.add_argument(
        "--ensemble", action="store_true", help=f"the mean over CLIP's {len(IMAGENET)} templates"
    )
    parser.add_argument(
        "--synonyms",
        choices=SYNONYMS,
        default=SYNONYMS[0],
        help="for a class with several names: use the first, or the mean of all (default %(default)s)",
    )


def chosen_prompt(arguments: argparse.Namespace) -> Prompt | Sequence[str] | None:
    """Returns the prompt that the flags choose, or None.

    Raises:
      UserError: a prompt or a template that cannot be read.
    """
    if arguments.prompt:
        return load_prompt(arguments.prompt)
    if arguments.ensemble:
        return IMAGENET
    return read_templates(arguments.template) if arguments.template else None

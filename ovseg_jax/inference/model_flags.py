"""Command-line flags that choose a published model in place of a run."""

import argparse
from collections.abc import Sequence
from typing import Any

from ovseg_jax.cli.console import NameOrList
from ovseg_jax.errors import UserError

_OWN = ("weights", "tokenizer", "patches")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of a published model."""
    from ovseg_jax.methods.clip_dense import LAST
    from ovseg_jax.methods.published import listed

    add = parser.add_argument
    add(
        "--model",
        action=NameOrList,
        listed=listed,
        metavar="NAME",
        help="a published model in place of --checkpoint, without training; --model=list lists them with licence, size "
        "and published score",
    )
    add(
        "--weights",
        metavar="PATH",
        help="with --model: the folder or file of its weights, by default from the Hugging Face hub",
    )
    add(
        "--tokenizer",
        metavar="PATH",
        help="with --model: the folder of the tokeniser, if it is not with the weights",
    )
    add(
        "--patches",
        choices=tuple(LAST),
        help="with --model: the last attention of its image tower (default: value)",
    )


def check_model_flags(arguments: argparse.Namespace, of_runs: Sequence[str]) -> None:
    """Checks that either a run or a published model is given, and no flag that needs the other.

    Args:
      arguments: the parsed flags.
      of_runs: names of flags that need a run.

    Raises:
      UserError: both or neither are given, a flag needs the other, or the model is unknown.
    """
    from ovseg_jax.methods.published import entry

    if (arguments.checkpoint is None) == (arguments.model is None):
        raise UserError("give either --checkpoint, a run, or --model, a published model (--model=list)")
    for flag in _OWN:
        if getattr(arguments, flag) is not None and not arguments.model:
            raise UserError(f"--{flag} needs --model")
    for flag in of_runs:
        if getattr(arguments, flag) is not None and arguments.model:
            raise UserError(f"--{flag} needs --checkpoint")
    if arguments.model:
        entry(arguments.model)


def pretrained_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the arguments of `Segmenter.from_pretrained`."""
    return dict(
        name=arguments.model,
        weights=arguments.weights or "",
        tokenizer=arguments.tokenizer or "",
        features=arguments.patches or "",
    )

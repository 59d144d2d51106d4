"""Methods by name."""

from typing import Any

from ml_collections import ConfigDict

from ovseg_jax.errors import UserError
from ovseg_jax.methods.clip import ClipTraining
from ovseg_jax.methods.cocoop import CoCoOp
from ovseg_jax.methods.linear_probe import LinearProbe
from ovseg_jax.methods.lseg import LSeg
from ovseg_jax.methods.maple import MaPLe
from ovseg_jax.methods.openseg import OpenSeg
from ovseg_jax.methods.prompt_tuning import PromptTuning
from ovseg_jax.methods.vpt import VPT
from ovseg_jax.vocab.classes import ClassList
from ovseg_jax.vocab.words import WordList

METHODS: dict[str, Any] = {
    "openseg": OpenSeg,
    "lseg": LSeg,
    "clip": ClipTraining,
    "pomp": PromptTuning,
    "linear_probe": LinearProbe,
    "vpt": VPT,
    "maple": MaPLe,
    "cocoop": CoCoOp,
}


def build(config: ConfigDict, words: WordList, classes: ClassList) -> Any:
    """The method that `config.method` names: a `protocols.Method`, or a `Classifier`.

    Args:
      config: the whole config of a run.
      words: the vocabulary of captions and class names.
      classes: of the training data.

    Raises:
      UserError: an unknown name, or what the method refuses.
    """
    if config.method not in METHODS:
        raise UserError(f"unknown method '{config.method}'; known: {', '.join(METHODS)}")
    return METHODS[config.method](config, words, classes)

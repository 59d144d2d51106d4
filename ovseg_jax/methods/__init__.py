"""Methods by name."""

from typing import Any

from ml_collections import ConfigDict

from ovseg_jax.data.fields import batch_fields
from ovseg_jax.data.rows import Rows
from ovseg_jax.errors import UserError
from ovseg_jax.methods.clip import ClipTraining
from ovseg_jax.methods.cocoop import CoCoOp
from ovseg_jax.methods.linear_probe import LinearProbe
from ovseg_jax.methods.lseg import LSeg
from ovseg_jax.methods.maple import MaPLe
from ovseg_jax.methods.openseg import OpenSeg
from ovseg_jax.methods.prompt_tuning import PromptTuning
from ovseg_jax.methods.vpt import VPT
from ovseg_jax.towers.vocabulary import SPOKEN
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
    return method_class(config)(config, words, classes)


def method_class(config: ConfigDict) -> Any:
    """Returns the class that `config.method` names.

    Raises:
      UserError: an unknown name.
    """
    if config.method not in METHODS:
        raise UserError(f"unknown method '{config.method}'; known: {', '.join(METHODS)}")
    return METHODS[config.method]


def training_rows(config: ConfigDict, method: Any, words: WordList) -> Rows:
    """Returns what makes the rows of training batches: the fields of the method and of `data.fields`.

    Raises:
      UserError: see `Rows.from_config`.
    """
    fields = batch_fields(method, config)
    # Reading a tokeniser's files takes long.
    tokenize = method.tokenizer if SPOKEN.keys() & set(fields) else None
    return Rows.from_config(config, fields, words, tokenize)

"""Methods by name."""

from typing import Any

from ml_collections import ConfigDict

from ovseg_jax.config import import_class
from ovseg_jax.data.fields import batch_fields
from ovseg_jax.data.rows import Rows
from ovseg_jax.methods.clip import ClipTraining
from ovseg_jax.methods.cocoop import CoCoOp
from ovseg_jax.methods.linear_probe import LinearProbe
from ovseg_jax.methods.lseg import LSeg
from ovseg_jax.methods.maple import MaPLe
from ovseg_jax.methods.openseg import OpenSeg
from ovseg_jax.methods.prompt_tuning import PromptTuning
from ovseg_jax.methods.vpt import VPT
from ovseg_jax.protocols import Trainable
from ovseg_jax.towers.vocabulary import SPOKEN
from ovseg_jax.vocab.classes import ClassList
from ovseg_jax.vocab.words import WordList

METHODS: dict[str, type[Trainable]] = {
    "openseg": OpenSeg,
    "lseg": LSeg,
    "clip": ClipTraining,
    "pomp": PromptTuning,
    "linear_probe": LinearProbe,
    "vpt": VPT,
    "maple": MaPLe,
    "cocoop": CoCoOp,
}


def method_type(name: Any) -> type[Trainable]:
    """Returns the class of a method: of a name in `METHODS`, or of "module:Class", which it imports.

    Raises:
      UserError: there is none of this name, or it is no method.
    """
    if name in METHODS:
        return METHODS[name]
    return import_class(name, Trainable, "method", METHODS)


def build(config: ConfigDict, words: WordList, classes: ClassList) -> Any:
    """Makes the method that `config.method` names, which is `Segmenting` or a `Classifier` too.

    Args:
      config: the whole config of a run.
      words: the vocabulary of captions and class names.
      classes: of the training data.

    Raises:
      UserError: an unknown name, or what the method refuses.
    """
    return method_type(config.method)(config, words, classes)  # type: ignore[call-arg]


def training_rows(config: ConfigDict, method: Any, words: WordList) -> Rows:
    """Returns what makes the rows of training batches: the fields of the method and of `data.fields`.

    Raises:
      UserError: see `Rows.from_config`.
    """
    fields = batch_fields(method, config)
    # Reading a tokeniser's files takes long.
    tokenize = method.tokenizer if SPOKEN.keys() & set(fields) else None
    return Rows.from_config(config, fields, words, tokenize)

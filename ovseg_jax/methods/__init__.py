"""Methods by name."""

from typing import Any

from ml_collections import ConfigDict

from ovseg_jax.methods.clip import ClipTraining
from ovseg_jax.methods.cocoop import CoCoOp
from ovseg_jax.methods.linear_probe import LinearProbe
from ovseg_jax.methods.lseg import LSeg
from ovseg_jax.methods.maple import MaPLe
from ovseg_jax.methods.openseg import OpenSeg
from ovseg_jax.methods.prompt_tuning import PromptTuning
from ovseg_jax.methods.vpt import VPT
from ovseg_jax.protocols import Trainable, import_class
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

"""Methods by name."""

from ml_collections import ConfigDict

from ovseg_jax.errors import UserError
from ovseg_jax.methods.base import Method
from ovseg_jax.methods.lseg import LSeg
from ovseg_jax.methods.openseg import OpenSeg
from ovseg_jax.vocab.classes import ClassList
from ovseg_jax.vocab.words import WordList

METHODS = {"openseg": OpenSeg, "lseg": LSeg}


def build(config: ConfigDict, words: WordList, classes: ClassList) -> Method:
    """The method that `config.method` names, for a vocabulary of caption words and the training data's classes."""
    if config.method not in METHODS:
        raise UserError(f"unknown method '{config.method}'; known: {', '.join(METHODS)}")
    return METHODS[config.method](config, words, classes)

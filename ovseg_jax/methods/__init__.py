"""The methods by name."""

from typing import Any

from ml_collections import ConfigDict

from ovseg_jax.config import import_class
from ovseg_jax.data.fields import batch_fields
from ovseg_jax.data.rows import Rows
from ovseg_jax.methods.clip import ClipTraining
from ovseg_jax.methods.clip_dense import ClipDense
from ovseg_jax.methods.cocoop import CoCoOp
from ovseg_jax.methods.fcclip import FCClip
from ovseg_jax.methods.groupvit import GroupViT
from ovseg_jax.methods.linear_probe import LinearProbe
from ovseg_jax.methods.lseg import LSeg
from ovseg_jax.methods.maple import MaPLe
from ovseg_jax.methods.mask2former import Mask2Former
from ovseg_jax.methods.maskformer import MaskFormer
from ovseg_jax.methods.maskformer_text import TextMaskFormer
from ovseg_jax.methods.openseg import OpenSeg
from ovseg_jax.methods.prompt_tuning import PromptTuning
from ovseg_jax.methods.pseg import PSeg
from ovseg_jax.methods.umg_clip import UMGClip
from ovseg_jax.methods.upernet import UPerNetMethod
from ovseg_jax.methods.vpt import VPT
from ovseg_jax.protocols import Trainable
from ovseg_jax.towers.vocabulary import SPOKEN
from ovseg_jax.vocab.classes import ClassList
from ovseg_jax.vocab.words import WordList

METHODS: dict[str, type[Trainable]] = {
    "openseg": OpenSeg,
    "lseg": LSeg,
    "upernet": UPerNetMethod,
    "pseg": PSeg,
    "maskformer": MaskFormer,
    "mask2former": Mask2Former,
    "maskformer_text": TextMaskFormer,
    "clip": ClipTraining,
    "clip_dense": ClipDense,
    "fcclip": FCClip,
    "umg_clip": UMGClip,
    "groupvit": GroupViT,
    "pomp": PromptTuning,
    "linear_probe": LinearProbe,
    "vpt": VPT,
    "maple": MaPLe,
    "cocoop": CoCoOp,
}


def method_type(name: Any) -> type[Trainable]:
    """Returns the class of a method, given by a name in `METHODS` or as "module:Class".

    Raises:
      UserError: there is no such class, or it is not a method.
    """
    if name in METHODS:
        return METHODS[name]
    return import_class(name, Trainable, "method", METHODS)


def build(config: ConfigDict, words: WordList, classes: ClassList) -> Any:
    """Creates the method that `config.method` names, which is also `Segmenting` or a `Classifier`.

    Args:
      config: the whole config of a run.
      words: the vocabulary of captions and class names.
      classes: the classes of the training data.

    Raises:
      UserError: the name is unknown, or the method refuses its config.
    """
    return method_type(config.method)(config, words, classes)  # type: ignore[call-arg]


def training_rows(config: ConfigDict, method: Any, words: WordList) -> Rows:
    """Creates the rows of training batches, with the fields of the method and of `data.fields`.

    Raises:
      UserError: see `Rows.from_config`.
    """
    fields = batch_fields(method, config)
    # The tokeniser is only read if needed, since reading its files is slow.
    tokenize = method.tokenizer if SPOKEN.keys() & set(fields) else None
    return Rows.from_config(config, fields, words, tokenize)

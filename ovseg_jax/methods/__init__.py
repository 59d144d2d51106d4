"""The methods by name."""

from typing import Any

from ml_collections import ConfigDict

from ovseg_jax.config import import_class
from ovseg_jax.data.fields import batch_fields
from ovseg_jax.data.rows import Rows
from ovseg_jax.protocols import Trainable
from ovseg_jax.towers.vocabulary import SPOKEN
from ovseg_jax.vocab.classes import ClassList
from ovseg_jax.vocab.words import WordList

# Imported only when asked for: each method would cost the commands of all others a part of a second.
METHODS: dict[str, str | type[Trainable]] = {
    "openseg": "ovseg_jax.methods.openseg:OpenSeg",
    "lseg": "ovseg_jax.methods.lseg:LSeg",
    "upernet": "ovseg_jax.methods.upernet:UPerNetMethod",
    "pseg": "ovseg_jax.methods.pseg:PSeg",
    "maskformer": "ovseg_jax.methods.maskformer:MaskFormer",
    "mask2former": "ovseg_jax.methods.mask2former:Mask2Former",
    "maskformer_text": "ovseg_jax.methods.maskformer_text:TextMaskFormer",
    "clip": "ovseg_jax.methods.clip:ClipTraining",
    "clip_dense": "ovseg_jax.methods.clip_dense:ClipDense",
    "fcclip": "ovseg_jax.methods.fcclip:FCClip",
    "umg_clip": "ovseg_jax.methods.umg_clip:UMGClip",
    "groupvit": "ovseg_jax.methods.groupvit:GroupViT",
    "pomp": "ovseg_jax.methods.prompt_tuning:PromptTuning",
    "linear_probe": "ovseg_jax.methods.linear_probe:LinearProbe",
    "vpt": "ovseg_jax.methods.vpt:VPT",
    "maple": "ovseg_jax.methods.maple:MaPLe",
    "cocoop": "ovseg_jax.methods.cocoop:CoCoOp",
}


def method_type(name: Any) -> type[Trainable]:
    """Returns the class of a method, given by a name in `METHODS` or as "module:Class".

    Raises:
      UserError: there is no such class, or it is not a method.
    """
    found = METHODS.get(name, name)
    return found if isinstance(found, type) else import_class(found, Trainable, "method", METHODS)


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

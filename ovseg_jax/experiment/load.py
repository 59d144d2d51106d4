"""Loading of a run from its folder: config, vocabulary, classes, method and variables."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ovseg_jax.errors import UserError
from ovseg_jax.files import read_recorded
from ovseg_jax.parallel.sharding import DEFAULT_RULES
from ovseg_jax.protocols import Variables
from ovseg_jax.reading import reading
from ovseg_jax.train.checkpoints import CONFIG_FILE, load_variables, read_run
from ovseg_jax.vocab.classes import ClassList
from ovseg_jax.vocab.word_tokenizer import WORDS_FILE
from ovseg_jax.vocab.words import WordList

CLASSES_FILE = "classes.json"


class Run(NamedTuple):
    """A run, finished or in progress.

    Attributes:
      config: the config, resolved by `config.resolved`.
      method: the method that the config describes.
      variables: the trained variables.
      words: the caption vocabulary.
      classes: the classes of the training data.
      step: the number of training steps of the variables.
    """

    config: ConfigDict
    method: Any
    variables: Variables
    words: WordList | None = None
    classes: ClassList | None = None
    step: int | None = None


def load_run(
    workdir: epath.PathLike,
    mesh: Mesh | None = None,
    *,
    step: int | None = None,
    rules: Iterable[Sequence[str]] | None = None,
    averaged: bool = True,
    kind: type | None = None,
    key: str = "--checkpoint",
    lacking: str = "cannot do this",
) -> Run:
    """Loads a run from its folder or bucket.

    Args:
      workdir: its folder or bucket.
      mesh: the mesh for its variables; by default this process's own device.
      step: the step of the checkpoint; by default the newest undamaged one.
      rules: the sharding rules on that mesh; by default the run's own.
      averaged: take the averaged parameters of a run that keeps them.
      kind: the class that the method must derive from.
      key: the flag or setting that named the run, for errors.
      lacking: the end of the error for a method of another class, such as "does not classify images".

    Raises:
      UserError: there is no run or no such checkpoint, its method is of another class, or a file is damaged.
    """
    workdir = epath.Path(workdir)
    config = read_run(workdir)
    with reading(workdir / CONFIG_FILE, "the model of"):  # A value in it may have another type.
        method, words, classes = read_method(config, workdir)
    if kind is not None and not isinstance(method, kind):
        raise UserError(f"{key}={workdir} was trained with method={config.method}, which {lacking}")
    rules = config.get("sharding", DEFAULT_RULES) if rules is None else rules
    variables, step = load_variables(workdir, step, mesh=mesh, rules=rules, averaged=averaged)
    return Run(config, method, jax.device_put(variables) if mesh is None else variables, words, classes, step)


def read_method(config: ConfigDict, workdir: epath.Path) -> tuple[Any, WordList, ClassList]:
    """Creates the method of a run with the vocabulary and classes in its folder; returns all three.

    Raises:
      UserError: a file is missing or damaged.
    """
    from ovseg_jax.methods import build

    words, classes = read_words(workdir), read_classes(workdir)
    return build(config, words, classes), words, classes


def read_words(workdir: epath.Path) -> WordList:
    """Reads the vocabulary of a run."""
    read_recorded(workdir / WORDS_FILE)
    return WordList.load(workdir / WORDS_FILE)


def read_classes(workdir: epath.Path) -> ClassList:
    """Reads the classes of a run's training data."""
    path = workdir / CLASSES_FILE
    text = read_recorded(path)
    with reading(path, "the classes"):
        return ClassList.from_json(text)

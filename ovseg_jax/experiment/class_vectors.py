"""Unit vectors of class names under a prompt, from a run or from published towers."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float
from ml_collections import ConfigDict

from ovseg_jax.errors import UserError
from ovseg_jax.experiment.load import load_run
from ovseg_jax.files import write_whole
from ovseg_jax.kernels.unit import host_unit
from ovseg_jax.models.text_towers import CLIPText, text_tower
from ovseg_jax.pretrained.load import load
from ovseg_jax.protocols import Classifier, Variables, only
from ovseg_jax.towers.clip import Clip
from ovseg_jax.towers.features import TowerText, class_features
from ovseg_jax.towers.packed_text import stacked
from ovseg_jax.towers.prompt_file import FILE, Prompt
from ovseg_jax.vocab.classes import ClassList
from ovseg_jax.vocab.words import WordList


class TextSide(NamedTuple):
    """The arguments of `class_features`: a classifier with its variables, and a prompt.

    Attributes:
      method: a classifier.
      variables: its variables.
      prompt: the prompt around each name; None for the method's own.
    """

    method: Classifier
    variables: Variables
    prompt: Prompt | Sequence[str] | None


def class_vectors(side: TextSide, classes: ClassList, synonyms: str = "first") -> Float[np.ndarray, "c d"]:
    """Computes a unit vector for each class.

    Args:
      side: the classifier and the prompt.
      classes: the classes.
      synonyms: for a class with several names, "first" takes the first name, "average" the normalised mean of the unit
        vectors of all.
    """
    if not side.method.unit_norm:
        raise UserError(f"the method {type(side.method).__name__} has no unit vectors of classes")

    def embed(names: list[str]) -> np.ndarray:
        return np.asarray(only(class_features(side.method, side.variables, names, side.prompt)), np.float32)

    if synonyms == "first":
        return embed([classes.display(k) for k in range(len(classes))])
    names, owner = classes.flat()
    each = embed(names)
    total = np.zeros((len(classes), each.shape[1]), np.float32)
    np.add.at(total, owner, each)
    return host_unit(total)


def text_side_of_run(workdir: str, mesh: Mesh, prompt: Prompt | Sequence[str] | None) -> TextSide:
    """Loads the text side of a run that classifies images.

    Raises:
      UserError: there is no run, or it does not classify images.
    """
    run = load_run(workdir, mesh, kind=Classifier, lacking="does not classify images")
    return TextSide(run.method, run.variables, prompt)


def text_side_of_towers(name: str, init: str, prompt: Prompt | Sequence[str]) -> TextSide:
    """Loads the text half of published CLIP towers.

    Raises:
      UserError: the text tower is unknown or not of CLIP's kind, or the weights cannot be read.
    """
    tower = text_tower(name)
    if not isinstance(tower, CLIPText):
        raise UserError(f"--text_tower={name} is not a text tower of CLIP's kind")
    # A placeholder, since no image is embedded.
    image = {"name": "small", "embed_dim": tower.embed_dim}
    clip = Clip(ConfigDict({"image": image, "text": {"name": name}, "init": init}), WordList([]))
    shapes = jax.eval_shape(lambda: clip.text.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    return TextSide(TowerText(clip), {"text": stacked(load(init, clip.text, shapes)["params"])}, prompt)


def prompt_of_run(workdir: str, mesh: Mesh) -> Prompt:
    """Returns the learned prompt of a run.

    Raises:
      UserError: there is no run, or its method learns no prompt that can be saved.
    """
    run = load_run(workdir, mesh, kind=Classifier, lacking="does not classify images")
    if FILE not in run.method.artifacts(run.variables):
        raise UserError(
            f"--checkpoint={workdir}: method={run.config.method} learns no prompt that can be saved"
        )
    return run.method.whole_prompt(run.variables)


def write_class_vectors(path: Path, classes: ClassList, vectors: Float[np.ndarray, "c d"]) -> None:
    """Writes vectors as .npy, or as .npz with the first name and the id of each class."""
    content = io.BytesIO()
    if path.suffix == ".npy":
        np.save(content, vectors)
    else:
        words = np.array([classes.display(k) for k in range(len(classes))])
        np.savez(content, words=words, ids=np.array(classes.ids, np.int64), vectors=vectors)
    write_whole(path, content.getvalue())

"""A linear classifier on the features of a frozen image tower: "Linear Probing" of papers/000, table 1.

logit_c = 10 w_c·x + b_c for the unit-norm feature x of an image, with the softmax over all N classes. This follows
amazon-science/prompt-pretraining, trainers/clip_mlp.py, which does not normalise features; the factor 10 is about their
length in CLIP's ViTs, so that the published learning rate applies. It has no text side and only predicts these N
classes.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from ovseg_jax.config import keys
from ovseg_jax.errors import UserError
from ovseg_jax.kernels.unit import unit
from ovseg_jax.methods.on_clip import OnClip
from ovseg_jax.parallel.accumulate import in_parts
from ovseg_jax.protocols import PRECISION, Aux, Batch, Text, Variables
from ovseg_jax.towers.clip import TOWER_KEYS, Clip
from ovseg_jax.vocab.classes import ClassList, rows_of_names
from ovseg_jax.vocab.words import WordList

FEATURE_LENGTH = 10.0
_NEVER = -1e9  # a logit


class LinearProbe(OnClip):
    """A method that trains `params` {"kernel" [D N], "bias" [N]}, which start at zero: the problem is convex.

    Its scores are the logits, for classes with training examples; all other classes score `_NEVER`.

    Args:
      config: the whole config of a run; `towers` (see `towers.clip.Clip`).
      words: the vocabulary, if the tokeniser is one of words.
      classes: the classes of the training data; the N are those that have training examples.
    """

    frozen_towers = True
    frozen = ("^towers/",)
    by_place = True
    unit_norm = False

    @classmethod
    def keys(cls, config: ConfigDict) -> dict[str, dict[str, bool]]:
        """Returns the method's own keys in each section, and whether each has an effect, see `experiment.keys`."""
        return {"towers": keys(TOWER_KEYS)}

    def __init__(self, config: ConfigDict, words: WordList, classes: ClassList):
        self.config = config
        self.clip = Clip(config.towers, words)
        trained = np.array(classes.examples or [1] * len(classes)) > 0
        self._names, self._count = classes.names, int(trained.sum())
        self._place = np.where(trained, np.cumsum(trained) - 1, self._count)

    def init(self, rng: jax.Array) -> Variables:
        """Creates `params`, and `towers`, which get no gradient."""
        params = {"kernel": jnp.zeros((self.clip.dim, self._count)), "bias": jnp.zeros(self._count)}
        return {"params": params, "towers": self.clip.init(rng)}

    def pretrained(self) -> dict[str, Any]:
        """Returns the towers' weights."""
        towers = self.clip.pretrained()
        return {"towers": towers} if towers else {}

    def loss(self, variables: Variables, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Aux]:
        """Computes the cross-entropy over all N classes; the mean over images, or over cached features."""
        image = batch.get("feature")
        if image is None:
            network = in_parts(self._embed_batch, self.config.get("accumulate", 1))
            image, _, _ = network({"towers": variables["towers"]}, batch, rng)
        x = FEATURE_LENGTH * unit(image)
        logits = x @ variables["params"]["kernel"] + variables["params"]["bias"]
        return cross_entropy(logits, jnp.asarray(self._place)[batch["label"]], batch["example_mask"])

    def save_assets(self, workdir: epath.Path) -> None:
        """Saves nothing: a class is a row of the probe, and only `embed_phrases` needs the tokeniser."""
        del workdir

    def embed_text(self, variables: Variables, texts: Sequence[str]) -> Text:
        """Returns the parameters of classes, given by any of their names, {"row": 10 w_c, "bias": b_c}.

        Raises:
          UserError: see `rows_of_names`.
        """
        if not len(texts):
            raise UserError("no class names were given")
        chosen = self._place[rows_of_names(self._names, texts, "the linear probe")]
        params = variables["params"]
        rows = jnp.pad(FEATURE_LENGTH * params["kernel"].T, ((0, 1), (0, 0)))
        bias = jnp.pad(params["bias"], (0, 1), constant_values=_NEVER)
        return {"row": rows[chosen], "bias": bias[chosen, None]}

    def embed_phrases(self, variables: Variables, texts: Sequence[str]) -> Text:
        """Embeds texts unchanged by the text tower, with a bias of 0."""
        rows = self.clip.embed_phrases(variables["towers"], texts)
        return {"row": rows, "bias": jnp.zeros((len(texts), 1))}

    def score_images(self, image: Float[Array, "b d"], text: Text) -> Float[Array, "b t"]:
        """Computes the logits."""
        return jnp.matmul(image, text["row"].T, precision=PRECISION) + text["bias"][:, 0]

    def logit_scale(self, variables: Variables) -> Float[Array, ""]:
        """Returns 1, since scores are logits."""
        del variables
        return jnp.ones(())


def cross_entropy(
    logits: Float[Array, "b n"], labels: Int[Array, " b"], valid: Bool[Array, " b"]
) -> tuple[jax.Array, Aux]:
    """Computes the mean of -log softmax(logits)[label] over valid rows; metrics are it and the accuracy."""
    own = jnp.take_along_axis(logits, labels[:, None], 1)[:, 0]
    loss = jax.nn.logsumexp(logits, 1) - own
    total = lambda x: jnp.sum(jnp.where(valid, x, 0).astype(jnp.float32))
    count = total(jnp.ones_like(loss))
    correct = total(jnp.argmax(logits, -1) == labels)
    return total(loss) / jnp.maximum(count, 1), Aux(
        {"loss": (total(loss), count), "accuracy": (correct, count)}, {}
    )

"""A linear classifier on the features of a frozen image tower: "Linear Probing" of papers/000, table 1.

logit_c = 10 w_c·x + b_c for the unit-norm feature x of an image, and the softmax over all N classes: that of
amazon-science/prompt-pretraining, trainers/clip_mlp.py, which leaves features at the length they have, about 10 for
CLIP's ViTs; so its learning rate is the one to use. It knows N classes and no text: it answers with no other class.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8
from ml_collections import ConfigDict

from ovseg_jax.config import keys
from ovseg_jax.errors import UserError
from ovseg_jax.parallel.accumulate import in_parts
from ovseg_jax.protocols import Aux, Batch, Variables
from ovseg_jax.towers.clip import TOWER_KEYS, Clip
from ovseg_jax.towers.text import unit
from ovseg_jax.vocab.classes import ClassList, rows_of_names
from ovseg_jax.vocab.words import WordList

FEATURE_LENGTH = 10.0


class LinearProbe:
    """Trains `params` {"kernel" [D N], "bias" [N]}, which start at zero: the problem is convex.

    A `Classifier` has unit vectors, and a linear classifier has rows of different lengths, and a bias. Both fit exactly
    in two more dimensions: with R the length of the longest (10 w_c, b_c), an image is (x, 1, 0) / √2, and a class is
    (10 w_c, b_c, what is missing to R) / R. Their cosine times √2 R is the logit, so that every ranking is that of the
    probe, bias and all. A class without examples is (0, -1, 0), with the logit -R: always less than the best of the
    others, for they sum to zero, as the gradients of a softmax do. Alignment and uniformity are those of these vectors,
    and not comparable to a prompt's.

    Args:
      config: the whole config of a run; `towers` (see `towers.clip.Clip`).
      words: the vocabulary, where the tokeniser is one of words.
      classes: those of them that have training examples are the N.
    """

    frozen_towers = True
    frozen = ("^towers/",)
    by_place = True

    @classmethod
    def keys(cls, config: ConfigDict) -> dict[str, dict[str, bool]]:
        """Returns the keys of its sections, and whether each has an effect, see `experiment.keys`."""
        return {"towers": keys(TOWER_KEYS)}

    def __init__(self, config: ConfigDict, words: WordList, classes: ClassList):
        self.config = config
        self.clip = Clip(config.towers, words)
        trained = np.array(classes.examples or [1] * len(classes)) > 0
        self._names, self._count = classes.names, int(trained.sum())
        self._place = np.where(trained, np.cumsum(trained) - 1, self._count)

    def init(self, rng: jax.Array) -> Variables:
        """`params`, and `towers`, which no gradient reaches."""
        params = {"kernel": jnp.zeros((self.clip.dim, self._count)), "bias": jnp.zeros(self._count)}
        return {"params": params, "towers": self.clip.init(rng)}

    def pretrained(self) -> dict[str, Any]:
        """The towers' weights."""
        towers = self.clip.pretrained()
        return {"towers": towers} if towers else {}

    def loss(self, variables: Variables, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Aux]:
        """The cross-entropy over all N classes; the mean over the images, or over features in their place."""
        image = batch.get("feature")
        if image is None:
            see = in_parts(self._see, self.config.get("accumulate", 1))
            image, _, _ = see({"towers": variables["towers"]}, batch, rng)
        x = FEATURE_LENGTH * unit(image[:, : self.clip.dim])
        logits = x @ variables["params"]["kernel"] + variables["params"]["bias"]
        return cross_entropy(logits, jnp.asarray(self._place)[batch["label"]], batch["example_mask"])

    def _see(self, variables: Variables, batch: Batch, rng: jax.Array) -> tuple[Array, tuple, dict]:
        del rng
        return self.embed_image(variables, batch["image"]), (), {}

    def embed_image(self, variables: Variables, image: UInt8[Array, "b h w 3"]) -> Float[Array, "b d"]:
        """Unit vectors of images, of D + 2 numbers."""
        x = self.clip.embed_image(variables["towers"], image)
        return jnp.pad(jnp.pad(x, ((0, 0), (0, 1)), constant_values=1), ((0, 0), (0, 1))) / jnp.sqrt(2.0)

    def embed_text(self, variables: Variables, texts: Sequence[str]) -> Float[Array, "k d"]:
        """Unit vectors of classes by any of their names.

        Raises:
          UserError: see `rows_of_names`.
        """
        if not len(texts):
            raise UserError("no class names were given")
        chosen = self._place[rows_of_names(self._names, texts, "the linear probe")]
        rows, longest = self._rows(variables)
        rows = jnp.pad(rows, ((0, 1), (0, 0))).at[-1, -1].set(-longest)
        rest = jnp.sqrt(jnp.maximum(longest**2 - jnp.square(rows).sum(1, keepdims=True), 0))
        return (jnp.concatenate([rows, rest], 1) / longest)[chosen]

    def embed_phrases(self, variables: Variables, texts: Sequence[str]) -> Float[Array, "k d"]:
        """Unit vectors of texts as they stand: the probe has no part in them."""
        return jnp.pad(self.clip.embed_phrases(variables["towers"], texts), ((0, 0), (0, 2)))

    def logit_scale(self, variables: Variables) -> Float[Array, ""]:
        """√2 R."""
        return jnp.sqrt(2.0) * self._rows(variables)[1]

    def _rows(self, variables: Variables) -> tuple[Float[Array, "n e"], Float[Array, ""]]:
        """(10 w_c, b_c) of each class, and R."""
        params = variables["params"]
        rows = jnp.concatenate([FEATURE_LENGTH * params["kernel"].T, params["bias"][:, None]], 1)
        return rows, jnp.maximum(jnp.linalg.norm(rows, axis=1).max(), 1e-6)


def cross_entropy(
    logits: Float[Array, "b n"], labels: Int[Array, " b"], valid: Bool[Array, " b"]
) -> tuple[jax.Array, Aux]:
    """The mean of -log softmax(logits)[label] over valid rows, and it and the accuracy as metrics."""
    own = jnp.take_along_axis(logits, labels[:, None], 1)[:, 0]
    loss = jax.nn.logsumexp(logits, 1) - own
    total = lambda x: jnp.sum(jnp.where(valid, x, 0).astype(jnp.float32))
    count = total(jnp.ones_like(loss))
    correct = total(jnp.argmax(logits, -1) == labels)
    return total(loss) / jnp.maximum(count, 1), Aux(
        {"loss": (total(loss), count), "accuracy": (correct, count)}, {}
    )

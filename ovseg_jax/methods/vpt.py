"""Visual prompt tuning (Jia et al. 2022; "VPT" of papers/000, tables 1 and 2): learned tokens in the image tower.

`config.prompt`: `length` n is the number of tokens of a block; `depth` J the number of blocks, from the first on, that
have their own tokens, which replace those of the block before. See `models.vit.ViT` for their position among the
patches. Class features, of "a photo of a {}.", are computed once: a step is a forward and backward pass of the image
tower and one matrix product with all N classes. Image features change in every step, so they cannot be cached.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from ml_collections import ConfigDict

from ovseg_jax.config import keys
from ovseg_jax.errors import UserError
from ovseg_jax.methods.linear_probe import cross_entropy
from ovseg_jax.methods.on_clip import OnClip
from ovseg_jax.methods.prompt_tuning import HARD_PROMPT, NOISE
from ovseg_jax.models.vit import ViT
from ovseg_jax.parallel.accumulate import in_parts
from ovseg_jax.protocols import Aux, Batch, Text, Variables
from ovseg_jax.towers.clip import SPACE, TOWER_KEYS, Clip
from ovseg_jax.towers.templates import fill
from ovseg_jax.vocab.classes import ClassList
from ovseg_jax.vocab.words import WordList


class VPT(OnClip):
    """A method that trains tokens for a frozen image tower. `config` is the whole config of a run.

    Args:
      config: `towers` (see `towers.clip.Clip`), `prompt` (see above).
      words: the vocabulary, if the tokeniser is one of words.
      classes: the classes of the training data; the N are those with training examples, named by their first names.

    Raises:
      UserError: the image tower is not a ViT, or a value in the config is invalid.
    """

    frozen_towers = True
    frozen = ("^towers/",)

    @classmethod
    def fields(cls, config: ConfigDict) -> tuple[str, ...]:
        """Returns the batch fields that the loss reads; the prompt changes image features, so they cannot be cached."""
        del config
        return ("image", "label")

    @classmethod
    def keys(cls, config: ConfigDict) -> dict[str, dict[str, bool]]:
        """Returns the method's own keys in each section, and whether each has an effect, see `experiment.keys`."""
        return {"towers": keys(TOWER_KEYS), "prompt": keys("length depth")}

    def __init__(self, config: ConfigDict, words: WordList, classes: ClassList):
        self.config = config
        self.clip = Clip(config.towers, words)
        trained = np.array(classes.examples or [1] * len(classes)) > 0
        self.names = [classes.display(k) for k in np.flatnonzero(trained).tolist()]
        self._place = np.cumsum(trained) - 1
        self.length, self.depth = int(config.prompt.length), int(config.prompt.depth)
        self.width = prompted_tower(config, self.clip).width
        if self.length < 1:
            raise UserError(f"prompt.length={self.length} is less than 1")

    def init(self, rng: jax.Array) -> Variables:
        """Creates `params` {"prompt": {"image" [J n d]}}, and `towers` with "hard" [N D], which get no gradient."""
        towers_rng, rng = jax.random.split(rng)
        towers = self.clip.init(towers_rng)
        hard = jnp.zeros((len(self.names), self.clip.dim))
        if not self.config.towers.get("init", ""):
            hard = self.embed_text({"towers": towers}, self.names)[SPACE]
        tokens = NOISE * jax.random.normal(rng, (self.depth, self.length, self.width))
        return {"params": {"prompt": {"image": tokens}}, "towers": {**towers, "hard": hard}}

    def pretrained(self) -> dict[str, Any]:
        """Returns the towers' weights and the class features."""
        towers = self.clip.pretrained()
        if not towers:
            return {}
        return {
            "towers": {**towers, "hard": np.asarray(self.embed_text({"towers": towers}, self.names)[SPACE])}
        }

    def loss(self, variables: Variables, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Aux]:
        """Computes eq. 1 of papers/000 over all N classes; the mean over the images."""
        network = in_parts(self._embed_batch, self.config.get("accumulate", 1))
        image, _, _ = network(variables, {"image": batch["image"]}, rng)
        logits = self.logit_scale(variables) * image @ variables["towers"]["hard"].T
        return cross_entropy(logits, jnp.asarray(self._place)[batch["label"]], batch["example_mask"])

    def embed_image(self, variables: Variables, image: UInt8[Array, "b h w 3"]) -> Float[Array, "b d"]:
        """Embeds images as unit vectors."""
        return self.clip.embed_image(variables["towers"], image, variables["params"]["prompt"]["image"])

    def embed_text(self, variables: Variables, texts: Sequence[str]) -> Text:
        """Embeds class names in "a photo of a {}." as unit vectors."""
        return self.embed_phrases(variables, [fill(HARD_PROMPT, text) for text in texts])


def prompted_tower(config: ConfigDict, clip: Clip) -> ViT:
    """Returns the image tower after checking that its first `config.prompt.depth` blocks can take tokens.

    Raises:
      UserError: it is not a ViT or has fewer blocks, or features are cached, which the tokens would change.
    """
    tower, depth = clip.image, int(config.prompt.depth)
    if not isinstance(tower, ViT):
        raise UserError(
            f"method={config.method} needs a ViT, which towers.image.name={config.towers.image.name!r} is not"
        )
    if not 1 <= depth <= tower.depth:
        raise UserError(
            f"prompt.depth={depth} is not between 1 and the {tower.depth} blocks of the image tower"
        )
    if config.data.get("cache_features", 0):
        raise UserError(
            f"data.cache_features={config.data.cache_features}: method={config.method} changes the images' features "
            "in each step; set 0"
        )
    return tower

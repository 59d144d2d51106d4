"""CLIP as it comes, as a dense classifier: the baseline without training of papers/004, 4.3, whose ALIGN is private.

`config.dense`: `features`, "activation", the map before the pooling in the space of the class token, as in 4.3, or
"value", the value path of the last attention (MaskCLIP, Zhou et al. 2022); `prompt`, the templates of class names, see
`towers.templates.read_templates`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8
from ml_collections import ConfigDict

from ovseg_jax.config import keys
from ovseg_jax.errors import UserError
from ovseg_jax.methods.on_clip import OnClip
from ovseg_jax.protocols import Aux, Batch, Prediction, Segmenting, Text, Variables
from ovseg_jax.towers.clip import SPACE, TOWER_KEYS, Clip
from ovseg_jax.towers.features import class_features
from ovseg_jax.towers.templates import read_templates
from ovseg_jax.vocab.classes import ClassList
from ovseg_jax.vocab.words import WordList

FEATURES = ("value", "activation")


class ClipDense(OnClip, Segmenting):
    """A method that is not trained: `config.steps` is 0. It also classifies whole images, and so other methods' masks.

    Args:
      config: `towers` (see `towers.clip.Clip`) and `dense`, see above.
      words: the vocabulary, if the tokeniser is one of words.
      classes: not used.

    Raises:
      UserError: a value in the config is invalid, or the image tower has no features of that kind.
    """

    frozen_towers = True
    frozen = ("^towers/",)

    @classmethod
    def fields(cls, config: ConfigDict) -> tuple[str, ...]:
        """Returns the batch fields that a training step would read."""
        del config
        return ("image",)

    @classmethod
    def keys(cls, config: ConfigDict) -> dict[str, dict[str, bool]]:
        """Returns the method's own keys in each section, and whether each has an effect, see `experiment.keys`."""
        return {"towers": keys(TOWER_KEYS), "dense": keys("features prompt")}

    def __init__(self, config: ConfigDict, words: WordList, classes: ClassList):
        del classes
        if config.steps:
            raise UserError(f"steps={config.steps}: the method clip_dense is not trained, so its steps are 0")
        if config.dense.features not in FEATURES:
            raise UserError(f"dense.features={config.dense.features!r} is not one of {', '.join(FEATURES)}")
        self.clip = Clip(config.towers, words)
        self._values = config.dense.features == "value"
        self.clip.check_patches(self._values)
        prompt = config.dense.prompt
        self._templates = read_templates(prompt if isinstance(prompt, str) else list(prompt))

    def init(self, rng: jax.Array) -> Variables:
        """Creates `towers`, and no parameters."""
        return {"params": {}, "towers": self.clip.init(rng)}

    def pretrained(self) -> dict[str, Any]:
        """Returns the towers' weights."""
        towers = self.clip.pretrained()
        return {"towers": towers} if towers else {}

    def loss(self, variables: Variables, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Aux]:
        """Raises an error, since there are no steps."""
        raise UserError("the method clip_dense is not trained")

    def predict(
        self, variables: Variables, image: UInt8[Array, "b s s 3"], image_size: Int[Array, "b 2"]
    ) -> Prediction:
        """Computes the features of the patches; there are no masks."""
        del image_size
        return Prediction(
            None, {}, {SPACE: self.clip.embed_patches(variables["towers"], image, self._values)}
        )

    def embed_image(self, variables: Variables, image: UInt8[Array, "b h w 3"]) -> Float[Array, "b d"]:
        """Embeds images as unit vectors."""
        return self.clip.embed_image(variables["towers"], image)

    def embed_text(self, variables: Variables, texts: Sequence[str]) -> Text:
        """Embeds class names by the templates of `dense.prompt` as unit vectors."""
        return class_features(self, variables, texts, self._templates)

    def embed_phrases(self, variables: Variables, texts: Sequence[str]) -> Text:
        """Embeds texts unchanged as unit vectors."""
        return {SPACE: self.clip.embed_phrases(variables["towers"], texts)}

    def logit_scale(self, variables: Variables) -> Float[Array, ""]:
        """Returns 1/τ of the towers."""
        return jnp.exp(variables["towers"]["scale"])

"""CLIP trained from scratch (Radford et al. 2021): images and captions, a symmetric contrastive loss over the batch."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jaxtyping import Array, Float, UInt8
from ml_collections import ConfigDict

from ovseg_jax.config import keys
from ovseg_jax.errors import UserError
from ovseg_jax.kernels.contrastive import contrastive_loss
from ovseg_jax.kernels.unit import unit
from ovseg_jax.methods.on_clip import OnClip
from ovseg_jax.parallel.sharding import active_batch_axes, on_host
from ovseg_jax.protocols import Aux, Batch, Text, Variables
from ovseg_jax.towers.clip import SPACE, TOWER_KEYS, TOWERS, Clip, from_training, write_towers
from ovseg_jax.towers.packed_text import unstacked
from ovseg_jax.towers.prompt_file import Prompt
from ovseg_jax.vocab.classes import ClassList
from ovseg_jax.vocab.words import WordList

# CLIP's upper bound of 1/τ (section 2.5).
MAX_SCALE = 100.0


class ClipTraining(OnClip):
    """A method that trains both towers and the temperature on images and captions.

    Args:
      config: `towers`, see `towers.clip.Clip`. Image towers with batch statistics are not supported.
      words: the vocabulary of the captions.
      classes: not used.
    """

    @classmethod
    def fields(cls, config: ConfigDict) -> tuple[str, ...]:
        """Returns the batch fields that the loss reads."""
        del config
        return ("image", "tokens")

    @classmethod
    def keys(cls, config: ConfigDict) -> dict[str, dict[str, bool]]:
        """Returns the method's own keys in each section, and whether each has an effect, see `experiment.keys`."""
        return {"towers": keys(TOWER_KEYS)}

    def __init__(self, config: ConfigDict, words: WordList, classes: ClassList):
        del classes
        self.clip = Clip(config.towers, words)

    def init(self, rng: jax.Array) -> Variables:
        """Creates `params` {"image", "text", "scale"}; the text tower's have the names of `CLIPText`."""
        return self._trained(self.clip.init(rng))

    def pretrained(self) -> dict[str, Any]:
        """Returns the weights that `towers.init` names."""
        found = self.clip.pretrained()
        return self._trained(found) if found else {}

    def loss(self, variables: Variables, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Aux]:
        """Computes the mean over the pairs of the cross-entropies in both directions."""
        del rng
        params = variables["params"]
        image = self.embed_image(variables, batch["image"])
        text: Any = self.clip.text.apply({"params": params["text"]}, batch["tokens"])
        scale = self.logit_scale(variables)
        axes = active_batch_axes()
        spoken = batch["example_mask"] & batch["token_valid"].any(1)
        out = contrastive_loss(image, unit(text.pooled), spoken, 1 / scale, batch_axes=axes)
        loss = out.loss / jnp.maximum(2 * out.pairs, 1)
        one = jnp.ones(())
        metrics = {
            "loss": (loss, one),
            "caption_accuracy": (out.correct, out.pairs),
            "logit_scale": (scale, one),
        }
        return loss, Aux(metrics, {})

    def embed_image(self, variables: Variables, image: UInt8[Array, "b h w 3"]) -> Float[Array, "b d"]:
        """Embeds images as unit vectors."""
        return self.clip.embed_image({"image": {"params": variables["params"]["image"]}}, image)

    def embed_text(self, variables: Variables, texts: Sequence[str]) -> Text:
        """Embeds class names in "a photo of a {}." as unit vectors."""
        return self.embed_phrases(variables, [f"a photo of a {text}." for text in texts])

    def embed_prompt(self, variables: Variables, prompt: Prompt, texts: Sequence[str]) -> Text:
        """Embeds class names in a learned prompt as unit vectors, see `Clip.embed_prompt` for errors."""
        return {SPACE: self.clip.embed_prompt(from_training(variables), prompt, texts)}

    def embed_phrases(self, variables: Variables, texts: Sequence[str]) -> Text:
        """Embeds texts unchanged as unit vectors."""
        return {SPACE: self.clip.embed_phrases(from_training(variables), texts)}

    def logit_scale(self, variables: Variables) -> Float[Array, ""]:
        """Returns the learned 1/τ, at most 100."""
        return jnp.minimum(jnp.exp(variables["params"]["scale"]), MAX_SCALE)

    def artifacts(self, variables: Variables) -> dict[str, Callable[[epath.Path], None]]:
        """Returns the writer of the trained towers, from which runs of other methods can start."""
        weights = on_host(from_training(variables))
        return {TOWERS: lambda folder: write_towers(folder, self.clip.config, weights)}

    def _trained(self, weights: dict[str, Any]) -> dict[str, Any]:
        if rest := weights["image"].keys() - {"params"}:
            raise UserError(f"method=clip cannot train an image tower with {', '.join(sorted(rest))}")
        params = {"image": weights["image"]["params"], "text": unstacked(weights["text"])}
        return {"params": params | ({"scale": weights["scale"]} if "scale" in weights else {})}

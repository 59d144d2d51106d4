"""The common part of methods on CLIP's towers: images of one class, or texts by the towers' tokeniser."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from etils import epath
from jaxtyping import Array, Float, UInt8
from ml_collections import ConfigDict

from ovseg_jax.data.fields import batch_fields
from ovseg_jax.data.source_base import Source
from ovseg_jax.protocols import Batch, Classifier, Text, Trainable, Variables
from ovseg_jax.towers.clip import SPACE, Clip
from ovseg_jax.towers.vocabulary import spoken_words
from ovseg_jax.vocab.tokenizers import PieceTokenizer, keep_tokenizer


class OnClip(Trainable, Classifier):
    """A base class for methods on the towers `clip`, whose weights are `variables["towers"]` where they are frozen."""

    clip: Clip

    @classmethod
    def fields(cls, config: ConfigDict) -> tuple[str, ...]:
        """Returns the batch fields that the loss reads: cached features in place of images, if there are any."""
        return ("feature" if config.data.get("cache_features", 0) else "image", "label")

    @classmethod
    def vocabulary(cls, config: ConfigDict, source: Source) -> Sequence[str]:
        """Returns the words that a tokeniser of words needs; those of texts only if it is built from them."""
        own = config.towers.get("tokenizer", "") == "words"
        return spoken_words(config.data, source, batch_fields(cls, config) if own else ()).words

    def kept_space(self) -> tuple[str, int] | None:
        """Returns the space of the towers, see `protocols.Segmenting`."""
        return SPACE, self.clip.dim

    @property
    def tokenizer(self) -> PieceTokenizer:
        """The tokeniser of the text tower, read at the first access."""
        return self.clip.tokenizer

    def save_assets(self, workdir: epath.Path) -> None:
        """Saves the tokeniser, unless it is one of the run's own words."""
        if self.clip.config.get("tokenizer", "") != "words":
            keep_tokenizer(self.tokenizer, workdir)

    def embed_image(self, variables: Variables, image: UInt8[Array, "b h w 3"]) -> Float[Array, "b d"]:
        """Embeds images as unit vectors."""
        return self.clip.embed_image(variables["towers"], image)

    def embed_phrases(self, variables: Variables, texts: Sequence[str]) -> Text:
        """Embeds texts unchanged as unit vectors."""
        return {SPACE: self.clip.embed_phrases(variables["towers"], texts)}

    def logit_scale(self, variables: Variables) -> Float[Array, ""]:
        """Returns the 1/τ of the towers."""
        return jnp.exp(variables["towers"]["scale"])

    def _embed_batch(self, variables: Variables, batch: Batch, rng: jax.Array) -> tuple[Array, tuple, dict]:
        """Embeds the images of a batch, as `parallel.accumulate.in_parts` calls it."""
        del rng
        return self.embed_image(variables, batch["image"]), (), {}

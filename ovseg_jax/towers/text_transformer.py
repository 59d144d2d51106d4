"""A transformer as a text side, trained together with the images, as in P-Seg (papers/002, 3.3.2 and C.1)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from ovseg_jax.errors import UserError
from ovseg_jax.kernels.unit import unit
from ovseg_jax.models.projection import Projection
from ovseg_jax.models.text_towers import CLIPText
from ovseg_jax.towers.features import embed_in_chunks
from ovseg_jax.towers.templates import fill, read_templates
from ovseg_jax.vocab.tokenizers import PieceTokenizer
from ovseg_jax.vocab.word_tokenizer import WordTokenizer, read_tokenizer
from ovseg_jax.vocab.words import WordList

TEXT_KEYS = "tokenizer vocab_size length width layers heads projection_hidden projection_norm prompt remat"


class TextNet(nn.Module):
    """CLIP's text transformer, whose end token goes through a projection of two layers."""

    tower: CLIPText
    projection: Projection

    def __call__(self, ids: Int[Array, "b l"], train: bool = False) -> Float[Array, "b e"]:
        """Embeds texts, without normalising them."""
        return self.projection(self.tower(ids).pooled, train).astype(jnp.float32)


class TextTransformer:
    """A text side with a transformer from random weights.

    Args:
      config: `tokenizer`, the folder of CLIP's (or its name on the hub), or "words" for the words of this run;
        `vocab_size` (0 for that of the tokeniser), `length`, `width`, `layers`, `heads`, `remat` of the transformer;
        `projection_hidden` and `projection_norm` (batch normalisation) of the projection; `prompt`, the templates of
        class names, see `towers.templates`.
      words: the vocabulary, if the tokeniser is one of words.
      dim: the dimension D of the text space.
      dtype: compute type.

    Raises:
      UserError: a value is invalid, or the tokeniser cannot be read.
    """

    learned = True

    def __init__(self, config: ConfigDict, words: WordList, dim: int, dtype: Any = jnp.float32):
        self.config, self.words, self.dim = config, words, dim
        self.source = str(config.get("tokenizer", "") or "")
        if not self.source:
            raise UserError(
                "text.tokenizer is missing: set the folder of CLIP's tokeniser, its name on the hub, or words"
            )
        prompt = config.get("prompt", "{}")
        templates = read_templates(prompt if isinstance(prompt, str) else list(prompt))
        if not isinstance(templates, tuple):
            raise UserError(f"text.prompt={prompt} is a learned prompt, which this transformer cannot use")
        self.templates = templates
        self.tokenizer = self._tokenizer()
        vocab_size, least = int(config.vocab_size), self.tokenizer.vocab_size
        if vocab_size and vocab_size < least:
            raise UserError(
                f"text.vocab_size={vocab_size}, but the tokeniser {self.source} has {least} pieces"
            )
        tower = CLIPText(
            vocab_size=vocab_size or least,
            length=int(config.length),
            width=int(config.width),
            layers=int(config.layers),
            heads=int(config.heads),
            embed_dim=0,
            remat=config.get("remat", "none"),
            dtype=dtype,
        )
        projection = Projection(dim, int(config.projection_hidden), bool(config.projection_norm), dtype=dtype)
        self.net = TextNet(tower, projection)
        net: Any = self.net
        self._embed = jax.jit(lambda variables, ids: unit(net.apply(variables, ids)))

    def _tokenizer(self) -> PieceTokenizer:
        length = int(self.config.length)
        if self.source == "words":
            return WordTokenizer(self.words, length)
        from ovseg_jax.pretrained.hub import find

        path = find(self.source)
        return read_tokenizer(path if path.is_dir() else path.parent, length, "clip")

    def init(self, rng: jax.Array) -> Mapping[str, Any]:
        """Creates `params`, and `batch_stats` if the projection is normalised."""
        return self.net.init(rng, jnp.zeros((1, 2), jnp.int32))

    def encode(self, variables: Mapping[str, Any], texts: Sequence[str]) -> Float[Array, "k d"]:
        """Embeds class names as unit vectors: the sum of those of the templates, normalised (CLIP's way).

        GroupViT's code averages several templates before it normalises them; it segments with one.

        Raises:
          UserError: there is no text, or an empty one, or one with a word that a tokeniser of words lacks.
        """
        if not len(texts) or not all(text.strip() for text in texts):
            raise UserError("no labels were given, or an empty one: every label needs at least one word")
        # Tokens after the end change nothing, since attention is causal.
        one = lambda chunk: self._embed(variables, np.asarray(self.tokenizer(chunk)[0]))
        parts = [
            embed_in_chunks(one, [fill(template, name) for name in texts]) for template in self.templates
        ]
        return parts[0] if len(parts) == 1 else unit(jnp.asarray(sum(parts)))

    def save(self, folder: Path, variables: Mapping[str, Any], dtype: Any = np.float32) -> None:
        """Saves the trained transformer for `ovseg_jax.torch`, see `write_text_tower`.

        Args:
          folder: created if missing.
          variables: `params`, and `batch_stats` if the projection is normalised.
          dtype: of the weights in the file.
        """
        from ovseg_jax.towers.text_files import write_text_tower

        flat: dict[str, Any] = {}
        for tree in variables.values():
            flat |= flatten_dict(jax.device_get(tree), sep="/")
        write_text_tower(folder, self.tokenizer, self.net, flat, self.templates, dtype)

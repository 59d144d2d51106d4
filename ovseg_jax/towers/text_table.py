"""A table of word vectors as a text side: learned, or frozen and read from a file."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from ovseg_jax.errors import UserError
from ovseg_jax.towers.text import embed_phrases
from ovseg_jax.vocab.phrases import word_ids
from ovseg_jax.vocab.vectors import read_vectors
from ovseg_jax.vocab.words import WordList


class TextTable:
    """A text side that looks words up; a phrase is the normalised sum of its words' unit vectors.

    With `vectors` (an .npz of `words` [V] and `vectors` [V D] from any text tower) and `learned=False` this is the
    paper's frozen text encoder: every word of the vocabulary is embedded once and looked up in training. With
    `learned=True` the vectors are parameters, as in training on `scenes`, which needs no pretrained tower.
    """

    def __init__(self, config: ConfigDict, words: WordList, dim: int):
        self.words, self.dim = words, dim
        self.vectors = str(config.get("vectors", "") or "")
        self.learned = bool(config.get("learned", True))
        if prompt := config.get("prompt", ""):
            raise UserError(f"text.prompt={prompt} needs a text tower, such as text.tower=clip_vitb16")
        if not self.learned and not self.vectors:
            raise UserError(
                "text.learned=False needs text.vectors, an .npz file with 'words' and 'vectors' of a text tower"
            )

    def init(self, rng: jax.Array) -> dict[str, Array]:
        """Creates the table: the file's vectors, or standard normal values for words without one.

        Raises:
          UserError: the file is missing, malformed or of another dimension, or the table is frozen and lacks a word.
        """
        table = jax.random.normal(rng, (len(self.words), self.dim), jnp.float32)
        if not self.vectors:
            return {"table": table}
        known, vectors = self._read()
        missing = [w for w in self.words.words[1:] if w not in known]
        if missing and not self.learned:
            raise UserError(
                f"{self.vectors} has no vector for {len(missing)} words of the vocabulary: {', '.join(missing[:8])}..."
            )
        rows = [known.get(w, -1) for w in self.words.words]
        return {"table": jnp.where((np.array(rows) >= 0)[:, None], vectors[rows], table)}

    def _read(self) -> tuple[dict[str, int], np.ndarray]:
        names, vectors = read_vectors(self.vectors, "text.vectors")
        if vectors.shape[1] != self.dim:
            raise UserError(
                f"text.vectors: {self.vectors} holds {vectors.shape} vectors for {len(names)} words, expected "
                f"({len(names)}, {self.dim}): set model.embed_dim to the tower's width"
            )
        return {n: i for i, n in enumerate(names)}, vectors

    def tokenize(self, texts: Sequence[str]) -> tuple[Int[np.ndarray, "k l"], Bool[np.ndarray, "k l"]]:
        """Returns word ids of texts, padded to the longest.

        Raises:
          UserError: there is no text; and see `vocab.phrases.word_ids`.
        """
        if not len(texts):
            raise UserError("no labels were given: give at least one, such as --labels='dog; grass,lawn'")
        rows = [word_ids(text, self.words.index) for text in texts]
        width = max(map(len, rows))
        ids, valid = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
        for i, row in enumerate(rows):
            ids[i, : len(row)], valid[i, : len(row)] = row, True
        return ids, valid

    def encode(self, params: dict[str, Array], texts: Sequence[str]) -> Float[Array, "k d"]:
        """Embeds texts as unit vectors; see `tokenize` for errors."""
        ids, valid = self.tokenize(texts)
        # Jitted, since compiling each operation on its own takes six times as long.
        return jax.jit(embed_phrases)(params["table"], ids, valid)

    def pretrained(self) -> dict[str, np.ndarray]:
        """Returns {}, since `init` reads the vectors of a file."""
        return {}

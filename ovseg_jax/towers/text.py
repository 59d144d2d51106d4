"""Embeddings of words and phrases from a table of word vectors."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ovseg_jax.kernels.unit import unit


def embed_words(table: Float[Array, "v d"], ids: Int[Array, "*n"]) -> Float[Array, "*n d"]:
    """Looks up single words in a table and normalises their vectors."""
    return unit(table[ids])


def embed_phrases(
    table: Float[Array, "v d"], ids: Int[Array, "*n l"], valid: Bool[Array, "*n l"]
) -> Float[Array, "*n d"]:
    """Embeds phrases as the normalised sum of their words' unit vectors."""
    return unit(jnp.sum(embed_words(table, ids) * valid[..., None], -2))

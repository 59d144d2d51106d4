"""The text side: words and phrases as unit vectors."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ovseg_jax.kernels.unit import unit


def embed_words(table: Float[Array, "v d"], ids: Int[Array, "*n"]) -> Float[Array, "*n d"]:
    """Returns unit vectors of single words, looked up in a table."""
    return unit(table[ids])


def embed_phrases(
    table: Float[Array, "v d"], ids: Int[Array, "*n l"], valid: Bool[Array, "*n l"]
) -> Float[Array, "*n d"]:
    """Returns unit vectors of phrases: the normalised sum of their words' unit vectors."""
    return unit(jnp.sum(embed_words(table, ids) * valid[..., None], -2))

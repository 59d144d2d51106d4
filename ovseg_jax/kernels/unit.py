"""Normalisation of vectors to length 1."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def unit(x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """Returns x / |x| along the last axis in float32; zeros stay zeros."""
    x = x.astype(jnp.float32)
    # The constant changes no bit of sums above 1e-5.
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), -1, keepdims=True) + 1e-12)


def host_unit(x: Float[np.ndarray, "*n d"]) -> Float[np.ndarray, "*n d"]:
    """Returns x / |x| along the last axis, computed by NumPy in the precision of x; zeros stay zeros."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-6)

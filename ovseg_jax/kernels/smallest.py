"""The places of the k smallest values: by `top_k`, and on CPUs, where XLA's is slow, by bisection."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def smallest(x: Float[Array, "*b n"], k: int) -> Int[Array, "*b k"]:
    """Returns the places of the k smallest values of each row, in any order; of equal values the first are taken.

    Args:
      x: float32 values of at least zero.
      k: how many, at least 1 and at most n.
    """
    return jax.lax.platform_dependent(
        x, cpu=lambda x: by_bisection(x, k), default=lambda x: jax.lax.top_k(-x, k)[1]
    )


def by_bisection(x: Float[Array, "*b n"], k: int) -> Int[Array, "*b k"]:
    """Returns the same places, in ascending order, by finding the k-th smallest value bit by bit.

    For 384 rows of 1,536 values and k = 384 it takes 0.4 times as long as `top_k` on a CPU. Other devices sort
    fast, and gather slowly.
    """
    # As integers, floats of at least zero have the same order.
    bits = jnp.moveaxis(jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32), -1, 0)

    def body(i: Array, highest: Array) -> Array:
        higher = highest | (1 << (30 - i))
        return jnp.where((bits < higher).sum(0, dtype=jnp.int32) < k, higher, highest)

    highest = jax.lax.fori_loop(0, 31, body, jnp.zeros(x.shape[:-1], jnp.int32))
    bits, highest = jnp.moveaxis(bits, 0, -1), highest[..., None]
    below, equal = bits < highest, bits == highest
    room = k - below.sum(-1, keepdims=True)
    chosen = below | (equal & (jnp.cumsum(equal, -1) <= room))
    find = lambda count: jnp.searchsorted(count, jnp.arange(1, k + 1))
    for _ in x.shape[:-1]:
        find = jax.vmap(find)
    return find(jnp.cumsum(chosen, -1))

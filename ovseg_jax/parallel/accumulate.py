"""A large batch through a network in parts, with the loss, and the gradient, of the whole."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ovseg_jax.parallel.sharding import join_parts, split_parts

Network = Callable[[Any, Any, jax.Array], tuple[Any, Any, Any]]


def in_parts(network: Network, parts: int) -> Network:
    """`network(variables, batch, rng) -> (rows, sums, mutated)`, computed for one part of the batch after the other.

    Of each part only its results stay alive; the backward pass computes the part once more. A contrastive loss of
    the joined rows is therefore that of the whole batch (as in GradCache, arXiv:2101.06983), and so is every mean
    that is taken of the sums; adding up the gradients of parts would give neither. The price is a second forward
    pass. Batch normalisation sees the statistics of a part, and what it keeps is their mean over the parts.

    Args:
      network: `rows` are arrays with a leading axis of examples, `sums` add up over examples, `mutated` are the
        collections that the forward pass changed.
      parts: into how many the batch is cut; each device works on its own share of every part.
    """
    if parts == 1:
        return network

    def whole(variables: Any, batch: Any, rng: jax.Array) -> tuple[Any, Any, Any]:
        @jax.checkpoint
        def one(variables, number, part):
            return network(variables, part, jax.random.fold_in(rng, number))

        step = lambda _, xs: (None, one(variables, *xs))
        _, (rows, sums, mutated) = jax.lax.scan(step, None, (jnp.arange(parts), split_parts(batch, parts)))
        mean = lambda x: jnp.mean(x, 0).astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x[-1]
        return join_parts(rows), jax.tree.map(lambda x: x.sum(0), sums), jax.tree.map(mean, mutated)

    return whole

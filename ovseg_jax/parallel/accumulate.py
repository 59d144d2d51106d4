"""Gradient accumulation with the exact loss and gradient of the whole batch, also for contrastive losses."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ovseg_jax.parallel.sharding import join_parts, split_parts

Network = Callable[[Any, Any, jax.Array], tuple[Any, Any, Any]]


def in_parts(network: Network, parts: int) -> Network:
    """Computes `network(variables, batch, rng) -> (rows, sums, mutated)` for one part of the batch at a time.

    Only the results of each part are kept, and the backward pass recomputes the part. A contrastive loss of the joined
    rows is therefore that of the whole batch (as in GradCache, arXiv:2101.06983), and so are means of the sums; summing
    the gradients of separate losses would give neither. It costs a second forward pass. Batch normalisation uses the
    statistics of each part, and its running statistics are updated by their mean.

    Args:
      network: `rows` are arrays with a leading axis of examples, `sums` are sums over examples, `mutated` are the
        collections that the forward pass changed.
      parts: the number of parts; each device works on its own share of every part.
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

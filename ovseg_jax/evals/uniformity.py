"""Alignment and uniformity of features on the sphere (Wang and Isola, 2020; papers/000, eq. 6 and 7)."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from ovseg_jax.kernels.resize import row_block
from ovseg_jax.parallel.sharding import AXES, replicated


def distances(
    image: Float[Array, "b d"], classes: Float[Array, "n d"], label: Int[Array, "b"]
) -> Float[Array, "b"]:
    """Computes ||x - w_y||² of each image's feature to that of its class, whose mean is eq. 6. Jittable."""
    return jnp.sum(jnp.square(image - classes[label]), -1)


def uniformity(classes: Float[Array, "n d"], mesh: Mesh) -> float | None:
    """Computes eq. 7: log of the mean of exp(-2 ||w_i - w_j||²) over the N (N-1) pairs i ≠ j; None for one class.

    Each device computes a share of the rows in blocks, so that [N N] is never stored. Every process returns the same
    number.
    """
    n = len(classes)
    if n < 2:
        return None
    sums = np.asarray(_row_sums(jax.device_put(classes, replicated(mesh)), mesh=mesh), np.float64)
    return math.log(sums[:n].sum() / (n * (n - 1)))


@partial(jax.jit, static_argnames="mesh")
def _row_sums(classes: Float[Array, "n d"], *, mesh: Mesh) -> Float[Array, "m"]:
    """Computes each class's sum over all others, padded with zeros to a multiple of the devices' blocks."""
    n = len(classes)
    share = -(-n // mesh.size)
    block = row_block(share, n + classes.shape[1])
    share = -(-share // block) * block

    def of_device(numbers, classes):
        square = jnp.sum(jnp.square(classes), -1)

        def of_block(number):
            row = jnp.minimum(number, n - 1)
            product = jnp.matmul(classes[row], classes.T, precision=jax.lax.Precision.HIGHEST)
            squared = jnp.maximum(square[row][:, None] + square - 2 * product, 0)
            pair = (number[:, None] != jnp.arange(n)) & (number[:, None] < n)
            return jnp.sum(jnp.exp(-2 * squared) * pair, -1)

        return jax.lax.map(of_block, numbers.reshape(-1, block)).ravel()

    split, whole = PartitionSpec(AXES), PartitionSpec()
    rows = jax.shard_map(of_device, mesh=mesh, in_specs=(split, whole), out_specs=split, check_vma=False)
    sums = rows(jnp.arange(share * mesh.size), classes)
    return jax.lax.with_sharding_constraint(sums, replicated(mesh))

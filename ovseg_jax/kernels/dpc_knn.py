"""Density peaks of tokens: DPC-KNN (Du et al. 2016) as TCFormer clusters tokens (Zeng et al., CVPR 2022)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def dpc_knn(
    tokens: Float[Array, "b n d"], clusters: int, neighbours: int = 5
) -> tuple[Int[Array, "b k"], Int[Array, "b n"]]:
    """Clusters the tokens of each image on its own, in float32; results have no gradient.

    With distances divided by sqrt(d), a token's density is exp of minus the mean of the squared distances to its
    nearest tokens, itself included. Centres are the tokens with the highest product of density and distance to the
    nearest denser token; for the densest it is the largest distance of the image. Each other token belongs to the
    nearest centre, the first of equal ones.

    TCFormer adds noise to densities, so that no two are equal. Here of equal tokens the first counts as denser, so that
    a result depends on the image alone.

    Args:
      tokens: the tokens.
      clusters: k, at most n.
      neighbours: number of nearest tokens, itself included, for the density.

    Returns:
      The indices of the centres in ascending order, and for each token the index of its centre among them.
    """
    x = jax.lax.stop_gradient(tokens).astype(jnp.float32)
    # Differences of large squares would lose the digits that decide: the mean is subtracted first.
    x = x - x.mean(1, keepdims=True)
    square = jnp.square(x).sum(-1)
    product = jnp.einsum("bnd,bmd->bnm", x, x, precision=jax.lax.Precision.HIGHEST)
    distance = jnp.maximum(square[:, :, None] + square[:, None] - 2 * product, 0) / x.shape[-1]
    index = jnp.arange(x.shape[1])
    distance = jnp.sqrt(jnp.where(index[:, None] == index, 0, distance))
    nearest = -jax.lax.top_k(-distance, min(neighbours, len(index)))[0]
    density = jnp.exp(-jnp.square(nearest).mean(-1))
    mine, other = density[:, :, None], density[:, None]
    denser = (other > mine) | ((other == mine) & (index < index[:, None]))
    peak = jnp.where(denser, distance, distance.max((1, 2), keepdims=True)).min(-1)
    centres = jnp.sort(jax.lax.top_k(peak * density, clusters)[1], axis=-1)
    to_centre = jnp.take_along_axis(distance, centres[:, None], axis=2)
    # A centre is its own, also if another token equals it.
    to_centre = jnp.where(index[:, None] == centres[:, None], -1, to_centre)
    return centres, to_centre.argmin(-1)

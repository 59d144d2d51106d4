"""Normalised cuts on the tokens of each image of a batch (Shi & Malik 2000), by eigenvectors and k-means."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ovseg_jax.kernels.kmeans import Clusters, kmeans


def spectral(
    tokens: Float[Array, "b p d"],
    valid: Bool[Array, "b p"],
    clusters: int,
    gamma: float,
    *,
    start: str = "farthest",
    iterations: int = 12,
    rng: Array | None = None,
) -> Clusters:
    """Clusters the tokens of each image by their affinity exp(-γ |x - y|²), in float32.

    As in scikit-learn, tokens have no affinity to themselves, and k-means clusters the K first eigenvectors of the
    normalised Laplacian, divided by the square root of each token's degree. Memory grows with the square of P and time
    with its cube.

    Args:
      tokens: the tokens.
      valid: False at padding, which has no influence.
      clusters: K.
      gamma: γ, in units of one over a squared distance.
      start: see `kmeans`, as the next two.
      iterations: of k-means.
      rng: for "kmeans++".

    Returns:
      The clusters, whose centres and inertia are those of the eigenvectors.
    """
    x = jnp.where(valid[..., None], tokens.astype(jnp.float32), 0)
    square = jnp.square(x).sum(2)
    product = jnp.einsum("bpd,bqd->bpq", x, x, precision=jax.lax.Precision.HIGHEST)
    distance = jnp.maximum(square[:, :, None] + square[:, None] - 2 * product, 0)
    own = jnp.eye(x.shape[1], dtype=bool)
    affinity = jnp.where(valid[:, :, None] & valid[:, None] & ~own, jnp.exp(-gamma * distance), 0)
    degree = affinity.sum(2)
    root = jnp.where(degree > 0, jax.lax.rsqrt(jnp.maximum(degree, 1e-30)), 0)
    # The eigenvalues of a normalised Laplacian are 0..2: padding comes after them, as vectors of its own.
    diagonal = jnp.where(valid, jnp.where(degree > 0, 1.0, 0.0), 3.0)
    laplacian = diagonal[:, :, None] * own - root[:, :, None] * affinity * root[:, None]
    _, vectors = jnp.linalg.eigh(laplacian)
    embedding = vectors[:, :, :clusters] * jnp.where(degree > 0, root, 1.0)[..., None]
    return kmeans(embedding, valid, clusters, start=start, iterations=iterations, rng=rng)

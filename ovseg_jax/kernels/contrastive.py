"""Image-text contrastive losses over the global batch (papers/002, eq. 2-3, and SigLIP's sigmoid)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ovseg_jax.kernels.all_pairs import Block, Form, Kind, PairSums, all_pairs, over_batch, pick, resolve_form


class Contrast(NamedTuple):
    """Sums over the valid pairs, and their number.

    Attributes:
      loss: "softmax": the sum of both directions; "sigmoid": the sum over all pairs of the batch.
      correct: the number of texts that score highest with their own image.
      pairs: the number of valid positive pairs.
    """

    loss: Float[Array, ""]
    correct: Float[Array, ""]
    pairs: Float[Array, ""]


def contrast(sums: PairSums, valid: Bool[Array, " b"], kind: Kind = "softmax") -> Contrast:
    """Computes the loss of some items from their sums over all pairs.

    "softmax": `Σ_i (log Σ_j exp G_ij - G_ii) + (log Σ_j exp G_ji - G_ii)`. "sigmoid": `-Σ_ij log σ(z_ij G_ij)` with
    z = 1 for a pair and -1 otherwise, which is `Σ_ij log(1 + exp G_ij) - Σ_i G_ii`.
    """
    each = sums.row - sums.positive if kind == "sigmoid" else sums.row + sums.column - 2 * sums.positive
    total = lambda x: jnp.sum(jnp.where(valid, x, 0).astype(jnp.float32))
    return Contrast(total(each), total(sums.positive >= sums.best), total(jnp.ones_like(each)))


def contrastive_loss(
    image: Float[Array, "b d"],
    text: Float[Array, "b d"],
    valid: Bool[Array, " b"],
    temperature: Float[Array, ""],
    bias: Float[Array, ""] | float = 0.0,
    *,
    kind: Kind = "softmax",
    form: Form | None = None,
    batch_axes: tuple[str, ...] = (),
    block: Block | None = None,
) -> Contrast:
    """Contrasts every image with every text of the global batch: `G_ij = <x_i, y_j> / σ + bias`.

    Args:
      image: unit-norm embeddings of images, or of regions.
      text: unit-norm embeddings of their texts.
      valid: False for padding, which is neither positive nor negative.
      temperature: σ.
      bias: SigLIP's bias, for "sigmoid".
      kind: "softmax" (CLIP, P-Seg) or "sigmoid" (SigLIP).
      form: how the pairs are computed, see `all_pairs`; by default chosen by size.
      batch_axes: mesh axes over which the batch is sharded.
      block: rows and columns to score at once in the ring; by default chosen by size.
    """
    picked = pick(image.shape[0], batch_axes, bytes_per_pair=4)
    form, block = resolve_form("contrastive loss", form, block, picked)
    shared = jnp.asarray(temperature, jnp.float32), jnp.asarray(bias, jnp.float32)

    def local(image, text, valid, shared) -> Contrast:
        sums = all_pairs(
            _scores, image, text, shared, valid, valid, form=form, kind=kind, axes=batch_axes, block=block
        )
        out = contrast(sums, valid, kind)
        return jax.lax.psum(out, batch_axes) if batch_axes else out

    return over_batch(local, batch_axes, (image, text, valid), shared)


def _scores(image: Array, text: Array, shared: tuple[Array, Array]) -> Array:
    temperature, bias = shared
    return jnp.einsum("bd,cd->bc", image, text, preferred_element_type=jnp.float32) / temperature + bias

"""Image-text contrastive losses over the global batch: papers/002, eq. 2-3; SigLIP's; GroupViT's multi-label loss."""

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


def multi_label_loss(
    image: Float[Array, "b d"],
    texts: Float[Array, "b m d"],
    valid: Bool[Array, " b"],
    temperature: Float[Array, ""],
    *,
    form: Form | None = None,
    batch_axes: tuple[str, ...] = (),
    block: Block | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Contrasts every image with the M texts of every image; returns the sum over the valid images, and their number.

    It is the loss that GroupViT's code adds for prompts (NVlabs/GroupViT, models/multi_label_contrastive.py). With
    `G_im,j = <x_j, y_im> / σ`, an image has the target 1/M for each of its own texts among all texts of the batch, a
    text its own image among all images, and both directions are halved: for image i
    `1/2 [log Σ_jm exp G_jm,i - 1/M Σ_m G_im,i] + 1/2M Σ_m [log Σ_j exp G_im,j - G_im,i]`.

    Args:
      image: unit-norm embeddings of images.
      texts: unit-norm embeddings of the texts of each.
      valid: False for padding, and for images whose texts are; neither is a negative.
      temperature: σ.
      form, batch_axes, block: see `contrastive_loss`; all texts count as one column.
    """
    b, m, _ = texts.shape
    picked = pick(b, batch_axes, bytes_per_pair=4 * m, row_to_column=1 / m)
    form, block = resolve_form("multi-label loss", form, block, picked)
    shared = jnp.asarray(temperature, jnp.float32), jnp.zeros(())

    def local(image, texts, valid, shared) -> tuple[Array, Array]:
        one = lambda text: all_pairs(
            _scores, image, text, shared, valid, valid, form=form, axes=batch_axes, block=block
        )
        sums = jax.vmap(one, 1)(texts)  # [m b]
        each = (jax.nn.logsumexp(sums.row, 0) + sums.column.mean(0)) / 2 - sums.positive.mean(0)
        out = jnp.sum(jnp.where(valid, each, 0)), valid.sum().astype(jnp.float32)
        return jax.lax.psum(out, batch_axes) if batch_axes else out

    return over_batch(local, batch_axes, (image, texts, valid), shared)


def _scores(image: Array, text: Array, shared: tuple[Array, Array]) -> Array:
    temperature, bias = shared
    return jnp.einsum("bd,cd->bc", image, text, preferred_element_type=jnp.float32) / temperature + bias

"""OpenSeg's grounding loss (papers/004, eq. 2-4), which matches captions with images through words and regions."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ovseg_jax.kernels.all_pairs import Block, Form, all_pairs, over_batch, pick, resolve_form
from ovseg_jax.kernels.contrastive import Contrast, contrast


def caption_scores(
    regions: Float[Array, "b n d"],
    words: Float[Array, "c k d"],
    word_valid: Bool[Array, "c k"] | Float[Array, "c k"],
    temperature: Float[Array, ""],
) -> Float[Array, "b c"]:
    """Computes the similarity of every image to every caption, eq. 3: `1/K Σ_j Σ_i σ(g(z, w_j))_i <z_i, w_j>`.

    Args:
      regions: unit-norm region embeddings.
      words: unit-norm word embeddings.
      word_valid: False for padding; a caption without words scores 0.
      temperature: τ of the softmax over regions, eq. 2.
    """
    similarity = jnp.einsum("bnd,ckd->bckn", regions, words, preferred_element_type=jnp.float32)
    # The softmax is normalised after the sum, which on TPU saves one array of all similarities.
    highest = jax.lax.stop_gradient(similarity.max(-1, keepdims=True))
    attention = jnp.exp((similarity - highest) / temperature)
    per_word = jnp.sum(attention * similarity, -1) / attention.sum(-1) * word_valid
    return per_word.sum(-1) / jnp.maximum(word_valid.sum(-1), 1)


def grounding_loss(
    regions: Float[Array, "b n d"],
    words: Float[Array, "b k d"],
    word_valid: Bool[Array, "b k"],
    example_mask: Bool[Array, " b"],
    region_temperature: Float[Array, ""],
    pair_temperature: Float[Array, ""],
    *,
    group: int | None,
    form: Form | None = None,
    batch_axes: tuple[str, ...] = (),
    block: Block | None = None,
) -> Contrast:
    """Contrasts each image with each caption, in both directions (eq. 4), within groups or over the whole batch.

    Images without a valid word, and padding, are neither positives nor negatives.

    Args:
      regions: unit-norm region embeddings of the global batch.
      words: unit-norm word embeddings of its captions.
      word_valid: False for padding words.
      example_mask: False for padding images.
      region_temperature: τ of the softmax over the regions for a word (eq. 3).
      pair_temperature: τ of the softmax over images and captions (eq. 4).
      group: contrast within consecutive groups of this many examples ("unsync" in the paper, where a group is the
        16 examples of one core; here it does not depend on the number of devices); None contrasts the whole batch
        ("sync", appendix F).
      form: how the pairs of the whole batch are computed, see `all_pairs` (rows are regions, columns are words); by
        default chosen by size.
      batch_axes: mesh axes over which the batch is sharded.
      block: images and captions to score at once in the ring; by default chosen by size.
    """
    b, n, _ = regions.shape
    temperatures = jnp.asarray(region_temperature), jnp.asarray(pair_temperature)

    def local(regions, words, word_valid, example_mask, temperatures, *, form, block, axes) -> Contrast:
        valid = example_mask & word_valid.any(-1)
        captions = words, word_valid.astype(jnp.float32)
        sums = all_pairs(
            _scores, regions, captions, temperatures, valid, valid, form=form, axes=axes, block=block
        )
        return contrast(sums, valid)

    batch = regions, words, word_valid, example_mask
    if group is not None:
        if b % group:
            raise ValueError(f"the batch size {b} is not a multiple of the group {group}")
        groups = jax.tree.map(lambda x: x.reshape(b // group, group, *x.shape[1:]), batch)
        dense = partial(local, temperatures=temperatures, form="dense", block=None, axes=())
        return jax.tree.map(jnp.sum, jax.vmap(dense)(*groups))
    k = words.shape[1]
    picked = pick(b, batch_axes, bytes_per_pair=4 * k * n, row_to_column=n / k)
    form, block = resolve_form("grounding loss", form, block, picked)

    def share(*batch_and_temperatures) -> Contrast:
        out = local(*batch_and_temperatures, form=form, block=block, axes=batch_axes)
        return jax.lax.psum(out, batch_axes) if batch_axes else out

    return over_batch(share, batch_axes, batch, temperatures)


def _scores(regions: Array, captions: tuple[Array, Array], temperatures: tuple[Array, Array]) -> Array:
    region_temperature, pair_temperature = temperatures
    return caption_scores(regions, *captions, region_temperature) / pair_temperature

"""OpenSeg's grounding loss (papers/004, eq. 2-4): captions are matched to images through words and regions."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float


class GroundingLoss(NamedTuple):
    """Sums over the image-caption pairs that count, and their number."""

    loss: Float[Array, ""]
    correct: Float[Array, ""]
    """How many captions score highest on their own image among the images of their group."""
    pairs: Float[Array, ""]


def caption_scores(
    regions: Float[Array, "b n d"],
    words: Float[Array, "c k d"],
    word_valid: Bool[Array, "c k"],
    temperature: Float[Array, ""],
) -> Float[Array, "b c"]:
    """Similarity of every image to every caption, eq. 3: `G = 1/K Σ_j Σ_i σ(g(z, w_j))_i <z_i, w_j>`.

    Args:
      regions: unit-norm region embeddings.
      words: unit-norm word embeddings.
      word_valid: False for padding; a caption without words scores 0.
      temperature: τ of the softmax over regions, eq. 2.
    """
    similarity = jnp.einsum("bnd,ckd->bckn", regions, words, preferred_element_type=jnp.float32)
    attention = jax.nn.softmax(similarity / temperature, axis=-1)
    per_word = jnp.sum(attention * similarity, -1) * word_valid
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
    batch_axes: tuple[str, ...] = (),
) -> GroundingLoss:
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
      batch_axes: mesh axes over which the batch is sharded; () computes the dense form on whatever XLA chooses.

    Returns:
      Sums of the loss and of correct captions, and the number of pairs.
    """
    b = regions.shape[0]
    if group is not None:
        if b % group:
            raise ValueError(f"a batch of {b} does not divide into groups of {group}")
        split = lambda x: x.reshape(b // group, group, *x.shape[1:])
        dense = partial(_dense, region_temperature=region_temperature, pair_temperature=pair_temperature)
        out = jax.vmap(dense)(split(regions), split(words), split(word_valid), split(example_mask))
        return jax.tree.map(jnp.sum, out)
    if not batch_axes:
        return _dense(regions, words, word_valid, example_mask, region_temperature, pair_temperature)
    rows = PartitionSpec(batch_axes)
    return jax.shard_map(
        partial(_sharded, axes=batch_axes),
        in_specs=(rows, rows, rows, rows, PartitionSpec(), PartitionSpec()),
        out_specs=PartitionSpec(),
    )(regions, words, word_valid, example_mask, region_temperature, pair_temperature)


def _dense(regions, words, word_valid, example_mask, region_temperature, pair_temperature) -> GroundingLoss:
    pair_valid = example_mask & word_valid.any(-1)
    scores = caption_scores(regions, words, word_valid, region_temperature) / pair_temperature
    own = jnp.arange(scores.shape[0])
    return _contrast(scores, scores, own, pair_valid, pair_valid)


def _sharded(regions, words, word_valid, example_mask, region_temperature, pair_temperature, *, axes):
    """Images stay; words travel to all. [B, B] scores are small; the [b, B, k, n] similarities are cut by caption."""
    gather = partial(jax.lax.all_gather, axis_name=axes, tiled=True)
    local_valid = example_mask & word_valid.any(-1)
    all_valid, all_words, all_word_valid = gather(local_valid), gather(words), gather(word_valid)
    b = regions.shape[0]

    @jax.checkpoint
    def of_captions(chunk):
        words, word_valid = chunk
        return caption_scores(regions, words, word_valid, region_temperature)

    chunks = jax.tree.map(lambda x: x.reshape(-1, b, *x.shape[1:]), (all_words, all_word_valid))
    rows = jax.lax.map(of_captions, chunks).transpose(1, 0, 2).reshape(b, -1) / pair_temperature
    start = jax.lax.axis_index(axes) * b
    columns = jax.lax.dynamic_slice_in_dim(gather(rows), start, b, axis=1)
    out = _contrast(rows, columns, start + jnp.arange(b), local_valid, all_valid)
    return jax.tree.map(lambda x: jax.lax.psum(x, axes), out)


def _contrast(rows, columns, own, local_valid, all_valid) -> GroundingLoss:
    """Eq. 4 for some examples: `rows` [b B] are their images' scores, `columns` [B b] their captions' scores."""
    lowest = jnp.finfo(rows.dtype).min
    rows = jnp.where(all_valid[None], rows, lowest)
    columns = jnp.where(all_valid[:, None], columns, lowest)
    here = jnp.arange(own.shape[0])
    positive = rows[here, own]
    loss = jax.nn.logsumexp(rows, 1) + jax.nn.logsumexp(columns, 0) - 2 * positive
    correct = columns.argmax(0) == own
    total = lambda x: jnp.sum(jnp.where(local_valid, x, 0).astype(jnp.float32))
    return GroundingLoss(total(loss), total(correct), total(jnp.ones_like(positive)))

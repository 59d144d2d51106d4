"""Softmax over very many classes: exactly, or against a sample of them (POMP, papers/000, section 3.2).

Most of the cost is the encoder of the class features, `encode(params, tokens) -> [k d]`. It encodes K sampled classes
in each step (`sampled_softmax`), or all N in chunks, one in memory at a time (`full_softmax`). Both distribute the
classes over the devices of the mesh and compare all images with all of these classes.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from ovseg_jax.kernels.all_pairs import LOWEST, over_batch, varying
from ovseg_jax.kernels.contrastive import Contrast
from ovseg_jax.kernels.unit import unit

Encode = Callable[[Any, Any], Float[Array, "k d"]]
Correction = Literal["log10", "log", "log10_q"] | float


def sample_classes(
    key: Key[Array, ""], count: int, num_classes: int, log_weights: Float[Array, " n"] | None = None
) -> Int[Array, " k"]:
    """Draws classes without replacement, by the Gumbel top-k trick.

    Args:
      key: the same key draws the same classes on every device.
      count: the number of classes to draw.
      num_classes: the number N of all classes.
      log_weights: logits of the proposal distribution; uniform by default.

    Raises:
      ValueError: `count` exceeds `num_classes`.
    """
    if not 0 < count <= num_classes:
        raise ValueError(f"cannot sample {count} of {num_classes} classes")
    gumbel = jax.random.gumbel(key, (num_classes,))
    return jax.lax.top_k(gumbel if log_weights is None else gumbel + log_weights, count)[1]


def frequency_proposal(examples: Float[Array, " n"] | Int[Array, " n"]) -> Float[Array, " n"]:
    """Returns the logits of eq. 8, `Q_i = M_i / Σ_j M_j`, from the numbers of training examples per class."""
    return jnp.log(examples.astype(jnp.float32))


def similarity_proposal(
    image: Float[Array, "b d"],
    features: Float[Array, "n d"],
    valid: Bool[Array, " b"],
    scale: Float[Array, ""] | float,
) -> Float[Array, " n"]:
    """Returns the logits of eq. 9, `Q_i(x) ∝ exp(x·w_i / τ)`, averaged over a batch.

    Probabilities are averaged, since the images of a batch share their negatives. The paper (E.1) has a distribution
    for each image; the authors' code takes the softmax of the logits' mean, and draws with replacement.

    Args:
      image: unit-norm features of the images.
      features: unit-norm features of all classes under a hand-written prompt.
      valid: False for padding.
      scale: 1/τ.
    """
    log_q = jax.nn.log_softmax(scale * jnp.matmul(image, features.T, preferred_element_type=jnp.float32))
    return jax.nn.logsumexp(jnp.where(valid[:, None], log_q, LOWEST), 0)


def local_correction(
    num_classes: int, negatives: Int[Array, "..."], kind: Literal["log10", "log"] | float
) -> Float[Array, "..."]:
    """Returns the margin m of eq. 5, which is added to the logits of the sampled negatives.

    Args:
      num_classes: the number N of all classes.
      negatives: the number of negatives of each image, K - 1 without those that are its own class.
      kind: "log10" is `log10((N-1) / (K-1))`, as in the paper's figures and its code; "log" is the natural logarithm,
        as eq. 5 reads; a number is a fixed margin (Table 9), 0 for none.
    """
    if isinstance(kind, int | float):
        return jnp.full(negatives.shape, kind, jnp.float32)
    ratio = (num_classes - 1) / jnp.maximum(negatives, 1).astype(jnp.float32)
    return jnp.log10(ratio) if kind == "log10" else jnp.log(ratio)


def sampled_softmax(
    encode: Encode,
    params: Any,
    tokens: Any,
    image: Float[Array, "b d"],
    labels: Int[Array, " b"],
    valid: Bool[Array, " b"],
    key: Key[Array, ""],
    scale: Float[Array, ""] | float,
    *,
    sample: int,
    correction: Correction = "log10",
    log_weights: Float[Array, " n"] | None = None,
    per_device: bool = False,
    views: int = 1,
    batch_axes: tuple[str, ...] = (),
) -> Contrast:
    """Computes local contrast with local correction, eq. 4: an image's class against K - 1 sampled ones.

    A sampled class that is an image's own class is not one of its negatives and does not count in its margin, as in the
    authors' code.

    Args:
      encode: returns features of classes, normalised here, from `params` and the classes' tokens.
      params: parameters of the encoder, which get gradients.
      tokens: a tree of arrays [N ...], the encoder's input for each class.
      image: unit-norm features of the global batch.
      labels: the class of each image.
      valid: False for padding.
      key: the random key of the step.
      scale: 1/τ.
      sample: K; N makes it the softmax over all classes.
      correction: see `local_correction`; or "log10_q", `-log10 Q_i` for each negative i, with Q the proposal of
        `log_weights`, as the authors' code corrects proposals that are not uniform.
      log_weights: proposal logits of the negatives, see `sample_classes`.
      per_device: whether every device draws its own negatives and encodes all of them, as the authors' code does;
        otherwise all images share one sample, whose encoding is distributed over the devices.
      views: number of consecutive images in a device's share that have one class, which is encoded once.
      batch_axes: mesh axes over which the batch is sharded.

    Returns:
      Sums over images; `correct` counts those whose own class scores highest among the sampled ones.
    """
    num_classes = _count(tokens)
    if correction == "log10_q" and log_weights is None:
        raise ValueError("correction='log10_q' needs log_weights")
    if not 2 <= sample <= num_classes:
        raise ValueError(f"sample={sample} is not between 2 and the number of classes, {num_classes}")
    # With K = N all classes are drawn: a draw of N - 1 would miss one class for all images of other classes.
    count = sample - 1 if sample < num_classes else num_classes

    def local(image, labels, valid, rest) -> Contrast:
        params, tokens, key, scale, log_weights = rest
        # Gradients are summed over devices here, once. Inside of `encode`, a branch that only some devices take would
        # deadlock.
        params = varying(params, batch_axes)
        if per_device and batch_axes:
            key = jax.random.fold_in(key, jax.lax.axis_index(batch_axes))
        ids = sample_classes(key, count, num_classes, log_weights)
        own = ids
        devices = jax.lax.axis_size(batch_axes) if batch_axes and not per_device else 1
        if devices > 1:
            each = -(-count // devices)
            padded = jnp.pad(ids, (0, each * devices - count))
            own = jax.lax.dynamic_slice_in_dim(padded, jax.lax.axis_index(batch_axes) * each, each)
        features = unit(encode(params, _take(tokens, jnp.concatenate([own, labels[::views]]))))
        negative = features[: own.shape[0]]
        positive = jnp.repeat(features[own.shape[0] :], views, 0)[: labels.shape[0]]
        if devices > 1:
            negative = jax.lax.all_gather(negative, batch_axes, tiled=True)[:count]

        rejected = ids[None] == labels[:, None]
        if correction == "log10_q":
            margin = -jax.nn.log_softmax(log_weights)[ids][None] / jnp.log(10.0)
        else:
            margin = local_correction(num_classes, count - rejected.sum(1), correction)[:, None]
        logits = scale * jnp.matmul(image, negative.T, preferred_element_type=jnp.float32)
        best = jnp.where(rejected, LOWEST, logits).max(1)
        logits = jnp.where(rejected, LOWEST, logits + margin)
        truth = scale * jnp.einsum("bd,bd->b", image, positive, preferred_element_type=jnp.float32)
        loss = jax.nn.logsumexp(jnp.concatenate([truth[:, None], logits], 1), 1) - truth
        out = _sums(loss, truth >= best, valid)
        return jax.lax.psum(out, batch_axes) if batch_axes else out

    rest = params, tokens, key, jnp.asarray(scale, jnp.float32), log_weights
    return over_batch(local, batch_axes, (image, labels, valid), rest)


def full_softmax(
    encode: Encode,
    params: Any,
    tokens: Any,
    image: Float[Array, "b d"],
    labels: Int[Array, " b"],
    valid: Bool[Array, " b"],
    scale: Float[Array, ""] | float,
    *,
    chunk: int,
    batch_axes: tuple[str, ...] = (),
) -> Contrast:
    """Computes the exact softmax over all N classes, in memory that does not grow with N.

    Each device loops over its share of the classes, `chunk` at a time, for the images of all devices; the backward pass
    encodes each chunk again instead of keeping it. The arguments are those of `sampled_softmax`.
    """
    num_classes = _count(tokens)

    def local(image, labels, valid, rest) -> Contrast:
        params, tokens, scale = rest
        params = varying(params, batch_axes)  # Otherwise each chunk would sum its gradients over the devices.
        start, devices = jnp.zeros((), jnp.int32), 1
        if batch_axes:
            start, devices = jax.lax.axis_index(batch_axes), jax.lax.axis_size(batch_axes)
            gather = functools.partial(jax.lax.all_gather, axis_name=batch_axes, tiled=True)
            image, labels, valid = gather(image), gather(labels), gather(valid)
        chunks = -(-num_classes // (chunk * devices))

        @jax.checkpoint
        def step(carry, number):
            best, total, truth = carry
            ids = (start * chunks + number) * chunk + jnp.arange(chunk)
            features = unit(encode(params, _take(tokens, jnp.minimum(ids, num_classes - 1))))
            logits = scale * jnp.matmul(image, features.T, preferred_element_type=jnp.float32)
            truth += jnp.where(labels[:, None] == ids, logits, 0).sum(1)
            logits = jnp.where(ids < num_classes, logits, LOWEST)
            new = jnp.maximum(best, jax.lax.stop_gradient(logits).max(1))
            total = total * jnp.exp(best - new) + jnp.exp(logits - new[:, None]).sum(1)
            return (new, total, truth), None

        zeros = jnp.zeros(image.shape[0], jnp.float32)
        empty = (jnp.full_like(zeros, LOWEST), zeros, zeros)
        empty = varying(empty, batch_axes)
        (best, total, truth), _ = jax.lax.scan(step, empty, jnp.arange(chunks))
        if batch_axes:
            here, best = best, jax.lax.pmax(best, batch_axes)
            total, truth = jax.lax.psum((total * jnp.exp(here - best), truth), batch_axes)
            # The values are equal on all devices; each device counts its own images.
            b = image.shape[0] // devices
            share = lambda x: jax.lax.dynamic_slice_in_dim(x, start * b, b)
            best, total, truth, valid = share(best), share(total), share(truth), share(valid)
        out = _sums(best + jnp.log(total) - truth, truth >= best, valid)
        return jax.lax.psum(out, batch_axes) if batch_axes else out

    return over_batch(
        local, batch_axes, (image, labels, valid), (params, tokens, jnp.asarray(scale, jnp.float32))
    )


def _sums(loss: Array, correct: Array, valid: Array) -> Contrast:
    total = lambda x: jnp.sum(jnp.where(valid, x, 0).astype(jnp.float32))
    return Contrast(total(loss), total(correct), total(jnp.ones_like(loss)))


def _count(tokens: Any) -> int:
    return jax.tree.leaves(tokens)[0].shape[0]


def _take(tokens: Any, ids: Int[Array, " k"]) -> Any:
    return jax.tree.map(lambda x: jnp.take(x, ids, axis=0), tokens)

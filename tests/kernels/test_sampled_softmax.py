"""The class-sampling softmax and the exact one, against their formulas in float64 and on eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ovseg_jax.kernels.sampled_softmax import (
    frequency_proposal,
    full_softmax,
    local_correction,
    sample_classes,
    sampled_softmax,
    similarity_proposal,
)
from ovseg_jax.parallel.sharding import AXES, make_mesh, put_batch

B, N, D, E, K = 16, 53, 6, 5, 20
SCALE = 7.0
KEY = jax.random.key(3)


def encode(params, tokens):
    return jnp.tanh(tokens["x"] @ params["w"]) + params["b"]


def make(dtype=np.float32):
    rng = np.random.default_rng(0)
    unit = lambda x: (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(dtype)
    params = {"w": rng.normal(size=(E, D)).astype(np.float32), "b": rng.normal(size=D).astype(np.float32)}
    tokens = {"x": rng.normal(size=(N, E)).astype(np.float32)}
    valid = np.ones(B, bool)
    valid[[2, 15]] = False
    return params, tokens, unit(rng.normal(size=(B, D))), rng.integers(0, N, B).astype(np.int32), valid


def features(params, tokens):
    f = np.tanh(np.float64(tokens["x"]) @ np.float64(params["w"])) + np.float64(params["b"])
    return f / np.linalg.norm(f, axis=1, keepdims=True)


def reference(data, negatives_of, correction=np.log10):
    """Eq. 4 and 5, image by image; `negatives_of(b)` are the classes sampled for image b."""
    params, tokens, image, labels, valid = data
    f, loss, correct = features(params, tokens), 0.0, 0
    for b in np.nonzero(valid)[0]:
        logits = SCALE * f @ np.float64(image[b])
        negatives = [c for c in negatives_of(b) if c != labels[b]]
        m = correction((N - 1) / len(negatives))
        loss -= np.log(
            np.exp(logits[labels[b]]) / (np.exp(logits[labels[b]]) + np.exp(logits[negatives] + m).sum())
        )
        correct += logits[labels[b]] >= logits[negatives].max()
    return loss, correct, valid.sum()


def run(function, data, shape, **kwargs):
    """Value, gradients in the parameters and the images, and sums."""
    params, tokens, image, labels, valid = data

    def loss(params, image, labels, valid):
        out = function(
            encode, params, tokens, image, labels, valid, batch_axes=AXES if shape else (), **kwargs
        )
        return out.loss, out

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    if shape is None:
        (_, out), grads = step(params, image, labels, valid)
        return out, grads
    mesh = make_mesh(shape)
    batch = put_batch({"image": image, "labels": labels, "valid": valid}, mesh)
    with jax.set_mesh(mesh):
        (_, out), grads = step(params, batch["image"], batch["labels"], batch["valid"])
    return out, grads


def close(a, b, rtol=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(
            np.float32(x), np.float32(y), rtol=rtol, atol=rtol * np.abs(np.float32(y)).max()
        )


@pytest.mark.parametrize("correction", ["log10", "log", 1.5, 0.0])
def test_one_device_equals_the_formula(correction):
    data = make()
    out, _ = run(sampled_softmax, data, None, key=KEY, scale=SCALE, sample=K, correction=correction)
    ids = np.asarray(sample_classes(KEY, K - 1, N))
    formula = {"log10": np.log10, "log": np.log}.get(correction, lambda ratio: correction)
    close(tuple(out), reference(data, lambda b: ids, formula))
    assert np.isin(data[3], ids).any()  # an image's own class was sampled: it is no negative of its own


@pytest.mark.parametrize("shape", [None, {"data": 8}])
def test_negatives_are_corrected_by_their_own_probability(shape):
    """-log10 Q of each, as the authors' code has it where the proposal is not uniform."""
    data, logits = make(), np.random.default_rng(5).normal(size=N)
    log_weights = jnp.asarray(logits, jnp.float32)
    how = dict(key=KEY, scale=SCALE, sample=K, log_weights=log_weights, correction="log10_q")
    out, _ = run(sampled_softmax, data, shape, **how)
    ids = np.asarray(sample_classes(KEY, K - 1, N, log_weights))
    margin = -np.log10(np.exp(logits) / np.exp(logits).sum())
    params, tokens, image, labels, valid = data
    loss = 0.0
    for b in np.nonzero(valid)[0]:
        x = SCALE * features(params, tokens) @ np.float64(image[b])
        negatives = [c for c in ids if c != labels[b]]
        loss += np.log(np.exp(x[labels[b]]) + np.exp(x[negatives] + margin[negatives]).sum()) - x[labels[b]]
    np.testing.assert_allclose(out.loss, loss, rtol=1e-5)
    with pytest.raises(ValueError, match="needs log_weights"):
        run(sampled_softmax, data, None, **{**how, "log_weights": None})


@pytest.mark.parametrize("shape", [{"data": 8}, {"data": 2, "fsdp": 4}])
def test_a_shared_sample_is_the_same_on_eight_devices(shape):
    data = make()
    how = dict(key=KEY, scale=SCALE, sample=K)
    close(run(sampled_softmax, data, shape, **how), run(sampled_softmax, data, None, **how))


def test_every_device_may_draw_its_own_sample():
    data = make()
    out, _ = run(sampled_softmax, data, {"data": 8}, key=KEY, scale=SCALE, sample=K, per_device=True)
    ids = [np.asarray(sample_classes(jax.random.fold_in(KEY, d), K - 1, N)) for d in range(8)]
    assert any(set(ids[0]) != set(other) for other in ids)
    close(tuple(out), reference(data, lambda b: ids[b // 2]))


@pytest.mark.parametrize("shape", [None, {"data": 8}])
@pytest.mark.parametrize("chunk", [4, 7, 64])
def test_full_softmax_equals_the_formula(chunk, shape):
    data = make()
    out, grads = run(full_softmax, data, shape, scale=SCALE, chunk=chunk)
    close(tuple(out), reference(data, lambda b: range(N), lambda ratio: 0.0))
    # A sample of all classes has no margin, and is the same loss.
    close((out, grads), run(sampled_softmax, data, None, key=KEY, scale=SCALE, sample=N), 2e-5)


def test_gradients_equal_a_plain_softmax():
    data = make()
    params, tokens, image, labels, valid = data

    def plain(params, image):
        f = encode(params, tokens)
        logits = SCALE * image @ (f / jnp.linalg.norm(f, axis=1, keepdims=True)).T
        return -jnp.where(valid, jax.nn.log_softmax(logits)[jnp.arange(B), labels], 0).sum()

    want = jax.grad(plain, argnums=(0, 1))(params, image)
    close(run(full_softmax, data, {"data": 8}, scale=SCALE, chunk=3)[1], want)


def test_bfloat16_images_are_summed_in_float32():
    data = make(jnp.bfloat16)
    out, grads = run(full_softmax, data, {"data": 8}, scale=SCALE, chunk=4)
    close(tuple(out), reference(data, lambda b: range(N), lambda ratio: 0.0), 1e-4)
    assert out.loss.dtype == jnp.float32 and grads[1].dtype == jnp.bfloat16


def test_the_margins_that_the_paper_states():
    """Table 9: m is 1 at K = 1000 and 1.5 at K = 319, for N = 10,451 classes."""
    m = local_correction(10_451, jnp.array([999, 318]), "log10")
    np.testing.assert_allclose(m, [1.02, 1.52], atol=0.005)
    assert local_correction(100, jnp.array(99), "log") == 0


def test_samples_are_distinct_and_follow_their_weights():
    draw = jax.jit(jax.vmap(lambda key: sample_classes(key, 3, 10)))
    ids = np.asarray(draw(jax.random.split(KEY, 5000)))
    assert all(len(set(row)) == 3 for row in ids[:100])
    np.testing.assert_allclose(np.bincount(ids.ravel(), minlength=10) / 5000, 0.3, atol=0.03)
    weights = frequency_proposal(jnp.array([6, 3, 1, 0]))
    first = jax.vmap(lambda key: sample_classes(key, 1, 4, weights)[0])(jax.random.split(KEY, 5000))
    np.testing.assert_allclose(np.bincount(first, minlength=4) / 5000, [0.6, 0.3, 0.1, 0], atol=0.03)


def test_similarity_proposes_what_the_images_look_like():
    image = jnp.eye(4)[:2]
    got = similarity_proposal(image, jnp.eye(4), jnp.array([True, False]), 3.0)
    np.testing.assert_allclose(got, jax.nn.log_softmax(3.0 * jnp.eye(4)[0]), atol=1e-6)


def test_samples_that_cannot_be():
    data = make()
    for sample in (1, N + 1):
        with pytest.raises(ValueError, match="is not between 2 and"):
            run(sampled_softmax, data, None, key=KEY, scale=SCALE, sample=sample)
    with pytest.raises(ValueError, match="5 of 4 classes"):
        sample_classes(KEY, 5, 4)

"""The three forms of all pairs against float64 NumPy, values and gradients, on one device and on eight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ovseg_jax.kernels import all_pairs as module
from ovseg_jax.kernels.all_pairs import pick
from ovseg_jax.kernels.contrastive import contrastive_loss, multi_label_loss
from ovseg_jax.parallel.sharding import AXES, make_mesh, put_batch

B, D = 32, 12
TAU, BIAS = 0.3, -0.7
SHAPES = [None, {"data": 8}, {"data": 2, "fsdp": 4}]


def make(dtype=np.float32):
    rng = np.random.default_rng(0)
    unit = lambda x: (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(dtype)
    valid = np.ones(B, bool)
    valid[[3, 17, 30, 31]] = False
    return unit(rng.normal(size=(B, D))), unit(rng.normal(size=(B, D))), valid


def reference(image, text, valid, kind, tau=TAU, bias=BIAS):
    """Value and gradients in image, text, temperature and bias: float64, by formulas."""
    x, y = np.float64(image[valid]), np.float64(text[valid])
    g = x @ y.T / tau + bias
    eye = np.eye(len(g))
    if kind == "softmax":
        softmax = lambda g, axis: np.exp(g) / np.exp(g).sum(axis, keepdims=True)
        value = -np.log(np.diag(softmax(g, 0))).sum() - np.log(np.diag(softmax(g, 1))).sum()
        d = softmax(g, 0) + softmax(g, 1) - 2 * eye
    else:
        value = np.log1p(np.exp(-(2 * eye - 1) * g)).sum()
        d = 1 / (1 + np.exp(-g)) - eye
    full = [np.zeros((B, D)), np.zeros((B, D))]
    full[0][valid], full[1][valid] = d @ y / tau, d.T @ x / tau
    correct = (g.argmax(0) == np.arange(len(g))).sum()
    return value, [*full, -(d * (g - bias)).sum() / tau, d.sum()], correct


def run(image, text, valid, shape, **kwargs):
    """Loss, gradients and the count of correct ones, under a mesh of some shape."""

    def loss(image, text, tau, bias, valid):
        axes = AXES if shape else ()
        out = contrastive_loss(image, text, valid, tau, bias, batch_axes=axes, **kwargs)
        return out.loss, out

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))
    scalars = jnp.float32(TAU), jnp.float32(BIAS)
    if shape is None:
        (value, out), grads = step(image, text, *scalars, valid)
    else:
        mesh = make_mesh(shape)
        batch = put_batch({"image": image, "text": text, "valid": valid}, mesh)
        with jax.set_mesh(mesh):
            (value, out), grads = step(batch["image"], batch["text"], *scalars, batch["valid"])
    return value, grads, out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("form", "block"), [("dense", None), ("gather", None), ("ring", None), ("ring", (4, 2)), ("ring", (2, 4))]
)
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_values_and_gradients_equal_float64(kind, form, block, shape):
    if form == "dense" and shape:
        pytest.skip("dense is the form of one device")
    image, text, valid = make()
    value, grads, out = run(image, text, valid, shape, kind=kind, form=form, block=block)
    want, want_grads, correct = reference(image, text, valid, kind)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    for got, want in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * max(np.abs(want).max(), 1))
    assert (out.correct, out.pairs) == (correct, valid.sum())


def multi_label_reference(image, texts, valid):
    """GroupViT's code: cross-entropy with soft targets over the flat texts, and over the images; with gradients."""
    x, y = np.float64(image[valid]), np.float64(texts[valid])
    n, m, d = y.shape
    flat = y.reshape(n * m, d)
    own = np.repeat(np.arange(n), m)[None] == np.arange(n)[:, None]  # [image, text]
    value, slopes = 0.0, []
    for logits, target in ((x @ flat.T / TAU, own / m), (flat @ x.T / TAU, own.T * 1.0)):
        assert np.allclose(target.sum(1), 1)
        log_softmax = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        value += 0.5 * -(target * log_softmax).sum(1).mean()
        slopes.append(0.5 * (np.exp(log_softmax) - target) / len(logits))
    slope = slopes[0] + slopes[1].T
    full = [np.zeros((B, d)), np.zeros((B, m, d))]
    full[0][valid], full[1][valid] = slope @ flat / TAU, (slope.T @ x / TAU).reshape(n, m, d)
    return value, [*full, -(slope * (x @ flat.T)).sum() / TAU**2]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("form", "block"), [("dense", None), ("gather", None), ("ring", None), ("ring", (4, 2))]
)
def test_the_multi_label_loss_is_groupvits(form, block, shape):
    if form == "dense" and shape:
        pytest.skip("dense is the form of one device")
    rng = np.random.default_rng(1)
    image, _, valid = make()
    texts = rng.normal(size=(B, 3, D))
    texts[:, 2] = texts[:, 1]  # a caption may stand in several slots
    texts = (texts / np.linalg.norm(texts, axis=-1, keepdims=True)).astype(np.float32)

    def loss(image, texts, tau, valid):
        axes = AXES if shape else ()
        total, count = multi_label_loss(image, texts, valid, tau, form=form, batch_axes=axes, block=block)
        return total / count

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    if shape is None:
        value, grads = step(image, texts, jnp.float32(TAU), valid)
    else:
        mesh = make_mesh(shape)
        batch = put_batch({"image": image, "text": texts, "valid": valid}, mesh)
        with jax.set_mesh(mesh):
            value, grads = step(batch["image"], batch["text"], jnp.float32(TAU), batch["valid"])
    want, want_grads = multi_label_reference(image, texts, valid)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    for got, want in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("form", ["gather", "ring"])
def test_bfloat16_inputs_are_summed_in_float32(form):
    image, text, valid = make(jnp.bfloat16)
    value, grads, _ = run(image, text, valid, {"data": 8}, form=form)
    want, want_grads, _ = reference(image, text, valid, "softmax")  # of the rounded inputs
    np.testing.assert_allclose(value, want, rtol=1e-5)
    assert grads[0].dtype == grads[1].dtype == jnp.bfloat16
    for got, want in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(np.float32(got), want, rtol=1e-2, atol=1e-2 * max(np.abs(want).max(), 1))


def test_the_ring_keeps_no_matrix_of_pairs():
    """Neither forward nor backward: nothing in the program is as large as a device's rows times all columns."""
    image, text, valid = map(jnp.asarray, make())
    loss = lambda x, y: contrastive_loss(x, y, valid, jnp.float32(TAU), form="ring", block=(8, 4)).loss
    shapes = [
        a.aval.shape for eqn in _equations(jax.make_jaxpr(jax.grad(loss))(image, text).jaxpr) for a in eqn
    ]
    assert max(np.prod(s) for s in shapes if s) <= B * D
    dense = lambda x, y: contrastive_loss(x, y, valid, jnp.float32(TAU), form="dense").loss
    shapes = [
        a.aval.shape for eqn in _equations(jax.make_jaxpr(jax.grad(dense))(image, text).jaxpr) for a in eqn
    ]
    assert (B, B) in shapes


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn.outvars
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


def test_the_form_follows_the_size(monkeypatch):
    assert pick(4096, (), 4) == ("dense", (4096, 4096))
    assert pick(131_072, (), 4) == ("ring", (4096, 4096))
    with jax.set_mesh(make_mesh({"data": 8})):
        assert pick(4096, AXES, 4) == ("gather", (512, 512))
        assert pick(131_072, AXES, 4) == ("ring", (4096, 4096))
        monkeypatch.setattr(module, "GATHER_BUDGET", 0)
        monkeypatch.setattr(module, "RING_BUDGET", 12 * 5 * 4)
        assert pick(96, AXES, 4, row_to_column=1 / 3) == ("ring", (12, 4))
        assert pick(96, AXES, 4, row_to_column=3.0) == ("ring", (4, 12))
        assert pick(96, AXES, 10_000) == ("ring", (1, 1))


def test_blocks_that_do_not_divide_are_an_error():
    image, text, valid = map(jnp.asarray, make())
    with pytest.raises(ValueError, match=r"the block \(4, 5\)"):
        contrastive_loss(image, text, valid, jnp.float32(TAU), form="ring", block=(4, 5))

"""Attention for a CPU beside sums in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ovseg_jax.kernels import cpu_attention
from ovseg_jax.kernels.cpu_attention import attention
from ovseg_jax.kernels.cpu_convs import fast_in_training, fast_on_cpu, one_by_one
from ovseg_jax.parallel.sharding import batch_sharding, make_mesh

RNG = np.random.default_rng(0)


def exact(query, key, value, mask, dy):
    """The result [B Q H D] and the gradients of its sum weighted by dy."""
    scale = query.shape[-1] ** -0.5
    scores = np.einsum("bqhd,bnhd->bhqn", query, key) * scale
    scores = scores if mask is None else np.where(mask, scores, -1e30)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mixed = np.einsum("bhqn,bnhd->bqhd", weights, value)
    dweights = np.einsum("bqhd,bnhd->bhqn", dy, value)
    ds = weights * (dweights - (dweights * weights).sum(-1, keepdims=True)) * scale
    return (
        mixed,
        np.einsum("bhqn,bnhd->bqhd", ds, key),
        np.einsum("bhqn,bqhd->bnhd", ds, query),
        np.einsum("bhqn,bqhd->bnhd", weights, dy),
    )


def inputs(b=8, q=5, n=7, h=3, d=4):
    return [RNG.normal(size=(b, rows, h, d)) for rows in (q, n, n, q)]


def loops(function, *args):
    return "while" in jax.jit(function).lower(*args).as_text()


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("shape", [None, (8, 1, 1, 7), (8, 1, 5, 7)])
def test_attention_head_by_head_and_its_gradients(shape, devices, monkeypatch):
    monkeypatch.setattr(cpu_attention, "LEAST", 0)
    *rows, dy = inputs()
    mask = None if shape is None else RNG.random(shape) < 0.6
    if mask is not None:
        mask[..., 0] = True
    expected = exact(*rows, mask, dy)

    def apply(query, key, value, mask, dy):
        mixed, back = jax.vjp(lambda *rows: attention(*rows, mask), query, key, value)
        return mixed, *back(dy)

    mesh = make_mesh(devices=jax.devices()[:devices])
    args = jax.tree.map(
        lambda x: jax.device_put(x.astype(x.dtype if x.dtype == bool else np.float32), batch_sharding(mesh)),
        (*rows, mask, dy),
    )
    with jax.set_mesh(mesh), jax.default_matmul_precision("float32"):
        compiled = jax.jit(fast_in_training(apply)).lower(*args).compile()
        found = compiled(*args)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and np.abs(one - other).max() < 3e-6 * np.abs(other).max()
    assert "while" in compiled.as_text()
    # Each device computes its own images.
    assert "all-gather" not in compiled.as_text() and "all-to-all" not in compiled.as_text()


def test_a_query_without_a_valid_key_gets_the_mean(monkeypatch):
    monkeypatch.setattr(cpu_attention, "LEAST", 0)
    *rows, _ = inputs(b=1)
    found = fast_on_cpu(attention)(
        *(jnp.asarray(x, jnp.float32) for x in rows), jnp.zeros((1, 1, 1, 7), bool)
    )
    np.testing.assert_allclose(found, np.broadcast_to(rows[2].mean(1, keepdims=True), found.shape), atol=1e-6)


@pytest.mark.parametrize(
    "given, looped",
    [
        ({}, True),
        (dict(causal=True), False),
        (dict(dtype=jnp.bfloat16), False),
        (dict(mask=(1, 2, 1, 64)), False),
        (dict(rows=16), False),
        (dict(wrapped=False), False),
    ],
)
def test_which_attention_goes_head_by_head(given, looped, monkeypatch):
    monkeypatch.setattr(cpu_attention, "LEAST", 2 * 64 * 64)
    size, dtype = given.get("rows", 64), given.get("dtype", jnp.float32)
    rows = [jnp.zeros((1, size, 2, 4), dtype)] * 3
    mask = jnp.ones(given["mask"], bool) if "mask" in given else None
    call = lambda *rows: attention(*rows, mask, given.get("causal", False))
    assert loops(fast_on_cpu(call) if given.get("wrapped", True) else call, *rows) == looped


def test_images_one_by_one(monkeypatch):
    x, y = jnp.asarray(RNG.normal(size=(3, 4))), jnp.arange(3.0)

    def sums(x, y):
        return {"sum": x.sum(1) * y, "rows": x}

    split = lambda x, y: one_by_one(sums, x, y)
    assert not loops(fast_on_cpu(split), x, y)  # of the tests' eight devices
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert loops(fast_on_cpu(split), x, y)
    assert not loops(split, x, y) and not loops(fast_in_training(split), x, y)
    assert not loops(fast_on_cpu(split), x[:1], y[:1])
    for one, other in zip(
        jax.tree.leaves(fast_on_cpu(split)(x, y)), jax.tree.leaves(sums(x, y)), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    assert fast_on_cpu(lambda x: one_by_one(lambda x, none: x, x, None))(x).shape == x.shape

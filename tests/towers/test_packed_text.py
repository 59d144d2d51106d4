"""Texts end to end in a stream, against Flax's tower applied to each of them in full."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ovseg_jax.models.text_towers import CLIPText
from ovseg_jax.towers.packed_text import encode_packed, pack, stacked, unstacked

M, WIDTH, START, END = 3, 16, 30, 31


def build(layers=3, **fields):
    tower = CLIPText(vocab_size=32, length=20, width=WIDTH, layers=layers, heads=2, embed_dim=8, **fields)
    rng = np.random.default_rng(0)
    params = jax.jit(tower.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    return tower, jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), params)


def names(lengths, seed=1):
    rng = np.random.default_rng(seed)
    ids = np.zeros((len(lengths), max(lengths)), np.int32)
    for row, length in zip(ids, lengths, strict=True):
        row[:length] = [*rng.integers(0, 30, length - 1), END]
    return jnp.asarray(ids), jnp.asarray(lengths, jnp.int32)


def in_full(tower, params, context, ids, length):
    table = params["Embed_0"]["embedding"]
    common = jnp.concatenate([table[START][None], context])
    x = jnp.concatenate([jnp.broadcast_to(common, (len(ids), *common.shape)), table[ids]], 1)
    valid = jnp.arange(x.shape[1]) < (1 + M + length)[:, None]
    return jax.jit(tower.apply)({"params": params}, None, valid, x).pooled


def packed(tower, params, context, ids, length, size, window):
    weights = stacked(params)
    table = weights["Embed_0"]["embedding"]
    lying = pack(ids, length, size)
    prefix = jnp.concatenate([table[START][None], context])
    return encode_packed(tower, weights, prefix, table[lying.ids], lying, window)


def close(a, b, rtol=2e-5):
    np.testing.assert_allclose(a, b, atol=rtol * np.abs(b).max())


@pytest.mark.parametrize("lengths", [[1], [5, 5, 5], [1, 6, 2, 4, 1, 1, 6, 3]])
@pytest.mark.parametrize("window", [6, 8])
@pytest.mark.parametrize("layers", [1, 2, 4])
def test_features_and_gradients(layers, window, lengths):
    tower, params = build(layers)
    ids, length = names(lengths)
    context = jnp.asarray(np.random.default_rng(2).normal(size=(M, WIDTH)), jnp.float32)
    weight = jnp.asarray(np.random.default_rng(3).normal(size=(len(lengths), 8)), jnp.float32)

    def value(f, *rest):
        loss = lambda c: (f(tower, params, c, ids, length, *rest) * weight).sum()
        return jax.jit(jax.value_and_grad(loss))(context)

    expected = value(in_full)
    for size in (sum(lengths), sum(lengths) + 5):
        jax.tree.map(close, value(packed, size, window), expected)


@pytest.mark.parametrize("remat", ["dots", "all"])
def test_what_is_computed_again_changes_nothing_but_what_is_kept(remat):
    ids, length = names([1, 6, 2, 4])
    context = jnp.asarray(np.random.default_rng(2).normal(size=(M, WIDTH)), jnp.float32)

    def loss(policy):
        tower, params = build(4, remat=policy)
        return lambda c: jnp.square(packed(tower, params, c, ids, length, 13, 6)).sum()

    def kept(policy):
        _, vjp = jax.vjp(loss(policy), context)
        return sum(x.size for x in jax.tree.leaves(vjp))

    for ours, expected in zip(
        *(jax.jit(jax.value_and_grad(loss(policy)))(context) for policy in (remat, "none")), strict=True
    ):
        close(ours, expected, 1e-6)
    order = [kept(policy) for policy in ("none", "dots", "all")]
    assert order == sorted(order, reverse=True) and len(set(order)) == 3


def test_activation_and_compute_type():
    tower, params = build(activation="gelu", dtype=jnp.bfloat16)
    ids, length = names([2, 4, 3])
    context = jnp.asarray(np.random.default_rng(2).normal(size=(M, WIDTH)), jnp.float32)
    exact = in_full(build(activation="gelu")[0], params, context, ids, length)
    ours = packed(tower, params, context, ids, length, 16, 4)
    assert ours.dtype == jnp.bfloat16
    close(np.float32(ours), exact, 0.03)


def test_padding_is_no_text():
    ids, length = names([2, 3])
    lying = pack(ids, length, 9)
    assert lying.text.tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2]
    assert lying.place[:5].tolist() == [0, 1, 0, 1, 2]
    assert lying.end.tolist() == [1, 4]


def test_unstacked_is_the_inverse():
    for layers in (1, 3):
        _, params = build(layers)
        kept = stacked(params)
        assert {} not in [x for x in kept.values() if isinstance(x, dict)]  # a file would lose it
        again = unstacked(kept)
        jax.tree.map(np.testing.assert_array_equal, again, dict(params))

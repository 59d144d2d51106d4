"""Clusters between two blocks: means, places, unfolding, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ovseg_jax.errors import UserError
from ovseg_jax.kernels.dpc_knn import dpc_knn
from ovseg_jax.models.token_clusters import TokenClusters, with_clusters
from ovseg_jax.models.transformer import Places
from tests import reference
from tests.models.test_transformer import IMAGE, TOWERS, draw


def test_tokens_become_the_means_of_their_clusters():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 21, 8)), jnp.float32)
    places = Places((3, 7), 1)
    hook = TokenClusters(after=2, ratio=0.25)
    same, unchanged = hook(0, x, places)
    assert same is x and unchanged is places
    out, there = hook(1, x, places)
    assert out.shape == (2, 6, 8)  # a quarter of 21, rounded up
    kept, owner = dpc_knn(x, 6)
    np.testing.assert_array_equal(there.kept, kept)
    for i in range(2):
        for k in range(6):
            np.testing.assert_allclose(out[i, k], np.float64(x[i])[owner[i] == k].mean(0), atol=1e-5)
        np.testing.assert_array_equal(owner[i][kept[i]], np.arange(6))
    whole = there.unfold(jnp.concatenate([x[:, :1], out], axis=1))
    np.testing.assert_array_equal(whole[:, 1:], np.take_along_axis(np.asarray(out), owner[..., None], 1))


@pytest.mark.parametrize("kind", TOWERS)
def test_a_tower_with_all_tokens_kept_is_unchanged_and_with_fewer_repeats_them(kind):
    tower = TOWERS[kind]
    variables = draw(tower)
    expected = jax.jit(tower.apply)(variables, IMAGE)
    whole = jax.jit(with_clusters(tower, after=1, ratio=1.0).apply)(variables, IMAGE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), whole, expected)
    out = jax.jit(with_clusters(tower, after=1, ratio=0.5).apply)(variables, IMAGE)
    for tokens in np.asarray(out.tokens).reshape(2, 6, -1):
        assert len(np.unique(tokens, axis=0)) == 3
    assert reference.relative_error(out.pooled, expected.pooled) > 1e-4


@pytest.mark.parametrize("last", ["", "value"])
def test_gradients_are_finite_and_reach_the_first_block(last):
    tower = with_clusters(TOWERS["eva02"], after=1, ratio=0.25).clone(last=last)
    variables = draw(tower)
    # Equal patches, where a distance of 0 has no derivative.
    image = jnp.broadcast_to(IMAGE[:, :1, :1], IMAGE.shape)
    gradient = jax.jit(jax.grad(lambda v, x: (tower.apply(v, x).tokens ** 2).mean()))
    for x in (IMAGE, image):
        found = gradient(variables, x)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
        assert np.abs(found["params"]["blocks_0"]["attn"]["value"]["kernel"]).max() > 0


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(after=0), "clusters.after=0 is less than 1"),
        (dict(after=3), "clusters.after=3 leaves no block of the 3"),
        (dict(ratio=0.0), "clusters.ratio=0.0 is not a share"),
        (dict(ratio=1.5), "clusters.ratio=1.5 is not a share"),
        (dict(neighbours=0), "clusters.neighbours=0 is less than 1"),
    ],
)
def test_mistakes(change, words):
    with pytest.raises(UserError, match=words):
        with_clusters(TOWERS["eva02"], **change)

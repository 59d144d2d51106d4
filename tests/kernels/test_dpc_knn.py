"""DPC-KNN against a float64 loop over tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ovseg_jax.kernels.dpc_knn import dpc_knn


def by_loops(tokens, clusters, neighbours):
    """One image: its centres in ascending order and the centre of each token."""
    x = np.float64(tokens)
    n = len(x)
    distance = np.array([[np.sqrt(((a - b) ** 2).sum() / len(a)) for b in x] for a in x])
    density = [np.exp(-np.mean(np.sort(distance[i])[:neighbours] ** 2)) for i in range(n)]
    delta = []
    for i in range(n):
        denser = [j for j in range(n) if density[j] > density[i] or (density[j] == density[i] and j < i)]
        delta.append(min((distance[i, j] for j in denser), default=distance.max()))
    score = np.array(delta) * density
    centres = np.sort(np.argsort(-score, kind="stable")[:clusters])
    owner = [
        list(centres).index(i) if i in centres else int(np.argmin(distance[i, centres])) for i in range(n)
    ]
    return centres, np.array(owner)


@pytest.mark.parametrize("clusters, neighbours", [(6, 5), (12, 3), (24, 5), (1, 1)])
def test_clusters_are_those_of_a_loop(clusters, neighbours):
    rng = np.random.default_rng(0)
    # Groups far from 0, as tokens with a large common mean, where float32 would lose the differences.
    groups = rng.normal(size=(2, 6, 16)) * 2 + 300
    tokens = np.repeat(groups, 4, axis=1) + rng.normal(size=(2, 24, 16)) * 0.3
    tokens = tokens.astype(np.float32)
    centres, owner = jax.jit(dpc_knn, static_argnums=(1, 2))(tokens, clusters, neighbours)
    for i in range(2):
        want = by_loops(tokens[i], clusters, neighbours)
        np.testing.assert_array_equal(centres[i], want[0])
        np.testing.assert_array_equal(owner[i], want[1])


def test_equal_tokens_have_different_centres_in_order():
    tokens = jnp.zeros((1, 8, 4)).at[0, 6:].set(1.0)
    centres, owner = jax.jit(dpc_knn, static_argnums=1)(tokens, 3)
    assert len(set(np.asarray(centres[0]).tolist())) == 3
    np.testing.assert_array_equal(np.asarray(owner)[0, np.asarray(centres[0])], [0, 1, 2])
    # Both groups have a centre, and a token is with its own group.
    of_centre = np.asarray(centres)[0, np.asarray(owner[0])]
    np.testing.assert_array_equal(of_centre >= 6, np.arange(8) >= 6)


def test_an_images_clusters_depend_on_nothing_but_the_image():
    tokens = np.random.default_rng(1).normal(size=(3, 20, 8)).astype(np.float32)
    both = jax.jit(dpc_knn, static_argnums=1)(tokens, 5)
    for i in range(3):
        alone = jax.jit(dpc_knn, static_argnums=1)(tokens[i : i + 1], 5)
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[i]), alone, both)  # noqa: B023

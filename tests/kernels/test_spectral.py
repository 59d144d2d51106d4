"""Normalised cuts against NumPy in float64, and against scikit-learn."""

import extras
import jax
import numpy as np
import pytest

from ovseg_jax.kernels.spectral import spectral

K, P, GAMMA = 4, 72, 1.5


def groups() -> np.ndarray:
    """Two blobs, each in a ring, which k-means on the tokens themselves does not find: [2 P 2]."""
    rng, angle = np.random.default_rng(0), np.arange(24) * np.pi / 12
    ring = np.stack([np.cos(angle), np.sin(angle)], -1)
    blob = lambda x: rng.normal((x, 0), 0.2, (12, 2))
    return np.array(
        [
            np.concatenate([blob(0), 3 * ring, 2.7 * ring + [12, 0], blob(12)])[rng.permutation(P)]
            for _ in range(2)
        ],
        np.float32,
    )


def run(tokens, valid=None):
    valid = np.ones(tokens.shape[:2], bool) if valid is None else valid
    return jax.device_get(jax.jit(lambda x, v: spectral(x, v, K, GAMMA, iterations=30))(tokens, valid))


def same_partition(a, b):
    pairs = {*zip(a.tolist(), b.tolist(), strict=True)}
    return len(pairs) == len(set(a.tolist())) == len(set(b.tolist()))


def embedding(x: np.ndarray) -> np.ndarray:
    w = np.exp(-GAMMA * np.square(x[:, None] - x).sum(2)) * (1 - np.eye(len(x)))
    d = w.sum(1)
    laplacian = np.eye(len(x)) - w / np.sqrt(d[:, None] * d)
    return np.linalg.eigh(laplacian)[1][:, :K] / np.sqrt(d)[:, None]


def test_the_clusters_have_the_objective_of_numpy():
    got = run(groups())
    for i, x in enumerate(groups().astype(np.float64)):
        e = embedding(x)
        centres = np.array([e[got.labels[i] == k].mean(0) for k in range(K)])
        np.testing.assert_allclose(
            np.square(e - centres[got.labels[i]]).sum(), got.inertia[i], rtol=1e-2, atol=1e-6
        )


def test_the_partition_is_scikit_learns():
    sklearn = extras.require("sklearn.cluster")
    got = run(groups())
    for labels, x in zip(got.labels, groups().astype(np.float64), strict=True):
        model = sklearn.SpectralClustering(K, gamma=GAMMA, random_state=0).fit(x)
        assert same_partition(labels, model.labels_)


def test_padding_has_no_influence():
    tokens = groups()
    valid = np.random.default_rng(1).random((2, P + 20)).argsort(1) < P
    padded = np.full((2, P + 20, 2), 7.0, np.float32)
    padded[valid] = tokens.reshape(-1, 2)
    got, want = run(padded, valid), run(tokens)
    assert (got.labels[~valid] == -1).all()
    for i in range(2):
        assert same_partition(got.labels[i][valid[i]], want.labels[i])


@pytest.mark.parametrize("count", [0, 1])
def test_an_image_of_padding_is_finite(count):
    got = run(groups(), np.broadcast_to(np.arange(P) < count, (2, P)))
    assert (got.sizes.sum(1) == count).all() and np.isfinite(got.centres).all()

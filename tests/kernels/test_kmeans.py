"""k-means against SciPy, scikit-learn and NumPy in float64, from the same start."""

from functools import partial

import extras
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.cluster.vq import kmeans2

from ovseg_jax.kernels.kmeans import kmeans

B, P, D, K = 3, 200, 5, 6


def groups(seed: int = 0, p: int = P, d: int = D) -> np.ndarray:
    """Tokens of several unequal groups, as an image has, away from the origin: [B P D]."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(B, 9, d)) * 2 + 5
    owner = rng.choice(9, size=(B, p), p=np.arange(1, 10) / 45)
    tokens = np.take_along_axis(centres, owner[..., None], 1) + 0.4 * rng.normal(size=(B, p, d))
    return tokens.astype(np.float32)


def run(tokens, valid=None, **options):
    valid = np.ones(tokens.shape[:2], bool) if valid is None else valid
    if not isinstance(start := options.pop("start", "farthest"), str):
        start = jnp.asarray(start)
    return jax.device_get(jax.jit(partial(kmeans, clusters=K, start=start, **options))(tokens, valid))


def squared(x: np.ndarray, c: np.ndarray) -> np.ndarray:
    return np.square(x[:, None] - c).sum(2)


def farthest(x: np.ndarray) -> np.ndarray:
    chosen = [x[squared(x, x.mean(0, keepdims=True))[:, 0].argmin()]]
    while len(chosen) < K:
        chosen.append(x[squared(x, np.array(chosen)).min(1).argmax()])
    return np.array(chosen)


def plus_plus(x: np.ndarray, rng: jax.Array) -> np.ndarray:
    draws = np.asarray(jax.random.uniform(rng, (K, 3)), np.float64)  # 3 = 2 + floor(log 6)
    chosen = [x[int(draws[0, 0] * len(x))]]
    for trials in draws[1:]:
        weight = squared(x, np.array(chosen)).min(1)
        drawn = x[np.searchsorted(np.cumsum(weight), trials * weight.sum(), side="right")]
        left = [squared(x, np.array([*chosen, token])).min(1).sum() for token in drawn]
        chosen.append(drawn[np.argmin(left)])
    return np.array(chosen)


@pytest.mark.parametrize("start", ["farthest", "kmeans++"])
@pytest.mark.parametrize("iterations", [0, 1, 12])
def test_it_is_scipys_from_the_same_start(start, iterations):
    tokens, rng = groups(), jax.random.key(3)
    got = run(tokens, start=start, iterations=iterations, rng=rng)
    for i, x in enumerate(tokens.astype(np.float64)):
        first = farthest(x) if start == "farthest" else plus_plus(x, rng)
        centres = kmeans2(x, first, iterations, minit="matrix")[0] if iterations else first
        np.testing.assert_allclose(got.centres[i], centres, atol=1e-4)
        distance = squared(x, centres)
        np.testing.assert_array_equal(got.labels[i], distance.argmin(1))
        np.testing.assert_allclose(got.inertia[i], distance.min(1).sum(), rtol=1e-4)
        np.testing.assert_array_equal(got.sizes[i], np.bincount(distance.argmin(1), minlength=K))


def test_empty_clusters_are_filled_as_scikit_learns():
    sklearn = extras.require("sklearn.cluster")
    tokens = groups(1)
    start = tokens[:, :K].copy()
    start[:, 2] = 100  # nearest to no token
    for iterations in (1, 2, 12):
        got = run(tokens, start=start, iterations=iterations)
        assert (got.sizes > 0).all()
        for i, x in enumerate(tokens.astype(np.float64)):
            model = sklearn.KMeans(K, init=start[i].astype(np.float64), n_init=1, max_iter=iterations, tol=0)
            model.fit(x)
            np.testing.assert_array_equal(got.labels[i], model.labels_)
            np.testing.assert_allclose(got.inertia[i], model.inertia_, rtol=1e-4)


def test_several_empty_clusters_are_filled_one_by_one():
    start = np.full((B, K, D), 100, np.float32) + np.arange(K, dtype=np.float32)[:, None]
    start[:, 0] = 5
    for iterations in (0, 1, 2, 3, 4, 5):
        got = run(groups(), start=start, iterations=iterations)
        assert ((got.sizes > 0).sum(1) == iterations + 1).all()


def test_the_objective_is_near_scikit_learns():
    """With its own start and one try, over some images; farthest points, which outliers attract, are a fifth worse."""
    sklearn = extras.require("sklearn.cluster")
    tokens = np.concatenate([groups(seed) for seed in range(10)])
    theirs = [sklearn.KMeans(K, n_init=1, random_state=0).fit(x.astype(np.float64)).inertia_ for x in tokens]
    ratio = lambda **options: float(run(tokens, iterations=30, **options).inertia.sum() / sum(theirs))
    assert ratio(start="kmeans++", rng=jax.random.key(0)) < 1.05
    assert ratio(start="farthest") < 1.3


@pytest.mark.parametrize("start", ["farthest", "kmeans++"])
def test_padding_has_no_influence(start):
    tokens, valid = groups(), np.arange(P) < 150
    valid = np.stack([valid, valid[::-1], np.random.default_rng(0).permutation(valid)])
    want = run(tokens[valid].reshape(B, 150, D), start=start, rng=jax.random.key(0))
    for filling in (0, 1e6, np.nan):
        got = run(
            np.where(valid[..., None], tokens, np.float32(filling)), valid, start=start, rng=jax.random.key(0)
        )
        assert (got.labels[~valid] == -1).all()
        np.testing.assert_array_equal(got.labels[valid].reshape(B, 150), want.labels)
        np.testing.assert_allclose(got.centres, want.centres, atol=1e-5)
        np.testing.assert_allclose(got.inertia, want.inertia, rtol=1e-5)


def test_an_image_of_nothing_but_padding_has_no_cluster():
    got = run(groups(), np.zeros((B, P), bool))
    assert (got.labels == -1).all() and (got.sizes == 0).all() and (got.inertia == 0).all()
    assert np.isfinite(got.centres).all()


@pytest.mark.parametrize("start", ["farthest", "kmeans++"])
@pytest.mark.parametrize("different", [1, 4])
def test_fewer_different_tokens_than_clusters_leave_clusters_empty(start, different):
    tokens = np.tile(groups()[:, :different], (1, 50, 1))
    got = run(tokens, start=start, rng=jax.random.key(1))
    assert ((got.sizes > 0).sum(1) == different).all()
    np.testing.assert_allclose(got.inertia, 0, atol=1e-3)


def test_a_result_does_not_depend_on_the_place_in_the_batch():
    tokens = groups()
    options = dict(start="kmeans++", rng=jax.random.key(0))
    whole, turned = run(tokens, **options), run(tokens[::-1], **options)
    np.testing.assert_array_equal(whole.labels, turned.labels[::-1])


def test_an_offset_of_all_tokens_changes_nothing():
    # Norms of 1e3 squared would leave float32 a resolution of 0.06, of the size of the distances.
    tokens = groups()
    want, got = run(tokens), run(tokens + np.float32(1000))
    assert (want.labels == got.labels).mean() > 0.99
    np.testing.assert_allclose(got.inertia, want.inertia, rtol=1e-2)


def test_an_unknown_start_is_refused():
    with pytest.raises(ValueError, match="'middle' is not one of farthest, kmeans\\+\\+"):
        kmeans(jnp.zeros((1, 2, 1)), jnp.ones((1, 2), bool), 1, start="middle")
    with pytest.raises(ValueError, match="needs rng"):
        kmeans(jnp.zeros((1, 2, 1)), jnp.ones((1, 2), bool), 1, start="kmeans++")

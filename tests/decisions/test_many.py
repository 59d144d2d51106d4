"""The best of many names, with most of them left out: what scoring all of them gives, to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ovseg_jax.decisions import many, maps

N, SIDE = 12, (24, 40)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def weights_and_logits(kind, names, seed=0):
    """Weights [T N] and mask logits [N 6 10] of a model."""
    rng = np.random.default_rng(seed)
    text, logits = unit(rng.normal(size=(names, 16))), 3 * rng.normal(size=(N, 6, 10))
    regions = unit(rng.normal(size=(N, 16)))
    if kind != "random":  # Regions that differ in width, several proposals each, and words that fit them.
        own = np.arange(N) % 3
        centres = unit(rng.normal(size=(3, 16)))
        regions = unit(centres[own] + 0.05 * rng.normal(size=(N, 16)))
        text[: names // 20] = unit(centres[rng.integers(0, 3, names // 20)] + 0.2 * text[: names // 20])
        rng.shuffle(text)
        logits = np.where(np.arange(10) // 4 == own[:, None, None], 9.0, -9) + np.zeros((N, 6, 10))
    if kind == "equal":
        text = text[rng.integers(0, 40, names)]  # Every name many times.
    if kind == "near":
        text = text[rng.integers(0, 40, names)] + 1e-7 * rng.normal(size=text.shape)
    if kind == "one":
        text[:] = text[:1]
    if kind == "shifted":
        regions += 3 * unit(text.sum(0))  # All scores are about as large.
    if kind == "off":
        logits[:, :, :5] = -300  # The masks are exactly 0 there.
    if kind == "negative":
        regions = -unit(abs(regions))
        text = unit(abs(text))
    return jnp.asarray(text @ regions.T, jnp.float32), jnp.asarray(logits, jnp.float32)


@pytest.mark.parametrize("logits", [True, False])
@pytest.mark.parametrize("strip", [24, 3])
def test_leaving_names_out_changes_nothing(monkeypatch, logits, strip):
    """Of masks, and of channels of any sign; in one strip of rows, and in several, of which some do not try."""
    monkeypatch.setattr(maps, "FEW_CELLS", 2)
    monkeypatch.setattr(maps, "row_block", lambda rows, floats: strip)
    if strip < 24:
        monkeypatch.setattr(many, "MOST_REACHED", 2.0)  # also where bounds are of no use
    for key, value in {"GROUP": 8, "SEEDS": 16, "SAMPLES": 8}.items():
        monkeypatch.setattr(many, key, value)
    names, (height, width) = 997, SIDE
    rows, columns = (
        maps.upsampling(pixels, cells, cells, jnp.int32(cells), jnp.int32(pixels))
        for pixels, cells in ((height, 6), (width, 10))
    )
    rows = rows.at[-2:].set(0)  # padding
    views = jnp.asarray(np.random.default_rng(1).random((4, names)) < [[1], [0.5], [0.02], [0]])
    functions = []
    for least in (1 << 30, 1):  # all names; few of them
        monkeypatch.setattr(maps, "MANY", least)
        run = jax.jit(lambda w, x: maps.best_names(w, x, rows, columns, views, logits=logits))
        functions.append(run.lower(*weights_and_logits("random", names)).compile())
    for kind in ("random", "trained", "equal", "near", "one", "shifted", "off", "negative"):
        want, got = (run(*weights_and_logits(kind, names)) for run in functions)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a[..., :-2, :], b[..., :-2, :], kind)


def test_few_names_are_scored_where_a_model_is_sure():
    for kind, most in (("trained", 500), ("one", 6000)):
        weights, logits = weights_and_logits(kind, 5000)
        masks = jax.nn.sigmoid(jnp.repeat(logits.reshape(N, -1), 20, 1))
        everything = jnp.ones((1, 5000), bool), jnp.ones(masks.shape[1], bool)
        name, score, scored = many.best_of_masks(weights, masks, *everything)
        assert 0 < scored <= most
        y = np.asarray(weights, np.float64) @ np.asarray(masks, np.float64)
        np.testing.assert_allclose(score[0], y.max(0), rtol=1e-5)
        np.testing.assert_allclose(y[name[0], np.arange(y.shape[1])], y.max(0), rtol=1e-5)


def test_strips_that_do_not_help_become_rare():
    """Of 54 strips without any gain six are tried; a gain is found again, and the next strip is tried as well."""
    backoff, tried = maps.Backoff.of(True), []
    for i in range(54):
        if backoff.wait > 0:
            backoff = backoff.waited()
        else:
            tried.append(i)
            backoff = backoff.after(jnp.asarray(False))
    assert tried == [0, 2, 5, 10, 19, 36]
    backoff = maps.Backoff(jnp.int32(0), jnp.int32(64)).after(jnp.asarray(True))
    assert backoff == (0, 1) and backoff.after(jnp.asarray(False)).wait == 1
    assert maps.Backoff.of(jnp.asarray(False)).wait > 1_000_000


@pytest.mark.parametrize("kind", ["random", "sure"])
def test_bounds_of_a_grid_are_left_where_they_are_of_no_use(kind):
    """Features of 12 x 12 cells, 32 channels: independent of each other, or near one name each in 3 x 3 places."""
    rng = np.random.default_rng(0)
    text, cells = unit(rng.normal(size=(3000, 32))), unit(rng.normal(size=(12, 12, 32)))
    if kind == "sure":
        cells = unit(text[rng.integers(0, 3000, (3, 3)).repeat(4, 0).repeat(4, 1)] + 0.3 * cells)
    cells = jnp.asarray(cells.reshape(-1, 32).T, jnp.float32)
    groups = many.groups_of_grid(jnp.asarray(text, jnp.float32), cells, jnp.ones((1, 3000), bool), 12)
    assert bool(groups.useful) == (kind == "sure") == bool((groups.bound != 0).any())

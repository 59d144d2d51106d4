"""The places of the k smallest values against NumPy's stable sort."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ovseg_jax.kernels.smallest import by_bisection, smallest


@pytest.mark.parametrize("k", [1, 7, 40])
def test_smallest_takes_the_places_of_a_stable_sort(k):
    """With equal values, zeros and infinities; in both forms."""
    rng = np.random.default_rng(0)
    x = np.abs(rng.normal(size=(3, 2, 40))).astype(np.float32) * 10.0 ** rng.integers(-30, 30, (3, 2, 40))
    x[0] = np.round(x[0])
    x[1, 0], x[1, 1, :20], x[2, 0, ::3] = 0, 1, np.inf
    x = x.astype(np.float32)
    expected = np.sort(np.argsort(x, -1, kind="stable")[..., :k], -1)
    for form in (smallest, by_bisection, lambda x, k: jax.lax.top_k(-x, k)[1]):
        found = jax.jit(lambda x, form=form: form(x, k))(x)
        np.testing.assert_array_equal(np.sort(found, -1), expected)
    np.testing.assert_array_equal(by_bisection(jnp.asarray(x[0, 0]), k), expected[0, 0])

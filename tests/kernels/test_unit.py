"""Vectors of length 1, on devices and on the host."""

import jax.numpy as jnp
import numpy as np

from ovseg_jax.kernels.unit import host_unit, unit


def test_host_and_device_agree_and_zeros_stay_zeros():
    x = np.random.default_rng(0).normal(size=(5, 3, 7)).astype(np.float32)
    x[2, 1] = 0
    host, device = host_unit(x), np.asarray(unit(jnp.asarray(x)))
    np.testing.assert_allclose(host, device, atol=2e-7)
    assert not host[2, 1].any() and not device[2, 1].any()
    np.testing.assert_allclose(np.delete(np.linalg.norm(host, axis=-1).ravel(), 7), 1, atol=1e-6)
    assert host.dtype == np.float32 and host_unit(x.astype(np.float64)).dtype == np.float64

import pytest

from ovseg_jax.errors import UserError
from ovseg_jax.losses.temperature import bounded, unbounded


def test_bounds_of_a_temperature_start_above_zero():
    with pytest.raises(UserError, match=r"temperature_bounds=\(0.0, 1.0\): the lower bound must be above 0"):
        unbounded(0.07, 0.0, 1.0)
    assert float(bounded(unbounded(0.07, 0.01, 1.0), 0.01, 1.0)) == pytest.approx(0.07, rel=1e-4)

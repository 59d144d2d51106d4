"""Keys' cubic convolution kernel, for arrays of JAX and of NumPy."""

from typing import TypeVar

T = TypeVar("T")


def keys(x: T, a: float = -0.75) -> T:
    """Returns the kernel's weights of samples at these distances, 0 from 2 on (Keys 1981).

    Args:
      x: distances, an array.
      a: slope at distance 1: -0.75 in `torch.nn.functional.interpolate`, -0.5 in Keys' paper and PIL.
    """
    x = abs(x)  # type: ignore[arg-type]
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return near * (x <= 1) + far * ((x > 1) & (x < 2))

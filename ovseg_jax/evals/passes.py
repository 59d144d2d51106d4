"""Passes over the batches of an evaluation, with one batch in flight on the mesh."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ovseg_jax.parallel.sharding import put_batch


def each_batch(
    batches: Iterable[Mapping[str, np.ndarray]], step: Callable[[dict[str, jax.Array]], Any], mesh: Mesh
) -> Iterator[Any]:
    """Yields the result of `step` for each batch as NumPy arrays.

    While the host handles one batch's results, the devices compute the next; the host never runs further ahead.

    Args:
      batches: this process's share of each batch, of any size, with `example_mask`.
      step: a compiled function of the global batch, whose results are replicated on every process.
      mesh: the devices.
    """
    waiting: Any = None
    for batch in batches:
        result = step(put_batch(pad_to_multiple(batch, len(mesh.local_devices)), mesh))
        if waiting is not None:
            yield jax.device_get(waiting)
        waiting = result
    if waiting is not None:
        yield jax.device_get(waiting)


def pad_to_multiple(batch: Mapping[str, np.ndarray], multiple: int) -> dict[str, np.ndarray]:
    """Pads a batch with empty examples (`example_mask` False) to a multiple of the number of devices."""
    batch = {key: np.asarray(value) for key, value in batch.items()}
    extra = -len(batch["example_mask"]) % multiple
    return {key: np.pad(v, [(0, extra)] + [(0, 0)] * (v.ndim - 1)) for key, v in batch.items()}

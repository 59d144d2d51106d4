"""What the passes of all evaluators share: batches over the mesh, one in flight, and names in equal chunks."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from ovseg_jax.parallel.sharding import put_batch

TEXT_CHUNK = 1024


def each_batch(
    batches: Iterable[Mapping[str, np.ndarray]], step: Callable[[dict[str, jax.Array]], Any], mesh: Mesh
) -> Iterator[Any]:
    """What `step` returns for each batch, as NumPy arrays.

    The host has one batch's results while the devices work on the next, and never runs further ahead.

    Args:
      batches: this process's share of each batch, of any size, with `example_mask`.
      step: a compiled function of the global batch, whose results are whole on every process.
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
    """Adds empty examples (`example_mask` False) until the devices share the batch evenly."""
    batch = {key: np.asarray(value) for key, value in batch.items()}
    extra = -len(batch["example_mask"]) % multiple
    return {key: np.pad(v, [(0, extra)] + [(0, 0)] * (v.ndim - 1)) for key, v in batch.items()}


def embed_in_chunks(
    embed: Callable[[Sequence[str]], Float[Array, "_ d"]], texts: Sequence[str]
) -> Float[Array, "t d"]:
    """Embeddings of any number of texts, a bounded number at a time and in equal shapes (one compilation)."""
    if len(texts) <= TEXT_CHUNK:
        return embed(list(texts))
    padded = [*texts, *[texts[0]] * (-len(texts) % TEXT_CHUNK)]
    chunks = [embed(padded[i : i + TEXT_CHUNK]) for i in range(0, len(padded), TEXT_CHUNK)]
    return jnp.concatenate(chunks)[: len(texts)]

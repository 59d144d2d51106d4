"""What a method is: a handful of pure functions. Step, loop, evaluators and segmenter know only this."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float, Int, UInt8

Variables = Mapping[str, Any]
Batch = Mapping[str, Array]


class Prediction(NamedTuple):
    """What a method sees in a batch of images, before any words are asked for.

    Attributes:
      mask_logits: [B N h w] logits of the proposals' sigmoid masks, or None for a per-pixel method.
      region_embed: [B N D] unit-norm embedding of each proposal, or None for a per-pixel method.
      pixel_embed: [B h w D] text-aligned feature of every pixel, not normalised.
    """

    mask_logits: Float[Array, "b n h w"] | None
    region_embed: Float[Array, "b n d"] | None
    pixel_embed: Float[Array, "b h w d"]


class Aux(NamedTuple):
    """Beside the loss: metrics as (sum, count), and the collections that the forward pass updated."""

    metrics: dict[str, tuple[jax.Array, jax.Array]]
    mutated: dict[str, Any]


@runtime_checkable
class Method(Protocol):
    """A model, its loss, its prediction and its text side."""

    def init(self, rng: jax.Array) -> Variables:
        """Makes the variables: `params`, and other collections such as `batch_stats`."""

    def pretrained(self) -> Mapping[str, Any]:
        """NumPy arrays, in a tree like the variables, that take the place of what `init` draws; {} where none do."""

    def loss(self, variables: Variables, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Aux]:
        """The training loss of one global batch: a scalar, and `Aux`."""

    def predict(
        self, variables: Variables, image: UInt8[Array, "b s s 3"], image_size: Int[Array, "b 2"]
    ) -> Prediction:
        """What the model sees in images that fill `image_size` (height, width) of their canvas."""

    def embed_text(self, variables: Variables, texts: Sequence[str]) -> Float[Array, "k d"]:
        """Unit-norm embeddings of texts."""

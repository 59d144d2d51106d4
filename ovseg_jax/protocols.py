"""What a method is: a handful of pure functions. Step, loop, evaluators and segmenter know only this.

Step and loop take any `Trainable`; a `Method` also segments, a `Classifier` also classifies whole images.
"""

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
class Trainable(Protocol):
    """A model and its loss: all that step and loop know.

    What a run is to leave behind beside its checkpoints, an `artifacts(variables)` gives: {file name: what writes it}.
    All processes call it.
    """

    def init(self, rng: jax.Array) -> Variables:
        """Makes the variables: `params`, and other collections such as `batch_stats`."""

    def pretrained(self) -> Mapping[str, Any]:
        """NumPy arrays, in a tree like the variables, that take the place of what `init` draws; {} where none do."""

    def loss(self, variables: Variables, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Aux]:
        """The training loss of one global batch: a scalar, and `Aux`."""


@runtime_checkable
class Segmenting(Protocol):
    """What segments: it predicts masks and pixels, and has a text side. All that evaluators and segmenter know.

    Regions are scored by cosine, unless there is a `region_scores`, see `decisions.segment.RegionScores`. One that
    learns what is no object may have a `no_object(variables) -> [d]`, its unit vector, see `methods.zsseg`.
    """

    def predict(
        self, variables: Variables, image: UInt8[Array, "b s s 3"], image_size: Int[Array, "b 2"]
    ) -> Prediction:
        """What the model sees in images that fill `image_size` (height, width) of their canvas."""

    def embed_text(self, variables: Variables, texts: Sequence[str]) -> Float[Array, "k d"]:
        """Unit-norm embeddings of texts."""


@runtime_checkable
class Method(Trainable, Segmenting, Protocol):
    """What is trained to segment."""


@runtime_checkable
class Classifier(Trainable, Protocol):
    """What classifies whole images by their similarity to class names in a prompt.

    One whose names can stand in any learned prompt also has an `embed_prompt(variables, prompt, texts)`. One whose own
    prompt differs between images has `embed_text_for(variables, texts, image: [d]) -> [k d]`, jittable, and its
    `embed_text` is a UserError. One whose towers never change says `frozen_towers = True`: what it makes of prompts
    other than its own is then computed once in a run. One that has something of its own for each class says `by_place =
    True`: its `embed_text` gets the names of all classes at once, since classes of one name differ by their places.
    """

    def embed_image(self, variables: Variables, image: UInt8[Array, "b s s 3"]) -> Float[Array, "b d"]:
        """Unit-norm embeddings of images. Jittable."""

    def embed_text(self, variables: Variables, texts: Sequence[str]) -> Float[Array, "k d"]:
        """Unit-norm embeddings of class names, each put into the method's own prompt."""

    def embed_phrases(self, variables: Variables, texts: Sequence[str]) -> Float[Array, "k d"]:
        """Unit-norm embeddings of whole texts as they stand, without the method's own prompt."""

    def logit_scale(self, variables: Variables) -> Float[Array, ""]:
        """1/τ: what a cosine is multiplied by to be a logit."""

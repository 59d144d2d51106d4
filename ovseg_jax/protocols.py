"""The contracts between the parts: what a method and an evaluator are to the step, the loop, evaluators and Segmenter.

A method derives from `Trainable` and from `Segmenting` or `Classifier` or both. It must define the functions that raise
NotImplementedError here; everything else has a default.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from jaxtyping import Array, Bool, Float, Int, UInt8

from ovseg_jax.errors import UserError
from ovseg_jax.kernels.unit import unit

Variables = Mapping[str, Any]
Batch = Mapping[str, Array]
Text = dict[str, Float[Array, "t d"]]
"""Embeddings of T texts in each space that a method has, by the space's name."""

# The accelerators' default for float32 products is a bfloat16 or TF32 pass, enough to swap two near names.
PRECISION = jax.lax.Precision.HIGHEST


class Aux(NamedTuple):
    """Beside the loss: metrics as (sum, count), and the collections that the forward pass updated."""

    metrics: dict[str, tuple[jax.Array, jax.Array]]
    mutated: dict[str, Any]


class Prediction(NamedTuple):
    """A method's output for a batch of images, before any words are asked for.

    Attributes:
      mask_logits: [B N h w] logits of the proposals' sigmoid masks, or None for a per-pixel method.
      regions: by space, [B N D] an embedding of each proposal; empty for a per-pixel method.
      pixels: by space, [B h w D] a feature of every pixel, not normalised.
      void: [B N] logit of "no object" for each proposal, for methods that learn it.
    """

    mask_logits: Float[Array, "*b n h w"] | None
    regions: dict[str, Float[Array, "*b n d"]]
    pixels: dict[str, Float[Array, "*b h w d"]]
    void: Float[Array, "*b n"] | None = None


class Vocabulary(NamedTuple):
    """The classes that are asked for, as arrays; T names of K classes.

    Attributes:
      owner: [T] the class of each name.
      seen: [T] whether the name is one of a class that the method was trained on, as far as it says so.
      isthing: [K] whether a class is countable.
    """

    owner: Int[Array, "t"]
    seen: Bool[Array, "t"]
    isthing: Bool[Array, "k"]


class RegionScores(NamedTuple):
    """The scores of an image's proposals.

    Attributes:
      names: [T N] of each name for each proposal.
      void: [N] of "no object" in the same unit, or None.
    """

    names: Float[Array, "t n"]
    void: Float[Array, "n"] | None = None


class PixelScores(NamedTuple):
    """The scores of an image's pixels in factors: a name scores `weights @ maps`, which [T h w] would hold.

    Attributes:
      weights: [T C].
      maps: [C h w].
    """

    weights: Float[Array, "t c"]
    maps: Float[Array, "c h w"]


class Trainable:
    """A model and its loss: all that step and loop know. It is made of (config, words, classes).

    Attributes:
      tokenizer: turns texts into (ids, which are valid), for fields of tokens; each worker process gets a copy.
      frozen: patterns of the variables that are never trained: checkpoints hold these once a run.
    """

    tokenizer: Any = None
    frozen: tuple[str, ...] = ()

    @classmethod
    def keys(cls, config: Any) -> dict[str, dict[str, bool]]:
        """Returns the keys of the config's sections that are its own, and whether each has an effect; none by default.

        See `experiment.keys`.
        """
        del config
        return {}

    @classmethod
    def fields(cls, config: Any) -> tuple[str, ...]:
        """Returns the batch fields that the loss reads (`data.fields.FIELDS`); `config.data.fields` adds to them."""
        raise NotImplementedError

    @classmethod
    def vocabulary(cls, config: Any, source: Any) -> Sequence[str]:
        """Returns the words that the text side knows, of a source's captions and class names; none by default."""
        del config, source
        return ()

    def init(self, rng: jax.Array) -> Variables:
        """Makes the variables: `params`, and other collections such as `batch_stats`."""
        raise NotImplementedError

    def pretrained(self) -> Mapping[str, Any]:
        """Returns NumPy arrays in a tree like the variables, which replace what `init` draws; {} by default."""
        return {}

    def loss(self, variables: Variables, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Aux]:
        """Computes the training loss of one global batch: a scalar, and `Aux`."""
        raise NotImplementedError

    def save_assets(self, workdir: Path) -> None:
        """Writes into a run's folder what the method took from elsewhere and needs again; nothing by default.

        It is called at every start, by the first process.
        """
        del workdir

    def artifacts(self, variables: Variables) -> dict[str, Callable[[epath.Path], None]]:
        """Returns the files that a finished run holds beside its checkpoints, {name: writer}; all processes call it."""
        del variables
        return {}


class Segmenting:
    """What predicts masks and pixels, and has a text side: all that evaluators and Segmenter know.

    Attributes:
      modes: the masks that its scores are defined for, see `decisions.rules.decide`.
    """

    modes: tuple[str, ...] = ("predicted", "none", "truth")

    def predict(
        self, variables: Variables, image: UInt8[Array, "b s s 3"], image_size: Int[Array, "b 2"]
    ) -> Prediction:
        """Predicts masks and features of images that fill `image_size` (height, width) of their canvas. Jittable."""
        raise NotImplementedError

    def embed_text(self, variables: Variables, texts: Sequence[str]) -> Text:
        """Embeds texts in every space; unit vectors where cosines are to score them."""
        raise NotImplementedError

    def score_regions(self, prediction: Prediction, text: Text, vocabulary: Vocabulary) -> RegionScores:
        """Scores every name for every proposal of one image; by default the cosine in the only space. Jittable.

        Args:
          prediction: of one image, without the axis of images.
          text: the names' embeddings.
          vocabulary: of the names.
        """
        del vocabulary
        space = common_space(prediction.regions, text)
        names = jnp.matmul(text[space], prediction.regions[space].T, precision=PRECISION)
        return RegionScores(names, prediction.void)

    def score_pixels(self, prediction: Prediction, text: Text, vocabulary: Vocabulary) -> PixelScores:
        """Scores every name for every pixel of one image; by default the cosine in the only space. Jittable."""
        del vocabulary
        space = common_space(prediction.pixels, text)
        return PixelScores(text[space], jnp.moveaxis(unit(prediction.pixels[space]), -1, 0))

    def region_scale(self, variables: Variables) -> float | None:
        """Returns 1/τ, by which a region's cosine becomes a logit; None where the method has learned none."""
        del variables
        return None

    def seen_names(self) -> frozenset[str]:
        """Returns the names of the classes that training knew, where scores depend on it; none by default."""
        return frozenset()


class Classifier:
    """What classifies whole images by their similarity to class names in a prompt.

    Attributes:
      frozen_towers: the towers never change, so that features under prompts other than its own are computed once a run.
      by_place: it has parameters of its own for each class: its `embed_text` gets the names of all classes at once,
        since classes of one name differ by their places.
      text_per_image: its class features differ between images: `embed_text_for` gives them, `embed_text` refuses.
      unit_norm: scores are cosines times `logit_scale`, so that distances between features mean something.
    """

    frozen_towers = False
    by_place = False
    text_per_image = False
    unit_norm = True

    def embed_image(self, variables: Variables, image: UInt8[Array, "b s s 3"]) -> Float[Array, "b d"]:
        """Embeds images as unit vectors. Jittable."""
        raise NotImplementedError

    def embed_text(self, variables: Variables, texts: Sequence[str]) -> Text:
        """Embeds class names, each in the method's own prompt."""
        raise NotImplementedError

    def embed_phrases(self, variables: Variables, texts: Sequence[str]) -> Text:
        """Embeds whole texts as they stand, without the method's own prompt."""
        raise NotImplementedError

    def embed_prompt(self, variables: Variables, prompt: Any, texts: Sequence[str]) -> Text:
        """Embeds class names in another learned prompt (`towers.prompt_file.Prompt`).

        Raises:
          UserError: the method has no place for one.
        """
        raise UserError(f"the method {type(self).__name__} has no place for the prompt {prompt.source}")

    def embed_text_for(self, variables: Variables, texts: Sequence[str], image: Float[Array, " d"]) -> Text:
        """Embeds class names for one image, given by its feature, where `text_per_image`. Jittable."""
        raise NotImplementedError

    def score_images(self, image: Float[Array, "b d"], text: Text) -> Float[Array, "b t"]:
        """Scores texts for images; by default the cosine in the only space. Jittable."""
        return jnp.matmul(image, only(text).T, precision=PRECISION)

    def logit_scale(self, variables: Variables) -> Float[Array, ""]:
        """Returns 1/τ: what a score is multiplied by to be a logit."""
        raise NotImplementedError


class Evaluator:
    """One named evaluation, made by `evals.registry`.

    Attributes:
      name: prefix of its metrics in metrics.jsonl and summary.json.
      every: steps between two runs during training; 0 for the end only.
      tables: after `run`, the rows of each per-class table.
      needs: the fields that it needs of its source.
      takes: the kind of method that it evaluates.
      overrides: keys of `config.data` that the evaluation may set for itself.
      options: keys of its own.
    """

    name: str
    every: int
    tables: dict[str, list[Any]]
    needs: frozenset[str] = frozenset()
    takes: type = Trainable
    overrides: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, setup: Any) -> "Evaluator":
        """Makes the evaluator from an `evals.registry.Setup`."""
        raise NotImplementedError

    def run(self, variables: Variables) -> dict[str, float]:
        """Returns the metrics, without the prefix, on every process."""
        raise NotImplementedError


def only(spaces: Mapping[str, Any]) -> Any:
    """Returns the value of the only space.

    Raises:
      UserError: there are several, or none.
    """
    if len(spaces) != 1:
        raise UserError(f"one space is needed, and here are {', '.join(sorted(spaces)) or 'none'}")
    return next(iter(spaces.values()))


def common_space(seen: Mapping[str, Any], text: Mapping[str, Any]) -> str:
    """Returns the name of the only space that images and texts share.

    Raises:
      UserError: there are several, or none.
    """
    common = sorted(seen.keys() & text.keys())
    if len(common) != 1:
        raise UserError(
            f"images have features in {', '.join(sorted(seen)) or 'no space'} and texts in "
            f"{', '.join(sorted(text)) or 'none'}: a method with these needs scores of its own"
        )
    return common[0]

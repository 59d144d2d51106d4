"""The interfaces between the parts: methods, predictions and evaluators, as training and inference use them.

A method derives from `Trainable` and from `Segmenting` or `Classifier` or both. It must define the functions that raise
NotImplementedError here; everything else has a default.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from jaxtyping import Array, Bool, Float, Int, UInt8

from ovseg_jax.data.windows import Whole
from ovseg_jax.errors import UserError
from ovseg_jax.kernels.unit import unit

Variables = Mapping[str, Any]
Batch = Mapping[str, Array]
Text = dict[str, Float[Array, "t d"]]
"""Embeddings of T texts in each space that a method has, by the space's name."""

# Accelerators compute float32 products in bfloat16 or TF32 by default, which can swap two names of similar scores.
PRECISION = jax.lax.Precision.HIGHEST


class Aux(NamedTuple):
    """The outputs beside the loss: metrics as (sum, count), and collections that the forward pass updated."""

    metrics: dict[str, tuple[jax.Array, jax.Array]]
    mutated: dict[str, Any]


class Prediction(NamedTuple):
    """A method's output for a batch of images, which does not depend on words.

    Attributes:
      mask_logits: [B N h w] logits of the proposals' sigmoid masks, or None for a per-pixel method.
      regions: by space, [B N D] an embedding of each proposal; empty for a per-pixel method.
      pixels: by space, [B h w D] a feature of every pixel, not normalised.
      void: [B N] score of "no object" for each proposal, for methods that learn it, on the scale of their regions'
        scores.
      image: by space, [B D] an embedding of the whole image, for decisions that first choose its classes; None for
        methods without one.
      scale: [B] 1/τ, the learned factor from cosines to logits; None for methods without one.
    """

    mask_logits: Float[Array, "*b n h w"] | None
    regions: dict[str, Float[Array, "*b n d"]]
    pixels: dict[str, Float[Array, "*b h w d"]]
    void: Float[Array, "*b n"] | None = None
    image: dict[str, Float[Array, "*b d"]] | None = None
    scale: Float[Array, "*b"] | None = None


class Vocabulary(NamedTuple):
    """The requested classes as arrays, with T names of K classes.

    Attributes:
      owner: [T] the class of each name.
      seen: [T] whether the method lists the name among those it was trained on, see `Segmenting.seen_names`.
      isthing: [K] whether a class is countable.
    """

    owner: Int[Array, "t"]
    seen: Bool[Array, "t"]
    isthing: Bool[Array, "k"]


class RegionScores(NamedTuple):
    """The scores of an image's proposals.

    Attributes:
      names: [T N] the score of each name for each proposal.
      void: [N] the score of "no object" on the same scale, or None.
      image: [T] the score of each name for the whole image on the same scale, or None.
      scale: the factor from scores to logits, or None.
    """

    names: Float[Array, "t n"]
    void: Float[Array, "n"] | None = None
    image: Float[Array, "t"] | None = None
    scale: Float[Array, ""] | None = None


class PixelScores(NamedTuple):
    """The scores of an image's pixels, [T h w], as the factors of `weights @ maps`.

    Attributes:
      weights: [T C] the weights of each name.
      maps: [C h w] feature maps.
    """

    weights: Float[Array, "t c"]
    maps: Float[Array, "c h w"]


class Trainable:
    """A model and its loss, as training uses them; it is created from (config, words, classes).

    Attributes:
      tokenizer: converts texts to (ids, valid mask), for fields of tokens; each worker process gets a copy.
      frozen: regular expressions for variables that are never trained; they are saved once in a run.
    """

    tokenizer: Any = None
    frozen: tuple[str, ...] = ()

    @classmethod
    def keys(cls, config: Any) -> dict[str, dict[str, bool]]:
        """Returns the method's own keys in each config section, and whether each has an effect; {} by default.

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
        """Returns the words that the text side knows, from a source's captions and class names; () by default."""
        del config, source
        return ()

    def init(self, rng: jax.Array) -> Variables:
        """Creates the variables: `params`, and other collections such as `batch_stats`."""
        raise NotImplementedError

    def pretrained(self) -> Mapping[str, Any]:
        """Returns a tree of NumPy arrays that replace variables of `init`; {} by default."""
        return {}

    def loss(self, variables: Variables, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Aux]:
        """Computes the training loss of one global batch: a scalar, and `Aux`."""
        raise NotImplementedError

    def save_assets(self, workdir: epath.Path) -> None:
        """Copies external files that the method needs again into a run's folder; none by default.

        The first process calls it at every start.
        """
        del workdir

    def artifacts(self, variables: Variables) -> dict[str, Callable[[epath.Path], None]]:
        """Returns the files that a finished run writes beside its checkpoints, {name: writer}.

        All processes call it.
        """
        del variables
        return {}


class Segmenting:
    """A method that predicts masks and pixel features and embeds texts, as evaluators and Segmenter use it.

    Attributes:
      modes: the origins of masks that its scores are defined for, see `decisions.rules.decide`.
      probabilities: whether the scores of regions are probabilities of the classes and of "no object".
      unknown_below: the confidence below which `Segmenter` calls a pixel unknown by default; that of the released demo
        of OpenSeg.
      whole: how `Segmenter` resizes images, each on a canvas of its own; None for the square of `data.image_size`.
      net: the image network that exports to PyTorch and ONNX write; None for a method without such a form.
      text: the text side whose words and tokeniser exports write; None for a method without one.
    """

    modes: tuple[str, ...] = ("predicted", "none", "truth")
    probabilities: bool = False
    unknown_below: float = 0.04
    whole: Whole | None = None
    net: Any = None
    text: Any = None

    def predict(
        self, variables: Variables, image: UInt8[Array, "b s s 3"], image_size: Int[Array, "b 2"]
    ) -> Prediction:
        """Predicts masks and features of images that fill `image_size` (height, width) of their canvas. Jittable."""
        raise NotImplementedError

    def embed_text(self, variables: Variables, texts: Sequence[str]) -> Text:
        """Embeds texts in every space, as unit vectors if scores are cosines."""
        raise NotImplementedError

    def kept_space(self) -> tuple[str, int] | None:
        """Returns the space and width of features of names that are worth keeping between processes; None by default.

        They take seconds to compute, and depend on nothing but the name and the files of the run.
        """
        return None

    def score_regions(self, prediction: Prediction, text: Text, vocabulary: Vocabulary) -> RegionScores:
        """Scores every name for every proposal of one image; by default the cosine in the only space. Jittable.

        Args:
          prediction: the prediction for one image, without the batch axis.
          text: the names' embeddings.
          vocabulary: the classes of the names.
        """
        del vocabulary
        space = common_space(prediction.regions, text)
        product = partial(jnp.matmul, text[space], precision=PRECISION)
        whole = None if prediction.image is None else product(prediction.image[space])
        return RegionScores(product(prediction.regions[space].T), prediction.void, whole, prediction.scale)

    def score_pixels(self, prediction: Prediction, text: Text, vocabulary: Vocabulary) -> PixelScores:
        """Scores every name for every pixel of one image; by default the cosine in the only space. Jittable."""
        del vocabulary
        space = common_space(prediction.pixels, text)
        return PixelScores(text[space], jnp.moveaxis(unit(prediction.pixels[space]), -1, 0))

    def region_scale(self, variables: Variables) -> float | None:
        """Returns 1/τ, the factor from a region's cosine to a logit; None if the method has not learned one."""
        del variables
        return None

    def seen_names(self) -> frozenset[str]:
        """Returns the names of the training classes, if scores depend on them; none by default."""
        return frozenset()


class Classifier:
    """A method that classifies whole images by their similarity to class names in a prompt.

    Attributes:
      frozen_towers: whether the towers never change; features under other prompts are then computed only once in a run.
      by_place: whether it has parameters for each class; `embed_text` then needs the names of all classes at once,
        since classes of the same name differ only by their position.
      text_per_image: whether class features depend on the image; `embed_text_for` then computes them, and `embed_text`
        raises an error.
      unit_norm: whether features are unit vectors, scores cosines, and distances between features meaningful.
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
        """Embeds texts unchanged, without the method's own prompt."""
        raise NotImplementedError

    def embed_prompt(self, variables: Variables, prompt: Any, texts: Sequence[str]) -> Text:
        """Embeds class names in another learned prompt (`towers.prompt_file.Prompt`).

        Raises:
          UserError: the method cannot use one.
        """
        raise UserError(f"the method {type(self).__name__} cannot use the prompt {prompt.source}")

    def embed_text_for(self, variables: Variables, texts: Sequence[str], image: Float[Array, " d"]) -> Text:
        """Embeds class names for one image, given by its feature, if `text_per_image`. Jittable."""
        raise NotImplementedError

    def score_images(self, image: Float[Array, "b d"], text: Text) -> Float[Array, "b t"]:
        """Scores texts for images; by default the cosine in the only space. Jittable."""
        return jnp.matmul(image, only(text).T, precision=PRECISION)

    def logit_scale(self, variables: Variables) -> Float[Array, ""]:
        """Returns 1/τ, the factor from scores to logits."""
        raise NotImplementedError


class Evaluator:
    """One named evaluation, made by `evals.registry`.

    Attributes:
      name: prefix of its metrics in metrics.jsonl and summary.json.
      every: steps between two runs during training; 0 for the end only.
      tables: after `run`, the rows of each per-class table.
      needs: the fields that its source must provide.
      takes: the class of methods that it evaluates.
      overrides: keys of `config.data` that the evaluation may override.
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
        """Creates the evaluator from an `evals.registry.Setup`."""
        raise NotImplementedError

    def run(self, variables: Variables) -> dict[str, float]:
        """Computes the metrics, named without the prefix, on every process."""
        raise NotImplementedError


def only(spaces: Mapping[str, Any]) -> Any:
    """Returns the value of the only space.

    Raises:
      UserError: there are several, or none.
    """
    if len(spaces) != 1:
        raise UserError(
            f"exactly one embedding space is needed, but there are {', '.join(sorted(spaces)) or 'none'}"
        )
    return next(iter(spaces.values()))


def common_space(image: Mapping[str, Any], text: Mapping[str, Any]) -> str:
    """Returns the name of the only space that images and texts share.

    Raises:
      UserError: there are several, or none.
    """
    common = sorted(image.keys() & text.keys())
    if len(common) != 1:
        raise UserError(
            f"images have features in {', '.join(sorted(image)) or 'no space'} and texts in "
            f"{', '.join(sorted(text)) or 'none'}: such a method must define its own scores"
        )
    return common[0]


def log_probability(
    logits: Float[Array, "t n"], vocabulary: Vocabulary, void: Float[Array, "n"] | None = None
) -> Float[Array, "t n"]:
    """Computes the log probability of each name for each region: a softmax over classes, each scored as its best name.

    Args:
      logits: of each name for each region.
      vocabulary: the classes of the names.
      void: the logit of "no object", a further class, or None.
    """
    classes = jax.ops.segment_max(logits, vocabulary.owner, num_segments=len(vocabulary.isthing))
    total = jax.nn.logsumexp(classes, axis=0)
    return logits - (total if void is None else jnp.logaddexp(total, void))

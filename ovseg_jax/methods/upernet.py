"""UPerNet as a method: a linear classifier of pixels over the classes of its training data (the student of P-Seg+).

papers/002, C.2: UPerNet on MAE's ViT-B, trained on label maps, which for P-Seg+ another model predicted (a stage of
kind "pseudo_label_maps"). It has no text side: it only knows the names of its classes.
"""

from collections.abc import Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8
from ml_collections import ConfigDict

from ovseg_jax.config import keys
from ovseg_jax.data.source_base import Source, check_provides
from ovseg_jax.errors import UserError
from ovseg_jax.models.backbones import build_backbone
from ovseg_jax.models.tap_pyramid import TapPyramid
from ovseg_jax.models.upernet import UPerNet, enlarge
from ovseg_jax.parallel.accumulate import in_parts
from ovseg_jax.protocols import (
    Aux,
    Batch,
    PixelScores,
    Prediction,
    Segmenting,
    Text,
    Trainable,
    Variables,
    Vocabulary,
)
from ovseg_jax.towers.vocabulary import spoken_words
from ovseg_jax.vocab.classes import ClassList, rows_of_names
from ovseg_jax.vocab.words import WordList

SPACE = "classes"
"""The name of the only space, with an axis for each class."""

NET_FIELDS = ("width", "pools", "aux_width", "dropout", "norm", "remat")


class UPerNetMethod(Trainable, Segmenting):
    """A per-pixel classifier, trained by the cross-entropy of both heads; `config` is the whole config of a run.

    Keys of `config.model`: `init`, a published UPerNet to start from ("" for none); `backbone`, with an `init` of its
    own; `mean` and `std` of pixels; `dtype`; and the fields of `models.upernet.UPerNet`. `config.loss.auxiliary_weight`
    is the weight of the auxiliary head's loss.

    Pixels of the groups "unseen" and "held_out" are not used in training, so that these classes are hardly predicted. A
    pixel's score for a class is 1 + log p / log K, for its probability p among the K classes: 1 is certainty and 0 is
    chance. Unlike p itself, it may be interpolated: the best class is that of the interpolated logits, as in
    mmsegmentation.

    Raises:
      UserError: the config has an unknown key or value, or fewer than two classes to train.
    """

    modes = ("predicted", "none")

    @classmethod
    def fields(cls, config: ConfigDict) -> tuple[str, ...]:
        """Returns the batch fields that the loss reads."""
        del config
        return ("image", "pixel_classes")

    @classmethod
    def keys(cls, config: ConfigDict) -> dict[str, dict[str, bool]]:
        """Returns the method's own keys in each section, and whether each has an effect, see `experiment.keys`."""
        auxiliary = bool(config.get("model", {}).get("aux_width", UPerNet.aux_width))
        model = keys("init backbone mean std dtype") | dict.fromkeys(NET_FIELDS, True)
        return {"model": model, "loss": keys("auxiliary_weight", auxiliary)}

    @classmethod
    def vocabulary(cls, config: ConfigDict, source: Source) -> Sequence[str]:
        """Returns the words of class names, of which no text side needs any.

        Raises:
          UserError: the source has no label maps.
        """
        check_provides(source, ("segments", "class_ids"), "the method upernet")
        return spoken_words(config.data, source).words

    def __init__(self, config: ConfigDict, words: WordList, classes: ClassList):
        del words
        self.config, self.names = config, classes.names
        withheld = classes.withheld()
        if (count := len(classes) - len(withheld)) < 2:
            raise UserError(
                f"the method upernet needs at least two classes to train, but the data has {count}"
            )
        # The last entry is that of pixels without a class, -1.
        self._target = np.array([-1 if k in withheld else k for k in range(len(classes))] + [-1], np.int32)
        model = config.model.to_dict()
        if unknown := sorted(model.keys() - {"init", "backbone", "mean", "std", "dtype", *NET_FIELDS}):
            raise UserError(f"config.model has no key {unknown[0]!r}")
        dtype = jnp.dtype(model.get("dtype", "float32"))
        fields: dict[str, Any] = {key: model[key] for key in NET_FIELDS if key in model}
        if "pools" in fields:
            fields["pools"] = tuple(fields["pools"])
        self.net = UPerNet(
            build_backbone(config.model.backbone, dtype),
            tuple(model["mean"]),
            tuple(model["std"]),
            len(classes),
            dtype=dtype,
            **fields,
        )
        if isinstance(self.net.backbone, TapPyramid):
            self.frozen = ("/tower/Transformer/encoder_norm/",)  # not used: the taps lie before it

    def init(self, rng: jax.Array) -> Variables:
        """Creates `params` {"image"}, and `batch_stats` if there are batch norms."""
        size = self.config.data.image_size
        variables = self.net.init(rng, jnp.zeros((1, size, size, 3), jnp.uint8), jnp.full((1, 2), size))
        rest, params = flax.core.pop(variables, "params")
        return {"params": {"image": params}, **rest}

    def pretrained(self) -> dict[str, Any]:
        """Returns the weights of `model.init`, or of `model.backbone.init`."""
        whole, backbone = self.config.model.get("init", ""), self.config.model.backbone.get("init", "")
        if not whole and not backbone:
            return {}
        if whole and backbone:
            raise UserError("model.init and model.backbone.init are both given: leave out one of them")
        from ovseg_jax.pretrained.load import load

        variables = dict(jax.eval_shape(self.init, jax.random.key(0)))
        shapes = {**variables, "params": variables["params"]["image"]}
        pixels = (self.net.mean, self.net.std)
        if whole:
            found = load(whole, self.net, shapes, pixels=pixels)
        else:
            own = {name: tree["backbone"] for name, tree in shapes.items() if "backbone" in tree}
            found = load(backbone, self.net.backbone, own, pixels=pixels)
            found = {name: {"backbone": tree} for name, tree in found.items()}
        return {**found, "params": {"image": found["params"]}}

    def loss(self, variables: Variables, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Aux]:
        """Computes the cross-entropy, the mean over labelled pixels, plus the weighted one of the auxiliary head.

        Logits are interpolated to the size of the labels, as in mmsegmentation and transformers.
        """
        network = in_parts(self._classify, self.config.get("accumulate", 1))
        _, sums, mutated = network(variables, batch, rng)
        count = jnp.maximum(sums["count"], 1)
        loss = sums["loss"] / count
        metrics = {"pixel_accuracy": (sums["correct"], sums["count"])}
        if "auxiliary" in sums:
            loss += float(self.config.loss.auxiliary_weight) * sums["auxiliary"] / count
            metrics["auxiliary_loss"] = (sums["auxiliary"], sums["count"])
        return loss, Aux({"loss": (loss, jnp.ones(())), **metrics}, mutated)

    def _classify(
        self, variables: Variables, batch: Batch, rng: jax.Array
    ) -> tuple[None, dict[str, Array], dict]:
        """Computes for some images the sums over labelled pixels, and the updated collections."""
        out, mutated = self.net.apply(
            _image_variables(variables),
            batch["image"],
            batch["image_size"],
            train=True,
            mutable=[name for name in variables if name != "params"],
            rngs={"dropout": rng},
        )
        target = jnp.asarray(self._target)[batch["pixel_classes"]]
        valid = (target >= 0) & batch["example_mask"][:, None, None]

        import optax  # as in `losses.matching`

        def total(logits: Array) -> tuple[Array, Array]:
            logits = enlarge(logits, target.shape[1:])
            nll = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(target, 0))
            return jnp.where(valid, nll, 0).sum(), logits

        loss, logits = total(out.logits)
        correct = ((logits.argmax(-1) == target) & valid).sum().astype(jnp.float32)
        sums = {"loss": loss, "correct": correct, "count": valid.sum().astype(jnp.float32)}
        if out.auxiliary is not None:
            sums["auxiliary"] = total(out.auxiliary)[0]
        return None, sums, dict(mutated)

    def predict(
        self, variables: Variables, image: UInt8[Array, "b s t 3"], image_size: Int[Array, "b 2"]
    ) -> Prediction:
        """Predicts the scores of the classes for every pixel."""
        out: Any = self.net.apply(_image_variables(variables), image, image_size)
        return Prediction(None, {}, {SPACE: scores_of(out.logits)})

    def embed_text(self, variables: Variables, texts: Sequence[str]) -> Text:
        """Returns the unit vector of the class that each name belongs to.

        Raises:
          UserError: see `rows_of_names`.
        """
        del variables
        rows = rows_of_names(self.names, texts, "this UPerNet has no text side and")
        return {SPACE: jax.nn.one_hot(rows, len(self.names))}

    def score_pixels(self, prediction: Prediction, text: Text, vocabulary: Vocabulary) -> PixelScores:
        """Returns the scores of the names' classes."""
        del vocabulary
        return PixelScores(text[SPACE], jnp.moveaxis(prediction.pixels[SPACE], -1, 0))


def scores_of(logits: Float[Array, "b h w k"]) -> Float[Array, "b h w k"]:
    """Computes 1 + log softmax(logits) / log K."""
    return 1 + jax.nn.log_softmax(logits) / jnp.log(logits.shape[-1])


def _image_variables(variables: Variables) -> Variables:
    return {**variables, "params": variables["params"]["image"]}

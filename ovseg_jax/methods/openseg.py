"""OpenSeg (papers/004): class-agnostic proposals learned from masks, words grounded to proposals by captions."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8
from ml_collections import ConfigDict

from ovseg_jax.config import keys
from ovseg_jax.data.source_base import Source, check_provides
from ovseg_jax.errors import UserError
from ovseg_jax.kernels.all_pairs import FORMS
from ovseg_jax.kernels.grounding import grounding_loss
from ovseg_jax.kernels.unit import unit
from ovseg_jax.losses.masks import best_match_dice_loss
from ovseg_jax.losses.temperature import bounded, unbounded
from ovseg_jax.methods.text_side import SPACE, TextSide, text_side
from ovseg_jax.models.backbones import build_backbone
from ovseg_jax.models.openseg import OpenSegFeatures, OpenSegNet
from ovseg_jax.parallel.accumulate import in_parts
from ovseg_jax.parallel.sharding import active_batch_axes
from ovseg_jax.protocols import Aux, Batch, Prediction, Segmenting, Trainable, Variables
from ovseg_jax.towers.text import embed_words
from ovseg_jax.towers.vocabulary import counted_words
from ovseg_jax.vocab.classes import ClassList
from ovseg_jax.vocab.words import WordList

NET_FIELDS = (
    "width embed_dim num_queries decoder_layers decoder_heads head_convs pyramid_output_conv position_grid "
    "mask_scale mask_bias detach_masks remat"
).split()

OTHER_FIELDS = ("backbone", "mean", "std", "dtype")


def build_net(config: ConfigDict, **overrides) -> OpenSegNet:
    """Creates the image network of a config's `model` section; raises a UserError for an unknown key."""
    model = config.model.to_dict()
    known = {*NET_FIELDS, *OTHER_FIELDS}
    if unknown := set(model) - known:
        raise UserError(
            f"unknown keys of config.model: {', '.join(sorted(unknown))}; known keys: {', '.join(sorted(known))}"
        )
    dtype = jnp.dtype(model.get("dtype", "float32"))
    fields = {k: model[k] for k in NET_FIELDS if k in model} | overrides
    backbone = build_backbone(config.model.backbone, dtype)
    return OpenSegNet(backbone, tuple(model["mean"]), tuple(model["std"]), dtype=dtype, **fields)


class OpenSeg(TextSide, Trainable, Segmenting):
    """The method OpenSeg: network, text side and losses; `config` is the whole config of a run.

    Keys of `config.loss`: `mask_weight` is α of eq. 5; `contrast` is "unsync" (within groups of `group` examples) or
    "sync" (the global batch, computed in a `form` of `kernels.all_pairs`, or "auto", by its size); `temperature` is the
    initial τ of eq. 2, learned within `temperature_bounds` (ours; () for none); `shared_temperature` uses one τ for
    eq. 3 and eq. 4 as in the paper, otherwise each has its own; `grounding_weight` 0 trains only the masks (the teacher
    of 3.3), `mask_weight` 0 only the words (Table 8), with batches without masks.

    The mask loss is a mean over the images of a batch that have masks (ours: where the paper weights the masks of
    captioned images by 0, in Table 8, it may divide by all images, which halves the weight of the others).
    """

    @classmethod
    def fields(cls, config: ConfigDict) -> tuple[str, ...]:
        """Returns the batch fields that the loss reads."""
        loss, of = config.get("loss", {}), {"masks": "mask_weight", "words": "grounding_weight"}
        return ("image", *(field for field, weight in of.items() if loss.get(weight, 1)))

    @classmethod
    def vocabulary(cls, config: ConfigDict, source: Source) -> Sequence[str]:
        """Returns the words of captions and class names that have an embedding.

        Raises:
          UserError: the source lacks the masks or captions that a loss needs.
        """
        fields = cls.fields(config)
        if "masks" in fields:
            check_provides(source, ("segments",), "the mask loss", "loss.mask_weight=0 trains captions alone")
        if "words" in fields:
            advice = "loss.grounding_weight=0 trains masks alone; captions are annotations/captions_<split>.json for "
            advice += "COCO, and captions.json for a folder"
            check_provides(source, ("captions",), "the grounding loss", advice)
        return counted_words(config.data, source, captions="words" in fields).words

    @classmethod
    def keys(cls, config: ConfigDict) -> dict[str, dict[str, bool]]:
        """Returns the method's own keys in each section, and whether each has an effect, see `experiment.keys`."""
        sync, tower = config.loss.get("contrast") == "sync", bool(config.text.get("tower"))
        grounding = bool(config.loss.get("grounding_weight", 1))
        return {
            "model": dict.fromkeys([*NET_FIELDS, *OTHER_FIELDS], True),
            "text": keys("tower init prompt", tower) | keys("learned vectors", not tower),
            "loss": {
                **keys("mask_weight grounding_weight"),
                **keys("contrast temperature temperature_bounds shared_temperature", grounding),
                **keys("group", grounding and not sync),
                **keys("form", grounding and sync),
            },
        }

    def __init__(self, config: ConfigDict, words: WordList, classes: ClassList):
        self.config, self.loss_config = config, config.loss
        self.net = build_net(config)
        self.text = text_side(config, words, self.net.embed_dim)
        self.frozen = () if self.text.learned else ("^text/",)
        if self.loss_config.contrast not in ("sync", "unsync"):
            raise UserError(f"loss.contrast={self.loss_config.contrast!r} is not 'sync' or 'unsync'")
        form = self.loss_config.form
        if form not in ("auto", *FORMS):
            raise UserError(f"loss.form={form!r} is not one of auto, {', '.join(FORMS)}")
        self.form = None if form == "auto" else form
        self.group = self.loss_config.group if self.loss_config.contrast == "unsync" else None
        if self.group and config.batch_size % self.group:
            raise UserError(f"batch_size={config.batch_size} is not a multiple of loss.group={self.group}")

    def init(self, rng: jax.Array) -> Variables:
        """Creates `params` {"image", "text", "temperature"}, and `batch_stats` if the backbone has them."""
        image_rng, text_rng = jax.random.split(rng)
        size = self.config.data.image_size
        image = jnp.zeros((1, size, size, 3), jnp.uint8)
        variables = self.net.init(image_rng, image, jnp.full((1, 2), size))
        rest, params = flax.core.pop(variables, "params")
        raw = unbounded(self.loss_config.temperature, *self.loss_config.temperature_bounds)
        temperature = {"region": raw} | ({} if self.loss_config.shared_temperature else {"pair": raw})
        params = {"image": params, "text": self.text.init(text_rng), "temperature": temperature}
        return {"params": params, **rest}

    def pretrained(self) -> dict[str, Any]:
        """Returns the weights of `model.backbone.init` and of a frozen text tower."""
        params: dict[str, Any] = {}
        if text := self.text.pretrained():
            params["text"] = text
        init = self.config.model.backbone.get("init", "")
        if not init:
            return {"params": params} if params else {}
        from ovseg_jax.pretrained.load import load

        shapes = jax.eval_shape(self.init, jax.random.key(0))
        own = {"params": shapes["params"]["image"]["backbone"]}
        own |= {name: tree["backbone"] for name, tree in shapes.items() if name != "params"}
        found = load(init, self.net.backbone, own, pixels=(self.net.mean, self.net.std))
        rest = {name: {"backbone": tree} for name, tree in found.items() if name != "params"}
        return {"params": {**params, "image": {"backbone": found["params"]}}, **rest}

    def loss(self, variables: Variables, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Aux]:
        """Computes eq. 5: grounding loss + α mask loss."""
        network = in_parts(self._forward, self.config.get("accumulate", 1))
        regions, masks, mutated = network(variables, batch, rng)
        params, one = variables["params"], jnp.ones(())
        region_tau, pair_tau = self.temperatures(params)
        mean = lambda total, count: total / jnp.maximum(count, 1)
        loss, parts = jnp.zeros(()), {}
        if "word_ids" in batch:
            words = embed_words(params["text"]["table"], batch["word_ids"])
            grounding = grounding_loss(
                regions,
                words,
                batch["word_valid"],
                batch["example_mask"],
                region_tau,
                pair_tau,
                group=self.group,
                form=self.form,
                batch_axes=active_batch_axes(),
            )
            loss = self.loss_config.grounding_weight * mean(grounding.loss, grounding.pairs)
            parts["grounding_loss"] = (grounding.loss, grounding.pairs)
            parts["caption_accuracy"] = (grounding.correct, grounding.pairs)
        if masks is not None:
            loss = loss + self.loss_config.mask_weight * mean(*masks)
            parts = {"mask_loss": masks, **parts}
        temperatures = {"region_temperature": (region_tau, one), "pair_temperature": (pair_tau, one)}
        return loss, Aux({"loss": (loss, one), **parts, **temperatures}, mutated)

    def _forward(
        self, variables: Variables, batch: Batch, rng: jax.Array
    ) -> tuple[Array, tuple[Array, Array] | None, dict]:
        """Computes for some images unit-norm regions, sum and count of the mask loss, and the updated collections."""
        out, mutated = apply_net(self.net, variables, batch, rng)
        assert out.mask_logits is not None and out.region_sum is not None
        if "masks" not in batch:
            return unit(out.region_sum), None, mutated
        weight = batch["mask_weight"] * batch["example_mask"]
        mask_loss = best_match_dice_loss(out.mask_logits, batch["masks"], batch["mask_valid"], weight)
        return unit(out.region_sum), mask_loss, mutated

    def temperatures(self, params: Mapping) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Returns τ of the softmax over regions (eq. 3) and τ of the softmax over pairs (eq. 4)."""
        raw, bounds = params["temperature"], self.loss_config.temperature_bounds
        return bounded(raw["region"], *bounds), bounded(raw.get("pair", raw["region"]), *bounds)

    def predict(
        self, variables: Variables, image: UInt8[Array, "b s t 3"], image_size: Int[Array, "b 2"]
    ) -> Prediction:
        """Predicts proposals, their embeddings and per-pixel features."""
        out: Any = self.net.apply(image_variables(variables), image, image_size)
        regions = {} if out.region_sum is None else {SPACE: unit(out.region_sum)}
        return Prediction(out.mask_logits, regions, {SPACE: out.pixel_embed})

    def region_scale(self, variables: Variables) -> float:
        """Returns 1/τ of eq. 3."""
        return 1 / float(self.temperatures(variables["params"])[0])


def image_variables(variables: Variables) -> Variables:
    """Returns the variables of the image network alone."""
    return {**variables, "params": variables["params"]["image"]}


def apply_net(
    net: OpenSegNet, variables: Variables, batch: Batch, rng: jax.Array
) -> tuple[OpenSegFeatures, dict]:
    """Runs the network in training mode; returns its features and the collections that it updated."""
    mutable = [name for name in variables if name != "params"]
    out, mutated = net.apply(
        image_variables(variables),
        batch["image"],
        batch["image_size"],
        train=True,
        mutable=mutable,
        rngs={"dropout": rng},
    )
    return out, dict(mutated)

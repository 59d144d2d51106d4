"""P-Seg (papers/002): a MaskFormer that learns its masks from pseudo-masks, and their meaning from captions."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jaxtyping import Array, Float, Int, UInt8
from ml_collections import ConfigDict

from ovseg_jax.config import keys
from ovseg_jax.data.fields import batch_fields
from ovseg_jax.data.source_base import Source, check_provides
from ovseg_jax.errors import UserError
from ovseg_jax.kernels.all_pairs import FORMS
from ovseg_jax.kernels.contrastive import Contrast, contrastive_loss, multi_label_loss
from ovseg_jax.kernels.grounding import grounding_loss
from ovseg_jax.kernels.unit import unit
from ovseg_jax.losses.masks import best_match_dice_loss
from ovseg_jax.losses.matching import Weights, matched_losses
from ovseg_jax.losses.temperature import bounded, unbounded
from ovseg_jax.methods import maskformer, openseg
from ovseg_jax.models.backbones import build_vit
from ovseg_jax.models.groupvit import GroupVitImage
from ovseg_jax.models.openseg import OpenSegNet, inside
from ovseg_jax.models.pseg import GroupingNet, PSegFeatures, PSegNet, SegmentViT
from ovseg_jax.models.pseudo_masks import GENERATOR_KEYS, build_generator
from ovseg_jax.parallel.accumulate import in_parts
from ovseg_jax.parallel.sharding import active_batch_axes
from ovseg_jax.protocols import Aux, Batch, Prediction, Segmenting, Text, Trainable, Variables
from ovseg_jax.towers.text import embed_phrases, embed_words
from ovseg_jax.towers.text_table import TextTable
from ovseg_jax.towers.text_transformer import TEXT_KEYS, TextTransformer
from ovseg_jax.towers.vocabulary import counted_words, spoken_words
from ovseg_jax.vocab.classes import ClassList
from ovseg_jax.vocab.tokenizers import keep_tokenizer
from ovseg_jax.vocab.words import WordList

SPACE = "text"
"""The name of the only space, which images and texts share."""

OWN_FIELDS = ("embed_dim", "projection_hidden", "projection_norm")
LOSS_KEYS = "mask_weight contrastive_weight average aggregation temperature temperature_bounds"
NETWORKS = ("maskformer", "openseg", "segment_vit", "groupvit")
GROUPING_FIELDS = tuple(
    field.name for field in dataclasses.fields(GroupVitImage) if field.name not in ("parent", "name", "dtype")
)
MATCHING = ("hungarian", "best")
AGGREGATION = ("mean", "words")


def build_net(config: ConfigDict) -> PSegNet | OpenSegNet | SegmentViT | GroupingNet:
    """Creates the image network of a config's `model` section.

    Raises:
      UserError: the network or a key is unknown.
    """
    model = config.model.to_dict()
    network = model.pop("network")
    if network not in NETWORKS:
        raise UserError(f"model.network={network!r} is not one of {', '.join(NETWORKS)}")
    if network == "openseg":
        net = openseg.build_net(ConfigDict(dict(model=model)))
        if not net.num_queries:
            raise UserError("model.num_queries=0: P-Seg needs masks")
        return net
    if network == "groupvit":
        return _grouping(config)
    fields = {key: model[key] for key in OWN_FIELDS if key in model}
    if network == "segment_vit":
        return _segment_vit(config, fields)
    return PSegNet(maskformer.build_net(config.model, ["network", *OWN_FIELDS]), **fields)


def _segment_vit(config: ConfigDict, fields: Mapping[str, Any]) -> SegmentViT:
    model, need = config.model, {*openseg.OTHER_FIELDS, *OWN_FIELDS, "network"}
    if unknown := sorted(set(model.keys()) - need):
        raise UserError(f"config.model of the network segment_vit has no key {unknown[0]!r}")
    if not config.get("pseudo_masks") or config.loss.mask_weight:
        raise UserError(
            "the network segment_vit has the masks of the section pseudo_masks and learns none: set loss.mask_weight=0"
        )
    if model.backbone.get("init", ""):
        raise UserError("model.backbone.init: the network segment_vit starts from random weights")
    dtype = jnp.dtype(model.get("dtype", "float32"))
    tower = build_vit(model.backbone, dtype, "the network segment_vit")
    generator = build_generator(config.pseudo_masks.to_dict(), dtype)
    return SegmentViT(tower, generator, tuple(model.mean), tuple(model.std), dtype=dtype, **fields)


def _grouping(config: ConfigDict) -> GroupingNet:
    model = {key: tuple(x) if isinstance(x, list) else x for key, x in config.model.to_dict().items()}
    if unknown := sorted(model.keys() - {"network", "mean", "std", "dtype", *GROUPING_FIELDS}):
        raise UserError(f"config.model of the network groupvit has no key {unknown[0]!r}")
    if config.get("pseudo_masks") or config.loss.mask_weight:
        raise UserError(
            "the network groupvit learns no masks: set loss.mask_weight=0, and leave out the section pseudo_masks"
        )
    fields: dict[str, Any] = {key: x for key, x in model.items() if key in GROUPING_FIELDS}
    image = GroupVitImage(**fields, dtype=jnp.dtype(model.get("dtype", "float32")))
    return GroupingNet(image, tuple(model["mean"]), tuple(model["std"]))


def features_of(out: Any) -> PSegFeatures:
    """Returns the features of P-Seg from the output of any of the networks."""
    if isinstance(out, PSegFeatures):
        return out
    return PSegFeatures(
        out.mask_logits[:, None], out.region_sum, unit(out.region_sum).mean(1), out.pixel_embed
    )


class PSeg(Trainable, Segmenting):
    """The method P-Seg: network, text side and losses; `config` is the whole config of a run.

    `config.pseudo_masks` describes the generator of masks (3.3.1), which runs in the step, on the augmented images;
    without that section, the masks of the source are used, which may be pseudo-masks made ahead of time.

    `config.model.network` is "maskformer" (3.2), see `models.pseg`, or "openseg" (ours), whose mask features are pixel
    embeddings, summed under the predicted mask; or "segment_vit", baseline 2 of 4.1, whose masks are the pseudo-masks,
    see `models.pseg.SegmentViT`; or "groupvit", whose masks are the groups of `models.groupvit.GroupVitImage`, with the
    fields of that class in `config.model`.

    Keys of `config.loss`: `mask_weight` and `contrastive_weight` are λ of eq. 4; `average` halves their sum, as Figure
    17 does and eq. 4 does not. `matching` is "hungarian" (3.3.1), with `focal` and `dice` of eq. 1, or "best" (ours):
    `losses.masks.best_match_dice_loss`. `aggregation` is "mean" (3.3.2: the mean of the mask features is contrasted
    with the whole text), or "words" (ours): each word attends to the masks, see `kernels.grounding`, over groups of
    `group` examples, or the whole batch with 0. `temperature` is the initial σ of eq. 2, learned within
    `temperature_bounds` (ours; () for none); with "words", the softmax over masks has one of its own. With a
    `multi_label_weight` above 0 (0 without the key, as 3.3.3 has no such term; 1 in GroupViT), the image is also
    contrasted with the batch field `prompts`, see `kernels.contrastive.multi_label_loss`, at a temperature of its own.
    """

    modes = ("predicted",)

    @classmethod
    def fields(cls, config: ConfigDict) -> tuple[str, ...]:
        """Returns the batch fields that the loss reads."""
        given = config.loss.get("mask_weight", 1) and not config.get("pseudo_masks")
        masks = ("masks",) if given else ()
        if not config.text.get("layers"):
            return ("image", *masks, "words")
        return (
            "image",
            *masks,
            "tokens",
            *(("prompts",) if config.loss.get("multi_label_weight", 0) else ()),
        )

    @classmethod
    def vocabulary(cls, config: ConfigDict, source: Source) -> Sequence[str]:
        """Returns the words that the text side knows; none for a tokeniser of word pieces, so no caption is read."""
        if "masks" in cls.fields(config):
            advice = (
                "masks= of a source names pseudo-masks, and the section pseudo_masks makes them in the step"
            )
            check_provides(source, ("segments",), "the mask loss", advice)
        advice = "captions.json for a folder, annotations/captions_<split>.json for COCO"
        check_provides(source, ("captions",), "the contrastive loss", advice)
        if not config.text.get("layers"):
            return counted_words(config.data, source).words
        return (
            spoken_words(config.data, source, batch_fields(cls, config)).words
            if config.text.tokenizer == "words"
            else ()
        )

    @classmethod
    def keys(cls, config: ConfigDict) -> dict[str, dict[str, bool]]:
        """Returns the method's own keys in each section, and whether each has an effect, see `experiment.keys`."""
        loss, transformer = config.loss, bool(config.text.get("layers"))
        words, masks = loss.get("aggregation") == "words", bool(loss.get("mask_weight", 1))
        own = {
            "maskformer": [*maskformer.NET_FIELDS, *OWN_FIELDS],
            "openseg": openseg.NET_FIELDS,
            "segment_vit": OWN_FIELDS,
            "groupvit": GROUPING_FIELDS,
        }.get(config.model.get("network"), ())
        others = (
            openseg.OTHER_FIELDS if config.model.get("network") != "groupvit" else ("mean", "std", "dtype")
        )
        return {
            "model": dict.fromkeys(["network", *others, *own], True),
            "text": keys(TEXT_KEYS, transformer) | keys("learned vectors", not transformer),
            "loss": {
                **keys(LOSS_KEYS),
                **keys("matching", masks),
                **keys("focal dice", masks and loss.get("matching") == "hungarian"),
                **keys("group", words),
                **keys("form", not (words and loss.get("group"))),
                **keys("multi_label_weight", transformer),
            },
            "pseudo_masks": dict.fromkeys(
                GENERATOR_KEYS, masks or config.model.get("network") == "segment_vit"
            ),
        }

    def __init__(self, config: ConfigDict, words: WordList, classes: ClassList):
        del classes
        self.config, self.loss_config = config, config.loss
        self.net = build_net(config)
        dim = self.net.embed_dim
        loss = self.loss_config
        for key, known in (("matching", MATCHING), ("aggregation", AGGREGATION), ("form", ("auto", *FORMS))):
            if loss[key] not in known:
                raise UserError(f"loss.{key}={loss[key]!r} is not one of {', '.join(known)}")
        self.multi_label = float(loss.get("multi_label_weight", 0))
        if self.multi_label and not config.text.get("layers"):
            raise UserError(
                f"loss.multi_label_weight={self.multi_label} needs a text transformer: text.layers above 0"
            )
        self.text: TextTable | TextTransformer
        if config.text.get("layers"):
            if loss.aggregation == "words":
                raise UserError("loss.aggregation=words needs a vector for each word: text.layers=0")
            self.text = TextTransformer(
                config.text, words, dim, jnp.dtype(config.model.get("dtype", "float32"))
            )
            self.tokenizer = self.text.tokenizer
        else:
            self.text = TextTable(config.text, words, dim)
        self.frozen = () if self.text.learned else ("^text/",)
        self.generator = None
        if loss.mask_weight and config.get("pseudo_masks"):
            self.generator = build_generator(
                config.pseudo_masks.to_dict(), jnp.dtype(config.model.get("dtype", "float32"))
            )
            self.frozen += ("^generator/",)
        if isinstance(self.net, SegmentViT):
            self.frozen += ("^image/generator/",)
        self.form = None if loss.form == "auto" else loss.form
        self.group = (loss.get("group", 0) if loss.aggregation == "words" else 0) or None
        if self.group and config.batch_size % self.group:
            raise UserError(f"batch_size={config.batch_size} is not a multiple of loss.group={self.group}")

    def init(self, rng: jax.Array) -> Variables:
        """Creates `params` {"image", "text", "temperature"}, and `batch_stats` of the parts that have them."""
        image_rng, text_rng = jax.random.split(rng)
        size = self.config.data.image_size
        image = self.net.init(image_rng, jnp.zeros((1, size, size, 3), jnp.uint8), jnp.full((1, 2), size))
        made = self.text.init(text_rng)
        text = made if isinstance(self.text, TextTransformer) else {"params": made}
        raw = unbounded(self.loss_config.temperature, *self.loss_config.temperature_bounds)
        others = {"region": raw} if self.loss_config.aggregation == "words" else {}
        others |= {"prompts": raw} if self.multi_label else {}
        joined = {name: {"image": tree} for name, tree in image.items()}
        for name, tree in text.items():
            joined.setdefault(name, {})["text"] = tree
        joined["params"]["temperature"] = {"pair": raw, **others}
        if self.generator is not None:
            made = self.generator.init(
                jax.random.key(0), jnp.zeros((1, size, size, 3), jnp.uint8), jnp.full((1, 2), size)
            )
            joined["params"] |= {"generator": made["params"]} if made else {}
        return joined

    def pretrained(self) -> dict[str, Any]:
        """Returns the weights of `model.backbone.init` and `pseudo_masks.backbone.init`.

        P-Seg's own network starts without any (ours: the paper does not say).
        """
        found: dict[str, Any] = {}
        if init := self.config.model.get("backbone", {}).get("init", ""):
            variables = jax.eval_shape(self.init, jax.random.key(0))
            shapes = {name: tree["image"] for name, tree in variables.items() if "image" in tree}
            inner: Any = self.net
            around = lambda tree: tree
            if isinstance(self.net, PSegNet):
                inner = self.net.net
                around = lambda tree: {"net": tree}
                shapes = {name: tree["net"] for name, tree in shapes.items() if "net" in tree}
            loaded = maskformer.pretrained_backbone(inner, shapes, init)
            found = {name: {"image": around(tree)} for name, tree in loaded.items()}
        own = isinstance(self.net, SegmentViT)
        generator = self.net.generator if isinstance(self.net, SegmentViT) else self.generator
        if generator is not None and "backbone" in self.config.pseudo_masks:
            from ovseg_jax.pretrained.generator import generator_weights

            weights = generator_weights(generator, self.config.pseudo_masks.backbone.get("init", ""))
            place = {"generator": weights["params"]}
            found.setdefault("params", {}).update({"image": place} if own else place)
        return found

    def loss(self, variables: Variables, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Aux]:
        """Computes eq. 4."""
        network = in_parts(self._forward, self.config.get("accumulate", 1))
        (image, text, prompts), masks, mutated = network(variables, batch, rng)
        weights, one = self.loss_config, jnp.ones(())
        out = self._contrast(variables["params"], image, text, batch)
        contrast = out.loss / jnp.maximum(out.pairs, 1)
        loss = weights.contrastive_weight * contrast
        parts = {"contrastive_loss": (out.loss, out.pairs), "caption_accuracy": (out.correct, out.pairs)}
        if masks is not None:
            loss = loss + weights.mask_weight * masks[0] / jnp.maximum(masks[1], 1)
            parts["mask_loss"] = masks
        if prompts is not None:
            parts["multi_label_loss"] = self._contrast_prompts(variables["params"], image, prompts, batch)
            total, count = parts["multi_label_loss"]
            loss = loss + self.multi_label * total / jnp.maximum(count, 1)
        loss = loss / 2 if weights.average else loss
        sigma = self._temperature(variables["params"], "pair")
        return loss, Aux({"loss": (loss, one), **parts, "temperature": (sigma, one)}, mutated)

    def _contrast(self, params: Mapping, image: Array, text: Array, batch: Batch) -> Contrast:
        sigma, axes = self._temperature(params, "pair"), active_batch_axes()
        if self.loss_config.aggregation == "words":
            return grounding_loss(
                image,
                text,
                batch["word_valid"],
                batch["example_mask"],
                self._temperature(params, "region"),
                sigma,
                group=self.group,
                form=self.form,
                batch_axes=axes,
            )
        spoken = batch["token_valid" if "tokens" in batch else "word_valid"].any(1)
        valid = batch["example_mask"].astype(bool) & spoken
        return contrastive_loss(image, text, valid, sigma, form=self.form, batch_axes=axes)

    def _contrast_prompts(
        self, params: Mapping, image: Array, prompts: Array, batch: Batch
    ) -> tuple[Array, Array]:
        valid = batch["example_mask"].astype(bool) & batch["prompt_valid"].any(2).all(1)
        sigma, axes = self._temperature(params, "prompts"), active_batch_axes()
        return multi_label_loss(image, prompts, valid, sigma, form=self.form, batch_axes=axes)

    def _forward(
        self, variables: Variables, batch: Batch, rng: jax.Array
    ) -> tuple[tuple[Array, Array, Array | None], tuple[Array, Array] | None, dict]:
        """Embeds some images, texts and prompts; returns these, sum and count of the mask loss, updated collections."""
        mutable = [name for name in variables if name != "params"]
        own = lambda part: {name: tree[part] for name, tree in variables.items() if part in tree}
        made, changed = self.net.apply(
            own("image"),
            batch["image"],
            batch["image_size"],
            train=True,
            mutable=mutable,
            rngs={"dropout": rng},
        )
        out = features_of(made)
        mutated = {name: {"image": tree} for name, tree in changed.items()}
        text: Any
        prompts = None
        if isinstance(self.text, TextTransformer):
            # Caption and prompts go through the transformer at once: as in GroupViT, a batch norm is of all of them.
            ids = [batch["tokens"][:, None], *([batch["prompts"]] if self.multi_label else [])]
            tokens = jnp.concatenate(ids, 1)
            text, changed = self.text.net.apply(
                own("text"), tokens.reshape(-1, tokens.shape[2]), train=True, mutable=mutable
            )
            for name, tree in changed.items():
                mutated.setdefault(name, {})["text"] = tree
            text = unit(text).reshape(*tokens.shape[:2], -1)
            text, prompts = text[:, 0], text[:, 1:] if self.multi_label else None
        elif self.loss_config.aggregation == "words":
            text = embed_words(variables["params"]["text"]["table"], batch["word_ids"])
        else:
            text = embed_phrases(variables["params"]["text"]["table"], batch["word_ids"], batch["word_valid"])
        image = unit(out.regions if self.loss_config.aggregation == "words" else out.image)
        if self.generator is not None:
            weights = {"params": variables["params"].get("generator", {})}
            generator: Any = self.generator
            masks, valid = generator.apply(weights, batch["image"], batch["image_size"])
            each = jnp.ones(len(masks), jnp.float32)
            batch = {**batch, "masks": masks, "mask_valid": valid, "mask_weight": each}
        return (image, text, prompts), self._mask_loss(out.mask_logits, batch), mutated

    def _mask_loss(self, logits: Array, batch: Batch) -> tuple[Array, Array] | None:
        if "masks" not in batch:
            return None
        weight = batch["mask_weight"] * batch["example_mask"]
        masks, valid = batch["masks"], batch["mask_valid"]
        if self.loss_config.matching == "best":
            layers = [
                best_match_dice_loss(logits[:, i], masks, valid, weight) for i in range(logits.shape[1])
            ]
            return sum(total for total, _ in layers), layers[0][1]  # type: ignore[return-value]
        weights = Weights(self.loss_config.focal, self.loss_config.dice)
        grid, canvas = masks.shape[2:], batch["image"].shape[1:3]
        cells = inside(batch["image_size"], grid, (canvas[0] / grid[0], canvas[1] / grid[1]))
        found = matched_losses(
            logits, masks, valid, weight, inside=cells, costs=weights, batch_axes=active_batch_axes()
        )
        return (weights.focal * found.mask + weights.dice * found.dice).sum(), found.masks

    def _temperature(self, params: Mapping, name: str) -> Float[Array, ""]:
        return bounded(params["temperature"][name], *self.loss_config.temperature_bounds)

    def save_assets(self, workdir: epath.Path) -> None:
        """Saves the tokeniser of word pieces."""
        if isinstance(self.text, TextTransformer) and self.text.source != "words":
            keep_tokenizer(self.text.tokenizer, workdir)

    def predict(
        self, variables: Variables, image: UInt8[Array, "b s t 3"], image_size: Int[Array, "b 2"]
    ) -> Prediction:
        """Predicts the masks with their embeddings, and embeddings of pixels."""
        own = {name: tree["image"] for name, tree in variables.items() if "image" in tree}
        out = features_of(self.net.apply(own, image, image_size))
        # GroupViT's decision, which C.1 follows, needs the whole image's embedding and the temperature.
        scale = jnp.broadcast_to(1 / self._last_temperature(variables["params"]), image.shape[:1])
        whole = {SPACE: unit(out.image)}
        regions, pixels = {SPACE: unit(out.regions)}, {SPACE: out.pixels}
        return Prediction(out.mask_logits[:, -1], regions, pixels, None, whole, scale)

    def embed_text(self, variables: Variables, texts: Sequence[str]) -> Text:
        """Embeds names as unit vectors."""
        own = {name: tree["text"] for name, tree in variables.items() if "text" in tree}
        if isinstance(self.text, TextTransformer):
            return {SPACE: self.text.encode(own, texts)}
        return {SPACE: self.text.encode(own["params"], texts)}

    def region_scale(self, variables: Variables) -> float:
        """Returns 1/σ of the last softmax over masks or texts."""
        return 1 / float(self._last_temperature(variables["params"]))

    def _last_temperature(self, params: Mapping[str, Any]) -> Array:
        return self._temperature(params, "region" if "region" in params["temperature"] else "pair")

"""UMG-CLIP's pre-training (papers/003, 4.1): captions and tags of images and of boxes, for both towers of a CLIP.

`config.loss`: `terms`, the losses of eq. 3, some of `TERMS`; `image_weight` and `region_weight`, α and β;
`tag_loss`, of Table 8: "smooth_l1" (eq. 3; `tag_reduction`, see `losses.tags`), or "contrastive", the caption loss with
one tag of each image or box, drawn in each step. Caption losses contrast all images, or all boxes, of the global batch,
with CLIP's one temperature; the linear maps of eq. 3 are the projections of the two towers.
`config.dense`: `features` of patches, "plain" (eq. 1) or "value", see `Clip.embed_both`; `normalise`, what is a unit
vector: "pooled", a box's mean patch (eq. 1; the projection and the mean commute), or "pixels", each patch before
RoIAlign as well, as in CLIPSelf; `sampling` of RoIAlign, see `kernels.roi_align`; `prompt`, the templates of class
names, see `towers.templates.read_templates`.
`config.clusters`: the clusters of patch tokens in training, keys of `models.token_clusters.TokenClusters`; `ratio` 1.0
for none. Images are embedded without clusters.
"""

import copy
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8
from ml_collections import ConfigDict

from ovseg_jax.config import keys
from ovseg_jax.data.source_base import Source, check_provides
from ovseg_jax.errors import UserError
from ovseg_jax.kernels.contrastive import Contrast, contrastive_loss
from ovseg_jax.kernels.roi_align import roi_align
from ovseg_jax.kernels.unit import unit
from ovseg_jax.losses.tags import REDUCTIONS, tag_loss
from ovseg_jax.methods.clip import ClipTraining
from ovseg_jax.models.convpass import all_but_adapters
from ovseg_jax.models.eva import Eva
from ovseg_jax.models.token_clusters import with_clusters
from ovseg_jax.models.vit import ViT
from ovseg_jax.parallel.accumulate import in_parts
from ovseg_jax.parallel.sharding import active_batch_axes
from ovseg_jax.protocols import Aux, Batch, Prediction, Segmenting, Text, Variables
from ovseg_jax.towers.clip import SPACE, TOWER_KEYS
from ovseg_jax.towers.features import class_features
from ovseg_jax.towers.templates import read_templates
from ovseg_jax.towers.vocabulary import SPOKEN
from ovseg_jax.vocab.classes import ClassList
from ovseg_jax.vocab.words import WordList

TERMS = {
    "image_captions": "tokens",
    "image_tags": "tags",
    "region_captions": "box_tokens",
    "region_tags": "box_tags",
}
"""The terms of eq. 3, and the batch field of the texts of each."""
TAG_LOSSES = ("smooth_l1", "contrastive")
FEATURES = ("plain", "value")
NORMALISE = ("pooled", "pixels")


class UMGClip(ClipTraining, Segmenting):
    """A method that trains a CLIP on texts of images and boxes; it classifies images, and segments without masks.

    With `towers.adapter` only the adapters are trained (4.2): the adaptation to classification and retrieval.

    Args:
      config: `towers` (see `towers.clip.Clip`), `loss` and `dense`, see above.
      words: the vocabulary, if the tokeniser is one of words.
      classes: not used.

    Attributes:
      last: how patches attend in the last block of the image tower, see `models.transformer.Block`.
      templates: those of class names, or a learned prompt.

    Raises:
      UserError: a value in the config is invalid, or the image tower has no features of patches.
    """

    unknown_below = -1.0  # as of `clip_dense`: a best cosine may be negative

    @classmethod
    def fields(cls, config: ConfigDict) -> tuple[str, ...]:
        """Returns the batch fields that the loss reads."""
        terms = _terms(config)
        boxes = ("boxes",) if any(term.startswith("region") for term in terms) else ()
        return ("image", *boxes, *(TERMS[term] for term in terms))

    @classmethod
    def keys(cls, config: ConfigDict) -> dict[str, dict[str, bool]]:
        """Returns the method's own keys in each section, and whether each has an effect, see `experiment.keys`."""
        terms = _terms(config)
        has = lambda part: any(part in term for term in terms)
        return {
            "towers": keys(TOWER_KEYS),
            "loss": keys("terms")
            | keys("image_weight", has("image"))
            | keys("region_weight", has("region"))
            | keys("tag_loss", has("tags"))
            | keys("tag_reduction", has("tags") and config.loss.get("tag_loss") != "contrastive"),
            "dense": keys("features prompt") | keys("normalise sampling", has("region")),
            "clusters": keys("ratio") | keys("after neighbours", config.clusters.get("ratio", 1) < 1),
        }

    @classmethod
    def vocabulary(cls, config: ConfigDict, source: Source) -> Sequence[str]:
        """Returns the words that a tokeniser of words needs.

        Raises:
          UserError: the source lacks the texts or boxes of a term.
        """
        for term in _terms(config):
            needs = (SPOKEN[TERMS[term]], *(("boxes",) if term.startswith("region") else ()))
            check_provides(source, needs, f"the term {term!r} of the loss", "loss.terms leaves terms out")
        return super().vocabulary(config, source)

    def __init__(self, config: ConfigDict, words: WordList, classes: ClassList):
        super().__init__(config, words, classes)
        self.config, self.terms = config, _terms(config)
        dense, loss = config.dense, config.loss
        for key, value, known in (
            ("dense.features", dense.features, FEATURES),
            ("dense.normalise", dense.normalise, NORMALISE),
            ("loss.tag_loss", loss.tag_loss, TAG_LOSSES),
            ("loss.tag_reduction", loss.get("tag_reduction", "sum"), REDUCTIONS),
        ):
            if value not in known:
                raise UserError(f"{key}={value!r} is not one of {', '.join(known)}")
        self.last = "value" if dense.features == "value" else ""
        self.clip.check_patches(self.last)
        if not isinstance(self.clip.image, ViT | Eva):
            raise UserError(f"towers.image.name={config.towers.image.name!r} is neither a ViT nor an EVA")
        self.net = self.clip.image
        self._cell, self._trained_clip = self.clip.image.patch, copy.copy(self.clip)
        if config.towers.get("adapter"):
            self._trained_clip.image = self.clip.adapted(train=True)
            self.frozen = ("^text/", "^scale$", all_but_adapters("image/"))
        if config.clusters.ratio != 1:
            loop, after = config.towers.image.get("scan"), config.clusters.get("after", 2)
            if loop is not None and loop < after:
                raise UserError(
                    f"towers.image.scan={loop} is less than clusters.after={after}: the loop has no clusters"
                )
            self._trained_clip.image = with_clusters(self._trained_clip.image, **config.clusters.to_dict())
        prompt = dense.prompt
        self.templates = read_templates(prompt if isinstance(prompt, str) else list(prompt))

    def loss(self, variables: Variables, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Aux]:
        """Computes eq. 3 of one global batch."""
        network = in_parts(self._forward, int(self.config.get("accumulate", 1)))
        rows, sums, _ = network(variables, batch, rng)
        scale, one = self.logit_scale(variables), jnp.ones(())
        settings = self.config.loss
        weight = {kind: float(settings[f"{kind}_weight"]) for kind in {t.split("_")[0] for t in self.terms}}
        total, metrics = jnp.zeros(()), {}
        for term in self.terms:
            kind, what = term.split("_")
            if term in sums:
                summed, count = sums[term]
            else:
                out = self._contrast(rows[kind], rows[f"{term}_text"], rows[f"{term}_valid"], scale)
                summed, count = out.loss / 2, out.pairs
                if what == "captions":
                    metrics[f"{kind}_accuracy"] = (out.correct, count)
            total += weight[kind] * summed / jnp.maximum(count, 1)
            metrics[f"{term}_loss"] = (summed, count)
        return total, Aux({"loss": (total, one), **metrics, "logit_scale": (scale, one)}, {})

    def _contrast(self, features: Array, texts: Array, valid: Array, scale: Array) -> Contrast:
        """Contrasts images [B d], or boxes [B R d], with their captions over the global batch."""
        d = features.shape[-1]
        rows = features.reshape(-1, d), texts.reshape(-1, d), valid.reshape(-1)
        return contrastive_loss(*rows, 1 / scale, batch_axes=active_batch_axes())

    def _forward(self, variables: Variables, batch: Batch, rng: jax.Array) -> tuple[dict, dict, dict]:
        """Returns the unit embeddings of images, boxes and captions by name, and the sums of the tag losses."""
        here, weights = batch["example_mask"], self._weights(variables)
        rngs = {"dropout": rng}  # of adapters
        image, patches = self._trained_clip.embed_both(weights, batch["image"], self.last, rngs)
        rows, sums, exists = {"image": image}, {}, {"image": here}
        if "boxes" in batch:
            exists["region"] = here[:, None] & batch["box_valid"]
            rows["region"] = self._embed_boxes(patches, batch["boxes"], exists["region"])
        loss = self.config.loss
        for i, term in enumerate(self.terms):
            kind, what = term.split("_")
            texts, spoken = self._embed_texts(variables, batch, term)
            if what == "tags" and loss.tag_loss == "smooth_l1":
                valid = exists[kind][..., None] & spoken
                sums[term] = tag_loss(rows[kind], texts, valid, loss.tag_reduction)
                continue
            if what == "tags":
                logits = jnp.where(spoken, 0.0, -jnp.inf)
                drawn = jax.random.categorical(jax.random.fold_in(rng, i), logits)[..., None, None]
                texts, spoken = jnp.take_along_axis(texts, drawn, -2)[..., 0, :], spoken.any(-1)
            rows |= {f"{term}_text": unit(texts), f"{term}_valid": exists[kind] & spoken}
        return rows, sums, {}

    def _embed_boxes(
        self, patches: Float[Array, "b h w d"], boxes: Float[Array, "b r 4"], valid: Bool[Array, "b r"]
    ) -> Float[Array, "b r d"]:
        """Embeds boxes in pixels as unit vectors, by RoIAlign of the projected patches."""
        dense = self.config.dense
        maps = unit(patches) if dense.normalise == "pixels" else patches
        sampling = int(dense.sampling)
        pooled = roi_align(maps, boxes, 1, scale=1 / self._cell, sampling=sampling, valid=valid)
        return unit(pooled[:, :, 0, 0])

    def _embed_texts(
        self, variables: Variables, batch: Batch, term: str
    ) -> tuple[Float[Array, "*n d"], Bool[Array, "*n"]]:
        """Embeds the texts of a term; the mask is False for unused ones."""
        field = TERMS[term]
        ids, valid = batch[field], batch[field.removesuffix("s") + "_valid"]
        out: Any = self.clip.text.apply(
            {"params": variables["params"]["text"]}, ids.reshape(-1, ids.shape[-1])
        )
        return out.pooled.reshape(*ids.shape[:-1], -1), valid.any(-1)

    @staticmethod
    def _weights(variables: Variables) -> dict[str, Any]:
        return {"image": {"params": variables["params"]["image"]}}

    def predict(
        self, variables: Variables, image: UInt8[Array, "b s s 3"], image_size: Int[Array, "b 2"]
    ) -> Prediction:
        """Computes the features of the patches, without masks."""
        patches = self.clip.embed_patches(self._weights(variables), image, self.last, image_size)
        return Prediction(None, {}, {SPACE: patches})

    def embed_text(self, variables: Variables, texts: Sequence[str]) -> Text:
        """Embeds class names by the templates of `dense.prompt` as unit vectors."""
        return class_features(self, variables, texts, self.templates)


def _terms(config: ConfigDict) -> tuple[str, ...]:
    """Returns `loss.terms` in the order of `TERMS`.

    Raises:
      UserError: one is unknown, or there is none.
    """
    named = config.loss.terms
    if not named or (unknown := sorted(set(named) - TERMS.keys())):
        wrong = repr(unknown[0]) if named else "empty"
        raise UserError(f"loss.terms: {wrong} is not one of {', '.join(TERMS)}")
    return tuple(term for term in TERMS if term in named)

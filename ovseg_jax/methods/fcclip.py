"""FC-CLIP (Yu et al. 2023): one frozen convolutional CLIP gives the features of Mask2Former's masks, and classifies.

UMG-CLIP's adaptation to panoptic segmentation (papers/003, 4.2 and 5.1) is the same with another trunk, see
`methods.trunks`.

With p_n[c] the probability of class c for mask n by a head that was trained on the masks' classes and q_n[c] that by
CLIP's own features under the mask (each a softmax over the classes, by their best names), a class scores

    softmax over c of p_n[c]^(1-w) q_n[c]^w,    times 1 - void_n,

with w = `seen` for classes with a name from the training data, and `unseen` for the others; void_n is the head's
probability of "no object" beside the classes. With `trust`, void_n is first multiplied by 1 - trust max_c q_n[c]
(OVRCOAT, nickormushev/OVRCOAT, 0.5).

Facts from bytedance/fc-clip, fcclip/*. Differences: masks are upsampled once, to the image's own size, where the
published code upsamples them to the network's input, crops the padding and upsamples again.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8
from ml_collections import ConfigDict

from ovseg_jax.config import keys
from ovseg_jax.data.windows import Whole
from ovseg_jax.errors import UserError
from ovseg_jax.kernels.resize import resize_within
from ovseg_jax.losses.points import Points, PointWeights, point_losses
from ovseg_jax.methods.mask2former import HEAD_FIELDS
from ovseg_jax.methods.maskformer import MaskFormer, total_loss, trained_classes
from ovseg_jax.methods.on_clip import OnClip
from ovseg_jax.methods.trunks import ConvNeXtTrunk, make_trunk, prepared
from ovseg_jax.models.deformable import cell_counts
from ovseg_jax.models.fcclip import FCClipHead, MaskClassifier, pool_under
from ovseg_jax.models.mask2former import Mask2FormerHead
from ovseg_jax.models.maskformer import cells_inside
from ovseg_jax.models.text_towers import CLIPText
from ovseg_jax.parallel.accumulate import in_parts
from ovseg_jax.parallel.sharding import active_batch_axes
from ovseg_jax.pretrained.published import weights_of
from ovseg_jax.protocols import (
    PRECISION,
    Aux,
    Batch,
    Prediction,
    RegionScores,
    Segmenting,
    Text,
    Variables,
    Vocabulary,
)
from ovseg_jax.towers.clip import MEAN, SPACE, STD, TOWER_KEYS, Clip
from ovseg_jax.towers.features import class_features
from ovseg_jax.towers.prompt_file import Prompt
from ovseg_jax.towers.templates import read_templates
from ovseg_jax.vocab.classes import ClassList, read_label_file
from ovseg_jax.vocab.words import WordList

HEAD = "head"
"""The space of the trained head's embeddings of masks, whose texts are those of `towers.clip.SPACE`."""

EPSILON = 1e-8  # added to probabilities in the published code
PUBLISHED = {"fcclip_convnext_l": "clip_convnext_large_d_320"}
"""The image tower of each published model."""


def published_config(name: str, weights: str = "", tokenizer: str = "", trust: float = 0.0) -> ConfigDict:
    """Returns the sections `towers`, `model` and `fcclip` of a published model, and 0 steps (bytedance/fc-clip).

    Args:
      name: a key of PUBLISHED.
      weights: its file; "" for one that is trained from its CLIP.
      tokenizer: where CLIP's tokeniser is; by default with the CLIP.
      trust: see above.

    Raises:
      UserError: the name is unknown.
    """
    if name not in PUBLISHED:
        raise UserError(f"the model {name!r} is not one of {', '.join(PUBLISHED)}")
    tower = PUBLISHED[name]
    return ConfigDict(
        dict(
            method="fcclip",
            steps=0,
            towers=dict(
                image=dict(name=tower),
                text=dict(name=tower),
                init="" if weights else weights_of(tower),
                tokenizer=tokenizer or weights_of(tower),
                image_size=320,
                mean=MEAN,
                std=STD,
                logit_scale=100.0,  # of CLIP; the published file has its own
                dtype="float32",
            ),
            model=dict(
                num_queries=250,
                width=256,
                mask_dim=256,
                layers=9,
                heads=8,
                ffn=2048,
                encoder_layers=6,
                encoder_ffn=1024,
                encoder_points=4,
                remat="none",
                dtype="float32",
                init=weights,
            ),
            fcclip=dict(prompt="vild", seen=0.4, unseen=0.8, trust=trust, short=800, longest=1333),
            data=dict(image_size=1344),  # of square canvases: the longest side, in whole cells
        )
    )


def published_fcclip(name: str, weights: str, tokenizer: str = "", trust: float = 0.0) -> "FCClip":
    """Creates a published model for inference; COCO's panoptic classes count as seen, see `published_config`.

    Raises:
      UserError: the name is unknown, or `weights` is empty.
    """
    if not weights:
        raise UserError(f"the file of {name}'s weights is missing: give for example fcclip_cocopan.pth")
    config = published_config(name, weights, tokenizer, trust)
    return FCClip(config, WordList([]), read_label_file("coco_panoptic"))


class FCClip(OnClip, Segmenting):
    """The method FC-CLIP; it also classifies whole images, as its CLIP does.

    Keys of `config.towers`: see `towers.clip.Clip`; for the image tower see `methods.trunks`. Keys of `config.model`:
    the fields of `Mask2FormerHead`, and `init`, a published FC-CLIP with its CLIP, in place of `towers.init`. Keys of
    `config.fcclip`: `prompt`, the templates of class names, see `towers.templates.read_templates`; `seen`, `unseen` and
    `trust`, see above; `short` and `longest`, the sides of images in `Segmenter`, 0 for squares of `data.image_size`;
    with adapters `clip_features`, see `methods.trunks.TowerTrunk`. Keys of `config.loss`: as for `methods.mask2former`.

    Regions have two spaces, `HEAD` and CLIP's, both as unit vectors times their factors from cosines to logits; the
    void of a prediction is the logit of "no object" in the first.

    Masks of the groups "unseen" and "held_out" are not used in training.

    Raises:
      UserError: a value in the config is invalid, or the image tower is no trunk.
    """

    frozen_towers = True
    frozen = ("^towers/",)
    probabilities = True

    # It learns from masks with classes, as MaskFormer does.
    fields, vocabulary = MaskFormer.fields, MaskFormer.vocabulary

    @classmethod
    def keys(cls, config: ConfigDict) -> dict[str, dict[str, bool]]:
        """Returns the method's own keys in each section, and whether each has an effect, see `experiment.keys`."""
        trained = bool(config.steps)
        return {
            "towers": keys(TOWER_KEYS),
            "model": dict.fromkeys([*HEAD_FIELDS, "dtype", "init"], True),
            "fcclip": keys("prompt seen unseen trust short longest")
            | keys("clip_features", bool(config.towers.get("adapter"))),
            "loss": keys("mask dice label no_object points", trained),
        }

    def __init__(self, config: ConfigDict, words: WordList, classes: ClassList):
        self.config, self.classes, self.clip = config, classes, Clip(config.towers, words)
        self.trunk = self.net = make_trunk(self.clip, config.fcclip.get("clip_features", "adapted"))
        if config.model.get("init") and config.towers.get("init"):
            raise UserError(
                "model.init and towers.init are both set: leave out the second, since the first has a CLIP"
            )
        if config.model.get("init") and not isinstance(self.trunk, ConvNeXtTrunk):
            raise UserError(
                "model.init: a published FC-CLIP has a ConvNeXt, but towers.image is another tower"
            )
        options = {name: config.model[name] for name in HEAD_FIELDS if name in config.model}
        dtype = jnp.dtype(config.model.get("dtype", "float32"))
        self._plain = self.clip.without_adapters()
        self.head = FCClipHead(
            Mask2FormerHead(**options, dtype=dtype), MaskClassifier(self.clip.dim, dtype=dtype)
        )
        prompt = config.fcclip.prompt
        templates = read_templates(prompt if isinstance(prompt, str) else list(prompt))
        if isinstance(templates, Prompt):
            raise UserError(f"fcclip.prompt={prompt}: the method fcclip takes no learned prompt")
        self.templates = templates
        for name in ("seen", "unseen", "trust"):
            if not 0 <= config.fcclip[name] <= 1:
                raise UserError(f"fcclip.{name}={config.fcclip[name]} is not between 0 and 1")
        if short := config.fcclip.get("short", 0):
            self.whole = Whole(short, config.fcclip.longest, self.trunk.cell)
        if config.steps:
            self.weights = PointWeights(*(float(config.loss[key]) for key in PointWeights._fields))
        self._names, self._owner = classes.flat()
        self._trained = trained_classes("fcclip", classes)

    def seen_names(self) -> frozenset[str]:
        """Returns all names of the classes that were trained."""
        return frozenset(n for n, k in zip(self._names, self._owner, strict=True) if self._trained[k])

    def init(self, rng: jax.Array) -> Variables:
        """Creates `params` and the frozen `towers`; for training with `names`, the embeddings of the classes' names."""
        tower_rng, head_rng = jax.random.split(rng)
        trained, towers = self.trunk.split(self.clip.init(tower_rng))
        trained |= self.trunk.init(jax.random.fold_in(head_rng, 1))
        return {"params": self._init_head(head_rng) | trained, "towers": self._with_names(towers)}

    def _init_head(self, rng: jax.Array) -> Any:
        maps = self.trunk.shapes()
        return self.head.init(rng, maps, jnp.full((1, 2), self.trunk.cell))["params"]

    def _with_names(self, towers: dict[str, Any]) -> dict[str, Any]:
        if not self.config.steps:
            return towers
        return {**towers, "names": self.embed_text({"towers": towers}, self._names)[SPACE]}

    def pretrained(self) -> dict[str, Any]:
        """Returns the weights of `model.init` or of `towers.init`."""
        if init := self.config.model.get("init", ""):
            return self.published(init)
        if not (found := self.clip.pretrained()):
            return {}
        trained, towers = self.trunk.split(found)
        return {"params": trained, "towers": self._with_names(towers)}

    def published(self, init: str) -> dict[str, Any]:
        """Returns all variables from a published FC-CLIP, see `pretrained.fcclip.load_fcclip`."""
        from ovseg_jax.pretrained.fcclip import load_fcclip
        from ovseg_jax.towers.packed_text import stacked

        key, text = jax.random.key(0), self.clip.text
        assert isinstance(text, CLIPText)
        shapes = {
            "image": jax.eval_shape(lambda: self.clip.image.init(key, jnp.zeros((1, 32, 32, 3)))),
            "text": jax.eval_shape(lambda: text.init(key, jnp.zeros((1, 2), jnp.int32))),
            "head": {"params": jax.eval_shape(self._init_head, key)},
        }
        found = load_fcclip(init, self.clip.image, text, self.head, shapes)
        towers = {
            "image": found["image"],
            "text": stacked(found["text"]["params"]),
            "scale": found["scale"],
        }
        return {"params": found["head"]["params"], "towers": self._with_names(towers)}

    def loss(self, variables: Variables, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Aux]:
        """Computes the losses of matched masks and of all classes, summed over the layers."""
        network = in_parts(self._forward, self.config.get("accumulate", 1))
        _, sums, _ = network(variables, batch, rng)
        loss, metrics = total_loss(sums, self.weights)
        return loss, Aux(metrics, {})

    def _forward(
        self, variables: Variables, batch: Batch, rng: jax.Array
    ) -> tuple[None, dict[str, Array], dict]:
        """Computes for some images the sums of the losses."""
        image, size = prepared(self.clip, self.trunk.cell, batch["image"], batch["image_size"])
        maps = self.trunk.apply(variables, image, jax.random.fold_in(rng, 2)).maps
        applied: Any = self.head.apply({"params": self._of_head(variables)}, maps, size, True, True)
        out, (regions, void, scale) = applied
        names = jax.lax.stop_gradient(variables["towers"]["names"])
        logits = scale * jnp.einsum("blnd,td->tbln", regions, names)
        logits = jax.ops.segment_max(logits, jnp.asarray(self._owner), num_segments=len(self.classes))
        # Classes that are not trained are no negatives either.
        logits = jnp.where(jnp.asarray(self._trained[:-1])[:, None, None, None], logits, -1e9)
        nothing = scale * jnp.einsum("blnd,d->bln", regions, void)
        classes = batch["mask_classes"]
        losses = point_losses(
            out.embeddings,
            out.pixels,
            batch["masks"],
            batch["mask_valid"] & jnp.asarray(self._trained)[classes],
            batch["example_mask"].astype(jnp.float32),
            jax.random.fold_in(rng, 1),
            class_logits=jnp.moveaxis(jnp.concatenate([logits, nothing[None]]), 0, -1),
            classes=classes,
            filled=batch["image_size"] / batch["image"].shape[1],
            costs=self.weights,
            points=Points(int(self.config.loss.points)),
            no_object=float(self.config.loss.no_object),
            batch_axes=active_batch_axes(),
        )
        sums = losses._asdict()
        del sums["query"]
        return None, sums, {}

    @staticmethod
    def _of_head(variables: Variables) -> dict[str, Any]:
        return {name: variables["params"][name] for name in ("masks", "classifier")}

    def predict(
        self, variables: Variables, image: UInt8[Array, "b s t 3"], image_size: Int[Array, "b 2"]
    ) -> Prediction:
        """Predicts masks with their embeddings by the head and by CLIP."""
        pixels, size = prepared(self.clip, self.trunk.cell, image, image_size)
        trunk, level = self.trunk.apply(variables, pixels), self.trunk.level
        applied: Any = self.head.apply({"params": self._of_head(variables)}, trunk.maps, size)
        out, (regions, void, scale) = applied
        mask_features, shape = out.pixels.astype(jnp.float32), trunk.last.shape[1:3]
        whole, cells = cell_counts(size, mask_features.shape[1:3], "c2"), cell_counts(size, shape, level)  # type: ignore[arg-type]
        # Logits are linear in the pixels, so that the pixels can be resized in their place.
        small = jnp.einsum(
            "bnc,bhwc->bnhw",
            out.embeddings[:, -1].astype(jnp.float32),
            resize_within(mask_features, shape, whole, cells),  # type: ignore[arg-type]
            precision=PRECISION,
        )
        under = (small > 0) & cells_inside(size, shape, level)[:, None]
        of_clip = self.trunk.embed(variables, pool_under(under, trunk.last, "bnhw,bhwc->bnc"))
        nothing = scale * jnp.einsum("bnd,d->bn", regions[:, -1], void, precision=PRECISION)
        spaces = {HEAD: scale * regions[:, -1], SPACE: self.logit_scale(variables) * of_clip}
        return Prediction(out.mask_logits[:, -1], spaces, {SPACE: trunk.dense}, nothing)

    def score_regions(self, prediction: Prediction, text: Text, vocabulary: Vocabulary) -> RegionScores:
        """Computes the probability of each name's class and of "no object" for every mask of one image, see above.

        For masks that are not its own, such as true ones, the score is the cosine of CLIP's features.
        """
        if HEAD not in prediction.regions:
            return super().score_regions(prediction, text, vocabulary)
        count, owner = len(vocabulary.isthing), vocabulary.owner

        def by_class(space: str) -> Float[Array, "k n"]:
            logits = jnp.matmul(text[SPACE], prediction.regions[space].T, precision=PRECISION)
            return jax.ops.segment_max(logits, owner, num_segments=count)

        own, clip = by_class(HEAD), by_class(SPACE)
        q = jax.nn.log_softmax(clip, 0)
        seen = jnp.zeros(count, bool).at[owner].max(vocabulary.seen)
        w = jnp.where(seen, self.config.fcclip.seen, self.config.fcclip.unseen)[:, None]
        assert prediction.void is not None
        nothing = jax.nn.softmax(jnp.concatenate([own, prediction.void[None]]), 0)[-1]
        nothing = nothing * (1 - self.config.fcclip.trust * jnp.exp(q).max(0))
        share = jax.nn.softmax((1 - w) * jax.nn.log_softmax(own, 0) + w * q, 0) * (1 - nothing)
        whole = 1 + (count + 1) * EPSILON
        return RegionScores(((share + EPSILON) / whole)[owner], (nothing + EPSILON) / whole)

    def embed_image(self, variables: Variables, image: UInt8[Array, "b h w 3"]) -> Float[Array, "b d"]:
        """Embeds images as unit vectors, without adapters."""
        return self._plain.embed_image(variables["towers"], image)

    def embed_text(self, variables: Variables, texts: Sequence[str]) -> Text:
        """Embeds class names by the templates of `fcclip.prompt` as unit vectors."""
        return class_features(self, variables, texts, self.templates)

    def logit_scale(self, variables: Variables) -> Float[Array, ""]:
        """Returns CLIP's 1/τ, at most 100."""
        return jnp.minimum(jnp.exp(variables["towers"]["scale"]), 100.0)

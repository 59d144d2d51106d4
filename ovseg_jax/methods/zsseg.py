"""ZSSeg's two stages (Xu et al. 2021; papers/000, 3.3 and appendix B): segmentation with a classifier's prompt.

The proposals of any method are cropped from the image one by one, with one colour outside of the mask, and a
classifier's image tower embeds each crop. With p_n[c] the probability of class c for proposal n by the proposals' own
embeddings and q_n[c] that by the classifier (softmax over the classes, each at its own temperature), a class scores

    p_n[c]^w q_n[c]^(1-w) for seen classes,    p_n[c]^(1-w) q_n[c]^w for all others,    q_n[c] for w = 0

and a pixel gets the class with the largest sum over n of score times sigmoid mask. A proposal that covers no pixel is
not classified: q_n = 1, and for w = 0 it is left out.

If the proposals' method predicts "no object" (`Prediction.void`), as ZSSeg's MaskFormer does and OpenSeg does not, the
softmax of p includes this class, which is then dropped.

Differences from the published code: crops are rounded to bytes, the input of a classifier; and masks are upsampled to
the label's own size before the sigmoid, where the published code upsamples the sum after it (see `decisions.maps`).
"""

import dataclasses
from collections.abc import Collection, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from ovseg_jax.errors import UserError
from ovseg_jax.kernels.all_pairs import LOWEST
from ovseg_jax.kernels.mask_crops import mask_crops
from ovseg_jax.kernels.resize import split_rows, upsampling
from ovseg_jax.parallel.sharding import active_batch_axes
from ovseg_jax.protocols import (
    PRECISION,
    Classifier,
    Prediction,
    RegionScores,
    Segmenting,
    Text,
    Variables,
    Vocabulary,
    log_probability,
)
from ovseg_jax.towers.features import class_features
from ovseg_jax.towers.prompt_file import Prompt

CROPS = "crops/"
"""The space of the crops' embeddings, and for texts the prefix of the names of the classifier's spaces."""

FILLS = {"mean": 255.0, "zero": 0.0}
"""Colours of pixels outside of a crop's mask, in units of the mean pixel."""


@dataclasses.dataclass(frozen=True)
class Rules:
    """The rules for joining the two stages.

    Attributes:
      crop_size: side of the crops in pixels, the size of the classifier's images.
      ensemble: w, see above. Published: 0.8 on COCO-Stuff, 0.7 on VOC, 0.5 on ADE20K, 0.2 on PC-59 (no class of the
        last two is seen, so that w is the weight of the classifier).
      scale: 1/τ of the proposals' softmax; ZSSeg trains with 100.
      threshold: the mask value above which a pixel belongs to the crop. Published: 0.5, on ADE20K 0.4.
      fill: colour of the other pixels, 0..255. Published: the mean of CLIP's images.
      crops: the number of crops to classify at once on each device.
    """

    crop_size: int
    ensemble: float = 0.8
    scale: float = 100.0
    threshold: float = 0.5
    fill: tuple[float, float, float] = (122.77, 116.75, 104.09)
    crops: int = 32

    def __post_init__(self):
        if not 0 <= self.ensemble <= 1:
            raise UserError(f"ensemble={self.ensemble} is not between 0 (the classifier alone) and 1")
        if not 0 < self.threshold < 1:
            raise UserError(f"threshold={self.threshold} is not between 0 and 1, the range of mask values")


class TwoStage(Segmenting):
    """The proposals of one trained method, classified by another; for evaluators and `Segmenter`, not for training.

    Its variables are {"proposals": ..., "classifier": ...}. Regions have the space `CROPS` beside those of the
    proposals' method, with zeros for a region that covers no pixel. For w = 0 the proposals' text side is not used.

    Args:
      proposals: the method that proposes masks.
      classifier: the method that classifies crops.
      rules: the rules for joining them.
      seen: names of the seen classes.
      templates: hand-written prompts whose unit features are averaged, or a learned one; by default the classifier's.
    """

    modes = ("predicted",)

    def __init__(
        self,
        proposals: Segmenting,
        classifier: Classifier,
        rules: Rules,
        *,
        seen: Collection[str] = (),
        templates: Sequence[str] | Prompt | None = None,
    ):
        self.proposals, self.classifier, self.rules = proposals, classifier, rules
        self.seen, self.templates = frozenset(seen), templates

    def seen_names(self) -> frozenset[str]:
        """Returns the names of the seen classes."""
        return self.seen

    def predict(
        self, variables: Variables, image: UInt8[Array, "b s s 3"], image_size: Int[Array, "b 2"]
    ) -> Prediction:
        """Predicts and embeds the proposals; pixel features are those of the proposals' method.

        Raises:
          UserError: the method proposes no masks.
        """
        found = self.proposals.predict(variables["proposals"], image, image_size)
        if found.mask_logits is None:
            raise UserError(
                f"{type(self.proposals).__name__} is a per-pixel method, which does not propose masks"
            )
        embed, cut = self._classify(variables["classifier"], image, image_size, found.mask_logits)
        return found._replace(regions={**found.regions, CROPS: jnp.where(cut[..., None], embed, 0)})

    def _classify(
        self, variables: Variables, image: Array, image_size: Array, mask_logits: Float[Array, "b n h w"]
    ) -> tuple[Float[Array, "b n d"], Bool[Array, "b n"]]:
        """Embeds the crop of each proposal, in parts; also returns which proposals cover a pixel."""
        b, n, h, w = mask_logits.shape
        side, rules = image.shape[1], self.rules
        devices = jax.sharding.get_abstract_mesh().size if active_batch_axes() else 1
        some = min(n, max(1, rules.crops * devices // b))
        matrix = lambda cells: jax.vmap(lambda size: upsampling(side, cells, side, size, size))
        rows, columns = matrix(h)(image_size[:, 0]), matrix(w)(image_size[:, 1])
        within = jnp.arange(side) < image_size[..., None]  # [b 2 side]
        within = within[:, 0, :, None] & within[:, 1, None, :]
        # The sigmoid of an upsampled logit exceeds the threshold where the logit exceeds this.
        border = jnp.log(rules.threshold / (1 - rules.threshold))

        def embed(logits: Float[Array, "some b h w"]) -> tuple[Array, Array]:
            logits = jnp.moveaxis(logits, 0, 1)  # images first, since they are sharded over the devices
            full = jnp.einsum("bsh,bnhw,btw->bnst", rows, logits, columns, precision=PRECISION)
            inside = (full > border) & within[:, None]
            crops = mask_crops(image, inside, jnp.asarray(rules.fill), rules.crop_size)
            features = self.classifier.embed_image(variables, crops.reshape(-1, *crops.shape[2:]))
            return features.reshape(b, some, -1), inside.any((2, 3))

        parts = jax.lax.map(embed, split_rows(jnp.moveaxis(mask_logits, 1, 0), some))
        features, cut = (jnp.moveaxis(x, 0, 1).reshape(b, -1, *x.shape[3:])[:, :n] for x in parts)
        return features, cut

    def embed_text(self, variables: Variables, texts: Sequence[str]) -> Text:
        """Embeds class names by both stages; the classifier's embeddings are multiplied by its 1/τ."""
        prompted = class_features(self.classifier, variables["classifier"], texts, self.templates)
        scale = self.classifier.logit_scale(variables["classifier"])
        own = self.proposals.embed_text(variables["proposals"], texts) if self.rules.ensemble else {}
        return {**own, **{CROPS + space: scale * x for space, x in prompted.items()}}

    def score_regions(self, prediction: Prediction, text: Text, vocabulary: Vocabulary) -> RegionScores:
        """Computes p^w q^(1-w) or p^(1-w) q^w for every name and every proposal of one image, see above.

        The logit of a class in the softmax is that of its best name. The softmax is over all classes that have a name,
        even if an evaluator then only uses some of them.
        """
        crops, w = prediction.regions[CROPS], self.rules.ensemble
        cut = jnp.any(crops != 0, -1)
        prompted = {space.removeprefix(CROPS): x for space, x in text.items() if space.startswith(CROPS)}
        q = log_probability(self.classifier.score_images(crops, prompted).T, vocabulary)
        if not w:
            return RegionScores(jnp.where(cut, jnp.exp(q), 0))
        rest = {space: x for space, x in text.items() if not space.startswith(CROPS)}
        own = self.proposals.score_regions(prediction, rest, vocabulary)
        # Probabilities need no temperature; over other classes than the method's own they are normalised again.
        logit = jnp.log if self.proposals.probabilities else lambda x: self.rules.scale * x
        void = None if own.void is None else logit(own.void)
        p = log_probability(logit(own.names), vocabulary, void)
        p = jnp.maximum(p, LOWEST)  # of a probability that is rounded to 0, whose power 0 is 1
        share = jnp.where(vocabulary.seen, 1 - w, w)[:, None]
        return RegionScores(jnp.exp((1 - share) * p + share * jnp.where(cut, q, 0)))

"""ZSSeg's two stages (Xu et al. 2021; papers/000, 3.3 and appendix B): a prompt as it is, put to another task.

Any method's proposals are cut out of the image one by one, what is not under the mask is filled with one colour, and
a classifier's image tower sees each crop as an image of its own. With p_n[c] the probability of class c for proposal
n by the proposals' own embeddings and q_n[c] that by the classifier (softmax over the classes, each at its own
temperature), a class scores

    p_n[c]^w q_n[c]^(1-w) for seen classes,    p_n[c]^(1-w) q_n[c]^w for all others,    q_n[c] for w = 0

and a pixel gets the class with the largest sum over n of score times sigmoid mask. A proposal that covers no pixel
is not put to the classifier: q_n = 1, and for w = 0 it is left out.

Proposals that know "no object", as ZSSeg's MaskFormer, which learns a unit vector for it, have a `no_object(variables)
-> [d]`: the softmax of p is then over one class more, which is dropped. OpenSeg's have none.

Where this differs from the published code: crops are rounded to bytes, as a classifier takes images; and masks are
upsampled to the label's own size before the sigmoid rather than the sum after it (see `decisions.segment`).
"""

import dataclasses
from collections.abc import Collection, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from ovseg_jax.errors import UserError
from ovseg_jax.evals.classification import class_features
from ovseg_jax.kernels.mask_crops import mask_crops
from ovseg_jax.kernels.resize import split_rows, upsampling
from ovseg_jax.parallel.sharding import active_batch_axes
from ovseg_jax.protocols import Classifier, Prediction, Segmenting, Variables
from ovseg_jax.towers.prompt_file import Prompt

_PRECISION = jax.lax.Precision.HIGHEST
_NEVER = -1e9  # a logit


@dataclasses.dataclass(frozen=True)
class Rules:
    """How the two stages are joined.

    Attributes:
      crop_size: side of the crops in pixels: that of the classifier's images.
      ensemble: w, see above. Published: 0.8 on COCO-Stuff, 0.7 on VOC, 0.5 on ADE20K, 0.2 on PC-59 (on the last two no
        class is seen, so that w counts for the classifier).
      scale: 1/τ of the proposals' softmax; ZSSeg trains its own at 100.
      threshold: the mask value above which a pixel belongs to the crop. Published: 0.5, on ADE20K 0.4.
      fill: colour of what does not, 0..255. Published: the mean of CLIP's images.
      crops: how many go through the classifier at once on each device.
    """

    crop_size: int
    ensemble: float = 0.8
    scale: float = 100.0
    threshold: float = 0.5
    fill: tuple[float, float, float] = (122.77, 116.75, 104.09)
    crops: int = 32

    def __post_init__(self):
        if not 0 <= self.ensemble <= 1:
            raise UserError(f"ensemble={self.ensemble}: the weight w lies between 0 (CLIP alone) and 1")
        if not 0 < self.threshold < 1:
            raise UserError(f"threshold={self.threshold}: masks have values between 0 and 1")


class TwoStage:
    """Proposals of one trained method, classified by another; for evaluators and `Segmenter`, not for training.

    Its variables are {"proposals": ..., "classifier": ...}. What it calls embeddings are both stages' side by side,
    which `region_scores` tells apart: of a region the proposals' times 1/τ, the classifier's times its 1/τ, the logit
    of "no object", and whether there was anything to classify; of a name the proposals' text side (nothing for w = 0,
    when it is not asked), the prompt's, and whether it is of a seen class.

    Args:
      proposals: what proposes masks.
      classifier: what classifies crops.
      rules: how.
      seen: names of the seen classes.
      templates: hand-written prompts whose unit features are averaged, or a learned one; by default the classifier's.
    """

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

    def predict(
        self, variables: Variables, image: UInt8[Array, "b s s 3"], image_size: Int[Array, "b 2"]
    ) -> Prediction:
        """The proposals with what both stages make of them; the pixels' features are the proposals' own.

        Raises:
          UserError: the method proposes no masks.
        """
        found = self.proposals.predict(variables["proposals"], image, image_size)
        if found.mask_logits is None or found.region_embed is None:
            raise UserError(f"{type(self.proposals).__name__} is a per-pixel method, which proposes no masks")
        embed, cut = self._classify(variables["classifier"], image, image_size, found.mask_logits)
        scale = self.classifier.logit_scale(variables["classifier"])
        own = self.rules.scale * found.region_embed
        nothing = jnp.full(cut.shape, _NEVER)
        if hasattr(self.proposals, "no_object"):
            vector = self.proposals.no_object(variables["proposals"])
            nothing = jnp.matmul(own, vector, precision=_PRECISION)
        both = (own, scale * embed, nothing[..., None], cut[..., None])
        return found._replace(region_embed=jnp.concatenate(both, -1))

    def _classify(
        self, variables: Variables, image: Array, image_size: Array, mask_logits: Float[Array, "b n h w"]
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b n"]]:
        """The classifier's embedding of each proposal, some proposals of every image at a time, and its presence."""
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
            logits = jnp.moveaxis(logits, 0, 1)  # images first: they are what the devices share
            full = jnp.einsum("bsh,bnhw,btw->bnst", rows, logits, columns, precision=_PRECISION)
            inside = (full > border) & within[:, None]
            crops = mask_crops(image, inside, jnp.asarray(rules.fill), rules.crop_size)
            features = self.classifier.embed_image(variables, crops.reshape(-1, *crops.shape[2:]))
            return features.reshape(b, some, -1), inside.any((2, 3))

        parts = jax.lax.map(embed, split_rows(jnp.moveaxis(mask_logits, 1, 0), some))
        features, cut = (jnp.moveaxis(x, 0, 1).reshape(b, -1, *x.shape[3:])[:, :n] for x in parts)
        return features, cut.astype(features.dtype)

    def embed_text(self, variables: Variables, texts: Sequence[str]) -> Float[Array, "k d"]:
        """What both stages make of class names, and which are seen."""
        prompted = class_features(self.classifier, variables["classifier"], texts, self.templates)
        seen = jnp.asarray([[text in self.seen] for text in texts], prompted.dtype)
        if not self.rules.ensemble:
            return jnp.concatenate([prompted, seen], 1)
        own = self.proposals.embed_text(variables["proposals"], texts)
        return jnp.concatenate([own, prompted, seen], 1)

    def region_scores(
        self, prediction: Prediction, text: Float[Array, "t e"], owner: Int[Array, "t"]
    ) -> Float[Array, "t n"]:
        """The score of every name for every proposal; see `decisions.segment.RegionScores`.

        A class counts in the softmax by its best name. The softmax is over all classes that have a name here, also
        where an evaluator then asks for some of them only.
        """
        regions, w = prediction.region_embed, self.rules.ensemble
        assert regions is not None
        d = prediction.pixel_embed.shape[-1]
        e = regions.shape[-1] - d - 2
        nothing, cut, seen = regions[:, -2], regions[:, -1] > 0, text[:, -1:] > 0
        q = _log_probability(text[:, -e - 1 : -1], regions[:, d:-2], owner)
        if not w:
            return jnp.where(cut, jnp.exp(q), 0)
        p = _log_probability(text[:, :d], regions[:, :d], owner, nothing)
        share = jnp.where(seen, 1 - w, w)
        return jnp.exp((1 - share) * p + share * jnp.where(cut, q, 0))


def _log_probability(
    text: Float[Array, "t d"],
    regions: Float[Array, "n d"],
    owner: Int[Array, "t"],
    nothing: Float[Array, "n"] | float = _NEVER,
) -> Float[Array, "t n"]:
    """Log of each name's probability for each region, if every class stands by its best name, beside "no object"."""
    logits = jnp.matmul(text, regions.T, precision=_PRECISION)
    classes = jax.ops.segment_max(logits, owner, num_segments=len(text))
    return logits - jnp.logaddexp(jax.nn.logsumexp(classes, axis=0), nothing)

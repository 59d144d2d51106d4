"""ZSSeg's MaskFormer (Xu et al. 2021): queries classified by the text embeddings of class names, for any names.

It is the first stage of `methods.zsseg` in papers/000 (tables 4, 5 and 13). Facts from the authors' copy of it,
amazon-science/prompt-pretraining, third_party/zsseg.baseline: mask_former/modeling/transformer/
zero_shot_transformer_predictor.py and clip_adapter/adapter.py.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, UInt8
from ml_collections import ConfigDict

from ovseg_jax.config import keys
from ovseg_jax.data.source_base import Source, check_provides
from ovseg_jax.errors import UserError
from ovseg_jax.methods.maskformer import MaskFormer
from ovseg_jax.methods.text_side import SPACE, TextSide, text_side
from ovseg_jax.models.maskformer import QueryEmbedding
from ovseg_jax.protocols import (
    PRECISION,
    Prediction,
    RegionScores,
    Text,
    Variables,
    Vocabulary,
    log_probability,
)
from ovseg_jax.towers.vocabulary import counted_words
from ovseg_jax.vocab.classes import ClassList
from ovseg_jax.vocab.splits import load_split
from ovseg_jax.vocab.words import WordList


class TextMaskFormer(TextSide, MaskFormer):
    """A MaskFormer whose class logits are cosines of queries and class names, times 1/τ, with a learned "no object".

    A region's score for a name is its probability among the names that are asked for and "no object".

    Keys beside those of `MaskFormer`: `model.embed_dim` and `model.embed_hidden`, see `QueryEmbedding`; `text`, the
    text side, as for `methods.openseg`; `loss.scale`, 1/τ; `loss.unseen`, classes that are not trained, see
    `vocab.splits.load_split` ("" for those that the data itself withholds).
    """

    @classmethod
    def vocabulary(cls, config: ConfigDict, source: Source) -> Sequence[str]:
        """Returns the words of class names.

        Raises:
          UserError: the source has no segments with classes.
        """
        check_provides(source, ("segments", "class_ids"), "the method maskformer_text")
        return counted_words(config.data, source, captions=False).words

    @classmethod
    def keys(cls, config: ConfigDict) -> dict[str, dict[str, bool]]:
        """Returns the method's own keys in each section, and whether each has an effect, see `experiment.keys`."""
        found, tower = super().keys(config), bool(config.text.get("tower"))
        return {
            "model": found["model"] | keys("embed_dim embed_hidden"),
            "text": keys("tower init prompt", tower) | keys("learned vectors", not tower),
            "loss": found["loss"] | keys("scale unseen"),
        }

    def __init__(self, config: ConfigDict, words: WordList, classes: ClassList):
        if unseen := config.loss.get("unseen", ""):
            classes = load_split(classes, unseen)
        super().__init__(config, words, classes)
        if config.model.get("init"):
            raise UserError(
                "model.init has no effect with maskformer_text: published MaskFormers have classes"
            )
        self.text = text_side(config, words, int(config.model.embed_dim))
        self.frozen = () if self.text.learned else ("^text/",)
        self.scale = float(config.loss.scale)

    def _classifier(self) -> QueryEmbedding:
        return QueryEmbedding(int(self.config.model.embed_dim), int(self.config.model.embed_hidden))

    def _logits(self, variables: Variables, classified: Any) -> Array:
        regions, void = classified
        names = [self.classes.display(k) for k in range(len(self.classes))]
        rows = jnp.concatenate([self.text.encode(variables["params"]["text"], names), void[None]])
        logits = self.scale * jnp.einsum("blnd,kd->blnk", regions, rows)
        # Classes that are not trained are no negatives either.
        used = jnp.asarray([*self._trained[:-1], True])
        return jnp.where(used, logits, -1e9)

    def init(self, rng: jax.Array) -> Variables:
        """Creates `params` {"net", "classifier", "text"}, and `batch_stats` if the backbone has them."""
        image, text = jax.random.split(rng)
        variables = super().init(image)
        return {**variables, "params": {**variables["params"], "text": self.text.init(text)}}

    def pretrained(self) -> dict[str, Any]:
        """Returns the weights of `model.backbone.init` and of a frozen text tower."""
        found = super().pretrained()
        text = self.text.pretrained()
        return {**found, "params": {**found.get("params", {}), "text": text}} if text else found

    def predict(
        self, variables: Variables, image: UInt8[Array, "b s t 3"], image_size: Int[Array, "b 2"]
    ) -> Prediction:
        """Predicts masks with unit embeddings, and the cosine with "no object"."""
        out, (regions, void) = self._outputs(variables, image, image_size)
        last = regions[:, -1]
        cosine = jnp.matmul(last, void, precision=PRECISION)
        return Prediction(out.mask_logits[:, -1], {SPACE: last}, {}, cosine)

    def score_regions(self, prediction: Prediction, text: Text, vocabulary: Vocabulary) -> RegionScores:
        """Computes the probability of each name and of "no object" for each proposal of one image."""
        assert prediction.void is not None
        regions, void = prediction.regions[SPACE], self.scale * prediction.void
        logits = self.scale * jnp.matmul(text[SPACE], regions.T, precision=PRECISION)
        score = log_probability(logits, vocabulary, void)
        return RegionScores(jnp.exp(score), jnp.exp(void - logits[0] + score[0]))

    def region_scale(self, variables: Variables) -> float:
        """Returns 1/τ."""
        del variables
        return self.scale

"""CLIP as a segmenter, without training: baselines of papers/004, 4.3 (there ALIGN, which is private) and papers/002.

`config.dense`: `features`, "activation", the map before the pooling in the space of the class token, as in papers/004;
"value", the value path of the last attention (MaskCLIP, Zhou et al. 2022); "sclip" or "clearclip", its attention by
SCLIP or ClearCLIP, see `models.transformer.Block`; or "pseudo_masks", where each mask of a pseudo-mask generator is
shown to CLIP on its own (papers/002, 4.1, baseline 1); `prompt`, the templates of class names, see
`towers.templates.read_templates`. For pseudo-masks, `crop` cuts the box around a mask out of the masked image, and
`fill` is the colour outside of the mask, see `methods.zsseg.FILLS`; `config.pseudo_masks` describes the generator, see
`models.pseudo_masks.build_generator`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8
from ml_collections import ConfigDict

from ovseg_jax.config import keys
from ovseg_jax.errors import UserError
from ovseg_jax.kernels.mask_crops import mask_crops
from ovseg_jax.methods.on_clip import OnClip
from ovseg_jax.methods.zsseg import FILLS
from ovseg_jax.models.pseg import CERTAIN
from ovseg_jax.models.pseudo_masks import GENERATOR_KEYS, PseudoMaskGenerator, build_generator
from ovseg_jax.protocols import Aux, Batch, Prediction, Segmenting, Text, Variables
from ovseg_jax.towers.clip import MEAN, SPACE, TOWER_KEYS, Clip
from ovseg_jax.towers.features import class_features
from ovseg_jax.towers.templates import read_templates
from ovseg_jax.vocab.classes import ClassList
from ovseg_jax.vocab.words import WordList

LAST = {"activation": "", "value": "value", "sclip": "sclip", "clearclip": "clearclip"}
FEATURES = (*LAST, "pseudo_masks")


class ClipDense(OnClip, Segmenting):
    """A method that is not trained: `config.steps` is 0. It also classifies whole images, and so other methods' masks.

    Args:
      config: `towers` (see `towers.clip.Clip`), `dense` and `pseudo_masks`, see above.
      words: the vocabulary, if the tokeniser is one of words.
      classes: not used.

    Attributes:
      last: how patches attend in the last block of the image tower, see `models.transformer.Block`.
      templates: those of class names, or a learned prompt.

    Raises:
      UserError: a value in the config is invalid, or the image tower has no features of that kind.
    """

    frozen_towers = True
    frozen = ("^towers/", "^generator/")
    # No threshold suits all towers: their best cosines differ, and may be negative.
    unknown_below = -1.0

    @classmethod
    def fields(cls, config: ConfigDict) -> tuple[str, ...]:
        """Returns the batch fields that a training step would read."""
        del config
        return ("image",)

    @classmethod
    def keys(cls, config: ConfigDict) -> dict[str, dict[str, bool]]:
        """Returns the method's own keys in each section, and whether each has an effect, see `experiment.keys`."""
        masks = config.dense.get("features") == "pseudo_masks"
        dense = keys("features prompt") | keys("crop fill", masks)
        return {
            "towers": keys(TOWER_KEYS),
            "dense": dense,
            "pseudo_masks": dict.fromkeys(GENERATOR_KEYS, masks),
        }

    def __init__(self, config: ConfigDict, words: WordList, classes: ClassList):
        del classes
        if config.steps:
            raise UserError(f"steps={config.steps}: the method clip_dense is not trained, so its steps are 0")
        if config.dense.features not in FEATURES:
            raise UserError(f"dense.features={config.dense.features!r} is not one of {', '.join(FEATURES)}")
        self.config, self.clip = config, Clip(config.towers, words)
        self.last = LAST.get(config.dense.features, "")
        self.generator: PseudoMaskGenerator | None = None
        if config.dense.features == "pseudo_masks":
            if config.dense.fill not in FILLS:
                raise UserError(f"dense.fill={config.dense.fill!r} is not one of {', '.join(FILLS)}")
            self.generator = build_generator(config.pseudo_masks.to_dict(), self.clip.dtype)
            self.modes = ("predicted",)
        else:
            self.clip.check_patches(self.last)
            self.net = self.clip.image
        prompt = config.dense.prompt
        self.templates = read_templates(prompt if isinstance(prompt, str) else list(prompt))

    def init(self, rng: jax.Array) -> Variables:
        """Creates `towers`, `generator` if pseudo-masks come from a tower, and no parameters."""
        variables = {"params": {}, "towers": self.clip.init(rng)}
        if self.generator is not None:
            side = self.config.data.image_size
            image = jnp.zeros((1, side, side, 3), jnp.uint8)
            made = self.generator.init(jax.random.key(0), image, jnp.full((1, 2), side))
            variables |= {"generator": made["params"]} if made else {}
        return variables

    def pretrained(self, *parts: str) -> dict[str, Any]:
        """Returns the weights of the towers, or of these `parts` alone (see `Clip`), and those of the generator's."""
        towers = self.clip.pretrained(*parts)
        found = {"towers": towers} if towers else {}
        if self.generator is not None and "backbone" in self.config.pseudo_masks:
            from ovseg_jax.pretrained.generator import generator_weights

            weights = generator_weights(self.generator, self.config.pseudo_masks.backbone.get("init", ""))
            found["generator"] = weights["params"]
        return found

    def loss(self, variables: Variables, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Aux]:
        """Raises an error, since there are no steps."""
        raise UserError("the method clip_dense is not trained")

    def predict(
        self, variables: Variables, image: UInt8[Array, "b s t 3"], image_size: Int[Array, "b 2"]
    ) -> Prediction:
        """Computes the features of the patches, without masks; or the pseudo-masks, each embedded on its own."""
        if self.generator is not None:
            return self._predict_masks(self.generator, variables, image, image_size)
        patches = self.clip.embed_patches(variables["towers"], image, self.last, image_size)
        return Prediction(None, {}, {SPACE: patches})

    def _predict_masks(
        self, generator: Any, variables: Variables, image: Array, image_size: Array
    ) -> Prediction:
        weights = {"params": variables.get("generator", {})}
        masks, valid = generator.apply(weights, image, image_size)
        of_side = [jnp.arange(side) < image_size[:, i, None] for i, side in enumerate(image.shape[1:3])]
        within = (of_side[0][:, :, None] & of_side[1][:, None])[:, None]
        fill = (
            jnp.asarray(tuple(self.config.towers.get("mean", MEAN)), jnp.float32)
            * FILLS[self.config.dense.fill]
        )
        size, crop = int(self.config.towers.image_size), self.config.dense.crop

        def embed(mask: UInt8[Array, "b h w"]) -> Float[Array, "b d"]:
            cells = generator.mask_stride
            inside = (mask > 0).repeat(cells, 1).repeat(cells, 2)[:, None] & within
            crops = mask_crops(image, inside, fill, size, None if crop else within)
            return self.embed_image(variables, crops[:, 0])

        features = jnp.moveaxis(jax.lax.map(embed, jnp.moveaxis(masks, 1, 0)), 0, 1)
        scale = jnp.broadcast_to(self.logit_scale(variables), image.shape[:1])
        regions = {SPACE: jnp.where(valid[..., None], features, 0)}
        return Prediction(jnp.where(masks > 0, CERTAIN, -CERTAIN), regions, {}, scale=scale)

    def embed_text(self, variables: Variables, texts: Sequence[str]) -> Text:
        """Embeds class names by the templates of `dense.prompt` as unit vectors."""
        return class_features(self, variables, texts, self.templates)

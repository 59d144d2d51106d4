"""Mask2Former (Cheng et al. 2022): masks with classes of a closed vocabulary, by masked attention."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ovseg_jax.config import keys
from ovseg_jax.errors import UserError
from ovseg_jax.losses.matching import Matched, PointWeights
from ovseg_jax.losses.points import Points, point_losses
from ovseg_jax.methods.maskformer import OTHER_FIELDS, MaskFormer
from ovseg_jax.models.backbones import build_backbone
from ovseg_jax.models.mask2former import Mask2FormerHead, Mask2FormerNet
from ovseg_jax.protocols import Batch

HEAD_FIELDS = (
    "num_queries width mask_dim layers heads ffn encoder_layers encoder_ffn encoder_points remat".split()
)


class Mask2Former(MaskFormer):
    """The method Mask2Former; `config` is the whole config of a run. Differences from `MaskFormer`:

    A region's scores and "no object" are probabilities, so that the decisions `panoptic` and `instances` are the
    authors' inference, and `argmax` is their semantic one.

    Keys of `config.model`: those of `Mask2FormerHead`, `deep_supervision`, `backbone.init` and `init`, a published
    Mask2Former. Keys of `config.loss`: `mask`, `dice` and `label` weight costs and losses, `no_object` the class "no
    object", and `points` is the number of points at which masks are compared.
    """

    weights_type: ClassVar = PointWeights

    @classmethod
    def keys(cls, config: ConfigDict) -> dict[str, dict[str, bool]]:
        """Returns the method's own keys in each section, and whether each has an effect, see `experiment.keys`."""
        model = (*HEAD_FIELDS, *OTHER_FIELDS, "deep_supervision", "init")
        return {"model": dict.fromkeys(model, True), "loss": super().keys(config)["loss"] | keys("points")}

    def _network(self) -> Mask2FormerNet:
        model = self.config.model
        if unknown := set(model) - self.keys(self.config)["model"].keys():
            raise UserError(f"unknown keys of config.model: {', '.join(sorted(unknown))}")
        dtype = jnp.dtype(model.get("dtype", "float32"))
        head = Mask2FormerHead(dtype=dtype, **{key: model[key] for key in HEAD_FIELDS if key in model})
        deep = bool(model.get("deep_supervision", True))
        backbone = build_backbone(model.backbone, dtype)
        return Mask2FormerNet(backbone, tuple(model.mean), tuple(model.std), head, deep, dtype)

    def _matched(self, out: Any, batch: Batch, rng: jax.Array, **options: Any) -> Matched:
        assert isinstance(self.weights, PointWeights)
        return point_losses(
            out.embeddings,
            out.pixels,
            rng=jax.random.fold_in(rng, 1),
            filled=batch["image_size"] / batch["image"].shape[1],
            costs=self.weights,
            points=Points(int(self.config.loss.points)),
            **options,
        )

"""LSeg+ (papers/004, 4.3): pixels classified by class names, the supervised baseline and upper bound for `scenes`."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from ml_collections import ConfigDict

from ovseg_jax.config import keys
from ovseg_jax.data.source_base import Source
from ovseg_jax.errors import UserError
from ovseg_jax.kernels.unit import unit
from ovseg_jax.losses.temperature import bounded
from ovseg_jax.methods.openseg import OpenSeg, apply_net, build_net
from ovseg_jax.models.fpn import resize
from ovseg_jax.parallel.accumulate import in_parts
from ovseg_jax.protocols import Aux, Batch, Variables
from ovseg_jax.towers.vocabulary import counted_words
from ovseg_jax.vocab.classes import ClassList
from ovseg_jax.vocab.words import WordList


class LSeg(OpenSeg):
    """A method with OpenSeg's network without masks, trained by per-pixel cross-entropy against class names.

    Classes of the group "held_out" are not used in training.
    """

    @classmethod
    def fields(cls, config: ConfigDict) -> tuple[str, ...]:
        """Returns the batch fields that the loss reads."""
        del config
        return ("image", "pixel_classes")

    @classmethod
    def vocabulary(cls, config: ConfigDict, source: Source) -> Sequence[str]:
        """Returns the words of captions and class names."""
        return counted_words(config.data, source).words

    @classmethod
    def keys(cls, config: ConfigDict) -> dict[str, dict[str, bool]]:
        """Returns the method's own keys in each section, and whether each has an effect, see `experiment.keys`."""
        found = super().keys(config)
        masks = "num_queries decoder_layers decoder_heads position_grid mask_scale mask_bias detach_masks"
        loss = dict.fromkeys(found["loss"], False) | keys("temperature temperature_bounds")
        return {**found, "model": found["model"] | keys(masks, False), "loss": loss}

    def __init__(self, config: ConfigDict, words: WordList, classes: ClassList):
        super().__init__(config, words, classes)
        self.net = build_net(config, num_queries=0)
        held_out = set(classes.groups.get("held_out", ()))
        trained = [k for k in range(len(classes)) if k not in held_out]
        if not trained:
            raise UserError("lseg: the training data has no class outside of the group 'held_out'")
        self.class_names = [classes.display(k) for k in trained]
        self.class_row = np.full(len(classes) + 1, -1, np.int32)  # the last entry maps -1, void, to -1
        self.class_row[trained] = np.arange(len(trained))

    def loss(self, variables: Variables, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Aux]:
        """Computes the mean cross-entropy over labelled pixels of cos(F_z, class name)/τ, on the labels' grid."""
        network = in_parts(self._classify, self.config.get("accumulate", 1))
        _, (total, correct, count), mutated = network(variables, batch, rng)
        loss = total / jnp.maximum(count, 1)
        tau = bounded(variables["params"]["temperature"]["region"], *self.loss_config.temperature_bounds)
        one = jnp.ones(())
        metrics = {
            "loss": (loss, one),
            "pixel_accuracy": (correct, count),
            "region_temperature": (tau, one),
        }
        return loss, Aux(metrics, mutated)

    def _classify(
        self, variables: Variables, batch: Batch, rng: jax.Array
    ) -> tuple[None, tuple[Array, Array, Array], dict]:
        """Computes for some images the sum of the loss, correct and labelled pixels, and the updated collections."""
        out, mutated = apply_net(self.net, variables, batch, rng)
        params = variables["params"]
        names = self.text.encode(params["text"], self.class_names)
        tau = bounded(params["temperature"]["region"], *self.loss_config.temperature_bounds)
        target = jnp.asarray(self.class_row)[batch["pixel_classes"]]
        logits = resize(unit(out.pixel_embed) @ names.T / tau, target.shape[1:])
        counts = (target >= 0) & batch["example_mask"][:, None, None]
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(target, 0)[..., None], -1)[..., 0]
        total, count = jnp.sum(nll * counts), counts.sum().astype(jnp.float32)
        correct = jnp.sum((logits.argmax(-1) == target) & counts).astype(jnp.float32)
        return None, (total, correct, count), mutated

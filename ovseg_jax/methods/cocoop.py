"""CoCoOp (Zhou et al. 2022; papers/000, tables 2 and 3): the context of `PromptTuning`, shifted for each image.

A small network computes one vector from an image's feature x, which is added to all M vectors of the context,
v_m(x) = v_m + W2 relu(W1 x + b1) + b2, with D/16 hidden units. Each image therefore has its own class features: the
text tower embeds B K texts in a training step, and N texts for each image in an evaluation, one image at a time.
`config.loss` is that of `PromptTuning`, with the same sampled classes for all images; the authors take all classes
(`sample=0`) and one image per step.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from etils import epath
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from ovseg_jax.config import keys
from ovseg_jax.errors import UserError
from ovseg_jax.kernels.all_pairs import over_batch, varying
from ovseg_jax.kernels.sampled_softmax import sampled_softmax
from ovseg_jax.methods.prompt_tuning import PromptTuning
from ovseg_jax.models.linear import linear, linear_init
from ovseg_jax.parallel.sharding import active_batch_axes
from ovseg_jax.protocols import Aux, Batch, Text, Variables
from ovseg_jax.towers.clip import SPACE
from ovseg_jax.towers.prompt import likely_size
from ovseg_jax.vocab.classes import ClassList
from ovseg_jax.vocab.words import WordList


class CoCoOp(PromptTuning):
    """A method that trains a context, and its shift by the image, for frozen towers; see `PromptTuning`.

    Raises:
      UserError: a value in the config is invalid.
    """

    text_per_image = True

    @classmethod
    def keys(cls, config: ConfigDict) -> dict[str, dict[str, bool]]:
        """Returns the method's own keys in each section, and whether each has an effect, see `experiment.keys`."""
        found = super().keys(config)
        return {**found, "prompt": found["prompt"] | keys("specific", False)}

    def __init__(self, config: ConfigDict, words: WordList, classes: ClassList):
        super().__init__(config, words, classes)
        if self.layout.specific:
            raise UserError("CoCoOp has one context for all classes: set prompt.specific=False")

    def init(self, rng: jax.Array) -> Variables:
        """Creates `params` {"prompt": {"context" [1 M d]}, "meta": {"hidden", "out"}}, and `towers`."""
        rng, hidden_rng, out_rng = jax.random.split(rng, 3)
        variables = super().init(rng)
        hidden = max(1, self.clip.dim // 16)
        meta = {
            "hidden": linear_init(hidden_rng, self.clip.dim, hidden),
            "out": linear_init(out_rng, hidden, self.clip.text.width),
        }
        return {**variables, "params": {**variables["params"], "meta": meta}}

    def contexts(self, variables: Variables, image: Float[Array, "b d"]) -> Float[Array, "b m e"]:
        """Computes the context of each image, [b M d]."""
        params = variables["params"]
        shift = linear(params["meta"]["out"], jax.nn.relu(linear(params["meta"]["hidden"], image)))
        return params["prompt"]["context"] + shift[:, None]

    def loss(self, variables: Variables, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Aux]:
        """Computes eq. 4 of papers/000 with eq. 5, or eq. 2 if `sample` is 0; the mean over the images."""
        tokens = self.table[0]
        image = self._features(variables, batch, rng)
        valid, labels = batch["example_mask"], jnp.asarray(self.place)[batch["label"]]
        log_weights, share = self._proposal(variables, image, valid)
        axes = active_batch_axes()

        def encode(p, tokens_):
            size = likely_size(tokens.length, len(tokens_.length), share)
            return self._encode(p[0], p[1], tokens_, size, may_exceed=True)

        def local(contexts, image, labels, valid, rest):
            weights, key, scale, log_weights = rest
            weights = varying(weights, axes)

            @jax.checkpoint
            def of_image(x):
                context, image, label, valid = (part[None] for part in x)
                return sampled_softmax(
                    encode,
                    ({"context": context}, weights),
                    tokens,
                    image,
                    label,
                    valid,
                    key,
                    scale,
                    sample=self.sample or len(self.names),
                    correction=self.correction,
                    log_weights=log_weights,
                )

            out = jax.lax.map(of_image, (contexts, image, labels, valid))
            out = jax.tree.map(lambda x: x.sum(0), out)
            return jax.lax.psum(out, axes) if axes else out

        batched = self.contexts(variables, image), image, labels, valid
        rest = {"text": variables["towers"]["text"]}, rng, self.logit_scale(variables), log_weights
        out = over_batch(local, axes, batched, rest)
        loss = out.loss / jnp.maximum(out.pairs, 1)
        return loss, Aux({"loss": (out.loss, out.pairs), "accuracy": (out.correct, out.pairs)}, {})

    def embed_text_for(self, variables: Variables, texts: Sequence[str], image: Float[Array, " d"]) -> Text:
        """Embeds class names in the prompt of one image, given by its feature, as unit vectors. Jittable."""
        context = self.contexts(variables, image[None])
        return {SPACE: self.clip.embed_names(variables["towers"], context, self.layout, self._tokens(texts))}

    def embed_text(self, variables: Variables, texts: Sequence[str]) -> Text:
        """Raises a UserError, since there are no class features without an image.

        Raises:
          UserError: always.
        """
        raise UserError(
            "CoCoOp's class features depend on the image: it can be scored, but not exported, drawn or used for regions"
        )

    def artifacts(self, variables: Variables) -> dict[str, Callable[[epath.Path], None]]:
        """Returns no files, since the context is not usable without the images."""
        return {}

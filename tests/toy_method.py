"""A whole method in one short file: masks by k-means, word vectors, a void embedding; for tests of the contracts."""

import jax
import jax.numpy as jnp
import numpy as np

from ovseg_jax.kernels.unit import unit
from ovseg_jax.protocols import Aux, Prediction, RegionScores, Segmenting, Trainable
from ovseg_jax.towers.vocabulary import counted_words
from ovseg_jax.vocab.phrases import word_ids

CLUSTERS, STRIDE, DIM, SCALE = 6, 4, 16, 10.0


class Toy(Trainable, Segmenting):
    modes = ("predicted",)
    fields = classmethod(lambda cls, config: ("image", "words"))
    vocabulary = classmethod(lambda cls, config, source: counted_words(config.data, source).words)

    def __init__(self, config, words, classes):
        self.words = words
        self.index = {word: i for i, word in enumerate(words.words)}

    def init(self, rng):
        rows = jax.random.split(rng, 3)
        shapes = dict(table=(len(self.words.words), DIM), image=(5, DIM), void=(DIM,))
        return {
            "params": {k: jax.random.normal(r, s) for (k, s), r in zip(shapes.items(), rows, strict=True)}
        }

    def regions(self, params, image, image_size):
        """Masks [B K h w] and unit vectors [B K D] of clusters of colour and place, in the image alone."""
        b, side = image.shape[0], image.shape[1] // STRIDE
        x = image.astype(jnp.float32).reshape(b, side, STRIDE, side, STRIDE, 3).mean((2, 4)) / 255
        place = jnp.stack(jnp.meshgrid(*2 * [jnp.linspace(0, 0.5, side)], indexing="ij"), -1)
        x = jnp.concatenate([x, jnp.broadcast_to(place, (b, side, side, 2))], -1).reshape(b, -1, 5)
        cell = jnp.arange(side) * STRIDE
        inside = (cell < image_size[:, :1])[:, :, None] & (cell < image_size[:, 1:])[:, None]
        inside = inside.reshape(b, -1, 1)
        centres = x[:, jnp.linspace(0, side * side - 1, CLUSTERS).astype(int)]
        for _ in range(5):
            near = jnp.square(x[:, :, None] - centres[:, None]).sum(-1)
            own = jax.nn.one_hot(near.argmin(-1), CLUSTERS) * inside
            total = own.sum(1)[..., None]
            centres = jnp.where(
                total > 0, jnp.einsum("bpk,bpc->bkc", own, x) / jnp.maximum(total, 1), centres
            )
        masks = jnp.moveaxis(own, 1, 2).reshape(b, CLUSTERS, side, side)
        return masks, unit((centres - 0.5) @ params["image"])

    def loss(self, variables, batch, rng):
        """Each word of a caption wants a region of its image that is not void, more than it wants other images."""
        params = variables["params"]
        _, regions = self.regions(params, batch["image"], batch["image_size"])
        words = unit(params["table"])[batch["word_ids"]]
        solid = jax.nn.sigmoid(-SCALE * regions @ unit(params["void"]))
        best = (jnp.einsum("ikd,jwd->ijkw", regions, words) * solid[:, None, :, None]).max(2)
        valid = batch["word_valid"] & batch["example_mask"][:, None]
        score = SCALE * (best * valid).sum(-1) / jnp.maximum(valid.sum(-1), 1)
        score = jnp.where(batch["example_mask"], score, -1e9)
        each = -jnp.diagonal(jax.nn.log_softmax(score)) * batch["example_mask"]
        total, count = each.sum(), batch["example_mask"].sum().astype(jnp.float32)
        return total / jnp.maximum(count, 1), Aux({"loss": (total, count)}, {})

    def predict(self, variables, image, image_size):
        masks, regions = self.regions(variables["params"], image, image_size)
        void = regions @ unit(variables["params"]["void"])
        pixels = jnp.einsum("bkhw,bkd->bhwd", masks, regions)
        return Prediction(20 * masks - 10, {"toy": regions}, {"toy": pixels}, void)

    def embed_text(self, variables, texts):
        table = unit(variables["params"]["table"])
        rows = [table[np.asarray(word_ids(text, self.index))].sum(0) for text in texts]
        return {"toy": unit(jnp.stack(rows))}

    def score_regions(self, prediction, text, vocabulary):
        logits = jnp.concatenate([text["toy"] @ prediction.regions["toy"].T, prediction.void[None]])
        share = jax.nn.softmax(SCALE * logits, 0)
        return RegionScores(share[:-1], share[-1])

"""A method that sees six colours: enough to check whatever stands around a real one."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ovseg_jax.errors import UserError
from ovseg_jax.protocols import Classifier, Prediction, Segmenting, Trainable
from ovseg_jax.vocab.classes import parse_labels

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 200, 40),
    "blue": (40, 60, 220),
    "yellow": (230, 220, 40),
    "white": (250, 250, 250),
    "black": (5, 5, 5),
}
CLASSES = parse_labels(";".join(COLOURS))


class ColourMethod(Trainable, Segmenting):
    """A proposal for each colour, which covers its pixels; its embedding is that colour's axis."""

    def __init__(self, stride: int = 1, masks: bool = True):
        self.stride, self.masks, self.embedded = stride, masks, 0

    def init(self, rng):
        return {"params": {"colours": jnp.array(list(COLOURS.values()), jnp.float32)}}

    def predict(self, variables, image, image_size):
        s, colours = self.stride, variables["params"]["colours"]
        b, h, w, _ = image.shape
        x = image.astype(jnp.float32).reshape(b, h // s, s, w // s, s, 3).mean((2, 4))
        distance = jnp.linalg.norm(x[..., None, :] - colours, axis=-1)
        inside = jnp.arange(h // s) * s < image_size[:, :1]
        inside = inside[:, :, None] & (jnp.arange(w // s) * s < image_size[:, 1:])[:, None]
        logits = jnp.where(inside[..., None], 6 - distance / 8, -9)
        hot = jnp.eye(len(COLOURS))[distance.argmin(-1)]
        if not self.masks:
            return Prediction(None, {}, {"colour": 3 * hot})
        region = jnp.broadcast_to(jnp.eye(len(COLOURS)), (b, len(COLOURS), len(COLOURS)))
        return Prediction(jnp.moveaxis(logits, -1, 1), {"colour": region}, {"colour": 3 * hot})

    def embed_text(self, variables, texts: Sequence[str]):
        self.embedded += 1
        rows = np.zeros((len(texts), len(COLOURS)), np.float32)
        for i, text in enumerate(texts):
            for word in text.split():
                if word not in COLOURS:
                    raise UserError(f"label '{text}': this model's text side has never seen '{word}'")
                rows[i, list(COLOURS).index(word)] = 1
        return {"colour": jnp.asarray(rows / np.linalg.norm(rows, axis=-1, keepdims=True))}


class ColourClassifier(Trainable, Classifier):
    """Knows an image by the share of each colour in it; its own prompt takes green for blue."""

    def init(self, rng):
        return ColourMethod().init(rng)

    def embed_image(self, variables, image):
        distance = jnp.linalg.norm(image[..., None, :] - variables["params"]["colours"], axis=-1)
        share = jnp.eye(len(COLOURS))[distance.argmin(-1)].mean((1, 2))
        return share / jnp.linalg.norm(share, axis=-1, keepdims=True)

    def embed_text(self, variables, texts: Sequence[str]):
        return self.embed_phrases(variables, [text.replace("green", "blue") for text in texts])

    def embed_phrases(self, variables, texts: Sequence[str]):
        """Colours of the words; other words turn the vector a little, each its own way."""
        known = {word: np.eye(len(COLOURS))[k] for k, word in enumerate(COLOURS)}
        noise = lambda word: 0.02 * np.random.default_rng(list(word.encode())).normal(size=len(COLOURS))
        rows = np.stack(
            [sum(known.get(word, noise(word)) for word in text.strip(".").split()) for text in texts]
        )
        return {"colour": jnp.asarray(rows / np.linalg.norm(rows, axis=-1, keepdims=True), jnp.float32)}

    def logit_scale(self, variables):
        return jnp.float32(100)


class Masks(ColourMethod):
    """The method as a run builds it, of a config, words and classes."""

    def __init__(self, *_):
        super().__init__()


class Pixels(ColourMethod):
    """The same without proposals."""

    def __init__(self, *_):
        super().__init__(masks=False)


class Colours(ColourClassifier):
    """The classifier as a run builds it."""

    def __init__(self, *_):
        super().__init__()


FAKES = {"colours": Colours, "masks": Masks, "pixels": Pixels}


def config(size: int = 32) -> ConfigDict:
    return ConfigDict({"data": {"image_size": size}})


def blocks(height: int, width: int, *rows: Sequence[str]) -> np.ndarray:
    """An image of colour blocks."""
    grid = np.array([[COLOURS[c] for c in row] for row in rows], np.uint8)
    y, x = np.arange(height) * len(rows) // height, np.arange(width) * len(rows[0]) // width
    return grid[y][:, x]

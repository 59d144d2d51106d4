"""Retrieval of a method's images and captions, against a ranking by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ovseg_jax.errors import UserError
from ovseg_jax.evals.retrieval import RetrievalEvaluator
from ovseg_jax.parallel.sharding import make_mesh
from ovseg_jax.protocols import Classifier
from ovseg_jax.vocab.classes import ClassList
from tests.scoring.test_retrieval import reference

CLASSES = ClassList((), (), ())


class Colours(Classifier):
    """Embeds an image by its first pixel, and a text by the numbers in it."""

    def embed_image(self, variables, image):
        return image[:, 0, 0].astype(jnp.float32) @ variables["w"]

    def embed_phrases(self, variables, texts):
        return {"rgb": jnp.array([[float(x) for x in text.split()] for text in texts]) @ variables["w"]}


def batches(pixels, size):
    """Batches of `size`, the last with padding."""
    for first in range(0, len(pixels), size):
        own = pixels[first : first + size]
        image = np.zeros((size, 2, 2, 3), np.uint8)
        image[: len(own)] = own[:, None, None]
        yield {"image": image, "example_mask": np.arange(size) < len(own)}


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("most", [0, 2])
def test_recalls_are_those_of_a_ranking(devices, most):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (22, 3)).astype(np.uint8)
    told = [[pixel + rng.normal(0, 60, 3) for _ in range(k % 4)] for k, pixel in enumerate(pixels)]
    captions = [[" ".join(map(str, text)) for text in own] for own in told]
    mesh = make_mesh({"data": -1}, jax.devices()[:devices])
    evaluator = RetrievalEvaluator(
        "r",
        Colours(),
        CLASSES,
        lambda: batches(pixels, 8),
        mesh,
        captions=lambda: captions,
        max_captions=most,
    )
    found = evaluator.run({"w": jnp.eye(3)})
    kept = [own[: most or None] for own in told]
    owner = np.repeat(np.arange(22), [len(own) for own in kept])
    texts = np.array([text for own in kept for text in own])
    want = reference(np.float64(pixels) @ texts.T, owner)
    for way, own in want.items():
        for key, value in own.items():
            assert found[f"{way.replace(' ', '_')}_{key}"] == value
    assert found["R@1"] == pytest.approx(sum(float(own["R@1"].expected) for own in want.values()) / 2)
    assert 0 < found["text_to_image_R@1"] < found["text_to_image_R@5"] < 100


def test_captions_are_needed():
    mesh = make_mesh({"data": -1}, jax.devices()[:1])
    make = lambda **own: RetrievalEvaluator("r", Colours(), CLASSES, lambda: iter(()), mesh, **own)
    with pytest.raises(UserError, match=r"evals\.r: no image of the source has a caption"):
        make(captions=lambda: [[], []]).run({"w": jnp.eye(3)})
    with pytest.raises(UserError, match=r"evals\.r\.max_captions=-1 is less than 0"):
        make(captions=list, max_captions=-1)

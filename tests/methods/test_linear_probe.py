"""The probe against softmax regression in NumPy's float64, and as a `Classifier` of unit vectors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ovseg_jax.errors import UserError
from ovseg_jax.methods import build
from ovseg_jax.protocols import Classifier
from ovseg_jax.towers import features
from ovseg_jax.towers.features import class_features
from ovseg_jax.vocab.classes import ClassList
from ovseg_jax.vocab.words import WordList
from tests.methods import torch_clip

WORDS = WordList("cat kitten dog sky emu sea".split())
# Nobody has seen an emu.
CLASSES = ClassList(
    (("cat", "kitten"), ("dog",), ("emu",), ("sky",)), (0, 1, 2, 3), (True,) * 4, {}, (9, 9, 0, 9)
)
ROWS = np.array([0, 1, -1, 2])
D = torch_clip.D


@pytest.fixture(scope="module")
def method():
    return build(torch_clip.config("linear_probe", {}), WORDS, CLASSES)


@pytest.fixture(scope="module")
def variables(method):
    rng = np.random.default_rng(0)
    kernel, bias = (rng.normal(0, 0.3, shape).astype(np.float32) for shape in ((D, 3), (3,)))
    params = {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}
    return {**torch_clip.draw(method), "params": params}


def drawn(seed=1, count=8):
    x = np.random.default_rng(seed).normal(size=(count, D))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def batch():
    return {
        "feature": jnp.asarray(drawn(), jnp.float32),
        "label": jnp.asarray([0, 1, 3, 0, 3, 3, 1, 0], jnp.int32),
        "example_mask": jnp.arange(8) != 3,
    }


def test_loss_and_gradients(method, variables):
    loss, grad = torch_clip.value_and_grad(method, variables, batch())
    x, mask = 10 * drawn(), np.arange(8) != 3
    kernel, bias = (np.float64(variables["params"][key]) for key in ("kernel", "bias"))
    score = np.exp(x @ kernel + bias)
    share, truth = score / score.sum(1, keepdims=True), np.eye(3)[ROWS[np.asarray(batch()["label"])]]
    torch_clip.close(loss, -np.log(share[truth > 0])[mask].mean())
    error = (share - truth)[mask] / mask.sum()
    torch_clip.close(grad["kernel"], x[mask].T @ error)
    torch_clip.close(grad["bias"], error.sum(0))


def test_images_and_their_features_are_the_same(method, variables):
    images = torch_clip.batch(2)
    given = {key: images[key] for key in ("label", "example_mask")}
    whole = method.embed_image(variables, images["image"])
    loss, _ = method.loss(variables, images, jax.random.key(0))
    for feature in (whole, method.clip.embed_image(variables["towers"], images["image"])):
        torch_clip.close(method.loss(variables, {**given, "feature": feature}, jax.random.key(0))[0], loss)


def test_a_classifier_with_the_logits_of_the_probe(method, variables):
    assert isinstance(method, Classifier) and not method.unit_norm
    image = torch_clip.batch(2)["image"]
    see = method.embed_image(variables, image)
    np.testing.assert_allclose(np.linalg.norm(see, axis=1), 1, rtol=1e-5)
    x = 10 * np.float64(see)
    logits = x @ np.float64(variables["params"]["kernel"]) + np.float64(variables["params"]["bias"])
    scores = method.score_images(see, method.embed_text(variables, ["dog", "kitten", "sky", "cat"]))
    torch_clip.close(method.logit_scale(variables) * scores, logits[:, [1, 0, 2, 0]])
    # A class without examples is never an answer.
    assert (method.score_images(see, method.embed_text(variables, ["cat", "emu"]))[:, 1] < -1e8).all()
    # A hand-written prompt keeps its ranking.
    hard = method.embed_phrases(variables, ["cat", "dog sky"])
    plain = method.clip.embed_phrases(variables["towers"], ["cat", "dog sky"])
    torch_clip.close(method.score_images(see, hard), x / 10 @ np.float64(plain).T)


def test_it_starts_undecided_and_learns():
    classes = ClassList(tuple((n,) for n in ("cat", "dog", "sky", "sea")), (0, 1, 2, 3), (True,) * 4)
    method = build(torch_clip.config("linear_probe", {}), WORDS, classes)
    variables = torch_clip.draw(method)
    # Only these are compiled.
    params = jax.jit(lambda key: method.init(key)["params"])(jax.random.key(0))
    variables = {**variables, "params": params}
    losses = torch_clip.losses(method, variables)
    assert losses[0] == pytest.approx(np.log(4), rel=1e-4) and losses[-1] < 0.5 * losses[0]


def test_classes_that_share_a_name_are_told_apart(monkeypatch):
    monkeypatch.setattr(features, "TEXT_CHUNK", 2)
    names = (("crane", "bird"), ("dog",), ("crane",), ("dog", "hound"))
    method = build(torch_clip.config("linear_probe", {}), WORDS, ClassList(names, (0, 1, 2, 3), (True,) * 4))
    variables = torch_clip.draw(method)
    embed = lambda names: np.asarray(method.embed_text(variables, names)["row"])
    every = embed(["crane", "bird", "dog", "crane", "dog", "hound"])
    first = embed(["crane", "dog", "crane", "dog"])
    np.testing.assert_array_equal(every, first[np.array([0, 0, 1, 2, 3, 3])])
    flat = [name for of_class in names for name in of_class]
    np.testing.assert_array_equal(class_features(method, variables, flat)["row"], every)
    assert len(np.unique(first, axis=0)) == 4
    np.testing.assert_array_equal(embed(["hound", "bird"]), first[np.array([3, 0])])
    with pytest.raises(UserError, match="2 classes called 'crane'"):
        method.embed_text(variables, ["crane"])


@pytest.mark.parametrize("names,said", [(["dog", "sea"], "none is called 'sea'"), ([], "no class names")])
def test_names_that_cannot_be(method, variables, names, said):
    with pytest.raises(UserError, match=said):
        method.embed_text(variables, names)

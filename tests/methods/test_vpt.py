"""Deep visual prompts against open_clip's image tower with tokens put into it one block at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ovseg_jax.errors import UserError
from ovseg_jax.methods import build
from ovseg_jax.models.vit import ViT
from ovseg_jax.vocab.classes import ClassList
from ovseg_jax.vocab.words import WordList
from tests import reference
from tests.methods import torch_clip

WORDS = WordList("a photo of big_dog cat dog red fox sky".split())
CLASSES = ClassList(tuple((name,) for name in ("cat", "dog", "red_fox", "sky")), (0, 1, 2, 3), (True,) * 4)


def make(depth=3, **changes):
    return build(torch_clip.config("vpt", dict(length=2, depth=depth), **changes), WORDS, CLASSES)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_loss_and_gradients(depth):
    method = make(depth)
    model, towers = torch_clip.make(method.clip)
    tokens = np.random.default_rng(0).normal(size=(depth, 2, 32)).astype(np.float32)
    params, batch = {"prompt": {"image": jnp.asarray(tokens)}}, torch_clip.batch(4)
    hard = np.random.default_rng(1).normal(size=(4, torch_clip.D)).astype(np.float32)
    hard /= np.linalg.norm(hard, axis=1, keepdims=True)
    variables = {"params": params, "towers": {**towers, "hard": jnp.asarray(hard)}}
    loss, grad = torch_clip.value_and_grad(method, variables, batch)

    own = torch_clip.tensor(tokens)
    seen = torch_clip.see(model, batch["image"], own)
    expected = torch_clip.cross_entropy(torch_clip.SCALE * seen @ torch_clip.tensor(hard).T, batch)
    expected.backward()
    torch_clip.close(loss, expected)
    torch_clip.close(grad["prompt"]["image"], own.grad)
    torch_clip.close(method.embed_image(variables, batch["image"]), seen)


def test_other_outputs_hold_no_prompt():
    tower = ViT(
        patch=8, width=16, depth=2, heads=2, mlp_dim=16, grid=(2, 2), taps=(0, 1), cls="none", pool="mean"
    )
    x, prompts = torch_clip.batch(4)["image"][:, :, :8] / 255, jnp.ones((2, 3, 16))
    variables = jax.tree.map(jnp.asarray, reference.init(tower, x))
    out = jax.jit(lambda x: tower.apply(variables, x, prompts=prompts))(x)
    assert out.tokens.shape == out.taps[0].shape == out.taps[1].shape == (8, 2, 1, 16)
    torch_clip.close(out.pooled, out.tokens.mean((1, 2)))


def test_classes_are_a_photo_of_them_and_tokens_learn():
    method = make()
    variables = jax.jit(method.init)(jax.random.key(0))
    expected = method.embed_phrases(
        variables, [f"a photo of a {n}." for n in ("cat", "dog", "red fox", "sky")]
    )
    np.testing.assert_allclose(variables["towers"]["hard"], expected["clip"], atol=1e-6)
    losses = torch_clip.losses(method, variables, rate=0.1)
    assert losses[-1] < 0.8 * losses[0]


def test_parts_of_a_batch_give_the_same():
    whole, parts = make(), make(accumulate=2)
    variables, batch = torch_clip.draw(whole), torch_clip.batch(4)
    for a, b in zip(
        *(jax.tree.leaves(torch_clip.value_and_grad(m, variables, batch)) for m in (whole, parts)),
        strict=True,
    ):
        torch_clip.close(b, a)


@pytest.mark.parametrize(
    "changes,said",
    [
        ({"towers.image": dict(name="small", width=16, levels=2, embed_dim=torch_clip.D)}, "'small' is none"),
        ({"prompt.depth": 4}, "between 1 and the 3"),
        ({"prompt.length": 0}, "is less than 1"),
        ({"data.cache_features": 2}, "cache_features"),
    ],
)
def test_what_cannot_be(changes, said):
    image = changes.pop("towers.image", None)
    config = torch_clip.config("vpt", dict(length=2, depth=3), **changes)
    if image:
        config.towers.image = image
    with pytest.raises(UserError, match=said):
        build(config, WORDS, CLASSES)
